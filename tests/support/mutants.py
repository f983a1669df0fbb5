"""Breaks the source on purpose, one place at a time, and expects a test to notice.

``tests/specs/<op>.py`` lists ``MUTANTS``. Each is applied to a copy of the repository, where its tests must fail; the
unbroken copy must pass them all.

    python -m tests.support.mutants                  all
    python -m tests.support.mutants attention scale  where "op mutant" contains these words
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROCESSES = min(4, os.cpu_count() or 1)
TESTS_FAILED = 1  # pytest's exit code; 2 and above are errors of its own, such as a file that cannot be imported


@dataclass(frozen=True)
class Mutant:
    """``old`` stands exactly once in ``file``; with ``new`` in its place, ``tests`` must fail."""

    name: str
    file: str  # from the repository's root
    old: str
    new: str
    tests: str  # pytest arguments: a file, and -k with the few tests that should see it


@contextmanager
def _copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        for name in ("kernels", "gptfast", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def _pytest(root: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "--tb=line", *shlex.split(tests)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def _survives(mutant: Mutant) -> str | None:
    """Why ``mutant`` counts as not caught; None where a test failed on it."""
    source = (ROOT / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        return f"{mutant.old!r} stands {source.count(mutant.old)} times in {mutant.file}"
    with _copy() as root:
        (root / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        result = _pytest(root, mutant.tests)
    if result.returncode == TESTS_FAILED:
        return None
    return f"pytest ended with {result.returncode}:\n{result.stdout[-1500:]}{result.stderr[-500:]}"


def _union(commands: list[str]) -> list[str]:
    """pytest arguments, a line for each file, that run what all of ``commands``, "FILE" or "FILE -k WORDS", run."""
    words: dict[str, set[str]] = {}
    for command in commands:
        file, *options = shlex.split(command)
        words.setdefault(file, set()).add(options[1] if options else "")
    return [file if "" in of else f"{file} -k {shlex.quote(' or '.join(sorted(of)))}" for file, of in words.items()]


def main(words: list[str]) -> None:
    """Runs the mutants; exit code 1 where one survives, or where the unbroken source fails."""
    todo: list[tuple[str, Mutant]] = []
    for path in sorted((ROOT / "tests" / "specs").glob("[!_]*.py")):
        mutants = importlib.import_module(f"tests.specs.{path.stem}").MUTANTS
        todo += [(path.stem, m) for m in mutants if all(word in f"{path.stem} {m.name}" for word in words)]
    if not todo:
        sys.exit(f"no mutant matches {' '.join(words)}")

    survivors = 0
    with _copy() as root:
        for tests in _union([mutant.tests for _, mutant in todo]):
            result = _pytest(root, tests)
            if result.returncode:
                sys.exit(f"the unbroken source fails `pytest {tests}`:\n{result.stdout[-3000:]}{result.stderr[-500:]}")
    started = time.perf_counter()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for (op, mutant), reason in zip(todo, pool.map(lambda item: _survives(item[1]), todo), strict=True):
            print(f"{'caught  ' if reason is None else 'SURVIVED'}  {op}: {mutant.name}", flush=True)
            if reason is not None:
                survivors += 1
                print(reason)
    print(f"{len(todo) - survivors} of {len(todo)} caught in {time.perf_counter() - started:.0f} s")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
