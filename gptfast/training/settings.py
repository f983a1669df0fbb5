"""What decides the numbers of a run, and the learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("cosine", "linear")


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run; resuming under others is refused. The defaults are for training from nothing.

    Raises ValueError where a number is not accepted.
    """

    steps: int
    batch_size: int = 4  # sequences (or examples) a step, over all devices
    context: int = 512  # tokens a sequence, at most
    learning_rate: float = 1e-3  # at its highest
    schedule: str = "cosine"  # of the learning rate behind the warm-up; or "linear"
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices; gains and biases are left alone
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    lm_coef: float = 0.5  # λ: weight of the language-model loss beside a task's own
    classifier_dropout: float = 0.1  # on the state a classification head reads
    accumulate: int = 1  # parts a batch is cut into, one after the other
    held_out: float = 0.05  # of each text file, its end
    seed: int = 0
    dtype: str = "float32"  # of the matmuls; weights and optimiser stay float32

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "lm_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("held_out", "beta1", "beta2", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


def fine_tuning_settings(examples: int, *, epochs: int = 3, batch_size: int = 32, **others: Any) -> Settings:
    """The paper's settings for fine-tuning (Radford et al. 2018, section 4.1): 3 epochs of batches of 32, Adam with
    decoupled weight decay 0.01, learning rate 6.25e-5, linear warm-up over 0.2 % of the steps, then linear decay.

    Args:
        examples: how many there are; what is left over of an epoch when its batches are full waits for the next.
        others: fields of ``Settings`` that are to differ.

    Raises:
        ValueError: there are fewer examples than a batch needs, or a number is not accepted.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size must be from 1 to the number of examples, {examples}, got {batch_size}")
    steps = epochs * (examples // batch_size)
    paper = {
        "learning_rate": 6.25e-5,
        "schedule": "linear",
        "warmup_steps": math.ceil(0.002 * steps),
        "weight_decay": 0.01,
        "beta2": 0.999,
        "held_out": 0.0,
    }
    return Settings(steps=steps, batch_size=batch_size, **{**paper, **others})


def learning_rate(step: int, settings: Settings) -> float:
    """Of step 0 … steps - 1: linear warm-up, then down to 0, in a line as the paper fine-tunes, or by half a cosine as
    it pre-trains (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * left
