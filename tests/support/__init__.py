"""Verification that every kernel's tests share. Importing any of it checks the interpreted kernels from then on.

    interpreter    a Triton interpreter that sees out-of-bounds accesses, races, and rounds bfloat16 as hardware does
    guard          tensors between regions of NaN, outputs that start as NaN
    accuracy       "at most twice torch's error" against a float64 oracle
    compile_gate   machine code for sm_80, sm_90, sm_100 and gfx942 with no GPU, and how many variants a sweep compiles
    mutants        breaks the source on purpose and expects a red test

A kernel adds ``tests/specs/<op>.py`` with two tables: ``CASES`` (compile_gate.Case) and ``MUTANTS`` (mutants.Mutant).
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from . import interpreter

    interpreter.install()
