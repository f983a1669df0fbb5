"""GPT-1's tokenizer: ftfy, text standardisation, spaCy, lower case, then byte-pair encoding.

    >>> tokenizer = OpenAIGPTTokenizer("vocab.json", "merges.txt")
    >>> tokenizer.tokenize("Mr. Smith doesn't know.")
    ['mr.</w>', 'smith</w>', 'does</w>', "n't</w>", 'know</w>', '.</w>']

Source: `text_utils.py` of OpenAI's finetune-transformer-lm, and HuggingFace's `OpenAIGPTTokenizer` (transformers 4.57).
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .tokenizer_base import BatchEncoding, TokenizerBase, to_list
from .tokenizer_fast import OpenAIGPTTokenizerFast
from .tokenizer_files import END_OF_WORD, AddedToken, read_merges, read_vocab

__all__ = ["AddedToken", "BatchEncoding", "OpenAIGPTTokenizer", "OpenAIGPTTokenizerFast", "train_tokenizer"]

# --- text to words, in three ways


def words_original(text: str) -> list[str]:
    """OpenAI's order: repair, standardise, split with spaCy, and only then lower case."""
    return _spacy_words(text, r"""([-~!";?+,)(/*\[\]}{|_])\1*""")


def words_transformers(text: str) -> list[str]:
    """HuggingFace 4.x: lower case before all else, and backslashes are set apart."""
    return _spacy_words(lower_characters(text), r"""([-~!";?+,)(\\/*\[\]}{|_])\1*""")


def words_basic(text: str) -> list[str]:
    """BERT's basic tokenization: no accents, every punctuation mark and ideograph a word, no line breaks."""
    text = lower_characters(text).translate(_BASIC_CLEAN)
    return unicodedata.normalize("NFD", text).translate(_BASIC_SPLIT).split()


def lower_characters(text: str) -> str:
    """Lower case without regard to neighbours, as HuggingFace has it: a final Σ becomes σ, not ς."""
    return text.lower() if text.isascii() else "".join(map(str.lower, text))


def _spacy_words(text: str, set_apart: str) -> list[str]:
    import ftfy

    text = ftfy.fix_text(text).translate(_PLAIN_PUNCTUATION)
    text = re.sub(set_apart, r" \g<0> ", text)
    # A run of white space becomes one space, or " \n ", of which spaCy makes the token "\n ".
    text = re.sub(r"\s+", lambda run: " \n " if "\n" in run[0] else " ", text).strip()
    return [token.text.lower() for token in _spacy_tokenizer()(text)]


@functools.cache
def _spacy_tokenizer() -> Callable[[str], Iterable[Any]]:
    from spacy.lang.en import English

    return English().tokenizer  # nlp(text) would stop at a million characters; its tokenizer has no limit


_PLAIN_PUNCTUATION = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})


class _CharacterTable(dict[int, str]):
    """A table for `str.translate` that fills itself as characters are met."""

    def __init__(self, replacement: Callable[[str], str]):
        self.replacement = replacement

    def __missing__(self, code: int) -> str:
        return self.setdefault(code, self.replacement(chr(code)))


def _clean(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if char == "\ufffd" or category.startswith("C"):
        return ""
    return f" {char} " if _IDEOGRAPH.match(char) else char


def _split(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Mn":
        return ""
    return f" {char} " if char in string.punctuation or category.startswith("P") else char


_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_BASIC_CLEAN, _BASIC_SPLIT = _CharacterTable(_clean), _CharacterTable(_split)
_WORDS = {"original": words_original, "transformers": words_transformers, "basic": words_basic}


# --- the tokenizer


class OpenAIGPTTokenizer(TokenizerBase):
    """GPT-1's tokenizer.

    Args:
        vocab_file: a vocab.json (OpenAI's encoder_bpe_40000.json), or the mapping itself.
        merges_file: a merges.txt (OpenAI's vocab_40000.bpe), or the list of pairs itself.
        tokenization: "original" (OpenAI's, as the paper and its weights had it), "transformers" (HuggingFace 4.x's,
            which lower-cases before spaCy) or "basic" (BERT's; HuggingFace's without ftfy or spaCy, and in version 5).
            None means "original" where ftfy and spaCy can be imported, else "basic" with one warning a process.
        kwargs: pad_token and the other special tokens, model_max_length, padding_side, …: see `TokenizerBase`.

    Raises:
        ImportError: tokenization="original" or "transformers" without ftfy or spaCy.
        ValueError: an unknown tokenization, or a damaged file; it is named.
    """

    def __init__(
        self,
        vocab_file: Any,
        merges_file: Any,
        unk_token: Any = "<unk>",
        *,
        tokenization: str | None = None,
        **kwargs: Any,
    ):
        self._tokenization = self._saved_tokenization = _available_tokenization(tokenization)
        vocab = read_vocab(vocab_file)
        super().__init__(vocab, read_merges(merges_file, vocab), unk_token=unk_token, **kwargs)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._cache: dict[str, tuple[str, ...]] = {}

    @property
    def tokenization(self) -> str:
        """The one in use: "original", "transformers" or "basic"."""
        return self._tokenization

    def tokenize(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise ValueError(f"text is {type(text).__name__} {text!r:.80}; it must be a str")
        tokens: list[str] = []
        for piece, added in self._cut_added_tokens(text):
            for word in _WORDS[self._tokenization](piece) if piece else ():
                tokens += self.bpe(word)
            if added is not None:
                tokens.append(added)
        return tokens

    def bpe(self, word: str) -> tuple[str, ...]:
        """Split into characters, the last with </w>; merge the pair of lowest rank everywhere until none is left."""
        if word in self._cache:
            return self._cache[word]
        text = "\n" if word == "\n " else word  # how spaCy hands over a line break
        symbols = [*text[:-1], text[-1] + END_OF_WORD]
        while len(symbols) > 1:
            best = min(set(itertools.pairwise(symbols)), key=lambda pair: self._ranks.get(pair, math.inf))
            if best not in self._ranks:
                break
            merged, at = [], 0
            while at < len(symbols):
                joined = tuple(symbols[at : at + 2]) == best
                merged.append(best[0] + best[1] if joined else symbols[at])
                at += 1 + joined
            symbols = merged
        return self._cache.setdefault(word, tuple(symbols))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        ids = to_list(token_ids)
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        # HuggingFace puts spaces around added tokens, but not around pad_token and its like.
        apart = {token.content for token in self._added.values() if not token.special}
        apart |= {token for token in self.additional_special_tokens if token not in self.encoder}
        parts: list[str] = []
        for is_apart, run in itertools.groupby(tokens, apart.__contains__):
            members = list(run)
            parts += members if is_apart else [self.convert_tokens_to_string(members)]
        text = (" " if spaces_between_special_tokens else "").join(filter(None, parts))
        return self._cleaned(text, clean_up_tokenization_spaces)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace(END_OF_WORD, " ").strip()

    def _cut_added_tokens(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Yield (the text before an added token, the token), and last (the rest, None)."""
        tokens = sorted(self._added.values(), key=lambda token: -len(token.content))
        original = self._tokenization == "original"
        if original:  # OpenAI's code has no special tokens: a text that says <unk> means those five characters
            tokens = [token for token in tokens if token.content != self.unk_token]
        else:
            kept = [*self.all_special_tokens, *(t.content for t in tokens if t.normalized and not t.special)]
            parts = re.split(f"({'|'.join(map(re.escape, kept))})", text) if kept else [text]
            text = "".join(part if i % 2 else lower_characters(part) for i, part in enumerate(parts))

        def pattern(token: AddedToken) -> str:
            # In OpenAI's order the text is not lower-cased yet, but a normalized token matches as if it were.
            ignore_case = "i" if original and token.normalized and not token.special else ""
            found = f"((?{ignore_case}:{re.escape(token.content)}))"
            found = f"(?<![^ ]){found}(?![^ ])" if token.single_word else found
            return r"\s*" * token.lstrip + found + r"\s*" * token.rstrip

        start = 0
        for match in re.finditer("|".join(map(pattern, tokens)), text) if tokens else ():
            yield text[start : match.start()], tokens[(match.lastindex or 0) - 1].content
            start = match.end()
        yield text[start:], None

    def _stored(self, token: AddedToken) -> AddedToken:
        if token.special or not token.normalized:
            return token
        return dataclasses.replace(token, content=token.content.lower())

    def _encode_rows(
        self,
        texts: list[Any],
        pairs: list[Any] | None,
        is_split_into_words: bool,
        add_special_tokens: bool,
        truncation: str,
        length: int,
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        def ids_of(text: Any) -> list[int]:
            pieces = text if is_split_into_words else [text]
            return self.convert_tokens_to_ids([token for piece in pieces for token in self.tokenize(piece)])

        def cut(ids: list[int], n: int) -> list[int]:
            return ids[:n] if self.truncation_side == "right" else ids[len(ids) - n :]

        rows: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            a, b = ids_of(text), None if pairs is None else ids_of(pairs[i])
            if truncation != "do_not_truncate":
                reserved = self.num_special_tokens_to_add(b is not None) if add_special_tokens else 0
                n_a, n_b = self._truncated(len(a), len(b or []), length - reserved, truncation)
                a, b = cut(a, n_a), None if b is None else cut(b, n_b)
            if add_special_tokens:
                ids, types = (
                    self.build_inputs_with_special_tokens(a, b),
                    self.create_token_type_ids_from_sequences(a, b),
                )
                special = self.get_special_tokens_mask(a, b)
            else:
                ids, types = a + (b or []), [0] * len(a) + [1] * len(b or [])
                special = [0] * len(ids)
            rows.append({"input_ids": ids, "token_type_ids": types, "special_tokens_mask": special})
        return rows, []

    @classmethod
    def _construct(
        cls, vocab: Any, merges: Any, tokenizer_file: Path | None, saved: dict[str, Any], given: dict[str, Any]
    ) -> "OpenAIGPTTokenizer":
        remembered, asked = saved.pop("tokenization", None), given.get("tokenization")
        usable = None if remembered in ("original", "transformers") and _missing_libraries() else remembered
        tokenizer = cls(vocab, merges, **{**saved, **given, "tokenization": asked or usable})
        if remembered and not asked:
            tokenizer._saved_tokenization = remembered  # even where it cannot be used: saving again must not lose it
        return tokenizer

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"tokenization": self._saved_tokenization}


_warned_of_basic = False


def _available_tokenization(tokenization: str | None) -> str:
    """The tokenization to use, after the checks that `OpenAIGPTTokenizer` documents."""
    global _warned_of_basic
    if tokenization not in (None, *_WORDS):
        raise ValueError(f"tokenization={tokenization!r} must be None or one of {', '.join(_WORDS)}")
    missing = [] if tokenization == "basic" else _missing_libraries()
    advice = f"{' and '.join(missing)} cannot be imported (pip install {' '.join(missing)})"
    if missing and tokenization:
        raise ImportError(f"tokenization={tokenization!r}: {advice}")
    if missing and not _warned_of_basic:
        _warned_of_basic = True
        warnings.warn(
            f"{advice}, so OpenAIGPTTokenizer uses BERT's basic tokenization: ids differ from GPT-1's. "
            "tokenization='basic' says that this is meant.",
            stacklevel=3,
        )
    return tokenization or ("basic" if missing else "original")


def _missing_libraries() -> list[str]:
    missing = []
    for module in ("ftfy", "spacy.lang.en"):
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(module.split(".")[0])
    return missing


# --- learning a vocabulary


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    tokenization: str | None = None,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
    **kwargs: Any,
) -> OpenAIGPTTokenizer:
    """Learn a vocabulary in GPT-1's form: <unk>, characters by frequency, the same with </w>, merges, and "\\n</w>".

    Args:
        texts: documents; each is tokenized whole.
        vocab_size: the most entries. There are fewer when no pair is left that occurs `min_frequency` times.
        tokenization: as for `OpenAIGPTTokenizer`, which gets `kwargs` too.
        limit_alphabet: keep so many characters, the most frequent; the others become <unk>. None keeps all.

    Returns:
        the tokenizer. The same texts give the same vocabulary.

    Raises:
        TypeError: texts is one str. ValueError: vocab_size leaves no room for the characters.
        ImportError: the `tokenizers` library is missing.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError('train_tokenizer needs tokenizers: pip install "gptfast-kernels[hf]"') from error
    if isinstance(texts, str):
        raise TypeError("texts is one str; it must be a list of them, or another iterable")

    tokenization = _available_tokenization(tokenization)
    words = Counter(word for text in texts for word in _WORDS[tokenization](text) if not word.isspace())
    frequency: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            frequency[char] += count
    alphabet = sorted(frequency, key=lambda char: (-frequency[char], char))[:limit_alphabet]
    symbols = [*alphabet, *(char + END_OF_WORD for char in alphabet)]
    if vocab_size < len(symbols) + 2:
        raise ValueError(f"{vocab_size=} must be at least {len(symbols) + 2}: {len(alphabet)} characters in two forms")

    # The trainer numbers word endings in the order of a hash map and breaks ties by number, so two runs would differ.
    # Therefore every symbol, with </w> or without, goes in as one private-use character.
    private = {symbol: chr(0xF0000 + i) for i, symbol in enumerate(symbols)}
    # What is not in the alphabet becomes a space, which no merge crosses.
    coded = (
        ("".join(private.get(symbol, " ") for symbol in (*word[:-1], word[-1] + END_OF_WORD)), count)
        for word, count in words.items()
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # <unk> and "\n</w>" are added below
        min_frequency=min_frequency,
        initial_alphabet=list(private.values()),
        show_progress=False,
    )
    learner.train_from_iterator((f"{word} " * count for word, count in coded), trainer)
    public = {code: symbol for symbol, code in private.items()}
    merges = [
        ("".join(public[code] for code in left), "".join(public[code] for code in right))
        for left, right in json.loads(learner.to_str())["model"]["merges"]
    ]
    entries = ["<unk>", *symbols, *(left + right for left, right in merges), "\n" + END_OF_WORD]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    return OpenAIGPTTokenizer(vocab, merges, tokenization=tokenization, **kwargs)
