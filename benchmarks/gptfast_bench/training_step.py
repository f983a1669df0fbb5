"""One training step, ours beside transformers' and torch.compile's: time, and peak memory.

    python -m gptfast_bench.training_step --batch-size 8 --context 512          one JSON object

Every contender starts from the same weights, with the same loss on the same ids, gradients clipped and AdamW's step
taken; a step without dropout counts only if its loss agrees with ours.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.training.batch import Batch
from gptfast.training.loop import autocast, make_optimizer
from gptfast.training.objective import Objective
from gptfast.training.parallel import clip_gradients
from gptfast.training.report import peak_flops, training_flops
from gptfast.training.settings import Settings

from .harness import environment

CONTENDERS = ("gptfast", "transformers", "compile")
Step = Callable[[], float]  # takes one step, returns its loss


def make_step(
    contender: str, config: OpenAIGPTConfig, *, batch_size: int, context: int, device: torch.device, dtype: str
) -> Step:
    """A training step on random ids [batch_size, context] in float32 weights, with matmuls in ``dtype``.

    Args:
        contender: "gptfast"; "transformers", eager; or "compile", transformers' model under ``torch.compile``.
        dtype: "float32" or "bfloat16".
    """
    if contender not in CONTENDERS:
        raise ValueError(f"contender must be one of {', '.join(CONTENDERS)}, got {contender!r}")
    settings = Settings(steps=1, batch_size=batch_size, context=context, learning_rate=1e-5, dtype=dtype)
    torch.manual_seed(0)
    model: Any = OpenAIGPTLMHeadModel(config)
    ids = torch.randint(config.vocab_size, (batch_size, context + 1), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids[:, :-1], ids[:, 1:], batch_size * context, "random ids").to(device)
    if contender == "gptfast":
        objective = Objective(model.to(device)).train()

        def loss() -> torch.Tensor:
            return objective(batch)[0]
    else:
        import transformers

        weights = model.state_dict()
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**config.to_dict()))
        model.load_state_dict(weights)
        model.to(device).train()
        forward = torch.compile(model) if contender == "compile" else model

        def loss() -> torch.Tensor:
            logits = forward(batch.input_ids).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())

    optimizer = make_optimizer(model, settings)

    def step() -> float:
        with autocast(settings, device):
            value = loss()
        value.backward()
        clip_gradients(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def peak_mb(device: torch.device) -> float:
    """Of a GPU torch's own count; of a CPU the whole process's, so that a contender needs a process of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, in kibibytes elsewhere
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(step: Step, *, device: torch.device, warm_up: int = 2, rounds: int = 5) -> dict[str, float]:
    """Median, fastest and slowest of ``rounds`` steps in ms, peak memory in MB and the first loss."""
    losses = [step() for _ in range(warm_up)]
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()  # reads the loss, which waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "ms": statistics.median(times),
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "peak_mb": peak_mb(device),
        "loss": losses[0],
    }


def run_alone(contender: str, arguments: Sequence[str]) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "gptfast_bench.training_step", "--contender", contender, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contender", choices=CONTENDERS, help="in this process; all, each in its own, if not given")
    parser.add_argument("--without", nargs="+", default=[], choices=CONTENDERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=40478)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    config = OpenAIGPTConfig(
        vocab_size=args.vocab_size,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=args.attention_dropout,
    )
    if args.contender is not None:
        size = {"batch_size": args.batch_size, "context": args.context, "device": device, "dtype": dtype}
        if args.contender != "gptfast":
            import transformers  # noqa: F401 - what it takes by itself is not the step's
        before = peak_mb(device)
        row = measure(make_step(args.contender, config, **size), device=device, rounds=args.rounds)
        flops = training_flops(config, args.context, lm_head=True) * args.batch_size * args.context
        peak = peak_flops(device, getattr(torch, dtype))
        row["peak_mb"] -= before
        row["mfu"] = flops / (1e-3 * row["ms"] * peak) if peak else None  # type: ignore[assignment]
        print(json.dumps(row))
        return
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--without", *args.without)]
    rows = {name: run_alone(name, given) for name in CONTENDERS if name not in args.without}
    if not args.dropout and not args.attention_dropout:
        for name, row in rows.items():
            if abs(row["loss"] - rows["gptfast"]["loss"]) > (1e-3 if dtype == "float32" else 2e-2):
                raise ValueError(f"{name}'s loss is {row['loss']}, ours is {rows['gptfast']['loss']}")
    size = {"shape": [args.batch_size, args.context], "dtype": dtype}
    print(json.dumps({"environment": environment(args.device, torch.get_num_threads())} | size | rows))


if __name__ == "__main__":
    main()
