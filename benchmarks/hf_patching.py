"""transformers' models with our ops patched in against the same models as they are, timed in turn on this machine.

    python benchmarks/hf_patching.py --json benchmarks/results/hf-patching-cpu.json

Each cell is gated first: what the patched model computes, gradients too, must equal the other's. A cell where patching
makes it slower is listed at the end, and in the file. Random weights: times depend on the models' sizes and the text's
length. Five minutes on two idle cores; --rounds and --only shorten it.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import transformers  # noqa: E402

from gptfast.hf import OpenAIGPTLMHeadModel, apply_gptfast  # noqa: E402
from gptfast_bench.harness import TOLERANCE, environment, error_of, noise_of, pin_threads, state, time_in_turn  # noqa: E402

SLOWER = 1.02  # what counts as slower; a row's "noise" is what transformers differs from itself by


def models() -> Iterator[tuple[str, type, Any]]:
    t = transformers
    yield "openai-gpt", t.OpenAIGPTLMHeadModel, t.OpenAIGPTConfig()
    yield "gpt2 (small)", t.GPT2LMHeadModel, t.GPT2Config()
    yield "bert (base)", t.BertForMaskedLM, t.BertConfig()
    llama = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    yield "llama (tiny)", t.LlamaForCausalLM, t.LlamaConfig(**llama, num_key_value_heads=4, vocab_size=32000)


def cells(model: Any, device: str) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """(name, what to do with a model), from short to long."""
    size = model.config.vocab_size

    def forward(B: int, T: int, padded: bool) -> Callable[[Any], Any]:
        ids = torch.randint(1, size, (B, T), device=device)
        mask = torch.ones(B, T, dtype=torch.long, device=device)
        if padded:
            mask[1:, : T // 3] = 0
        return torch.no_grad()(lambda model: [model(ids, attention_mask=mask).logits[mask.bool()]])

    def train(B: int, T: int) -> Callable[[Any], Any]:
        ids = torch.randint(1, size, (B, T), device=device)

        def step(model: Any) -> Any:
            model.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            return [loss.detach(), model.get_input_embeddings().weight.grad[ids[0]]]

        return step

    def generate(T: int, new: int) -> Callable[[Any], Any]:
        ids = torch.randint(1, size, (1, T), device=device)
        how: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return lambda model: [model.generate(ids, **how)]

    yield "forward 1 x 32", forward(1, 32, False)
    yield "forward 1 x 512", forward(1, 512, False)
    yield "forward 4 x 64, left-padded", forward(4, 64, True)
    yield "forward and backward 1 x 128", train(1, 128)
    if model.can_generate():
        yield "generate 16 after 32", generate(32, 16)


def measure(device: str, rounds: int, seconds: float, only: str) -> Iterator[dict[str, Any]]:
    for name, kind, config in models():
        if only not in name:
            continue
        torch.manual_seed(0)
        plain = kind(config).to(device).eval()
        patched = copy.deepcopy(plain)
        apply_gptfast(patched)
        contenders = {"transformers": plain, "patched": patched}
        if kind is transformers.OpenAIGPTLMHeadModel:
            ours = OpenAIGPTLMHeadModel(config).to(device).eval()
            ours.load_state_dict(plain.state_dict())
            contenders["gptfast.hf"] = ours
        for cell, call in cells(plain, device):
            expected = call(plain)
            for who, model in contenders.items():
                error = error_of(call(model), expected)
                if error > TOLERANCE["float32"]:
                    raise SystemExit(f"{name}, {cell}: {who} is wrong, off by {error:.1e} of transformers' own")
            calls = {who: lambda model=model, call=call: call(model) for who, model in contenders.items()}
            samples = time_in_turn(calls, device, rounds=rounds, seconds=seconds, least=4)
            medians = {who: statistics.median(times) for who, times in samples.items()}
            row = {"model": name, "cell": cell, "median_ms": medians, "rounds": len(samples["patched"])}
            row["noise"] = noise_of(samples["transformers"])
            row["speedup"] = {who: medians["transformers"] / ms for who, ms in medians.items() if who != "transformers"}
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=6, help="a cell, at most, once 4 rounds are done")
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    before, rows = state(arguments.device), []
    for row in measure(arguments.device, arguments.rounds, arguments.seconds, arguments.only):
        times = ", ".join(f"{who} {ms:.1f} ms" for who, ms in row["median_ms"].items())
        print(f"{row['model']:14} {row['cell']:30} {times}: {row['speedup']['patched']:.2f} x", flush=True)
        rows.append(row)
    slower = [f"{row['model']}, {row['cell']}" for row in rows if row["speedup"]["patched"] < 1 / SLOWER]
    print("patching makes slower:", "; ".join(slower) or "nothing")
    if arguments.json:
        where = environment(arguments.device, arguments.threads)
        report = {"environment": where, "before": before, "after": state(arguments.device), "slower": slower}
        arguments.json.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
