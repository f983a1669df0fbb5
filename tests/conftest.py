"""Without a GPU the kernels run interpreted, which Triton decides when it is imported: so this comes first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
