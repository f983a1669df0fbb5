"""HuggingFace's fast GPT-1 tokenizer on the Rust library `tokenizers`: BERT's basic tokenization, then the same merges.

Its ids are those of transformers' OpenAIGPTTokenizerFast (4.x) and OpenAIGPTTokenizer (5.x), not the original ones.
"""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

from .tokenizer_base import TokenizerBase, to_list
from .tokenizer_files import (
    END_OF_WORD,
    TOKENIZER_NAME,
    AddedToken,
    prefixed,
    read_merges,
    read_tokenizer_json,
    read_vocab,
)


class OpenAIGPTTokenizerFast(TokenizerBase):
    """HuggingFace's fast GPT-1 tokenizer, which also knows where in the text each token comes from.

    Args:
        vocab_file, merges_file: as for `OpenAIGPTTokenizer`.
        tokenizer_file: a tokenizer.json, instead of the two.
        kwargs: pad_token and the other special tokens, model_max_length, padding_side, …: see `TokenizerBase`.

    Raises:
        ImportError: the `tokenizers` library is missing. ValueError: no vocabulary, or a damaged file; it is named.
    """

    is_fast = True
    tokenization = "basic"

    def __init__(
        self,
        vocab_file: Any = None,
        merges_file: Any = None,
        tokenizer_file: str | os.PathLike | None = None,
        unk_token: Any = "<unk>",
        **kwargs: Any,
    ):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError('OpenAIGPTTokenizerFast needs tokenizers: pip install "gptfast-kernels[hf]"') from error
        if tokenizer_file is not None:
            content = read_tokenizer_json(tokenizer_file)
            vocab = read_vocab(content["model"]["vocab"])
            merges = read_merges(content["model"]["merges"], vocab)
            backend = tokenizers.Tokenizer.from_file(str(tokenizer_file))
            backend.no_truncation()
            backend.no_padding()
            kwargs.setdefault("added_tokens_decoder", {token["id"]: token for token in content.get("added_tokens", ())})
        elif vocab_file is None or merges_file is None:
            raise ValueError(f"{vocab_file=}, {merges_file=}: give both, or tokenizer_file")
        else:
            vocab = read_vocab(vocab_file)
            merges = read_merges(merges_file, vocab)
            unknown = AddedToken.of(unk_token).content
            model = tokenizers.models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix=END_OF_WORD)
            backend = tokenizers.Tokenizer(model)
            backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
            backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
            backend.decoder = tokenizers.decoders.BPEDecoder(suffix=END_OF_WORD)
        if backend.post_processor is None:  # token types 0 and 1, nothing else
            backend.post_processor = tokenizers.processors.TemplateProcessing("$A:0", "$A:0 $B:1", [])
        self._backend = backend
        super().__init__(vocab, merges, unk_token=unk_token, **kwargs)

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self._backend

    def tokenize(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise ValueError(f"text is {type(text).__name__} {text!r:.80}; it must be a str")
        return self._backend.encode(text, add_special_tokens=False).tokens

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        ids = to_list(token_ids)
        text = self._backend.decode([ids] if isinstance(ids, int) else ids, skip_special_tokens=skip_special_tokens)
        return self._cleaned(text, clean_up_tokenization_spaces)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._backend.decoder.decode(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._backend.num_special_tokens_to_add(pair)  # a post-processor that the user set may add some

    def save_pretrained(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        paths = super().save_pretrained(save_directory, filename_prefix)
        unified = str(Path(save_directory) / prefixed(TOKENIZER_NAME, filename_prefix))
        self._backend.save(unified)
        return (*paths, unified)

    def _encode_rows(
        self,
        texts: list[Any],
        pairs: list[Any] | None,
        is_split_into_words: bool,
        add_special_tokens: bool,
        truncation: str,
        length: int,
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        batch = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encode = functools.partial(
            self._backend.encode_batch,
            batch,
            is_pretokenized=is_split_into_words,
            add_special_tokens=add_special_tokens,
        )
        if truncation in ("only_first", "only_second"):  # Rust would raise a bare Exception where this is impossible
            for encoding in encode():
                n_first, n_second = (encoding.sequence_ids.count(sequence) for sequence in (0, 1))
                self._truncated(n_first, n_second, length - (len(encoding) - n_first - n_second), truncation)
        if truncation == "do_not_truncate":
            encodings = encode()
        else:
            self._backend.enable_truncation(length, strategy=truncation, direction=self.truncation_side)
            try:
                encodings = encode()
            finally:
                self._backend.no_truncation()
        rows = [
            {
                "input_ids": encoding.ids,
                "token_type_ids": encoding.type_ids,
                "special_tokens_mask": encoding.special_tokens_mask,
                "offset_mapping": encoding.offsets,
            }
            for encoding in encodings
        ]
        return rows, encodings

    def _register(self, token: AddedToken, index: int) -> None:
        from tokenizers import AddedToken as BackendToken

        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        add = self._backend.add_special_tokens if token.special else self._backend.add_tokens
        add([BackendToken(token.content, **flags)])
        found = self._backend.token_to_id(token.content)
        if found != index:
            raise ValueError(f"added token {token.content!r} has id {index}, but the next free id is {found}")
        super()._register(token, index)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"tokenization": self.tokenization}

    @classmethod
    def _construct(
        cls, vocab: Any, merges: Any, tokenizer_file: Path | None, saved: dict[str, Any], given: dict[str, Any]
    ) -> "OpenAIGPTTokenizerFast":
        remembered = saved.pop("tokenization", cls.tokenization)
        if remembered != cls.tokenization:
            warnings.warn(
                f"{saved['name_or_path']} was saved with tokenization={remembered!r}, which OpenAIGPTTokenizer has; "
                "OpenAIGPTTokenizerFast gives other ids",
                stacklevel=4,
            )
        return cls(vocab, merges, tokenizer_file, **{**saved, **given})
