"""The rule that outputs and gradients are held to: no worse than PyTorch."""

import torch
from torch import Tensor


def assert_no_worse_than_torch(
    name: str, ours: Tensor, torchs: Tensor, oracle: Tensor, *, factor: float = 2.0, magnitude: float = 0.0
) -> None:
    """Asserts max |ours - oracle| <= factor * max |torchs - oracle| + a unit in the last place of the largest value.

    Four units in float32: the largest of a few hundred errors is noise there, and of two correct ways to compute a sum
    one errs more than twice the other in a tenth of all small problems.

    Args:
        name: what is compared, for the message.
        ours, torchs: results in the dtype under test, ours and PyTorch's.
        oracle: the same computed in float64.
        magnitude: of what the values are summed from, where they may cancel to less.
    """
    assert ours.shape == oracle.shape, f"{name}: shape {list(ours.shape)}, expected {list(oracle.shape)}"
    assert ours.dtype == torchs.dtype, f"{name}: {ours.dtype}, torch has {torchs.dtype}"
    if ours.numel() == 0:
        return
    same = ours.double() == oracle  # also where both are the same infinity
    error = (ours.double() - oracle).abs().masked_fill(same, 0.0)
    torch_error = (torchs.double() - oracle).abs().masked_fill(torchs.double() == oracle, 0.0)
    finite = oracle[oracle.isfinite()].abs()
    ulp = torch.finfo(ours.dtype).eps * max(magnitude, float(finite.max()) if finite.numel() else 0.0)
    bound = factor * torch_error.max() + (4 if ours.dtype == torch.float32 else 1) * ulp
    assert error.max() <= bound, (  # a NaN fails too
        f"{name}: error {error.max():.3e}, torch's {torch_error.max():.3e}, bound {bound:.3e}, "
        f"at {[int(i) for i in (error.nan_to_num(torch.inf) == error.nan_to_num(torch.inf).max()).nonzero()[0]]} "
        f"of {list(ours.shape)}"
    )
