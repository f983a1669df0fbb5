"""Everything that needs a GPU, in one command and in this order: is it right, how fast is it; if asked, is it clean.

    python -m gptfast_bench.gpu [--output-dir FOLDER] [tests] [bench] [sanitize] [-- arguments of gptfast bench]

``make gpu`` runs tests and bench, in ten minutes together: the tests stop at the first that is red, and then nothing is
timed, or after four minutes. ``tests`` alone runs them to the end. The rows that are most wanted come first and are
kept one by one, so a run that is cut off has them, and ``bench -- --resume FILE`` goes on behind them. The sanitizer, a
hundred times as slow as the tests, is a run of its own. Has not run on a GPU yet.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gptfast.cli import main as gptfast

from .harness import ROOT

OPS = ("attention", "normalization", "activation", "projection", "loss", "embeddings", "decode", "matvec")
TESTS = [f"tests/test_{name}.py" for name in (*OPS, "step", "graphs", "warmup")]
# A few, since they take a hundred times as long
SANITIZED = ["tests/test_attention.py", "-k", "test_lengths or test_windows or test_varlen or test_dropout"]
TEST_SECONDS = 240.0  # where timings follow
MINUTES = 8.5  # behind which no cell is started: the last one takes its time
STEPS = ("tests", "bench", "sanitize")


def main(argv: list[str]) -> None:
    argv, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "gpu"))
    parser.add_argument("--output-dir", type=Path, default=default, help="$OUT where that is set")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; the first two if not given")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.steps) - set(STEPS)):
        parser.error(f"no such step: {', '.join(unknown)}")
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")

    started = time.monotonic()
    steps = args.steps or list(STEPS[:2])
    limit = TEST_SECONDS if "bench" in steps else None
    if "tests" in steps and not passes(args.output_dir, {"tests": _tests(first_failure=bool(limit))}, limit):
        sys.exit("tests are red: nothing is timed")
    if "bench" in steps:
        seconds = max(60.0, MINUTES * 60 - (time.monotonic() - started))
        options = ["--device", "cuda", "--output-dir", str(args.output_dir), f"--seconds={seconds:.0f}"]
        if status := gptfast(["bench", *options, *rest]):
            sys.exit(status)
    if "sanitize" in steps and not passes(args.output_dir, _sanitizers()):
        sys.exit("the sanitizer found something")


def passes(output: Path, commands: dict[str, list[str]], seconds: float | None = None) -> bool:
    """Runs each; what each ended with is kept in tests.json, one by one. Cut off after ``seconds`` is not red."""
    codes: dict[str, int | str] = {}
    for name, command in commands.items():
        print(shlex.join(command), flush=True)
        # memcheck sees the bounds of allocations, which torch's cache would hide
        cache = {} if name == "tests" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            codes[name] = subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            codes[name] = f"green so far, cut off after {seconds:.0f} s"
            print(f"{name}: {codes[name]}", flush=True)
        output.mkdir(parents=True, exist_ok=True)
        (output / "tests.json").write_text(json.dumps({"torch": torch.__version__, "exit_codes": codes}) + "\n")
    return all(code == 0 or isinstance(code, str) for code in codes.values())


def _tests(first_failure: bool) -> list[str]:
    parallel = ["--numprocesses", "8"] if importlib.util.find_spec("xdist") else []  # most of the time is compilation
    return [sys.executable, "-m", "pytest", *parallel, *(["--exitfirst"] if first_failure else []), *TESTS]


def _sanitizers() -> dict[str, list[str]]:
    if not shutil.which("compute-sanitizer"):
        sys.exit("compute-sanitizer is not installed")
    pytest = [sys.executable, "-m", "pytest", *SANITIZED]
    return {
        tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest]
        for tool in ("memcheck", "racecheck")
    }


if __name__ == "__main__":
    main(sys.argv[1:])
