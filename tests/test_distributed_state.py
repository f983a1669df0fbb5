"""States of sharded runs: damaged, of other settings, half written, on a full disk. One rank shards like many."""

import json
import resource

import pytest
import torch.distributed as dist

from gptfast.training import STATE_FILE, Options, Parallel, loop
from tests.support.two_ranks import SETTINGS, on_text

FSDP = Parallel("fsdp", 0, 1)


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run that stopped behind its sixth step, and the state in it."""
    rate = loop.learning_rate

    def stop(step, settings):
        if step == 6:
            raise KeyboardInterrupt
        return rate(step, settings)

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        on_text(tmp_path, FSDP)
    monkeypatch.undo()
    (state,) = tmp_path.glob("training_state-*")
    return tmp_path, state


def test_only_the_last_state_is_kept_until_the_model_is_there(stopped):
    folder, state = stopped
    assert state.name == "training_state-000000006"
    on_text(folder, FSDP, resume=True)
    assert not list(folder.glob("training_state*"))
    assert (folder / "model.safetensors").exists()


def test_unfinished_run_is_not_overwritten(stopped):
    folder, _ = stopped
    with pytest.raises(FileExistsError, match="unfinished run"):
        on_text(folder, FSDP)


def test_state_of_another_kind_of_run_is_refused(stopped, tmp_path_factory):
    folder, _ = stopped
    with pytest.raises(ValueError, match="training_state-000000006 is of a sharded run: resume it as it was started"):
        on_text(folder, Parallel(), resume=True)
    other = tmp_path_factory.mktemp("one-file")
    (other / STATE_FILE).write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"training_state\.pt is not of a sharded run: resume it as it was started"):
        on_text(other, FSDP, resume=True)
    assert (other / STATE_FILE).read_bytes() == b"precious"


def test_damage_is_named(stopped):
    folder, state = stopped
    run = (state / "run.json").read_text()
    (state / "run.json").write_text(run[:-9])
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        on_text(folder, FSDP, resume=True)
    (state / "run.json").write_text(json.dumps({**json.loads(run), "run": {}}))
    with pytest.raises(ValueError, match="was made under other settings"):
        on_text(folder, FSDP, resume=True)
    (state / "run.json").write_text(run)
    (shard,) = state.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training_state-000000006 is damaged"):
        on_text(folder, FSDP, resume=True)


def test_disk_full_keeps_the_last_state(tmp_path, monkeypatch):
    rate, limits = loop.learning_rate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk_at_step_4(step, settings):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return rate(step, settings)

    monkeypatch.setattr(loop, "learning_rate", fill_disk_at_step_4)
    try:
        with pytest.raises(OSError, match="cannot write the state of step 6"):
            on_text(tmp_path, FSDP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("training_state*")] == ["training_state-000000003"]
    on_text(tmp_path, FSDP, resume=True)
    rows = (tmp_path / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, SETTINGS.steps + 1))


def test_options_are_checked():
    for name in ("save_every", "evaluate_every", "log_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Options(**{name: 0})
