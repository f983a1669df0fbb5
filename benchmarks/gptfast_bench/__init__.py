"""The benchmark suite behind ``gptfast bench``: figures that a sceptic believes.

    harness.py   cells and providers; the gate, the clock, the limits, the environment
    op.py        what the small ops' files share; then one file an op: attention, normalization, decode, …
    model.py     GPT-1 whole: forward, loss, training, prefill, decoding, generating, memory, cold starts
    suite.py     which cells a run has; one process measures, another keeps what it has found
    report.py    a finished run as a table, CSV, the README's tables; page.py as an HTML page with pictures
    compare.py   two runs: what got slower, beyond noise
    training_step.py   a whole training step, optimizer and all, each contender in a process of its own: a command apart
    gpu.py       what ``make gpu`` runs: the tests first

Imports flow one way, ``gptfast_bench → gptfast → gptfast_kernels``, but for the command line, which starts this.
"""
