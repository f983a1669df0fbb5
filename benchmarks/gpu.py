"""Everything that needs a GPU, in one command and in this order: is it right, what can the card do, how fast is it.

    python -m benchmarks.gpu [--out FOLDER] [--skip-tests] [OP …]

``benchmarks/<op>.py`` offers ``cells()``, dicts of parameters, most wanted first, and ``run(cell)``, which checks and
times one and returns a row. Rows go to FOLDER/<op>.jsonl one by one, so a run that is cut off keeps what it has.
Nothing is timed where a test is red. Not run on a GPU yet.
"""

import argparse
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, limits, write_rows

ROOT = Path(__file__).parents[1]
OPS = ("attention", "normalization", "activation", "projection", "loss", "embeddings")  # in the order of interest
TESTS = [f"tests/test_{op}.py" for op in OPS if (ROOT / "tests" / f"test_{op}.py").exists()]
# A few, since they take a hundred times as long
SANITIZED = ["tests/test_attention.py", "-k", "test_lengths or test_windows or test_varlen or test_dropout"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--out", type=Path, default=default, help="folder for the rows")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing first: for a first look only")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all if none is named")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"no such op: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")

    if not arguments.skip_tests and not tests_pass(arguments.out):
        sys.exit("tests are red: nothing is timed")
    write_rows(arguments.out / "limits.jsonl", [environment() | limits()])
    for op in arguments.ops or OPS:
        if (ROOT / "benchmarks" / f"{op}.py").exists():
            write_rows(arguments.out / f"{op}.jsonl", rows(op))


def tests_pass(out: Path) -> bool:
    """The kernels' tests on the GPU, then a few under compute-sanitizer where it is installed."""
    pytest = [sys.executable, "-m", "pytest"]
    commands = {"tests": [*pytest, *TESTS]}
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            commands[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest, *SANITIZED]
    else:
        print("compute-sanitizer is not installed: no memcheck, no racecheck")
    codes = {}
    for name, command in commands.items():
        print(shlex.join(command), flush=True)
        codes[name] = subprocess.run(command, cwd=ROOT).returncode
        write_rows(out / "tests.jsonl", [environment() | {"exit_codes": codes}])
    return not any(codes.values())


def rows(op: str) -> Iterator[dict[str, Any]]:
    module = importlib.import_module(f"benchmarks.{op}")
    yield environment()
    for cell in module.cells():
        yield module.run(cell)


if __name__ == "__main__":
    main()
