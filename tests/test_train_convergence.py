"""200 steps on a book give transformers' loss curve, and its weights in the end."""

import json
from pathlib import Path

import pytest
import torch

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.tokenizer import train_tokenizer
from gptfast.training import LOG_FILE, Options, Settings, train
from gptfast.training.settings import learning_rate
from gptfast.training.text import Windows

BOOK = Path(__file__).parent.parent.parent / "shared" / "data" / "books" / "pride_and_prejudice.txt"
SETTINGS = Settings(steps=200, batch_size=4, context=32, learning_rate=3e-3, warmup_steps=20, held_out=0.0, seed=3)
SHAPE = {"n_positions": 33, "n_embd": 48, "n_layer": 3, "n_head": 3, "initializer_range": 0.05}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.skipif(not BOOK.exists(), reason="no book beside the repository")
def test_two_hundred_steps_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference")
    text = BOOK.read_text(encoding="utf-8")[:60_000]
    tokenizer = train_tokenizer([text], 400, tokenization="basic")
    torch.manual_seed(0)
    ours = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **SHAPE, **NO_DROPOUT))
    theirs = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=len(tokenizer), **SHAPE, **NO_DROPOUT)
    )
    theirs.load_state_dict(ours.state_dict())
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}

    train(ours, tokenizer, [text], SETTINGS, tmp_path, options=Options(log_every=1, progress=False))
    losses = [json.loads(row)["loss"] for row in (tmp_path / LOG_FILE).read_text().splitlines()]

    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)))
    windows = Windows(ids, batch_size=SETTINGS.batch_size, context=SETTINGS.context, seed=SETTINGS.seed)
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    their_losses = []
    theirs.train()
    for step in range(SETTINGS.steps):
        batch = windows.batch(step)
        rows = torch.cat([batch.input_ids, batch.targets[:, -1:]], 1)
        loss = theirs(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, SETTINGS)
        optimizer.step()
        optimizer.zero_grad()
        their_losses.append(loss.item())

    assert len(losses) == 200
    assert sum(losses[-10:]) / 10 < losses[0] - 0.6
    # rounding alone: 1.4e-6 where this was written
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(their_losses), rtol=0, atol=2e-5)
    ended = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        # of the keys' biases rounding is all that moves them: attention does not change with them
        assert (ended[name] - p).norm() <= (5e-3 if name.endswith("c_attn.bias") else 1e-4) * (p - start[name]).norm()
