"""What bfloat16 and int8 cost in quality: the model that ships, on a book.

    python benchmarks/dtypes.py BOOK [--tokens N] [--json FILE]

For each of ``--dtype float32 | bfloat16 | int8``: perplexity of its first N tokens, and the largest error of a logit
against the formulas in float64, for one pass over 512 tokens and for the same tokens decoded one by one.
"""

import argparse
import json
from pathlib import Path

import torch

import gptfast
from gptfast.cli import SHIPPED
from gptfast.scoring import score_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    tokenizer = gptfast.OpenAIGPTTokenizer.from_pretrained(SHIPPED)
    text = arguments.book.read_text(encoding="utf-8")[: 8 * arguments.tokens]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)))[: arguments.tokens]
    window = ids[None, :512]
    with torch.inference_mode(), gptfast.use_backend("reference"):
        exact = load("float64")(window).logits
    rows = []
    for name in ("float32", "bfloat16", "int8"):
        model = load(name)
        with torch.inference_mode():
            whole = model(window).logits
            cache = model.transformer.new_cache(1)
            steps = torch.cat([model(token, past_key_values=cache).logits for token in window.split(1, 1)], 1)
        rows.append(
            {
                "dtype": name,
                "perplexity": score_ids(model, ids).perplexity,
                "logit_error": float((whole - exact).abs().max()),
                "logit_error_decoding": float((steps - exact).abs().max()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        figures = {
            "book": arguments.book.name,
            "tokens": len(ids),
            "largest_logit": float(exact.abs().max()),
            "device": f"CPU, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "dtypes": rows,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def load(dtype: str) -> gptfast.OpenAIGPTLMHeadModel:
    width = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    model = gptfast.OpenAIGPTLMHeadModel.from_pretrained(SHIPPED, dtype=width)
    if dtype == "int8":
        gptfast.quantize(model)
    return model


if __name__ == "__main__":
    main()
