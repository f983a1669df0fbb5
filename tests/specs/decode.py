"""Decoding: what its kernels compile to, and what its tests must notice."""

import torch

from gptfast_kernels import decode
from tests.support.compile_gate import TARGETS, Case, Expect, Sweep
from tests.support.mutants import Mutant

BF16, FP32 = torch.bfloat16, torch.float32


def run(D: int, dtype: torch.dtype, *, T=1, S=512, B=2, H=12, Hkv=None, tensor=True, append=True, causal=True) -> None:
    qkv = torch.empty(B, T, 3, H, D, dtype=dtype)
    q, k, v = (x[:, :, : Hkv or H] if i else x for i, x in enumerate(qkv.unbind(2)))
    caches = (torch.empty(B, Hkv or H, S, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    new = (k, v) if append else (None, None)
    seqlens = torch.zeros(B, dtype=torch.int64) if tensor else None
    decode._launch(q, *caches, *new, seqlens, S - T, 0.125, causal)


def case(name: str, D: int, dtype: torch.dtype, targets: tuple[str, ...] = TARGETS, **how) -> Case:
    def expect(target: str) -> dict[str, Expect]:
        hip, row = target.startswith("hip"), decode.config(target, dtype, D)
        exact = not hip and D in (64, 128, 256) and target != "cuda:86"
        bounds = {"registers": row.registers, "blocks": row.blocks} if exact else {"registers": 512 if hip else 255}
        # 16 rows are fewer than wgmma and its successors take
        matrix = dtype != FP32 and ("v_mfma" if hip else "HMMA")
        expected = {"_decode_kernel": Expect(matrix=matrix, **bounds)}
        if how.get("S", 512) > 512:
            expected["_join_kernel"] = Expect(matrix=False, registers=64, blocks=8)
        return expected

    return Case(name, lambda: run(D, dtype, **how), expect, targets)


CASES = [
    case("64", 64, BF16),
    case("128", 128, BF16),
    case("256", 256, BF16),
    case("64 float32", 64, FP32),
    case("128 float32", 128, FP32),
    case("256 float32", 256, FP32),
    case("64 long", 64, BF16, ("cuda:90",), S=16384, B=1, H=1),
    case("64 grouped heads, several tokens", 64, BF16, ("cuda:90",), Hkv=3, T=7),
    case("40", 40, BF16, ("cuda:90",)),
    case("256 on a small SM", 256, BF16, ("cuda:86",)),
]
ONE = {"_decode_kernel": 1}
SWEEPS = [
    Sweep("S 1 to 512", lambda S: run(64, BF16, S=S), range(1, 513), ONE),
    Sweep("S 1 to 512, one length", lambda S: run(64, BF16, S=S, tensor=False), range(1, 513), ONE),
    Sweep("T 1 to 64", lambda T: run(64, BF16, T=T), range(1, 65), ONE),
    Sweep("batch and heads", lambda n: run(64, BF16, B=1 + n // 12, H=1 + n % 12), range(48), ONE),
    Sweep(
        "caches up to 65536",
        lambda n: run(64, BF16, S=2**n, B=1, H=1),
        range(17),
        {"_decode_kernel": 2, "_join_kernel": 5},  # whole or in parts; 2 to 32 parts
    ),
]
FILE = "kernels/gptfast_kernels/decode.py"


def mutant(name: str, tests: str, old: str, new: str, file: str = FILE, of: str = "decode") -> Mutant:
    return Mutant(name, file, old, new, f"tests/test_{of}.py -k '{tests}'")


MUTANTS = [
    mutant("scale ignored", "row_alone", "scores * scale_log2, -float", "scores, -float"),
    mutant("causal mask off by one", "several_queries", "last = total - T + m //", "last = total - T + 1 + m //"),
    mutant("causal range too short", "several_queries", "// GROUP + 1)", "// GROUP)"),
    mutant("last key dropped", "row_alone", "visible = (n < hi)[None, :]", "visible = (n < hi - 1)[None, :]"),
    mutant("unused slots read", "different_length", "lo, tl.minimum(hi, held),", "lo, tl.minimum(hi, held + 1),"),
    mutant("new keys not seen", "row_alone", "tl.maximum(lo, held), hi, scale", "tl.maximum(lo, held), held, scale"),
    mutant("new keys one off", "row_alone", "last, k, v, held, stride_kt", "last, k, v, held - 1, stride_kt"),
    mutant("keys of another part", "different_length", "tl.maximum(lo, held), hi, scale", "held, hi, scale"),
    mutant("values not appended", "row_alone", "v_cache + (held + t)[:, None]", "v_cache + (held + 0 * t)[:, None]"),
    mutant("written beyond the cache", "beyond_the_cache", "& (held + t < S))[:, None]", ")[:, None]"),
    mutant("heads of a group mixed up", "row_alone", "heads = h * GROUP + g", "heads = g * Hkv + h"),
    mutant("rows mixed up", "different_length", "tl.load(seqlens + b)", "tl.load(seqlens)"),
    mutant("row of no key", "without_new_keys", "tl.where(row_sum == 0.0, 1.0, row_sum)", "row_sum"),
    mutant("parts overlap", "different_length", "hi = tl.minimum(total, lo + part)", "hi = total"),
    mutant("parts not weighed", "different_length", "tl.sum(each * weight[:, None], 0)", "tl.sum(each, 0)"),
    mutant("running maximum not carried", "different_length", "tl.exp2(row_max - shift)", "tl.exp2(shift - shift)"),
    mutant(
        "strides of the cache dropped",
        "layouts",
        "for x in (q, k_cache, v_cache, k, v) for s in (x.stride()[:3]",
        "for x in (q, k_cache, v_cache, k, v) for s in ((*x.stride()[:2], x.shape[-1])",
    ),
    mutant("32-bit offsets", "beyond_32", "// tiles // Hkv).to(tl.int64)", "// tiles // Hkv)"),
    mutant("torch: lengths of the first row for all", "row_alone", "least if least == most else lengths", "least"),
]  # fmt: skip
