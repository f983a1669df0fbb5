"""Everything that needs a GPU, in one command and in this order: is it right, what can the card do, how fast is it.

    python -m benchmarks.gpu [--out FOLDER] [--skip-tests] [--first N] [OP …]

``benchmarks/<op>.py`` offers ``cells()``, dicts of parameters, most wanted first, and ``run(cell)``, which checks and
times one and returns a row. Each runs in a process of its own: one that crashes or hangs costs its own row alone, and
torch.compile, which keeps 8 variants of a function, starts each anew. Rows go to FOLDER/<op>.jsonl one by one, so a run
that is cut off keeps what it has, and ``--first`` goes on behind it. Nothing is timed where a test is red. Not run on a
GPU yet.
"""

import argparse
import importlib
import importlib.util
import json
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
TESTS = [f"tests/test_{op}.py" for op in OPS]
# A few, since they take a hundred times as long
SANITIZED = ["tests/test_attention.py", "-k", "test_lengths or test_windows or test_varlen or test_dropout"]
CELL_SECONDS = 180  # most of it is FlexAttention's compilation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--out", type=Path, default=default, help="folder for the rows")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing first: for a first look only")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out each op's first N cells")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all if none is named")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"no such op: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")

    if not arguments.skip_tests and not tests_pass(arguments.out):
        sys.exit("tests are red: nothing is timed")
    most = limits()
    write_rows(arguments.out / "limits.jsonl", [environment() | most])
    for op in arguments.ops or OPS:
        write_rows(arguments.out / f"{op}.jsonl", rows(op, arguments.first, most), append=arguments.first > 0)


def tests_pass(out: Path) -> bool:
    """The kernels' tests on the GPU, then a few under compute-sanitizer where it is installed."""
    pytest = [sys.executable, "-m", "pytest"]
    parallel = ["--numprocesses", "4"] if importlib.util.find_spec("xdist") else []  # most of the time is compilation
    commands = {"tests": [*pytest, *parallel, *TESTS]}
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            commands[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest, *SANITIZED]
    else:
        print("compute-sanitizer is not installed: no memcheck, no racecheck")
    codes = {}
    for name, command in commands.items():
        print(shlex.join(command), flush=True)
        # memcheck sees the bounds of allocations, which torch's cache would hide
        cache = {} if name == "tests" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        codes[name] = subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}).returncode
        write_rows(out / "tests.jsonl", [environment() | {"exit_codes": codes}])
    return not any(codes.values())


def rows(op: str, first: int, most: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The rows of cells first, first + 1, …; times held against ``most``, what ``limits`` found."""
    yield environment()
    for index, cell in enumerate(importlib.import_module(f"benchmarks.{op}").cells()):
        if index >= first:
            row = run_alone(op, cell)
            for times in row.get("times", {}).values():
                if "ms" in times:
                    shares = times["tflop_s"] / most["matmul_tflop_s"], times.get("gb_s", 0) / most["copy_gb_s"]
                    times["percent_of_limit"] = round(100 * max(shares), 1)
            yield {"cell": index} | row


def run_alone(op: str, cell: dict[str, Any], seconds: float = CELL_SECONDS) -> dict[str, Any]:
    """The row of a cell, or the cell with the "error" that its process ended with."""
    code = f"import json, sys, benchmarks.{op} as op; print(json.dumps(op.run(json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(cell)]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    environ = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return cell | {"error": f"took longer than {seconds:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return cell | {"error": f"exit code {done.returncode}: {''.join(last)}"}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
