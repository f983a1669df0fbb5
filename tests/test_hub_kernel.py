"""The folder that `make hub-kernel` makes, loaded by HuggingFace's `kernels` and without it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "gptfast-kernels"
    command = [sys.executable, str(ROOT / "kernels" / "hub" / "build.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def package(folder):
    """The CPU's variant, imported by `kernels` or as it does, beside the gptfast_kernels that this process has."""
    if importlib.util.find_spec("kernels.layer"):  # not this repository's folder of that name
        import kernels

        yield kernels.get_local_kernel(folder, backend="cpu")
        return
    spec = importlib.util.spec_from_file_location("hub_gptfast", folder / "build" / "torch-cpu" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_gptfast"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("hub_gptfast")]:
        del sys.modules[name]


def test_the_copy_stands_beside_the_original(package):
    import gptfast_kernels

    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    for module in (package, gptfast_kernels):
        torch.testing.assert_close(module.layer_norm(x, w, None), F.layer_norm(x, (8,), w))
    sources = (Path(package.__file__).parent / "gptfast_kernels").glob("*.py")
    names = {line for path in sources for line in path.read_text().splitlines() if "Library(" in line}
    assert len(names) == 2  # _lib and _library
    assert all("gptfast_" in line for line in names)


def test_flash_attention_functions(package):
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((5, 4), (9, 2), (9, 2)))
    wide = {"enable_gqa": True, "scale": 0.3}
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **wide)
    out = package.flash_attn_func(q, k, v, softmax_scale=0.3, softcap=0.0, alibi_slopes=None)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    causal = package.flash_attn_func(q, k, v, causal=True, window_size=(2, -1))
    ours = package.flash_attention(q, k, v, causal=True, window_size=(2, None))
    assert torch.equal(causal, ours)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = package.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 3, causal=True)
    torch.testing.assert_close(packed[2:], package.flash_attn_func(q[:1, 2:], q[:1, 2:], q[:1, 2:], causal=True)[0])
    assert torch.equal(causal[:, 0], package.flash_attn_func(q, k, v, causal=True, window_size=(2, 0))[:, 0])


@pytest.mark.parametrize(
    "asked", [{"softcap": 30.0}, {"alibi_slopes": torch.zeros(4)}, {"s_aux": torch.zeros(4)}], ids=str
)
def test_what_is_not_computed_raises(package, asked):
    q = torch.randn(1, 3, 4, 8)
    with pytest.raises(ValueError, match=f"{next(iter(asked))} is not computed"):
        package.flash_attn_func(q, q, q, **asked)


# -- by `kernels` ------------------------------------------------------------------------------------------------

LAYERS = {
    "LayerNorm": lambda: torch.nn.LayerNorm(16),
    "GELU": lambda: torch.nn.GELU("tanh"),
    "GeLU": lambda: torch.nn.GELU(),
    "NewGELU": lambda: torch.nn.GELU("tanh"),
    "FastGELU": lambda: torch.nn.GELU("tanh"),
    "GeluTanh": lambda: torch.nn.GELU("tanh"),
}


@pytest.fixture
def hub():
    reason = "needs HuggingFace's kernels, not in [test]: its releases and transformers' pins disagree"
    hub = pytest.importorskip("kernels", reason=reason)
    if not hasattr(hub, "LocalLayerRepository"):
        pytest.skip(reason)
    return hub


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("hub")
def test_layers_by_kernels(folder, name):
    from kernels import LocalLayerRepository, Mode, kernelize, register_kernel_mapping, use_kernel_forward_from_hub

    kind = type(LAYERS[name]())
    marked = use_kernel_forward_from_hub(name)(type(f"Marked{name}", (kind,), {"forward": kind.forward}))
    plain = LAYERS[name]()
    layer = LAYERS[name]()
    layer.__class__ = marked
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 2)
    plain.load_state_dict(layer.state_dict())
    repository = LocalLayerRepository(folder, layer_name=name)
    register_kernel_mapping({name: {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: repository}}})
    before = layer.forward
    layer = kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert layer.forward != before
    x = torch.randn(3, 16, requires_grad=True)
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_functions_by_kernels(hub, folder):
    module = hub.get_local_kernel(folder)
    q = torch.randn(1, 4, 2, 8)
    expected = F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(module.flash_attn_func(q, q, q, causal=True), expected)
