"""What importing must and must not do, and which package may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported_modules(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module or "")
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/gptfast_kernels", {"gptfast", "gptfast_bench", "tests", "benchmarks", "transformers", "spacy"}),
        ("gptfast", {"tests", "benchmarks"}),
    ],
)
def test_imports_flow_one_way(folder, forbidden):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_modules(file) & forbidden, file


def test_only_the_command_imports_the_suite():
    for file in (ROOT / "gptfast").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptfast_bench"):
                assert file.name == "cli.py", file
                assert id(node) in inside, file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("gptfast_bench") for alias in node.names), file


def test_kernels_folder_is_no_package():
    """`import kernels` must stay free for HuggingFace's package of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


HEAVY = ("transformers", "spacy", "ftfy", "h5py", "tokenizers", "huggingface_hub", "matplotlib")


def test_import_is_light_and_leaves_torch_alone():
    run_python(f"""
import torch
settings = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
before = settings()
import gptfast, gptfast_kernels
assert not torch.cuda.is_initialized()
assert before == settings()
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
""")


def test_import_with_torch_alone():
    """No Triton (there is none for this platform, say) and none of the extras."""
    run_python(f"""
for name in ("triton", *{HEAVY}):
    sys.modules[name] = None
import gptfast
gptfast.OpenAIGPTTokenizer
gptfast.OpenAIGPTLMHeadModel(gptfast.OpenAIGPTConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1))
""")


def run_python(code: str) -> None:
    path = [str(ROOT), str(ROOT / "kernels")]
    code = f"import sys\nsys.path[:0] = {path}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
