"""Makes a folder that HuggingFace's ``kernels`` loads: ``make hub-kernel``, or ``python build.py FOLDER``.

    FOLDER/README.md
    FOLDER/build/<variant>/metadata.json
    FOLDER/build/<variant>/__init__.py          layers, flash_attn_func, flash_attn_varlen_func, and the ops themselves
    FOLDER/build/<variant>/gptfast_kernels/     a copy

Nothing is compiled beforehand, Triton does that on first use; so a variant is only a name. The copy registers its
operators with torch under a name of its own, made of what it holds: two versions in one process would else collide.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "gptfast_kernels"
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}
NAME, VERSION = "gptfast-kernels", 1

INIT = '''\
"""gptfast_kernels, as HuggingFace's ``kernels`` loads it."""

from . import layers
from .flash import flash_attn_func, flash_attn_varlen_func
from .gptfast_kernels import *
from .gptfast_kernels import __all__ as _ops

__all__ = [*_ops, "flash_attn_func", "flash_attn_varlen_func", "layers"]
'''

README = """\
---
license: mit
library_name: kernels
tags: [kernel]
---
# gptfast-kernels

Attention, LayerNorm, GELU and the fusions around them, in Triton, with PyTorch's operators where there is no GPU.
Layers: LayerNorm, GELU, GeLU, NewGELU, FastGELU, GeluTanh. Functions: flash_attn_func, flash_attn_varlen_func.
"""


def build(folder: Path) -> str:
    """Writes ``folder``, replacing its build/; returns the name that its operators have in torch.ops."""
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.py"))}
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]
    namespace = f"gptfast_{digest}"
    shutil.rmtree(folder / "build", ignore_errors=True)
    for variant, backend in VARIANTS.items():
        package = folder / "build" / variant
        (package / SOURCE.name).mkdir(parents=True)
        for name, text in files.items():
            (package / SOURCE.name / name).write_text(_renamed(text, namespace), encoding="utf-8")
        for name in ("layers.py", "flash.py"):
            shutil.copy(HERE / name, package / name)
        (package / "__init__.py").write_text(INIT, encoding="utf-8")
        metadata = {
            "id": f"{NAME.replace('-', '_')}_{backend}_{digest}",
            "name": NAME,
            "version": VERSION,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (package / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")
    return namespace


def _renamed(text: str, namespace: str) -> str:
    """Operators under another name, wherever source says "gptfast", "gptfast::op" or torch.ops.gptfast."""
    return re.sub(r'(?<=")gptfast(?="|::)|(?<=\bops\.)gptfast\b', namespace, text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    print(f"{sys.argv[1]}: operators torch.ops.{build(Path(sys.argv[1]))}")
