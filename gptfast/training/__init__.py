"""Training: pre-training on plain text, and fine-tuning as GPT-1's paper does it, on one device or many.

Read in this order: ``settings``, ``batch``, the data (``text``, ``tables``, ``tasks``), ``objective`` (what is
minimised), ``parallel`` (many devices), ``state`` (what survives a crash), ``report`` (what a person sees), ``loop``;
then ``api``, which puts them together, and ``predict``.
"""

from .api import fine_tune, train
from .loop import Options
from .parallel import Parallel, start
from .predict import load_fine_tuned, load_for_task, predict, predict_file
from .report import LOG_FILE, plot_log
from .settings import Settings, fine_tuning_settings
from .state import STATE_FILE, SUMMARY_FILE, check_output, is_unfinished
from .tasks import TASK_FILE, Task, read_examples
from .text import read_texts, split_held_out

__all__ = [
    "LOG_FILE",
    "STATE_FILE",
    "SUMMARY_FILE",
    "TASK_FILE",
    "Options",
    "Parallel",
    "Settings",
    "Task",
    "check_output",
    "fine_tune",
    "fine_tuning_settings",
    "is_unfinished",
    "load_fine_tuned",
    "load_for_task",
    "plot_log",
    "predict",
    "predict_file",
    "read_examples",
    "read_texts",
    "split_held_out",
    "start",
    "train",
]
