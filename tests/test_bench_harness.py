"""The benchmark suite's gate, clock and limits; and that every op and mode agrees with float64, at a toy's size."""

import contextlib
import dataclasses
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import gptfast
from gptfast_bench import harness, model, normalization, suite
from gptfast_bench.harness import Cell, Contender, Limits, Settings, choose, error_of, noise_of, run_cell, time_in_turn
from gptfast_kernels import _triton, use_backend
from tests.support import DEVICE

SETTINGS = Settings(rounds=2, seconds=0.0, least=1, baselines=("torch eager", "SDPA", "transformers", "hand-made SDPA"))
SMOKE = suite.profiles(cuda=False)["smoke"].cells
OPS = "tests.support.bench_ops"


def by_provider(rows):
    return {row["provider"]: row for row in rows}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would time its own backend; make gpu does")
@pytest.mark.parametrize("cell", [c for c in SMOKE if c.mode not in ("memory", "start")], ids=lambda cell: cell.key)
def test_every_op_and_mode_passes_its_gate(cell):
    if cell.op == "model":
        pytest.importorskip("transformers", reason="the baseline of the model's cells")
    rows = by_provider(run_cell(cell, SETTINGS))
    assert len(rows) > 1
    assert "gptfast" in rows
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["error"] <= row["tolerance"]
        assert {"ms", "host_us", "parts"} & set(row)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's providers")
@pytest.mark.parametrize("mode", ["forward", "loss", "decode", "generate"])
def test_coarser_weights_are_rows_of_their_own(mode):
    cell = next(cell for cell in SMOKE if cell.op == "model" and cell.mode == mode)
    cell = dataclasses.replace(cell, without=("torch.compile", "transformers"))
    rows = by_provider(run_cell(cell, dataclasses.replace(SETTINGS, baselines=())))
    for name in ("gptfast bfloat16", "gptfast int8"):
        assert rows[name]["status"] == "ok", rows[name]
        assert rows[name]["tolerance"] == 6e-2
        if mode in ("forward", "decode"):
            assert rows["gptfast"]["error"] < 1e-5 < 1e-4 < rows[name]["error"]
            assert rows[name]["bytes"] < rows["gptfast"]["bytes"]
    assert rows["transformers"]["status"] == "unavailable"


@pytest.mark.parametrize("mode", ["forward", "loss", "train", "prefill", "decode", "generate"])
def test_transformers_runs_in_bfloat16(mode):
    """It is the baseline of a GPU's cells."""
    pytest.importorskip("transformers", reason="the baseline of the model's cells")
    cell = next(cell for cell in SMOKE if cell.op == "model" and cell.mode == mode)
    cell = dataclasses.replace(cell, dtype="bfloat16", without=("torch.compile", "gptfast", "hand-made"))
    (row,) = (row for row in run_cell(cell, SETTINGS) if row["provider"] == "transformers")
    assert row["status"] == "ok", row


def test_a_gpus_graphs_are_of_what_can_be_captured():
    """``generate`` replays graphs by itself and would fail in a capture; what a graph holds is not a call's memory."""
    settings = dataclasses.replace(SETTINGS, device="meta")  # whatever is no CPU has a GPU's providers
    for cell in suite.profiles(cuda=True)["full"].cells:
        if cell.op == "model" and cell.mode not in ("start", "memory"):
            providers = model.task(cell, settings).providers
            graphs = {name for name in providers if name.endswith("CUDA graph")}
            captured = cell.mode in ("forward", "autotuned", "prefill", "decode", "launch")
            wanted = {"hand-made SDPA", "gptfast", "gptfast triton"} if captured else set()
            assert graphs == {f"{name} CUDA graph" for name in wanted}, cell
            autotuned = {name for name in providers if "max-autotune" in name}
            assert bool(autotuned) == (cell.mode == "autotuned")


def test_ours_on_triton_is_asked_for_by_name():
    """Where a kernel cannot run, no other backend does in its place."""
    cell = next(cell for cell in SMOKE if cell.op == "model" and cell.mode == "forward")
    cell = dataclasses.replace(
        cell, without=("torch.compile", "transformers", "hand-made", "packed", "int8", "bfloat16")
    )
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.AROUND, "gptfast", lambda: asked.append(1) or use_backend("triton"))
        patch.setattr(_triton, "INTERPRETED", False)
        rows = by_provider(run_cell(cell, dataclasses.replace(SETTINGS, baselines=())))
    if DEVICE == "cpu":
        assert rows["gptfast"]["status"] == "unavailable"
        assert "backend='triton' cannot run here" in rows["gptfast"]["reason"]
    assert asked


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's providers")
def test_a_compiled_backward_pass_is_timed_alone():
    """Its graph is kept between calls, which torch.compile's own default refuses."""
    cell = next(c for c in SMOKE if c.op == "normalization" and c.mode == "backward")
    rows = by_provider(run_cell(cell, dataclasses.replace(SETTINGS, baselines=("torch.compile",))))
    assert rows["torch.compile"]["status"] == "ok", rows["torch.compile"]


@pytest.mark.parametrize("broken", ["repeats", "is one position off"])
def test_a_text_that_is_generated_wrongly_is_caught(broken):
    """With a head that is the token table, random weights name the last token again, unless positions outweigh it."""
    pytest.importorskip("transformers", reason="the baseline of the model's cells")
    cell = next(cell for cell in SMOKE if cell.op == "model" and cell.mode == "generate")
    task = model.task(cell, SETTINGS)
    contender = task.providers["gptfast"]()
    made, T = contender.run(), cell.shape["T"]
    assert error_of(contender.judge(made), task.expected()) < 1e-5
    prompt, new = made[:, :T], made[:, T:]
    wrong = made[:, T - 1 : T].expand_as(new) if broken == "repeats" else new.roll(1, -1)
    assert error_of(contender.judge(torch.cat([prompt, wrong], 1)), task.expected()) > 6e-2


@pytest.mark.parametrize("how", ["int8", "packed", "one position in bfloat16", "320 positions"])
def test_a_profile_calls_what_multiplies_a_matmul(how):
    """Every operator that a block on a CPU multiplies with, none of which is an embedding, a copy or something else."""
    config = gptfast.OpenAIGPTConfig(vocab_size=53, n_positions=320, n_embd=48, n_layer=1, n_head=3)
    body, x = gptfast.OpenAIGPTModel(config).eval(), torch.zeros(1, 320 if how[0] == "3" else 1, dtype=torch.int64)
    changes = {"int8": gptfast.quantize, "packed": gptfast.pack, "one position in bfloat16": torch.nn.Module.bfloat16}
    body = changes.get(how, torch.nn.Identity())(body)
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        body(x)
    names = [event.key for event in profile.key_averages() if re.search(r"mm|bag", event.key)]
    assert names
    for name in names:
        assert next(part for part, pattern in model.PARTS.items() if re.search(pattern, name.lower())) == "matmul"


def test_a_wrong_kernel_is_caught_and_never_timed(monkeypatch):
    """1 % off, which a tolerance of a few bfloat16 roundings would let through in float32."""
    timed = []
    right = normalization.layer_norm

    def wrong(*args, **how):
        timed.append(1)
        return right(*args, **how) * 1.01

    monkeypatch.setattr(normalization, "layer_norm", wrong)
    cell = next(c for c in SMOKE if c.op == "normalization" and c.mode == "backward")
    rows = by_provider(run_cell(cell, SETTINGS))
    assert rows["gptfast"]["status"] == "wrong"
    assert "off by 1" in rows["gptfast"]["reason"]
    assert "ms" not in rows["gptfast"]
    assert len(timed) == 1  # by the gate
    assert rows["torch eager"]["status"] == "ok"


def test_a_coarse_or_unwritten_row_counts_however_many_are_right():
    exact = torch.randn(1000, 8, dtype=torch.float64)
    one = exact.clone()
    one[7] = 0
    assert error_of([exact], [exact]) == 0
    assert error_of([one], [exact]) > 0.2
    one[7] = torch.nan
    assert error_of([one], [exact]) == math.inf
    assert error_of([exact.float()], [exact]) < 1e-7
    with pytest.raises(ValueError, match="results must have the shape"):
        error_of([exact[:5]], [exact])
    with pytest.raises(ValueError, match="results must be 2 tensors"):
        error_of([exact], [exact, exact])


def test_a_row_near_zero_is_held_to_the_others_length():
    exact = torch.ones(4, 8, dtype=torch.float64)
    exact[0] = 0
    assert error_of([exact + 1e-7], [exact]) < 1e-6


def test_providers_that_cannot_run_say_why():
    cell = Cell(OPS, "forward", "float32", {"providers": ["right", "absent", "refusing", "wrong"]})
    rows = by_provider(run_cell(cell, dataclasses.replace(SETTINGS, baselines=())))
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "absent": "unavailable",
        "refusing": "unavailable",
        "wrong": "wrong",
    }
    assert rows["absent"]["reason"] == "it is not installed"
    assert rows["refusing"]["reason"] == "RuntimeError: No available kernel."
    assert rows["right"]["rounds"] == 1
    assert rows["right"]["gb_s"] == pytest.approx(96 / rows["right"]["ms"] / 1e6)
    assert all(row["baseline"] == "right" for row in rows.values())


def test_what_a_profile_leaves_out_is_a_row():
    cell = Cell(OPS, "forward", "float32", {"providers": ["right", "wrong"]}, without=("wro",))
    rows = by_provider(run_cell(cell, dataclasses.replace(SETTINGS, baselines=())))
    assert rows["wrong"]["status"] == "unavailable"
    assert "left out" in rows["wrong"]["reason"]


def test_a_kernel_counts_once_in_a_profile(monkeypatch):
    """Kineto gives its time to the operator that launched it, too."""
    kernel = {"is_user_annotation": False, "self_cpu_time_total": 0.0, "self_device_time_total": 300.0}
    events = [
        SimpleNamespace(key="aten::addmm", device_type=DeviceType.CPU, **kernel),
        SimpleNamespace(key="nvjet_hsh_128x256", device_type=DeviceType.CUDA, **kernel),
        SimpleNamespace(key="void pow_tensor_scalar_kernel_impl", device_type=DeviceType.CUDA, **kernel),
        SimpleNamespace(key="a step", device_type=DeviceType.CUDA, **(kernel | {"is_user_annotation": True})),
    ]
    profile = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    parts = model._profile(lambda: None, calls=3)["parts"]
    assert {part: ms for part, ms in parts.items() if ms} == {"matmul": pytest.approx(0.1), "GELU": pytest.approx(0.1)}


def test_a_model_on_a_gpu_is_timed_until_the_gpu_is_done(monkeypatch):
    """Each call's share of so many, behind a flush and a wait that are not timed."""
    order = []
    flush = SimpleNamespace(zero_=lambda: order.append("flush"))
    clock = iter([10.0, 10.6])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: order.append("look") or next(clock))
    assert harness._waited_ms(lambda: order.append("call"), flush, 3) == pytest.approx(200.0)
    assert order == ["flush", "wait", "look", "call", "call", "call", "wait", "look"]


def test_what_nvidia_smi_says(monkeypatch):
    asked = []

    def answer(command, **how):
        asked.append(command)
        return SimpleNamespace(stdout="1980 MHz, 34, 120.5 W\n")

    monkeypatch.setattr(harness.subprocess, "run", answer)
    found = harness._nvidia_smi("cuda:1", clock="clocks.sm", temperature="temperature.gpu", power="power.draw")
    assert found == {"clock": "1980 MHz", "temperature": "34", "power": "120.5 W"}
    (command,) = asked
    assert {"--query-gpu=clocks.sm,temperature.gpu,power.draw", "--id=1"} <= set(command)

    def absent(command, **how):
        raise FileNotFoundError

    monkeypatch.setattr(harness.subprocess, "run", absent)
    assert harness._nvidia_smi("cuda", driver="driver_version") == {"driver": None}


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("GPTFAST_COMMIT", "abc123")
    assert harness.environment("cpu", 1)["commit"] == "abc123"


def test_calls_are_timed_in_turn_each_round_from_another_one():
    order = []
    samples = time_in_turn({name: lambda name=name: _slow(order, name) for name in "abc"}, rounds=3)
    assert order == list("abcbcacab")
    assert all(len(taken) == 3 for taken in samples.values())
    samples = time_in_turn({"a": lambda: _slow([], "a")}, rounds=50, seconds=0.0, least=2)
    assert len(samples["a"]) == 2


def _slow(order, name):
    order.append(name)
    torch.randn(600, 600) @ torch.randn(600, 600)  # above the millisecond that needs no repeats
    torch.randn(600, 600) @ torch.randn(600, 600)


def test_noise_is_what_a_provider_differs_from_itself():
    draw = random.Random(1)
    steady = [10 + draw.gauss(0, 0.01) for _ in range(30)]
    shaky = [10 + draw.gauss(0, 2) for _ in range(30)]
    assert noise_of([5.0] * 10) == 0
    assert noise_of(steady) < 0.01 < 0.05 < noise_of(shaky)
    assert noise_of(steady) == noise_of(list(steady))
    assert noise_of([4.0, 5.0]) == pytest.approx(0.25)
    assert noise_of([4.0]) is None


def test_baselines_choose_what_runs_beside_ours():
    names = ["eager", "compile", "gptfast", "gptfast torch.compile"]
    assert choose(names, ()) == ("eager", names)
    assert choose(names, ("compile",)) == ("compile", ["compile", "gptfast"])
    assert choose(names, ("compile", "eager"))[0] == "compile"
    assert choose(["eager", "gptfast tile 1", "gptfast tile 2"], ("none",))[1] == ["gptfast tile 1", "gptfast tile 2"]


def test_shares_of_the_limits():
    limits = Limits(copy_gb_s=10.0, read_gb_s=20.0, matmul_tflop_s={"float32": 0.1})
    row = {"ms": 2.0, "bytes": 20e6, "flops": 50e6, "tflop_s": 0.025, "dtype": "float32", "computes_in": "float32"}
    assert limits.share(row) == (pytest.approx(0.5), "memory")  # 1 ms to read, 0.5 ms to compute
    assert limits.flop_share(row) == pytest.approx(0.25)
    assert limits.share(row | {"flops": 200e6}) == (pytest.approx(1.0), "arithmetic")
    assert limits.share(row | {"flops": 200e6, "computes_in": "int8"}) == (pytest.approx(1.0), "arithmetic")
    assert limits.share(row | {"computes_in": "bfloat16"}) is None  # a rate that was not measured
    assert limits.share(row | {"flops": 0, "computes_in": "bfloat16"})[1] == "memory"
    assert limits.share({"ms": 2.0}) is None
    known = dataclasses.replace(limits, peak_tflop_s={"float32": 0.2})
    assert known.flop_share(row) == pytest.approx(0.125)  # of the data sheet's
    assert known.share(row | {"flops": 200e6}) == (pytest.approx(1.0), "arithmetic")  # of what was measured


def test_a_contender_defaults_to_its_output():
    out = torch.ones(2)
    assert Contender(lambda: out).judge(out) == [out]
    assert list(Contender(lambda: out).judge((out, out))) == [out, out]
