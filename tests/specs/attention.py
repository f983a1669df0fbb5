"""Attention: what its kernels compile to, and what its tests must notice."""

import torch

from gptfast_kernels import attention
from tests.support.compile_gate import TARGETS, Case, Expect, Sweep
from tests.support.mutants import Mutant

KERNELS = {
    "_attention_forward": "forward",
    "_attention_backward_dq": "backward_dq",
    "_attention_backward_dkv": "backward_dkv",
}


def run(
    D: int, dtype: torch.dtype, *, B=2, T=512, H=12, Hkv=None, left=None, dropout=False, padding=False, varlen=False
) -> None:
    """Forward and backward of a packed projection, causal, or of a q, k, v where the heads differ."""
    qkv = torch.empty(B, T, 3, H, D, dtype=dtype)
    q, k, v = (x[:, :, : Hkv or H] if i else x for i, x in enumerate(qkv.unbind(2)))
    cu = torch.tensor([0, T // 2, T], dtype=torch.int32) if varlen else None
    how = (
        cu, cu, T, T, 0.125, left, 0, 0.1 if dropout else 0.0, torch.zeros(1, dtype=torch.int64) if dropout else None,
        torch.ones(B, T, dtype=torch.bool) if padding else None,
    )  # fmt: skip
    out, lse2 = attention._forward(q, k, v, *how)
    attention._backward_separate(out, None, out, lse2, q, k, v, *how)


def case(name: str, D: int, dtype: torch.dtype, targets: tuple[str, ...] = TARGETS, exact: bool = False, **how) -> Case:
    """``exact``: the bounds are those of the table's row, not only no spills and the matrix instruction."""

    def expect(target: str) -> dict[str, Expect]:
        expected = {}
        for name, kernel in KERNELS.items():
            group = 12 // how.get("Hkv", 12)
            row = attention.config(
                kernel, target, dtype, D, group, how.get("dropout", False), how.get("padding", False)
            )
            matrix = dtype != torch.float32 and (row.matrix or True)
            bounds = {"registers": row.registers, "blocks": row.blocks} if exact else {"registers": 512}
            expected[name] = Expect(matrix=matrix, **bounds)
        return expected

    return Case(name, lambda: run(D, dtype, **how), expect, targets)


BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = ("cuda:90",)
TIGHT = ("cuda:80", "cuda:90")  # where registers run out first
ALL = {"dropout": True, "padding": True, "left": 100}
CASES = [
    case("64", 64, BF16, exact=True),
    case("128", 128, BF16, exact=True),
    case("256", 256, BF16, exact=True),
    case("64 float32", 64, FP32, exact=True),
    case("128 float32", 128, FP32, exact=True),
    case("256 float32", 256, FP32, exact=True),
    case("64 padding", 64, BF16, HOPPER, padding=True),
    case("64 window", 64, BF16, HOPPER, left=100),
    case("64 varlen", 64, BF16, HOPPER, varlen=True, B=1),
    case("64 grouped heads", 64, BF16, HOPPER, Hkv=3),
    case("64 dropout padding window", 64, BF16, **ALL),
    case("128 dropout padding window", 128, BF16, **ALL),
    case("256 dropout padding window", 256, BF16, **ALL),
    case("256 float32 dropout padding window", 256, FP32, ("cuda:80", "cuda:100", "hip:gfx942"), **ALL),
    case("64 float32 dropout padding window", 64, FP32, ("cuda:80",), **ALL),
    case("80 float32 dropout padding window", 80, FP32, ("cuda:80",), **ALL),
    case("64 dropout", 64, BF16, TIGHT, dropout=True),
    case("128 dropout", 128, BF16, ("cuda:80",), dropout=True),
    case("256 dropout", 256, BF16, ("cuda:80",), dropout=True),
    case("64 dropout padding", 64, BF16, TIGHT, dropout=True, padding=True),
    case("64 dropout varlen", 64, BF16, ("cuda:80",), dropout=True, varlen=True, B=1),
    case("64 dropout grouped heads", 64, BF16, TIGHT, dropout=True, Hkv=3),
    case("40", 40, BF16, HOPPER),
    case("80 dropout grouped heads", 80, BF16, TIGHT, dropout=True, Hkv=3),
    case("128 grouped heads", 128, BF16, TIGHT, Hkv=3),
    case("64 on a small SM", 64, BF16, ("cuda:86",)),
    case("128 on a small SM", 128, BF16, ("cuda:86",)),
    case("256 on a small SM", 256, BF16, ("cuda:86",)),
    case("256 float32 on a small SM", 256, FP32, ("cuda:86",)),
]
ONE_EACH = dict.fromkeys(KERNELS, 1)
SWEEPS = [
    Sweep("T 1 to 512", lambda T: run(64, BF16, T=T), range(1, 513), ONE_EACH),
    Sweep("T 1 to 512, padding", lambda T: run(64, BF16, T=T, padding=True), range(1, 513), ONE_EACH),
    Sweep("batch and heads", lambda n: run(64, BF16, T=64, B=1 + n // 12, H=1 + n % 12), range(48), ONE_EACH),
]
FILE = "kernels/gptfast_kernels/attention.py"


def mutant(name: str, tests: str, old: str, new: str, file: str = FILE) -> Mutant:
    return Mutant(name, file, old, new, f"tests/test_attention.py -k '{tests}'")


MUTANTS = [
    mutant("strides of heads dropped", "layouts", "x.stride()[:3] for x", "(*x.stride()[:2], x.shape[-1]) for x"),
    mutant("strides of rows dropped", "qkvpacked", "[:, None] * stride + d\n    if", "[:, None] * D + d\n    if"),
    mutant(
        "scale ignored in forward",
        "softmax_scale",
        "tl.exp2(scores * scale_log2 - new_max[:, None])",
        "tl.exp2(scores - new_max[:, None])",
    ),
    mutant("scale ignored in dQ", "softmax_scale", "_store_rows(acc * scale,", "_store_rows(acc,"),
    mutant("scale ignored in dK", "softmax_scale", "acc_k * scale, 0.0)", "acc_k, 0.0)"),
    mutant("causal mask off by one", "test_lengths", "tl.where(distance <= right", "tl.where(distance <= right + 1"),
    mutant("window off by one", "test_windows", "tl.where(distance >= -left", "tl.where(distance > -left"),
    mutant("clear keys one tile too far", "several_tiles", "m0 + S - T + right + 1", "m0 + S - T + right + 16"),
    mutant("clear queries from one tile too early", "several_tiles", "n0 + BLOCK_N - 1 - (S - T)", "n0 - (S - T)"),
    mutant(
        "causal offset dropped from the range", "bottom_right", "m0 + BLOCK_M + S - T + right", "m0 + BLOCK_M + right"
    ),
    mutant(
        "causal offset dropped from dK and dV",
        "bottom_right",
        "n[:, None] - m[None, :] - offset",
        "n[:, None] - m[None, :]",
    ),
    mutant("padding read as keys", "padding", "other=0) != 0", "other=0) != 2"),
    mutant(
        "strides within the mask dropped",
        "layouts_of_the_mask",
        "    return x if x is None or x.stride(-1) == 1 else x.contiguous()",
        "    return x if x is None or x.ndim < 3 or x.stride(-1) == 1 else x.contiguous()",
    ),
    mutant("padding has gradients", "padding", "tl.where(inside[:, None], acc_v, 0.0)", "acc_v"),
    mutant(
        "keys beyond the end are seen",
        "lengths",
        "    elif MASKED:\n        inside = n < S",
        "    elif MASKED:\n        inside = n < S + 1",
    ),
    mutant("row that sees no key", "bottom_right", "tl.where(empty, 1.0, row_sum", "tl.where(empty, 0.0, row_sum"),
    mutant(
        "LSE of a row that sees no key",
        "bottom_right",
        'tl.where(value == -float("inf"), float("inf"), value)',
        "value",
    ),
    mutant("LSE not subtracted in dQ", "several_tiles", "scale_log2 - lse2[:, None])", "scale_log2)"),
    mutant(
        "LSE not subtracted in dK and dV",
        "several_tiles",
        "scale_log2 - row_lse2[None, :])",
        "scale_log2)",
    ),
    mutant("LSE's gradient dropped", "lse_and_its", "mask=m < T, other=0.0) * LOG2E", "mask=m < T, other=0.0) * 0.0"),
    mutant(
        "running maximum not carried",
        "several_tiles",
        "alpha = tl.exp2(row_max - new_max)",
        "alpha = tl.exp2(new_max - new_max)",
    ),
    mutant("delta dropped from dK", "several_tiles", "tl.load(delta + m, mask=seen, other=0.0)[None, :]", "0.0"),
    mutant(
        "32-bit offsets within a tile",
        "beyond_32",
        "rows.to(tl.int64)[:, None] * stride + d\n    if",
        "rows[:, None] * stride + d\n    if",
    ),
    mutant("heads of a group mixed up", "grouped", "h = h_kv * GROUP + g", "h = g * (H // GROUP) + h_kv"),
    mutant(
        "dropout seed dropped from backward",
        "test_dropout",
        "kept = keep(seed, row[:, None], n[None, :], dropout_p)",
        "kept = keep(seed + 1, row[:, None], n[None, :], dropout_p)",
    ),
    mutant("dropout rows differ in dK and dV", "varlen", "first_row + g * longest, clear", "first_row + g, clear"),
    mutant("dropout not made up for", "test_dropout", "row_sum * (1.0 - dropout_p)", "row_sum"),
    mutant("sequences mixed up", "varlen", "tl.load(cu_seqlens + b + 1) - first", "tl.load(cu_seqlens + b + 1)"),
    mutant(
        "rows beyond the end written",
        "lengths or properties",
        "m, strides_out[1], m < T, D, BLOCK_D)\n    tl.store(lse2",
        "m, strides_out[1], m < T + 1, D, BLOCK_D)\n    tl.store(lse2",
    ),
    mutant(
        "columns beyond the head dim", "head_dims", "y_stride, y_inside, D - d0, CHUNK", "y_stride, y_inside, D, CHUNK"
    ),
    mutant("query that sees no key, in dK and dV", "sees_no_key", 'seen = row_lse2 < float("inf")', "seen = m < T"),
    mutant("running maximum starts at -inf", "bottom_right or padding", "-3.4e38", '-float("inf")'),
    mutant(
        "second order passes in silence",
        "second_order",
        "if not torch.is_grad_enabled() or torch.compiler.is_compiling():",
        "if True:",
    ),
    mutant(
        "Philox loses the key",
        "test_dropout",
        "tl.philox(seed, column",
        "tl.philox(seed * 0, column",
        "kernels/gptfast_kernels/_philox.py",
    ),
]
