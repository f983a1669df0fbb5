"""What a run leaves in its folder: while it goes, a state to resume from; at its end, the model and a summary.

A state is complete before it takes the last one's name, so that at any moment, a crash or a full disk included, the
folder holds a good one. Sharded runs write theirs by ``torch.distributed.checkpoint``, each rank its part.
"""

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import SAFETENSORS, read_pickle
from .parallel import Parallel
from .settings import Settings

STATE_FILE = "training_state.pt"
SUMMARY_FILE = "training.json"
SHARDS = "training_state-"  # folder names of sharded states: this and the step
RUN_FILE = "run.json"  # in such a folder, written last


def check_output(folder: str | os.PathLike, resume: bool) -> None:
    """Raises FileExistsError where a run would overwrite another, or repeat what is done."""
    unfinished = is_unfinished(folder)
    finished = (Path(folder) / SAFETENSORS).exists()
    if unfinished and not resume:
        raise FileExistsError(f"{folder} holds an unfinished run: resume it, or choose another folder")
    if finished and not unfinished:
        raise FileExistsError(f"{folder} holds a finished model: choose another folder")


def is_unfinished(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a state to resume from."""
    return (Path(folder) / STATE_FILE).exists() or bool(_sharded(Path(folder)))


def fingerprint(settings: Settings, config: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    return json.loads(json.dumps({**asdict(settings), "config": config.to_dict(), **data}))


@dataclass
class State:
    """Saves and restores a run. ``run`` is its fingerprint."""

    folder: Path
    model: Any
    optimizer: torch.optim.Optimizer
    run: dict[str, Any]
    parallel: Parallel

    def save(self, step: int, losses: list[float]) -> None:
        """Replaces the last state. OSError: it could not be written; the last one is still there."""
        if self.parallel.sharded:
            self._save_shards(step, losses)
        elif self.parallel.is_main:
            self._save_file(step, losses)
        self.parallel.barrier()

    def load(self) -> tuple[int, list[float]] | None:
        """Restores the last state; returns (steps taken, losses since the last row of the log), or None without one.

        Raises:
            ValueError: the state is damaged, or of a run under other settings, or sharded where this one is not or the
            other way round. OSError: it cannot be read.
        """
        file, folders = self.folder / STATE_FILE, _sharded(self.folder)
        if self.parallel.sharded:
            if file.exists():
                raise ValueError(
                    f"{file} is not of a sharded run: resume it as it was started, without parallel fsdp or tensor"
                )
            return self._load_shards(folders[-1]) if folders else None
        if folders:
            raise ValueError(
                f"{folders[-1]} is of a sharded run: resume it as it was started, with parallel fsdp or tensor"
            )
        return self._load_file(file) if file.exists() else None

    def remove(self) -> None:
        if self.parallel.is_main:
            (self.folder / STATE_FILE).unlink(missing_ok=True)
            for folder in _sharded(self.folder):
                shutil.rmtree(folder)

    # -- one file ---------------------------------------------------------------------------------------------------

    def _save_file(self, step: int, losses: list[float]) -> None:
        state = {
            "step": step,
            "losses": losses,
            "run": self.run,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        file = self.folder / STATE_FILE
        new = file.with_suffix(".new")
        try:
            with new.open("wb") as handle:
                torch.save(state, handle)
                handle.flush()
                os.fsync(handle.fileno())
            new.replace(file)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch's writer wraps the handle's
            new.unlink(missing_ok=True)
            if not isinstance(cause, OSError):
                raise
            kept = "the last good one is kept" if file.exists() else "there is none before it"
            message = f"cannot write the state of step {step}, {kept}: {cause.strerror}"
            raise OSError(cause.errno, message, str(file)) from error
        _flush_folder(self.folder)

    def _load_file(self, file: Path) -> tuple[int, list[float]]:
        state = read_pickle(file)
        if not isinstance(state, dict) or not state.keys() >= {"step", "losses", "run", "model", "optimizer"}:
            raise ValueError(f"{file} is damaged, or not of a training run")
        self._check_run(file, state["run"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["losses"]

    def _check_run(self, file: Path, run: dict[str, Any]) -> None:
        differing = [name for name in self.run if run.get(name) != self.run[name]]
        if differing:
            was, now = ({name: r.get(name) for name in differing} for r in (run, self.run))
            raise ValueError(f"{file} was made under other settings: {was}, now {now}")

    # -- a folder of shards -----------------------------------------------------------------------------------------

    def _save_shards(self, step: int, losses: list[float]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        folder = self.folder / f"{SHARDS}{step:09d}"
        new = folder.with_suffix(".new")
        if self.parallel.is_main:
            shutil.rmtree(new, ignore_errors=True)
        self.parallel.barrier()
        try:
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=new)
        except dcp.CheckpointException as error:
            if self.parallel.is_main:
                shutil.rmtree(new, ignore_errors=True)
            causes = [cause for cause, _ in error.failures.values()]
            first = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
            raise OSError(
                getattr(first, "errno", None) or errno.EIO, f"cannot write the state of step {step}: {first}", str(new)
            ) from error
        if not self.parallel.is_main:
            return
        (new / RUN_FILE).write_text(json.dumps({"step": step, "losses": losses, "run": self.run}))
        for path in new.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        new.rename(folder)
        _flush_folder(self.folder)
        for older in _sharded(self.folder)[:-1]:
            shutil.rmtree(older)

    def _load_shards(self, folder: Path) -> tuple[int, list[float]]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        try:
            saved = json.loads((folder / RUN_FILE).read_text())
            step, losses, run = saved["step"], saved["losses"], saved["run"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / RUN_FILE} is damaged: {error}") from error
        self._check_run(folder, run)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        try:
            dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        except dcp.CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise ValueError(f"{folder} is damaged: {type(first).__name__}: {first}") from error
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        return step, losses


def _sharded(folder: Path) -> list[Path]:
    """Complete sharded states, the newest last."""
    return sorted(path for path in folder.glob(f"{SHARDS}*") if path.suffix != ".new")


def _flush_folder(folder: Path) -> None:
    """Makes a rename in it outlast a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
