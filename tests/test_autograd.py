"""What every op's autograd owes torch.compile, torch.func and forward-mode differentiation."""

import pytest
import torch

from gptfast_kernels import embedding, flash_attention, gelu, layer_norm, linear_cross_entropy, linear_gelu
from tests.support import DEVICE

IDS = torch.tensor([[2, 0, 1]], device=DEVICE)

# op(x, backend) -> scalar, of x [3, 16], which every op takes in several places
OPS = {
    "layer_norm": lambda x, backend: layer_norm(x, None, None, residual=x, backend=backend).sin().sum(),
    "gelu": lambda x, backend: gelu(x[0], bias=x[0], backend=backend).sum(),
    "linear_gelu": lambda x, backend: linear_gelu(x, x, backend=backend).sum(),
    "embedding": lambda x, backend: (
        embedding(IDS, x, x, position_ids=IDS, token_type_ids=IDS, backend=backend).sin().sum()
    ),
    "linear_cross_entropy": lambda x, backend: linear_cross_entropy(x, x, IDS[0], backend=backend),
    "flash_attention": lambda x, backend: flash_attention(*[x[None, :, None]] * 3, backend=backend).sin().sum(),
}


@pytest.fixture
def x():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("op", OPS)
def test_one_tensor_in_several_places_compiles(op, x):
    torch._dynamo.reset()
    leaf = x.requires_grad_()
    expected, *_ = torch.autograd.grad(OPS[op](leaf, "reference"), leaf)
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(leaf, "triton"), leaf)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_transforms_are_right_or_refused(op, x):
    """Silence would be a gradient of zero: the operators below an autograd function have none."""

    def of(backend):
        return lambda x: OPS[op](x, backend)

    expected = torch.func.grad(of("reference"))(x)
    transforms = {
        "Grad": lambda f: torch.func.grad(f)(x),
        "Vmap": lambda f: torch.func.vmap(f)(x[None]),
        "Jvp": lambda f: torch.func.jvp(f, (x,), (x,)),
    }
    for name, transform in transforms.items():
        if (op, name) == ("flash_attention", "Grad"):
            torch.testing.assert_close(transform(of("triton")), expected)
        else:
            with pytest.raises(RuntimeError, match=f"torch.func's {name} cannot pass this backend"):
                transform(of("triton"))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="forward-mode differentiation cannot pass this backend"),
    ):
        OPS[op](torch.autograd.forward_ad.make_dual(x, x), "triton")
