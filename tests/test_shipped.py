"""The model that ships: its size, its files, and that what its card and the README say of it is so."""

import json
import re
from pathlib import Path

import pytest
import torch

from gptfast import OpenAIGPTLMHeadModel, OpenAIGPTTokenizer
from gptfast.cli import SHIPPED, _speed
from gptfast.scoring import score_ids
from gptfast.training import LOG_FILE, SUMMARY_FILE, read_texts, split_held_out

ROOT = Path(__file__).parent.parent
BOOKS = ROOT.parent / "shared" / "data" / "books"
SUMMARY = json.loads((SHIPPED / SUMMARY_FILE).read_text())


def test_weights_are_small_half_precision_and_finite():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 12_000_000
    model = OpenAIGPTLMHeadModel.from_pretrained(SHIPPED)
    assert model.dtype == torch.float16
    assert model.num_parameters() == SUMMARY["parameters"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_vocabulary_has_the_form_of_gpt1s():
    vocab = json.loads((SHIPPED / "vocab.json").read_text())
    merges = (SHIPPED / "merges.txt").read_text().splitlines()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert vocab["<unk>"] == 0
    assert vocab["\n</w>"] == len(vocab) - 1
    assert merges[0] == "#version: 0.2"
    assert all("".join(merge.split(" ")) in vocab for merge in merges[1:])
    tokenizer = OpenAIGPTTokenizer.from_pretrained(SHIPPED, tokenization="basic")
    assert tokenizer.decode(tokenizer("Call me Ishmael.")["input_ids"]) == "call me ishmael ."


@pytest.mark.parametrize("page", [SHIPPED / "README.md", ROOT / "README.md"])
def test_pages_say_what_the_summary_says(page):
    text = page.read_text(encoding="utf-8")
    perplexity, bits = re.search(r"held-out perplexity (\d+\.\d+) a token,\s+(\d+\.\d+) bits a\s+byte", text).groups()
    assert perplexity == f"{SUMMARY['held_out_perplexity']:.2f}"
    assert bits == f"{SUMMARY['held_out_bits_per_byte']:.3f}"
    assert f"{SUMMARY['parameters']:,}" in text


def test_readmes_demo_is_the_run_that_was_kept():
    figures = json.loads((ROOT / "benchmarks" / "results" / "demo-cpu.json").read_text())
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f": {figures['forward_ms']:.1f} ms, unfused reference {figures['reference_ms']:.1f} ms" in page
    assert (
        f"float64: {figures['error']:.1e}; the unfused reference itself errs by {figures['reference_error']:.1e}"
        in page
    )
    assert _speed(figures["generation"]) in page
    shown = page.split("times as fast")[1].split("[")[0]
    assert shown.split() == figures["generation"]["text"].split()


def test_log_reaches_the_last_step_and_learns():
    rows = [json.loads(line) for line in (SHIPPED / LOG_FILE).read_text().splitlines()]
    assert rows[-1]["step"] == SUMMARY["settings"]["steps"]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert held_out == sorted(held_out, reverse=True)


@pytest.mark.skipif(not BOOKS.exists(), reason="the books it was trained on are not beside the repository")
def test_held_out_perplexity_is_what_the_summary_says():
    pytest.importorskip("spacy", reason="the model's ids are the original tokenization's")
    pytest.importorskip("ftfy", reason="the model's ids are the original tokenization's")
    tokenizer = OpenAIGPTTokenizer.from_pretrained(SHIPPED)
    model = OpenAIGPTLMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32)
    ids, size = [], 0
    for text in read_texts(sorted(BOOKS.glob("*.txt"))):
        _, held_out = split_held_out(text, SUMMARY["settings"]["held_out"])
        ids += tokenizer.convert_tokens_to_ids(tokenizer.tokenize(held_out))
        size += len(held_out.encode())
    score = score_ids(model, torch.tensor(ids), text_bytes=size)
    assert score.tokens == SUMMARY["held_out_tokens"]
    assert score.perplexity == pytest.approx(SUMMARY["held_out_perplexity"], rel=1e-3)  # float16 against float32
    assert score.bits_per_byte == pytest.approx(SUMMARY["held_out_bits_per_byte"], rel=1e-3)


def test_readme_states_what_each_dtype_costs():
    figures = json.loads((ROOT / "benchmarks" / "results" / "dtypes-cpu.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert f"the largest logit is {figures['largest_logit']:.1f}" in readme
    for title, key, form in (
        ("perplexity a token", "perplexity", ".3f"),
        ("largest error of a logit, one pass", "logit_error", ".1e"),
        ("… decoded one by one", "logit_error_decoding", ".1e"),
    ):
        assert f"| {title} | " + " | ".join(f"{row[key]:{form}}" for row in figures["dtypes"]) + " |" in readme


def test_readme_states_what_a_training_step_takes():
    figures = json.loads((ROOT / "benchmarks" / "results" / "training-step-cpu.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    ours, theirs, compiled = (
        [f"{figures[who]['ms'] / 1e3:.1f} s", f"{figures[who]['peak_mb'] / 1e3:.1f} GB"]
        for who in ("gptfast", "transformers", "compile")
    )
    assert f"{ours[0]} and {ours[1]} of memory; transformers {theirs[0]} and {theirs[1]}" in readme
    assert f"`torch.compile` {compiled[0]} and {compiled[1]}." in readme
