"""``gptfast bench`` and ``gptfast bench compare``, behind their arguments, which gptfast/cli.py declares."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from . import compare, page, report, suite
from .harness import Settings


def run(args: argparse.Namespace) -> None:
    """Measures, keeps bench.json, bench.csv and bench.html in the output folder, and prints the table.

    Args:
        args: device, threads, profile, op, mode, dtype, baseline, output_dir, resume, first, seconds, no_progress,
            json, csv.

    Raises:
        ValueError: an argument is not accepted; before anything is measured.
    """
    cuda = args.device.startswith("cuda")
    profile = suite.profiles(cuda)[args.profile]
    most = len(suite.usable_cpus())
    threads = min(most, torch.get_num_threads()) if args.threads is None else args.threads
    if not 1 <= threads <= most:
        raise ValueError(f"--threads must be from 1 to {most}, the CPUs that this process may use, got {threads}")
    if not 0 <= args.first < len(profile.cells):
        raise ValueError(f"--first must be from 0 to {len(profile.cells) - 1}, got {args.first}")
    cells = suite.select(profile.cells, args.op, args.mode, args.dtype)[args.first :]
    settings = Settings(args.device, threads, profile.rounds, profile.seconds, profile.least, tuple(args.baseline))
    known = suite.provider_names(cells, settings) if args.baseline else set()
    if unknown := sorted(set(args.baseline) - known):
        raise ValueError(f"--baseline must be of {', '.join(sorted(known))}; got {', '.join(unknown)}")
    output = Path(args.output_dir)
    resume = output / suite.REPORT if args.resume is True else Path(args.resume) if args.resume else None
    if resume is None and (output / suite.REPORT).exists():
        print(f"{output / suite.REPORT} is overwritten; --resume would go on with it", file=sys.stderr)
    options = {"profile": args.profile, "command": command(args), "resume": resume}
    options |= {"budget": args.seconds or profile.budget}
    try:
        found = suite.run(cells, settings, output, **options, progress=not args.no_progress)
    finally:
        if (output / suite.REPORT).exists():
            pages(output)
    if args.json:
        print(json.dumps(found.content))
    elif args.csv:
        print(report.to_csv(found.content), end="")
    else:
        print(report.table(found.content))
        print("\n" + ", ".join(str(output / name) for name in (suite.REPORT, "bench.csv", "bench.html")))
    if found.content["left"]:
        print(f"{len(found.content['left'])} cells are left, for time is up: --resume goes on", file=sys.stderr)


def command(args: argparse.Namespace) -> str:
    """The command line that measures the same, however this one was started; where its files go is left out."""
    words = ["gptfast", "bench", "--profile", args.profile, "--device", args.device]
    for name in ("op", "mode", "dtype", "baseline"):
        words += [word for value in getattr(args, name) for word in (f"--{name}", value)]
    return shlex.join(words)


def pages(output: Path) -> None:
    """bench.csv and bench.html, of the bench.json beside them."""
    content = suite.Report.read(output / suite.REPORT).content
    (output / "bench.csv").write_text(report.to_csv(content), encoding="utf-8")
    (output / "bench.html").write_text(page.html(content), encoding="utf-8")


def compare_files(before: str, after: str, as_json: bool = False) -> int:
    """Prints what became of each row; returns 1 if any got slower or is lost, else 0."""
    old, new = (suite.Report.read(Path(name)).content for name in (before, after))
    differences = compare.compare(old, new)
    if as_json:
        print(json.dumps([vars(difference) for difference in differences]))
    else:
        print(compare.text(old, new, differences))
    return int(any(difference.verdict in ("slower", "lost") for difference in differences))
