"""Labelled examples in files: TSV, CSV or JSON lines, told by the name's ending. A bad line is named."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

ENDINGS = (".tsv", ".csv", ".jsonl", ".ndjson")


def read_rows(file: str | os.PathLike, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, {column: text}) of each line that is not blank. The first of a TSV or CSV names its columns.

    Raises:
        OSError: the file cannot be read. ValueError: its name has another ending, it is not UTF-8, a column is missing,
        or a line is not as the rest; the message starts with ``file:line``.
    """
    path = Path(file)
    if path.suffix not in ENDINGS:
        raise ValueError(f"{file} must end in one of {', '.join(ENDINGS)}, got {path.suffix!r}")
    rows = _delimited if path.suffix in (".tsv", ".csv") else _json_lines
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from rows(path, lines, columns)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}:{_line_that_is_not_utf8(path)} is not UTF-8 text: {error.reason}") from error


def _line_that_is_not_utf8(path: Path) -> int:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(path)


def _delimited(path: Path, lines, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    # a TSV holds no tabs and no line ends in its fields, so that a quote in it is a quote
    if path.suffix == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)
    header: list[str] = []
    start = 1
    try:
        for row in reader:
            line, start = start, reader.line_num + 1
            if not row:
                continue
            if not header:
                header = row
                _check_columns(f"{path}:{line}", columns, header)
                for name in columns:
                    if header.count(name) > 1:
                        raise ValueError(f"{path}:{line} has column {name!r} twice")
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}:{line} has {len(row)} fields, the first line has {len(header)}")
            yield line, {name: row[header.index(name)] for name in columns}
    except csv.Error as error:
        raise ValueError(f"{path}:{start}: {error}") from error


def _json_lines(path: Path, lines, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number may be too long to read
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
        _check_columns(f"{path}:{number}", columns, list(row))
        for name in columns:
            if not isinstance(row[name], str | int | float) or isinstance(row[name], bool):
                raise ValueError(f"{path}:{number}: {name} must be a text or a number, got {row[name]!r}")
        texts = {name: str(row[name]) for name in columns}
        for name, text in texts.items():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON may escape half a surrogate pair
                raise ValueError(f"{path}:{number}: {name} is not text: {error}") from error
        yield number, texts


def _check_columns(where: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    for name in wanted:
        if name not in found:
            raise ValueError(f"{where} has no column {name!r}, it has {', '.join(map(repr, found))}")
