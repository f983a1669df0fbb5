"""What of the benchmarks needs no GPU: which cells there are, and what a run keeps of cells that fail."""

import importlib
import json

import pytest
import torch

from benchmarks import attention as bench
from benchmarks import gpu
from benchmarks.harness import write_rows
from gptfast_kernels import attention
from tests.support import DEVICE


@pytest.mark.parametrize("op", gpu.OPS)
def test_cells_survive_json(op):
    """As which each reaches its process and its row."""
    cells = list(importlib.import_module(f"benchmarks.{op}").cells())
    assert cells
    assert json.loads(json.dumps(cells)) == cells


def test_attention_times_what_is_claimed_first():
    first, *_ = cells = list(bench.cells())
    assert first == {"T": 512, "D": 64, "causal": True, "dropout_p": 0.0, "direction": "forward"}
    sweep = {tuple(cell.values()) for cell in cells if "tile" not in cell}
    for T in (128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        for D in (64, 128):
            for causal in (True, False):
                assert {(T, D, causal, 0.0, "forward"), (T, D, causal, 0.0, "backward")} <= sweep


def test_a_tile_replaces_one_kernels_row():
    def rows(target):
        return [attention.config(kernel, target, torch.bfloat16, 64, 1, False) for kernel in attention.KERNELS]

    before = rows("cuda:90")
    with bench._tile(["backward_dq", 128, 64, 8, 2]):
        forward, dq, dkv = rows("cuda:90")
    assert (forward, dkv) == (before[0], before[2])
    assert (dq.block_m, dq.block_n, dq.num_warps, dq.num_stages) == (128, 64, 8, 2)
    assert rows("cuda:90") == before


def test_a_cell_that_fails_is_a_row():
    assert gpu.run_alone("activation", {"no": "M"}) == {"no": "M", "error": "exit code 1: KeyError: 'M'"}
    assert gpu.run_alone("activation", {"no": "M"}, seconds=0.01)["error"] == "took longer than 0 s"


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would time the cell")
def test_a_cell_without_a_gpu_says_so():
    error = gpu.run_alone("attention", next(bench.cells()))["error"]
    assert "CUDA" in error or "NVIDIA" in error


def test_rows_go_on_from_a_cell_and_are_held_against_the_limits(monkeypatch):
    times = {"a": {"ms": 1.0, "tflop_s": 400.0, "gb_s": 300.0}, "b": {"ms": 1.0, "tflop_s": 80.0}, "c": {"error": "no"}}
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "run_alone", lambda op, cell: cell | {"times": json.loads(json.dumps(times))})
    _, *rows = gpu.rows("attention", 3, {"matmul_tflop_s": 800.0, "copy_gb_s": 3000.0})
    cells = list(bench.cells())
    assert [row["cell"] for row in rows] == list(range(3, len(cells)))
    assert rows[0].items() >= cells[3].items()
    a, b, c = rows[0]["times"].values()
    assert (a["percent_of_limit"], b["percent_of_limit"]) == (50.0, 10.0)
    assert c == {"error": "no"}


def test_rows_are_kept_as_they_come(tmp_path):
    def cut_off():
        yield {"cell": 0}
        raise KeyboardInterrupt

    path = tmp_path / "results" / "op.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_rows(path, cut_off())
    write_rows(path, [{"cell": 1}], append=True)
    assert path.read_text() == '{"cell": 0}\n{"cell": 1}\n'
