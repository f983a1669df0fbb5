"""Kernels for transformers: attention, LayerNorm, GELU, and the fusions around them. Needs torch alone.

Every op takes ``backend="auto" | "triton" | "torch" | "reference"``; see ``_dispatch.py`` for how "auto" chooses.
"""

from ._dispatch import get_default_backend, set_default_backend, use_backend
from .activation import gelu
from .attention import flash_attention, flash_attention_qkvpacked, flash_attention_varlen
from .decode import flash_attention_with_kvcache
from .embeddings import embedding
from .loss import linear_cross_entropy
from .matvec import gemv
from .normalization import layer_norm
from .projection import linear_gelu

__all__ = [
    "embedding",
    "flash_attention",
    "flash_attention_qkvpacked",
    "flash_attention_varlen",
    "flash_attention_with_kvcache",
    "gelu",
    "gemv",
    "get_default_backend",
    "layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "set_default_backend",
    "use_backend",
]
