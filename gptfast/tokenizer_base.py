"""What GPT-1's two tokenizers share, as HuggingFace has it: special tokens, batches, padding, truncation, files."""

import dataclasses
import logging
import os
import re
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .tokenizer_files import (
    ADDED_NAME,
    ALL_NAMES,
    CONFIG_NAME,
    MERGES_NAME,
    SPECIAL_NAME,
    SPECIAL_TOKENS,
    TOKENIZER_NAME,
    VOCAB_NAME,
    AddedToken,
    Merges,
    Vocab,
    check_settings,
    find_vocabulary,
    prefixed,
    read_settings,
    write_json,
)

logger = logging.getLogger(__name__)

NO_LIMIT = int(1e30)  # HuggingFace's model_max_length where none is known; it takes all above 1e20 for that
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_PADDINGS = ("longest", "max_length", "do_not_pad")
_CLEAN_UP = re.compile(r" (?=[.?!,])| (?=n't|'m|'s|'ve|'re)")

Tokenizer = TypeVar("Tokenizer", bound="TokenizerBase")


class _SpecialToken:
    """`tokenizer.pad_token` and its like: a string or None. Setting one does not add it to the vocabulary."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: "TokenizerBase | None", owner: type | None = None) -> Any:
        return self if tokenizer is None else tokenizer._special[self.name]

    def __set__(self, tokenizer: "TokenizerBase", token: str | AddedToken | None) -> None:
        tokenizer._special[self.name] = None if token is None else AddedToken.of(token).content


class _SpecialTokenId:
    """`tokenizer.pad_token_id` and its like: an int or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    def __get__(self, tokenizer: "TokenizerBase | None", owner: type | None = None) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._special[self.name]
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: "TokenizerBase", index: int | None) -> None:
        tokenizer._special[self.name] = None if index is None else tokenizer.convert_ids_to_tokens(index)


class Span(NamedTuple):
    """Characters or tokens from ``start`` up to, not with, ``end``."""

    start: int
    end: int

    @classmethod
    def of(cls, pair: tuple[int, int] | None) -> "Span | None":
        return None if pair is None else cls(*pair)


class BatchEncoding(UserDict):
    """A dict of what the model takes, also by attribute; `model(**tokenizer(text, return_tensors="pt"))`.

    Args:
        data: name to list (one sequence), list of lists (a batch), or tensor.
        encodings: the Rust library's record of each sequence, from the fast tokenizer only.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, encodings: Sequence[Any] | None = None):
        super().__init__(data or {})
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "encodings") or name not in self.data:  # "data" is absent while unpickling
            raise AttributeError(f"BatchEncoding has no attribute {name!r}")
        return self.data[name]

    def __getitem__(self, key: str | int) -> Any:
        """A column by its name; by a number, the Rust library's record of that row."""
        return self._encoding(key) if isinstance(key, int) else self.data[key]

    @property
    def is_fast(self) -> bool:
        return self.encodings is not None

    def _encoding(self, index: int) -> Any:
        if self.encodings is None:
            raise ValueError("only OpenAIGPTTokenizerFast knows where tokens come from")
        return self.encodings[index]

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self._encoding(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the index of its word, counted anew in the second of a pair."""
        return self._encoding(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token 0 or 1: first or second of a pair."""
        return self._encoding(batch_index).sequence_ids

    # With one index, as for a single text, it is the character's, token's or word's in row 0.

    def _at(self, row_or_index: int, index: int | None) -> tuple[Any, int]:
        return (self._encoding(0), row_or_index) if index is None else (self._encoding(row_or_index), index)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token of a character; None for white space."""
        encoding, index = self._at(batch_or_char_index, char_index)
        return encoding.char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word of a character; None for white space."""
        encoding, index = self._at(batch_or_char_index, char_index)
        return encoding.char_to_word(index, sequence_index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> Span | None:
        """Where in its text a token stands; None for padding."""
        encoding, index = self._at(batch_or_token_index, token_index)
        return Span.of(encoding.token_to_chars(index))

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The word of a token; None for padding."""
        encoding, index = self._at(batch_or_token_index, token_index)
        return encoding.token_to_word(index)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> Span | None:
        """Where in its text a word stands."""
        encoding, index = self._at(batch_or_word_index, word_index)
        return Span.of(encoding.word_to_chars(index, sequence_index))

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> Span | None:
        """The tokens of a word."""
        encoding, index = self._at(batch_or_word_index, word_index)
        return Span.of(encoding.word_to_tokens(index, sequence_index))

    def convert_to_tensors(self, return_tensors: str | None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Turn every list into a torch ("pt") or numpy ("np") array, int64, in place."""
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} must be 'pt', 'np' or None")
        for name, value in self.data.items() if return_tensors else ():
            try:
                array = np.asarray([value] if prepend_batch_axis else value)
            except ValueError as error:
                raise ValueError(
                    f"{name!r} has rows of different lengths and cannot become a tensor: "
                    "ask for padding=True, and truncation=True where they may be too long"
                ) from error
            self.data[name] = array if array.size else array.astype(np.int64)
        if return_tensors == "pt":
            import torch

            self.data = {name: torch.from_numpy(array) for name, array in self.data.items()}
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """Move the torch tensors to `device`, in place."""
        for name, value in self.data.items():
            if hasattr(value, "to"):
                self.data[name] = value.to(device=device, non_blocking=non_blocking)
        return self


class TokenizerBase(ABC):
    """Ids, special tokens, batches and files; a subclass turns text into tokens.

    Args:
        vocab: token to id. merges: the pairs of the byte-pair encoding, in rank order.
        unk_token, bos_token, …, additional_special_tokens: those not in the vocabulary are added at its end.
        model_max_length: the length that truncation=True and padding="max_length" mean.
        padding_side, truncation_side: "right" or "left".
        clean_up_tokenization_spaces: `decode` closes the spaces before punctuation and contractions.
        added_tokens_decoder: id to AddedToken, as a saved tokenizer has it.
        name_or_path: where it came from; for the reader.
    """

    model_input_names = ("input_ids", "attention_mask")
    pad_token_type_id = 0
    do_lower_case = True
    is_fast = False

    bos_token, bos_token_id = _SpecialToken(), _SpecialTokenId()
    eos_token, eos_token_id = _SpecialToken(), _SpecialTokenId()
    unk_token, unk_token_id = _SpecialToken(), _SpecialTokenId()
    sep_token, sep_token_id = _SpecialToken(), _SpecialTokenId()
    pad_token, pad_token_id = _SpecialToken(), _SpecialTokenId()
    cls_token, cls_token_id = _SpecialToken(), _SpecialTokenId()
    mask_token, mask_token_id = _SpecialToken(), _SpecialTokenId()

    def __init__(
        self,
        vocab: Vocab,
        merges: Merges,
        *,
        unk_token: Any = "<unk>",
        bos_token: Any = None,
        eos_token: Any = None,
        sep_token: Any = None,
        pad_token: Any = None,
        cls_token: Any = None,
        mask_token: Any = None,
        additional_special_tokens: Sequence[Any] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        name_or_path: str = "",
    ):
        check_settings(
            {"padding_side": padding_side, "truncation_side": truncation_side, "model_max_length": model_max_length}
        )
        self.encoder = vocab
        self.decoder = {index: token for token, index in vocab.items()}
        self.merges = merges
        self.model_max_length = NO_LIMIT if model_max_length is None else model_max_length
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.name_or_path = name_or_path
        self._warned: set[str] = set()
        self._added: dict[int, AddedToken] = {}
        self._added_ids: Vocab = {}
        given = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        extra = list(additional_special_tokens or ())
        contents = (None if token is None else AddedToken.of(token).content for token in given)
        self._special = dict(zip(SPECIAL_TOKENS, contents, strict=True))
        self.additional_special_tokens = [AddedToken.of(token).content for token in extra]

        for index, token in sorted((int(i), AddedToken.of(token)) for i, token in (added_tokens_decoder or {}).items()):
            self._register(self._stored(token), index)
        self.add_tokens([token for token in (*given, *extra) if token is not None], special_tokens=True)

    # --- text to tokens: the subclass

    @abstractmethod
    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`, before they become ids."""

    @abstractmethod
    def _encode_rows(
        self,
        texts: list[Any],
        pairs: list[Any] | None,
        is_split_into_words: bool,
        add_special_tokens: bool,
        truncation: str,
        length: int,
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Encode, truncate and join: the columns of each row, and the Rust library's records or nothing."""

    @abstractmethod
    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of one sequence of ids: a list, an array, a tensor, or one id."""

    @abstractmethod
    def convert_tokens_to_string(self, tokens: list[str]) -> str: ...

    # --- the vocabulary

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary without added tokens; `len(tokenizer)` counts those too."""
        return len(self.encoder)

    def get_vocab(self) -> Vocab:
        return {**self.encoder, **self._added_ids}

    def __len__(self) -> int:
        return len(self.encoder) + sum(token not in self.encoder for token in self._added_ids)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"special_tokens={self.special_tokens_map}, model_max_length={self.model_max_length})"
        )

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """An int for a string, a list for a list; unk_token's id for what is not in the vocabulary."""
        if isinstance(tokens, str):
            index = self._id_of(tokens)
            return self._id_of(self.unk_token or "") if index is None else index
        ids = {token: self.convert_tokens_to_ids(token) for token in set(tokens)}
        return [ids[token] for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """A string for an int, a list for a list; unk_token for an id that is not in the vocabulary."""
        ids = to_list(ids)
        if isinstance(ids, int):
            return self._added[ids].content if ids in self._added else self.decoder.get(ids, self.unk_token)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.convert_ids_to_tokens(int(index)) for index in ids if int(index) not in skipped]

    def _id_of(self, token: str) -> int | None:
        return self._added_ids.get(token, self.encoder.get(token))

    # --- special and added tokens

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        tokens: dict[str, Any] = {name: token for name, token in self._special.items() if token is not None}
        extra = {"additional_special_tokens": list(self.additional_special_tokens)}
        return {**tokens, **(extra if self.additional_special_tokens else {})}

    @property
    def all_special_tokens(self) -> list[str]:
        named = (token for token in self._special.values() if token is not None)
        return list(dict.fromkeys((*named, *self.additional_special_tokens)))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.additional_special_tokens)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self._added.items()))

    @property
    def added_tokens_encoder(self) -> Vocab:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> Vocab:
        return self.added_tokens_encoder

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add a token or a list of them (str or AddedToken) behind the vocabulary.

        Returns:
            how many were new; resize the model's embeddings by as many.
        """
        tokens = list(new_tokens) if isinstance(new_tokens, (list, tuple)) else [new_tokens] if new_tokens else []
        size_before = len(self)
        for item in tokens:
            if isinstance(item, str) and (not item or item in self._added_ids):
                continue
            token = self._stored(AddedToken.of(item, special=special_tokens or item in self.all_special_tokens))
            if token.special and token.content not in self.all_special_tokens:
                self.additional_special_tokens.append(token.content)
            index = self._id_of(token.content)
            self._register(token, len(self) if index is None else index)
        return len(self) - size_before

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Set pad_token, bos_token, … and additional_special_tokens, adding what the vocabulary lacks.

        Returns:
            how many were new.
        """
        accepted = (*SPECIAL_TOKENS, "additional_special_tokens", "extra_special_tokens")
        for name in special_tokens_dict:
            if name not in accepted:
                raise ValueError(f"special_tokens_dict has {name!r}; it accepts {', '.join(accepted)}")
        added = 0
        for name, value in special_tokens_dict.items():
            if name in SPECIAL_TOKENS:
                setattr(self, name, value)
                added += self.add_tokens([AddedToken.of(value, special=True)])
                continue
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}={value!r} must be a list of str or AddedToken")
            if replace_additional_special_tokens and value:
                self.additional_special_tokens = [AddedToken.of(token).content for token in value]
            added += self.add_tokens([AddedToken.of(token, special=True) for token in value])
        return added

    def _stored(self, token: AddedToken) -> AddedToken:
        """The token as this tokenizer keeps it."""
        return token

    def _register(self, token: AddedToken, index: int) -> None:
        self._added[index] = token
        self._added_ids[token.content] = index

    # --- what GPT-1 adds around a sequence: nothing. Override the first two to add something.

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * len(token_ids_0) + [1] * len(token_ids_1 or [])

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for what `build_inputs_with_special_tokens` added, or for any special token if it has been applied."""
        if not already_has_special_tokens:
            return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))
        if token_ids_1 is not None:
            raise ValueError("token_ids_1 must be None with already_has_special_tokens=True")
        return [int(index in self.all_special_ids) for index in token_ids_0]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    # --- batches

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encode a text, a pair of texts, or a batch of either.

        Args:
            text, text_pair: a str or a list of them; with is_split_into_words a list of words or a list of such lists.
                A batch of pairs may also come as one list of pairs.
            padding: True or "longest", "max_length", or False.
            truncation: True or "longest_first", "only_first", "only_second", or False.
            max_length: for both; model_max_length where not given.
            pad_to_multiple_of: round the padded length up to a multiple.
            padding_side: instead of the tokenizer's own.
            return_tensors: "pt", "np", or None for lists. Ids are int64 [B, T]; a single text has B = 1.
            return_token_type_ids, return_special_tokens_mask, return_length: add those columns.
            return_offsets_mapping: (start, end) of each token in its text; the fast tokenizer only.
            verbose: log a sequence longer than model_max_length, once.

        Raises:
            ValueError: not text; unknown padding, truncation, return_tensors; padding without a pad_token; a
                truncation that cannot reach max_length; rows of different lengths asked for as tensors.
        """
        if stride or return_overflowing_tokens:
            raise ValueError(f"{stride=}, {return_overflowing_tokens=}: windows are not supported; slice the ids")
        if return_offsets_mapping and not self.is_fast:
            raise NotImplementedError("return_offsets_mapping needs OpenAIGPTTokenizerFast")
        length, padding, truncation = self._resolve(padding, truncation, max_length, pad_to_multiple_of)
        batched, texts, pairs = _as_batch(text, text_pair, is_split_into_words)

        rows, encodings = self._encode_rows(texts, pairs, is_split_into_words, add_special_tokens, truncation, length)
        for row in rows:
            row["length"] = len(row["input_ids"])
            if verbose and max_length is None and row["length"] > self.model_max_length:
                self._warn_once(
                    f"a sequence of {row['length']} tokens is longer than the model's {self.model_max_length}; "
                    "the model will refuse it"
                )
        wanted = {
            "input_ids": True,
            "token_type_ids": bool(return_token_type_ids),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
            "length": return_length,
        }
        rows = [{name: row[name] for name, want in wanted.items() if want} for row in rows]
        attention = return_attention_mask is None or return_attention_mask
        self._pad_rows(rows, padding, length, pad_to_multiple_of, padding_side, attention)
        for encoding, row in zip(encodings, rows, strict=False):
            side = padding_side or self.padding_side
            encoding.pad(
                len(row["input_ids"]), direction=side, pad_id=self.pad_token_id or 0, pad_token=str(self.pad_token)
            )
        names = list(rows[0]) if rows else ["input_ids", *["attention_mask"] * attention]
        columns = {name: [row[name] for row in rows] for name in names}
        output = BatchEncoding(columns if batched else rows[0], encodings if self.is_fast else None)
        return output.convert_to_tensors(return_tensors, prepend_batch_axis=not batched)

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        """The ids alone; keywords as in `__call__`."""
        return self(text, text_pair, **kwargs)["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """`__call__` by its transformers 2 name."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **kwargs: Any) -> BatchEncoding:
        """`__call__` on a list of texts, or on a list of pairs, by its transformers 2 name."""
        return self(list(batch_text_or_text_pairs), **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def _cleaned(self, text: str, clean_up: bool | None) -> str:
        clean_up = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return self.clean_up_tokenization(text) if clean_up else text

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Close the spaces before punctuation and English contractions."""
        return _CLEAN_UP.sub("", text.replace(" ' ", "'"))

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Collate encoded texts: a list of dicts, a dict of lists, or one dict. Keys it does not know stay as they are.

        Raises:
            ValueError: no input_ids, rows that differ in their keys, or what `__call__` raises for padding.
        """
        length, padding, _ = self._resolve(padding, False, max_length, pad_to_multiple_of)
        batched, rows = True, encoded_inputs
        if isinstance(encoded_inputs, Mapping):
            columns = {name: to_list(value) for name, value in encoded_inputs.items()}
            batched = any(isinstance(to_list(ids), (list, tuple)) for ids in columns.get("input_ids", ()))
            rows = [columns]
            if batched:
                rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for row in rows or [None]:
            if not isinstance(row, Mapping) or "input_ids" not in row or row.keys() != rows[0].keys():
                raise ValueError(f"encoded_inputs must be dicts with the same keys, input_ids among them: {row!r:.80}")
        rows = [{name: to_list(value) for name, value in row.items()} for row in rows]
        attention = return_attention_mask is None or return_attention_mask
        self._pad_rows(rows, padding, length, pad_to_multiple_of, padding_side, attention)
        output = BatchEncoding({name: [row[name] for row in rows] for name in rows[0]} if batched else rows[0])
        return output.convert_to_tensors(return_tensors)

    def _resolve(
        self, padding: bool | str, truncation: bool | str | None, max_length: int | None, multiple: int | None
    ) -> tuple[int, str, str]:
        """Check the arguments and resolve them: (length, one of _PADDINGS, one of _TRUNCATIONS)."""
        if truncation is None and max_length is not None and padding is False:
            self._warn_once("max_length was given without truncation: truncating to it; say truncation=True")
            truncation = True
        if isinstance(padding, bool):
            padding = "longest" if padding else "do_not_pad"
        if isinstance(truncation, bool) or truncation is None:
            truncation = "longest_first" if truncation else "do_not_truncate"
        if padding not in _PADDINGS:
            raise ValueError(f"padding={padding!r} must be True, False or one of {_PADDINGS}")
        if truncation not in _TRUNCATIONS:
            raise ValueError(f"truncation={truncation!r} must be True, False or one of {_TRUNCATIONS}")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", multiple)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive int or None")
        length = self.model_max_length if max_length is None else max_length
        if length > 1e20:
            if padding == "max_length":
                self._warn_once("padding='max_length' without max_length or model_max_length: not padding")
                padding = "do_not_pad"
            if truncation != "do_not_truncate":
                self._warn_once("truncation without max_length or model_max_length: not truncating")
                truncation = "do_not_truncate"
        if padding != "do_not_pad":
            if self.pad_token is None:
                raise ValueError(
                    f"padding={padding!r} needs a pad_token: set one (tokenizer.pad_token = tokenizer.unk_token) "
                    "or add one (tokenizer.add_special_tokens({'pad_token': '<pad>'}))"
                )
            if truncation != "do_not_truncate" and multiple and length % multiple:
                raise ValueError(f"max_length={length} must be a multiple of pad_to_multiple_of={multiple}")
        return length, padding, truncation

    def _truncated(self, n_first: int, n_second: int, length: int, truncation: str) -> tuple[int, int]:
        """How many tokens of a pair to keep so that they are at most `length` together."""
        excess = n_first + n_second - length
        if excess <= 0:
            return n_first, n_second
        if truncation == "longest_first":  # cut the longer to the shorter, then both alike
            half, odd = divmod(length, 2)
            if min(n_first, n_second) > half:
                kept = (half + odd, half)
            else:
                kept = (length - n_second, n_second) if n_first > n_second else (n_first, length - n_first)
            possible = min(kept) >= 0
        elif truncation == "only_first":
            kept = (n_first - excess, n_second)
            possible = kept[0] > 0
        else:
            kept = (n_first, n_second - excess)
            possible = kept[1] > 0
        if not possible:
            raise ValueError(f"{truncation=} cannot bring {n_first} + {n_second} tokens to a length of {length}")
        return kept

    def _pad_rows(
        self,
        rows: list[dict[str, Any]],
        padding: str,
        length: int,
        multiple: int | None,
        side: str | None,
        attention_mask: bool,
    ) -> None:
        """Add attention masks where they are missing, and pad every known column of `rows`, in place."""
        side = side or self.padding_side
        if side not in ("right", "left"):
            raise ValueError(f"padding_side={side!r} must be 'right' or 'left'")
        fill = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": self.pad_token_type_id,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }
        for row in rows if attention_mask else ():
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        if padding == "do_not_pad":
            return
        if padding == "longest":
            length = max((len(row["input_ids"]) for row in rows), default=0)
        length += -length % (multiple or 1)
        for row in rows:
            missing = length - len(row["input_ids"])
            for name in fill.keys() & row.keys():
                blank = [fill[name]] * missing
                row[name] = [*row[name], *blank] if side == "right" else [*blank, *row[name]]

    def _warn_once(self, message: str) -> None:
        key = re.sub(r"\d+", "", message)
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)

    # --- files

    @classmethod
    def from_pretrained(
        cls: type[Tokenizer],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> Tokenizer:
        """Load from a folder or a Hub name: vocab.json and merges.txt, or OpenAI's own two, or tokenizer.json.

        Args:
            revision, cache_dir, local_files_only, token: for the Hub. subfolder: below the folder or repository.
            kwargs: the constructor's, over what was saved.

        Raises:
            OSError: no vocabulary there. ValueError: a damaged file; it is named.
        """
        from .checkpoint import resolve_files

        files = resolve_files(
            pretrained_model_name_or_path,
            ALL_NAMES,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            subfolder=subfolder,
        )
        vocab, merges = find_vocabulary(files, pretrained_model_name_or_path)
        saved = {"name_or_path": str(pretrained_model_name_or_path), **read_settings(files)}
        return cls._construct(vocab, merges, files.get(TOKENIZER_NAME), saved, kwargs)

    @classmethod
    @abstractmethod
    def _construct(
        cls: type[Tokenizer],
        vocab: Any,
        merges: Any,
        tokenizer_file: Path | None,
        saved: dict[str, Any],
        given: dict[str, Any],
    ) -> Tokenizer:
        """Call the constructor with the saved keywords and, over them, those the caller gave."""

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write vocab.json and merges.txt, the latter byte for byte as OpenAI's. Returns their paths."""
        folder = Path(save_directory)
        if not folder.is_dir():
            raise ValueError(f"save_directory={str(folder)!r} must be a folder that exists")
        vocab, merges = (folder / prefixed(name, filename_prefix) for name in (VOCAB_NAME, MERGES_NAME))
        write_json(vocab, self.encoder)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges), ""]
        merges.write_text("\n".join(lines), encoding="utf-8", newline="\n")
        return str(vocab), str(merges)

    def save_pretrained(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write all that `from_pretrained`, here and in transformers, needs. Returns the paths."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        added = {index: dataclasses.asdict(token) for index, token in self.added_tokens_decoder.items()}
        beyond = {token["content"]: index for index, token in added.items() if index >= self.vocab_size}
        contents = {
            CONFIG_NAME: self._settings() | {"added_tokens_decoder": added},
            SPECIAL_NAME: self.special_tokens_map,
            **({ADDED_NAME: beyond} if beyond else {}),
        }
        paths = []
        for name, content in contents.items():
            paths.append(folder / prefixed(name, filename_prefix))
            write_json(paths[-1], content)
        return (*map(str, paths), *self.save_vocabulary(folder, filename_prefix))

    def _settings(self) -> dict[str, Any]:
        """The constructor's keywords that bring this tokenizer back, for tokenizer_config.json."""
        names = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
        settings = {name: getattr(self, name) for name in names}
        return settings | self.special_tokens_map | {"tokenizer_class": "OpenAIGPTTokenizer"}


def _as_batch(text: Any, text_pair: Any, split: bool) -> tuple[bool, list[Any], list[Any] | None]:
    """(is a batch, the texts, their pairs), after checking every one of them."""

    def is_text(item: Any) -> bool:
        if not split:
            return isinstance(item, str)
        return isinstance(item, (list, tuple)) and all(isinstance(word, str) for word in item)

    def is_pair(item: Any) -> bool:
        return isinstance(item, (list, tuple)) and len(item) == 2

    if text_pair is None and not split and isinstance(text, (list, tuple)) and text and all(map(is_pair, text)):
        text, text_pair = ([pair[i] for pair in text] for i in (0, 1))
    kind = "a list of words" if split else "a str"
    single = is_text(text) and not (split and len(text) == 0)
    batches = {"text": [text] if single else text}
    if text_pair is not None:
        batches["text_pair"] = [text_pair] if single else text_pair
    for name, batch in batches.items():
        if not isinstance(batch, (list, tuple)):
            raise ValueError(f"{name} is {type(batch).__name__} {batch!r:.80}; it must be {kind} or a list of such")
        for index, item in enumerate(batch):
            if not is_text(item):
                raise ValueError(f"{name}[{index}] is {type(item).__name__} {item!r:.80}; it must be {kind}")
    if text_pair is not None and len(batches["text"]) != len(batches["text_pair"]):
        raise ValueError(f"text has {len(batches['text'])} rows, text_pair has {len(batches['text_pair'])}")
    return not single, list(batches["text"]), list(batches["text_pair"]) if text_pair is not None else None


def to_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
