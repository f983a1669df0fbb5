"""An op for the benchmark suite's tests: providers that are right, wrong, refuse, crash or hang, as the cell says."""

import os
import time

import torch

from gptfast_bench.harness import Cell, Contender, Settings, Task, Unavailable


def task(cell: Cell, settings: Settings) -> Task:
    def right() -> Contender:
        return Contender(lambda: torch.ones(3, 4))

    def wrong() -> Contender:
        return Contender(lambda: torch.full((3, 4), 1.01))

    def absent() -> Contender:
        raise Unavailable("it is not installed")

    def refusing() -> Contender:
        raise RuntimeError("No available kernel.\nand much more")

    def crashing() -> Contender:
        return Contender(lambda: os.abort())

    def crashing_later() -> Contender:
        before_the_rounds = iter(range(2))  # the gate's call, and on a GPU one for the peak of memory

        def run() -> torch.Tensor:
            return torch.ones(3, 4) if next(before_the_rounds, None) is not None else os.abort()

        return Contender(run)

    def hanging() -> Contender:
        return Contender(lambda: time.sleep(600))

    makers = {f.__name__: f for f in (right, wrong, absent, refusing, crashing, crashing_later, hanging)}
    providers = {name: makers[name] for name in cell.shape["providers"]}
    return Task(providers, lambda: [torch.ones(3, 4, dtype=torch.float64)], moved=96, flops=12, tokens=3)
