"""A benchmark run: which cells it has, what it keeps when a provider crashes or somebody ends it, and going on."""

import dataclasses
import json
import sys
from typing import ClassVar

import pytest
import torch

from gptfast.cli import main
from gptfast_bench import attention, cli, gpu, suite
from gptfast_bench.harness import Cell, Settings
from gptfast_kernels.attention import KERNELS, config
from tests.support import DEVICE

OPS = "tests.support.bench_ops"
SETTINGS = Settings(rounds=2, seconds=0.0, least=1)
ENVIRONMENT = {"kind": "cpu", "threads": 1, "torch": "2", "commit": "abc", "started": "today"}
LIMITS = {"copy_gb_s": 10.0, "read_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.1}}


def cell(*providers, **what):
    return Cell(OPS, "forward", "float32", {"providers": list(providers), **what})


# -- cells --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("profile", ["quick", "full", "inference", "smoke"])
def test_cells_survive_json_and_are_told_apart_by_their_keys(profile, cuda):
    cells = suite.profiles(cuda)[profile].cells
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        again = Cell(**json.loads(json.dumps(dataclasses.asdict(cell))))
        assert again.key == cell.key


def test_every_op_and_mode_is_there():
    full = {(cell.op, cell.mode) for cell in suite.profiles(True)["full"].cells}
    modes = ("forward", "train", "prefill", "decode", "generate", "first token", "launch", "parts", "memory", "start")
    assert full >= {("model", mode) for mode in modes}
    assert full >= {(op, "forward") for op in suite.OPS} | {(op, "launch") for op in suite.OPS}
    quick = {cell.op for cell in suite.profiles(False)["quick"].cells}
    assert quick == {*suite.OPS, "model"}


def test_what_is_published_leaves_no_rival_out():
    assert not any(cell.without for cell in suite.profiles(False)["inference"].cells)


def test_a_gpu_is_asked_first_what_is_claimed_first():
    full, inference = (suite.profiles(True)[name].cells for name in ("full", "inference"))
    claimed = [(cell.mode, *list(cell.shape.values())[1:]) for cell in inference]
    assert {cell.dtype for cell in inference} == {"bfloat16"}
    assert claimed[:5] == [
        ("forward", 64, 512),
        ("forward", 1, 128),
        ("decode", 1, 1, 256),
        ("decode", 64, 1, 256),
        ("first token", 1, 128),
    ]
    assert {mode for mode, *_ in claimed[5:]} == {"launch", "generate", "start", "autotuned"}
    assert list(full[: len(inference)]) == inference
    attention_first = full[len(inference)]
    assert attention_first.op == "attention"
    assert attention_first.shape.items() >= {"B": 64, "T": 512, "D": 64, "causal": True, "dropout_p": 0.0}.items()


def test_what_compiles_for_minutes_comes_last_of_the_claims():
    *before, two, last = suite.profiles(True)["inference"].cells
    assert [cell.mode for cell in (two, last)] == ["autotuned", "autotuned"]
    for claim in before:
        assert claim.mode == "generate" or "torch.compile" in claim.without


def test_attention_is_swept_over_lengths():
    cells = [cell for cell in suite.profiles(True)["full"].cells if cell.op == "attention"]
    swept = {(cell.shape["T"], cell.shape["D"], cell.shape["causal"], cell.mode) for cell in cells}
    for T in (128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        for D in (64, 128):
            for causal in (True, False):
                assert {(T, D, causal, "forward"), (T, D, causal, "backward")} <= swept
    assert {cell.shape["B"] * cell.shape["T"] for cell in cells if cell.mode != "launch"} == {attention.GPU_TOKENS}


def test_a_tile_replaces_one_kernels_row():
    def rows():
        return [config_of(kernel) for kernel in KERNELS]

    def config_of(kernel):
        return attention.attention.config(kernel, "cuda:90", torch.bfloat16, 64, 1, False)

    before = rows()
    with attention.tiles("backward_dq", (128, 64, 8, 2)):
        forward, dq, dkv = rows()
    assert (forward, dkv) == (before[0], before[2])
    assert (dq.block_m, dq.block_n, dq.num_warps, dq.num_stages) == (128, 64, 8, 2)
    assert rows() == before
    assert attention.attention.config is config


def test_selecting():
    cells = suite.profiles(False)["full"].cells
    chosen = suite.select(cells, ["attention"], ["forward"], ["float32", "bfloat16"])
    assert {(cell.op, cell.mode) for cell in chosen} == {("attention", "forward")}
    assert {cell.dtype for cell in chosen} == {"float32", "bfloat16"}
    assert suite.select(cells, [], [], []) == list(cells)
    with pytest.raises(ValueError, match=r"--op must be of activation, .*, got flash"):
        suite.select(cells, ["flash"], [], [])
    with pytest.raises(ValueError, match="--mode must be of"):
        suite.select(cells, [], ["sideways"], [])
    with pytest.raises(ValueError, match="has no --mode decode here"):
        suite.select(cells, ["attention"], ["decode"], [])


# -- a run --------------------------------------------------------------------------------------------------------


class Impatient(suite._Worker):
    """Gives the provider called "hanging" half a second, and the others, with the imports, all they need."""

    patience = 600.0

    def _start(self, limits):
        self.patience = 600.0
        super()._start(limits)

    def _listen(self):
        for event in super()._listen():
            self.patience = 0.5 if event.get("provider") == "hanging" else 600.0
            yield event

    def _patience(self):
        return self.patience


def test_a_provider_that_crashes_or_hangs_costs_its_own_row(tmp_path, monkeypatch):
    """And what was measured before is in the file already; what stands behind it in the cell is measured still."""
    monkeypatch.setattr(suite, "_Worker", Impatient)
    seen = []
    write = suite.Report.write

    def watch(report):
        write(report)
        seen.append([row["provider"] for row in json.loads(report.path.read_text())["rows"]])

    monkeypatch.setattr(suite.Report, "write", watch)
    cells = [cell("right"), cell("crashing_later", "right", "crashing", "wrong", "hanging")]
    report = suite.run(cells, SETTINGS, tmp_path, profile="smoke", progress=False)
    assert ["right"] in seen  # before the crash
    first, *rest = report.rows
    assert (first["provider"], first["status"]) == ("right", "ok")
    rows = {row["provider"]: row for row in rest}
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "crashing": "failed",
        "hanging": "failed",
        "crashing_later": "failed",
    }
    assert "signal 6" in rows["crashing"]["reason"]
    assert "signal 6" in rows["crashing_later"]["reason"]  # in the rounds, where all are timed in turn
    assert "no sign of life" in rows["hanging"]["reason"]
    assert report.content["complete"]
    assert json.loads((tmp_path / suite.REPORT).read_text())["rows"] == report.rows


class Fake:
    """A measuring process that measures nothing; ``stop_at`` is the cell at which somebody presses Ctrl-C."""

    measured: ClassVar[list] = []
    stop_at = None
    device = "a CPU"

    def __init__(self, settings, dtypes):
        self.ended = False

    def ask(self):
        return {"environment": ENVIRONMENT | {"device": self.device}, "limits": LIMITS}

    def measure(self, cell):
        if cell.key == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(cell.key)
        row = {"op": cell.op, "mode": cell.mode, "dtype": cell.dtype, "shape": dict(cell.shape)}
        return [row | {"provider": "right", "baseline": "right", "status": "unavailable", "reason": "a test"}]

    def end(self):
        self.ended = True


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(suite, "_Worker", Fake)
    monkeypatch.setattr(Fake, "measured", [])
    monkeypatch.setattr(Fake, "stop_at", None)
    return Fake


CELLS = [cell("right", n=n) for n in range(4)]


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path, fake, monkeypatch):
    fake.stop_at = CELLS[2].key
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        suite.run(CELLS, SETTINGS, tmp_path, profile="smoke", progress=False)
    kept = suite.Report.read(tmp_path / suite.REPORT).content
    assert [row["shape"]["n"] for row in kept["rows"]] == [0, 1]
    assert not kept["complete"]
    assert kept["left"] == [cell.key for cell in CELLS[2:]]

    fake.stop_at, fake.measured[:] = None, []
    resumed = suite.run(
        CELLS, SETTINGS, tmp_path / "more", profile="smoke", resume=tmp_path / suite.REPORT, progress=False
    )
    assert fake.measured == [cell.key for cell in CELLS[2:]]
    assert [row["shape"]["n"] for row in resumed.rows] == [0, 1, 2, 3]
    assert resumed.content["complete"]

    monkeypatch.setattr(Fake, "device", "another CPU")
    with pytest.raises(ValueError, match="measured elsewhere: device was a CPU"):
        suite.run(CELLS, SETTINGS, tmp_path, profile="smoke", resume=tmp_path / suite.REPORT, progress=False)
    assert suite.Report.read(tmp_path / suite.REPORT).content == kept


def test_time_that_is_up_leaves_cells(tmp_path, fake):
    report = suite.run(CELLS, SETTINGS, tmp_path, profile="smoke", budget=-1.0, progress=False)
    assert report.rows == []
    assert report.content["left"] == [cell.key for cell in CELLS]
    assert not report.content["complete"]


def test_files_that_are_no_reports_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="is not JSON"):
        suite.Report.read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is no report of this suite"):
        suite.Report.read(tmp_path / "b.json")


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_and_keeps_a_report(tmp_path, fake, capsys):
    arguments = ["bench", "--profile", "smoke", "--device", "cpu", "--op", "attention", "--no-progress"]
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "CPU figures: a CPU, 1 threads" in out
    assert "unavailable: a test" in out
    assert {file.name for file in tmp_path.iterdir()} == {suite.REPORT, "bench.csv", "bench.html"}
    assert main([*arguments, "--output-dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
    assert main([*arguments, "--output-dir", str(tmp_path), "--csv"]) == 0
    assert capsys.readouterr().out.startswith("op,mode,dtype,")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "flash"], "--op must be of"),
        (["--threads", "0"], "--threads must be from 1 to"),
        (["--threads", "9999"], "--threads must be from 1 to"),
        (["--first", "9999"], "--first must be from 0 to"),
        (["--baseline", "nobody"], "--baseline must be of"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--resume"], "bench.json"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_measured(arguments, message, tmp_path, fake, capsys):
    profile = ["bench", "--profile", "smoke", "--output-dir", str(tmp_path), "--no-progress"]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main([*profile, *device, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert fake.measured == []


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_gpu_command_says_that_there_is_none(monkeypatch):
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu.main([])


def test_the_gpu_command_times_nothing_where_a_test_is_red(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gptfast", lambda argv: pytest.fail("was timed"))
    monkeypatch.setattr(gpu, "_tests", lambda **_: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(SystemExit, match="tests are red"):
        gpu.main(["--output-dir", str(tmp_path)])
    assert json.loads((tmp_path / "tests.json").read_text())["exit_codes"] == {"tests": 1}


def test_the_gpu_command_times_with_what_time_is_left(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gptfast", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr(gpu, "_tests", lambda **_: [sys.executable, "-c", ""])
    gpu.main(["--output-dir", str(tmp_path), "tests", "bench", "--", "--quick", "--first", "3"])
    (argv,) = asked
    assert argv[:3] == ["bench", "--device", "cuda"]
    assert argv[-3:] == ["--quick", "--first", "3"]
    seconds = next(float(arg.partition("=")[2]) for arg in argv if arg.startswith("--seconds="))
    assert 60 <= seconds <= gpu.MINUTES * 60
    with pytest.raises(SystemExit):
        gpu.main(["nothing"])


def test_a_report_says_what_measures_the_same(tmp_path, fake, monkeypatch):
    """However it was started: ``python -m gptfast_bench.gpu bench -- …`` is no command line of gptfast's."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "bench", "--", "--output-dir", "somewhere"])
    arguments = ["bench", "--profile", "smoke", "--device", "cpu", "--op", "attention", "--mode", "forward"]
    assert main([*arguments, "--no-progress", "--output-dir", str(tmp_path)]) == 0
    command = suite.Report.read(tmp_path / suite.REPORT).content["command"]
    assert command == "gptfast bench --profile smoke --device cpu --op attention --mode forward"
    assert main([*command.split()[1:], "--no-progress", "--output-dir", str(tmp_path)]) == 0


def test_limits_measured_twice_are_the_higher():
    first = {"copy_gb_s": 20.0, "read_gb_s": 30.0, "matmul_tflop_s": {"float32": 0.3}}
    again = {"copy_gb_s": 25.0, "read_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.2, "bfloat16": 1.0}}
    again["peak_tflop_s"] = {"bfloat16": 2.0}
    highest = {"copy_gb_s": 25.0, "read_gb_s": 30.0, "matmul_tflop_s": {"float32": 0.3, "bfloat16": 1.0}}
    highest["peak_tflop_s"] = {"bfloat16": 2.0}
    assert suite._highest(first, again) == suite._highest(again, first) == highest


def test_the_gpu_commands_tests_leave_time_to_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gptfast", lambda argv: asked.append(argv) or 0)
    monkeypatch.setattr(gpu, "_tests", lambda **_: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(gpu, "TEST_SECONDS", 0.2)
    gpu.main(["--output-dir", str(tmp_path)])
    assert asked
    assert "cut off" in json.loads((tmp_path / "tests.json").read_text())["exit_codes"]["tests"]


def test_pages_are_made_of_an_interrupted_run_too(tmp_path, fake, capsys, monkeypatch):
    fake.stop_at = suite.select(suite.profiles(False)["smoke"].cells, ["attention"], [], [])[1].key
    arguments = ["bench", "--profile", "smoke", "--device", "cpu", "--op", "attention", "--no-progress"]
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert (tmp_path / "bench.html").exists()
    assert cli.suite.Report.read(tmp_path / suite.REPORT).rows
