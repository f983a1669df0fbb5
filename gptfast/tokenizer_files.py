"""A tokenizer's files: GPT-1's own two, and what transformers 4 and 5 write beside or instead of them."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

VOCAB_NAME, MERGES_NAME, TOKENIZER_NAME = "vocab.json", "merges.txt", "tokenizer.json"
OPENAI_VOCAB_NAME, OPENAI_MERGES_NAME = "encoder_bpe_40000.json", "vocab_40000.bpe"
CONFIG_NAME, SPECIAL_NAME, ADDED_NAME = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ALL_NAMES = (
    *(VOCAB_NAME, MERGES_NAME, OPENAI_VOCAB_NAME, OPENAI_MERGES_NAME, TOKENIZER_NAME),
    *(CONFIG_NAME, SPECIAL_NAME, ADDED_NAME),
)

END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before anything else sees it.

    Args:
        single_word: match only between spaces. lstrip, rstrip: take the white space on that side too.
        normalized: match in the lower-cased text; None means `not special`.
        special: skipped by `decode(skip_special_tokens=True)`.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    @classmethod
    def of(cls, token: Any, special: bool = False) -> "AddedToken":
        """From a string, one of ours, HuggingFace's object of the same name, or its JSON form."""
        if isinstance(token, str):
            return cls(token, special=special)
        names = [field.name for field in dataclasses.fields(cls)]
        form = token if isinstance(token, Mapping) else {name: getattr(token, name, None) for name in names}
        if not isinstance(form.get("content"), str):
            raise TypeError(f"token={token!r} must be a str or an AddedToken, not {type(token).__name__}")
        known: dict[str, Any] = {name: form[name] for name in names if name in form}
        return cls(**known | {"special": special or bool(known.get("special"))})


def read_vocab(source: Any) -> Vocab:
    """Token to id, from a vocab.json or a mapping."""
    vocab = dict(source) if isinstance(source, Mapping) else read_json(source)
    ids = list(vocab.values())
    if not all(type(index) is int and index >= 0 for index in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{_described(source)} must map tokens to ids: ints that differ and are not negative")
    return vocab


def read_merges(source: Any, vocab: Vocab) -> Merges:
    """The pairs in rank order, from a merges.txt or a list of pairs or of lines."""
    lines = source
    if isinstance(source, (str, os.PathLike)):
        lines = [line for line in _read_text(source).split("\n") if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ") if isinstance(line, str) else line) for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}:
            raise ValueError(
                f"{_described(source)}, merge {number}: {' '.join(pair)!r} must be two tokens of the vocabulary "
                "that together are one"
            )
    return pairs


def read_tokenizer_json(path: Any) -> dict[str, Any]:
    """A tokenizer.json, checked to be a byte-pair encoding in GPT-1's form."""
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        raise ValueError(f"{path} is not a GPT-1 tokenizer: it must be a BPE with the suffix {END_OF_WORD!r}")
    with _naming(path):
        read_merges(model["merges"], read_vocab(model["vocab"]))
        _read_added_tokens((token["id"], token) for token in content.get("added_tokens", ()))
    return content


@contextlib.contextmanager
def _naming(path: Any) -> Iterator[None]:
    """Makes an error about a file's content name the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_added_tokens(pairs: Iterable[tuple[Any, Any]]) -> dict[int, AddedToken]:
    tokens = {}
    for index, token in pairs:
        if not str(index).isdecimal():
            raise ValueError(f"{index!r} is no token id")
        tokens[int(index)] = AddedToken.of(token)
    return tokens


def read_json(path: Any) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, not {type(content).__name__}")
    return content


def _read_text(path: Any) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError unless the padding_side, truncation_side and model_max_length that are there are accepted."""
    for name in ("padding_side", "truncation_side"):
        if settings.get(name) not in (None, "right", "left"):
            raise ValueError(f"{name}={settings[name]!r} must be 'right' or 'left'")
    length = settings.get("model_max_length")
    if length is not None and not (isinstance(length, int | float) and length >= 1):
        raise ValueError(f"model_max_length={length!r} must be a positive number or None")


def read_settings(files: Mapping[str, Path]) -> dict[str, Any]:
    """The constructor's keywords out of the files that transformers 4 and 5 write."""
    config: dict[str, Any] = {}
    for name in (CONFIG_NAME, SPECIAL_NAME):
        if name in files:
            content = read_json(files[name])
            with _naming(files[name]):
                check_settings(content)
                for token in _special_tokens(content):
                    AddedToken.of(token)
            config |= content
    names = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "tokenization")
    settings = {name: config[name] for name in (*names, *SPECIAL_TOKENS) if config.get(name) is not None}
    settings["additional_special_tokens"] = _additional_special_tokens(config)

    special = {AddedToken.of(token).content for token in _special_tokens(config)}
    added: dict[int, AddedToken] = {}
    if ADDED_NAME in files:  # all that transformers before 4.34 wrote
        content = read_json(files[ADDED_NAME])
        with _naming(files[ADDED_NAME]):
            tokens = _read_added_tokens((index, token) for token, index in content.items())
        added = {index: AddedToken.of(token.content, token.content in special) for index, token in tokens.items()}
    if TOKENIZER_NAME in files:
        tokens_there = read_tokenizer_json(files[TOKENIZER_NAME]).get("added_tokens", ())
        added |= _read_added_tokens((token["id"], token) for token in tokens_there)
    if CONFIG_NAME in files:
        with _naming(files[CONFIG_NAME]):
            added |= _read_added_tokens(config.get("added_tokens_decoder", {}).items())
    return settings | {"added_tokens_decoder": added}


def _special_tokens(config: Mapping[str, Any]) -> list[Any]:
    named = [config[name] for name in SPECIAL_TOKENS if config.get(name) is not None]
    return [*named, *_additional_special_tokens(config)]


def _additional_special_tokens(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []  # 4.x, 5.x
    if not isinstance(extra, list | Mapping):
        raise TypeError(f"additional_special_tokens={extra!r} must be a list")
    return list(extra.values() if isinstance(extra, Mapping) else extra)


def find_vocabulary(files: Mapping[str, Path], name: Any) -> tuple[Any, Any]:
    """What `read_vocab` and `read_merges` take: two paths, or the contents of a tokenizer.json."""
    for vocab, merges in ((VOCAB_NAME, MERGES_NAME), (OPENAI_VOCAB_NAME, OPENAI_MERGES_NAME)):
        if vocab in files and merges in files:
            return files[vocab], files[merges]
    if TOKENIZER_NAME in files:
        model = read_tokenizer_json(files[TOKENIZER_NAME])["model"]
        return model["vocab"], model["merges"]
    raise OSError(
        f"{name} has no tokenizer: neither {VOCAB_NAME} and {MERGES_NAME}, "
        f"nor {OPENAI_VOCAB_NAME} and {OPENAI_MERGES_NAME}, nor {TOKENIZER_NAME}"
    )


def _described(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__


def prefixed(name: str, prefix: str | None) -> str:
    return f"{prefix}-{name}" if prefix else name


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
