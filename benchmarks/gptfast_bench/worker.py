"""The process that measures: reads cells as JSON lines, writes what it finds as JSON lines.

    {"settings": …}                       first line in
    {"cell": …, "skip": […]}              then one a cell
    {"provider": …}                       out: whose call is under way, so that a crash or a hang is laid to that one
    {"rows": […]}                         out: one a cell

What it writes on standard output is for its parent alone: libraries that print are sent to standard error.
"""

import json
import os
import sys
from typing import Any

from .harness import Cell, Settings, environment, measure_limits, pin_threads, run_cell


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict[str, Any]) -> None:
        pipe.write(json.dumps(event) + "\n")
        pipe.flush()

    first = json.loads(sys.stdin.readline())
    settings = Settings(**first["settings"] | {"baselines": tuple(first["settings"]["baselines"])})
    if settings.device == "cpu":
        pin_threads(settings.threads)
    if first["limits"]:
        limits = measure_limits(settings.device, first["limits"])
        tell({"environment": environment(settings.device, settings.threads), "limits": vars(limits)})
    for line in sys.stdin:
        wanted = json.loads(line)
        tell({"rows": run_cell(Cell(**wanted["cell"]), settings, wanted["skip"], tell)})


if __name__ == "__main__":
    main()
