"""Text and the key/value cache: cached equals uncached, padding changes nothing, sampling against brute force.

Against HuggingFace's ``generate``: test_model_parity.py.

Shapes: B batch, T prompt length, V vocabulary.
"""

import itertools
from typing import Any

import pytest
import torch

import gptfast
from gptfast.generation import distribution, draw
from gptfast_kernels import _dispatch

V, P = 97, 40
SMALL: dict[str, Any] = {"vocab_size": V, "n_positions": P, "n_embd": 24, "n_layer": 3, "n_head": 3}


@pytest.fixture(autouse=True)
def _one_thread():
    """Decoding waits for threads more than it gains by them wherever cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(seed=0, **settings):
    """A model whose greedy text differs from prompt to prompt and does not repeat one token, so that equality means
    something."""
    config = gptfast.OpenAIGPTConfig(**{**SMALL, "tie_word_embeddings": False, **settings})
    model = gptfast.OpenAIGPTLMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    spread = {"tokens_embed": 1.0, "positions_embed": 0.3, "ln_1": 0.1, "ln_2": 0.1, "lm_head": 1.0}
    with torch.no_grad():
        for name, p in model.named_parameters():
            module, part = name.split(".")[-2:]
            gain = 1.0 if module in ("ln_1", "ln_2") and part == "weight" else 0.0
            p.copy_(gain + spread.get(module, 0.15) * torch.randn(p.shape, generator=generator))
    return model


def ids(*shape, seed=0, size=V):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# ---- the full size ----


def test_full_size_cached_text_is_the_uncached_up_to_position_512():
    """12 layers, 768 wide, 512 positions. The vocabulary is small, 300 words, which leaves the blocks as they are and
    the time affordable. Uncached decoding takes, at every position, the argmax of a forward pass over all before it;
    causality makes one pass over the whole text give all of these at once, which is checked step by step at four."""
    torch.manual_seed(0)
    config = gptfast.OpenAIGPTConfig(vocab_size=300, tie_word_embeddings=False)
    model = gptfast.OpenAIGPTLMHeadModel(config).eval()
    T = 256
    text = model.generate(ids(1, T, seed=4, size=300), max_length=512)
    assert text.shape == (1, 512)
    assert len(text[0, T:].unique()) > 30
    with torch.no_grad():
        logits = model(text).logits[0, T - 1 : -1]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4  # so that no choice hangs on rounding
    assert torch.equal(logits.argmax(-1), text[0, T:])
    for end in (T, 300, 430, 511):
        stepped = model.generate(text[:, :end], max_new_tokens=1, use_cache=False)
        assert torch.equal(stepped, text[:, : end + 1])
    with _dispatch.record() as choices, pytest.raises(ValueError, match="max_new_tokens is 1 and input_ids has 512"):
        model.generate(text, max_new_tokens=1)
    assert choices == []


# ---- cached and uncached, alone and together ----


@pytest.mark.parametrize("T", [1, 2, 7, P - 1])
def test_cached_text_is_the_uncached(T):
    model = make()
    cached = model.generate(ids(3, T), max_length=P)
    assert cached.shape == (3, P)
    assert torch.equal(cached, model.generate(ids(3, T), max_length=P, use_cache=False))
    if T < 10:
        assert len({tuple(row[T:].tolist()) for row in cached}) == 3
        assert min(len(row.unique()) for row in cached) > 8


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", ["left", "right", "both", "inside"])
def test_a_padded_batch_comes_out_as_its_rows_alone(pad, use_cache):
    model, T, new = make(), 9, 15
    lengths = [9, 4, 1, 6]
    prompts = [ids(n, seed=n) for n in lengths]
    x, mask = ids(4, T, seed=99), torch.zeros(4, T, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        n = len(prompt)
        start = {"left": T - n, "right": 0, "both": (T - n) // 2, "inside": 0}[pad]
        slots = torch.arange(n) + start
        if pad == "inside" and n < T:
            slots[n // 2 :] += T - n
        x[b, slots], mask[b, slots] = prompt, 1
    for dtype in (torch.int64, torch.bool, torch.float32):
        got = model.generate(x, attention_mask=mask.to(dtype), max_new_tokens=new, use_cache=use_cache)
        assert torch.equal(got[:, :T], x)
        for b, prompt in enumerate(prompts):
            alone = model.generate(prompt[None], max_new_tokens=new)
            assert torch.equal(got[b, T:], alone[0, len(prompt) :]), b


def test_padding_takes_no_room():
    """39 positions with padding, 20 without: 20 more fit."""
    model, prompt = make(), ids(1, 20)
    x, mask = torch.cat([ids(1, 19, seed=1), prompt], 1), torch.ones(1, 39).long()
    mask[:, :19] = 0
    got = model.generate(x, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(got[:, 39:], model.generate(prompt, max_new_tokens=20)[:, 20:])
    with pytest.raises(ValueError, match="max_new_tokens is 21 and input_ids has 20 positions"):
        model.generate(x, attention_mask=mask, max_new_tokens=21)


def test_settings_of_the_config_do_not_disturb():
    expected = make().generate(ids(2, 5), max_new_tokens=9)
    settings = {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "use_cache": True}
    assert torch.equal(make(**settings).generate(ids(2, 5), max_new_tokens=9), expected)
    ragged = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    got = make(**settings).generate(ids(2, 5), attention_mask=ragged, max_new_tokens=9)
    assert torch.equal(got, make().generate(ids(2, 5), attention_mask=ragged, max_new_tokens=9))


class Banning(gptfast.OpenAIGPTLMHeadModel):
    """Never says token 3."""

    def forward(self, *args, **settings):
        output = super().forward(*args, **settings)
        output.logits[..., 3] = -torch.inf
        return output


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_forward_pass_or_a_hook_of_ones_own_is_called(use_cache):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[3] *= 100  # says it often
    prompt = ids(2, 5)
    plain = model.generate(prompt, max_new_tokens=12, use_cache=use_cache)
    assert 3 in plain[:, 5:]

    banning = Banning(model.config).eval()
    banning.load_state_dict(model.state_dict())
    banned = banning.generate(prompt, max_new_tokens=12, use_cache=use_cache)
    assert 3 not in banned[:, 5:]

    model.register_forward_hook(lambda _, __, output: (output.logits[..., 3].fill_(-torch.inf), None)[1])
    assert torch.equal(model.generate(prompt, max_new_tokens=12, use_cache=use_cache), banned)


class TakesAll(gptfast.OpenAIGPTLMHeadModel):
    def forward(self, input_ids, **settings):  # type: ignore[override]
        return super().forward(input_ids, **settings)


class TakesFew(gptfast.OpenAIGPTLMHeadModel):
    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):  # type: ignore[override]
        return super().forward(input_ids, attention_mask, return_dict=return_dict)


class GivesATuple(gptfast.OpenAIGPTLMHeadModel):
    def forward(self, *args, **settings):
        return super().forward(*args, **{**settings, "return_dict": False})


class GivesTheLast(gptfast.OpenAIGPTLMHeadModel):
    def forward(self, *args, **settings):
        return super().forward(*args, **{**settings, "logits_to_keep": 1})


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_forward_pass_that_generate_cannot_call_is_named(use_cache):
    model, x = make(), ids(2, 5)
    taking_all = TakesAll(model.config).eval()
    taking_all.load_state_dict(model.state_dict())
    assert torch.equal(taking_all.generate(x, use_cache=use_cache), model.generate(x))

    missing = "forward must take past_key_values, output_attentions, output_hidden_states: generate passes them"
    with _dispatch.record() as choices:
        with pytest.raises(TypeError, match=f"^TakesFew.{missing}$"):
            TakesFew(model.config).eval().generate_stream(x, max_new_tokens=3, use_cache=use_cache)
        model.transformer.forward = lambda input_ids, use_cache, return_dict: None
        with pytest.raises(TypeError, match=f"^OpenAIGPTModel.{missing}$"):
            model.generate(x, use_cache=use_cache)
    assert choices == []

    for kind, got in ((GivesATuple, "none"), (GivesTheLast, r"\[2, 1, 97\]")):
        with pytest.raises(TypeError, match=rf"{kind.__name__}.forward must return .* logits \[2, 5, V\], got {got}"):
            kind(model.config).eval().generate(x, use_cache=use_cache)


class SeesPositions(torch.nn.Linear):
    def forward(self, hidden):
        _B, _T, _C = hidden.shape
        return super().forward(hidden)


def test_a_head_put_in_the_place_of_the_models():
    model, prompt = make(), ids(2, 5)
    expected = model.generate(prompt, max_new_tokens=5)
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head, torch.nn.Identity())
    assert torch.equal(model.generate(prompt, max_new_tokens=5), expected)
    model.lm_head = SeesPositions(head.in_features, head.out_features, bias=False)
    model.lm_head.weight = head.weight
    assert torch.equal(model.generate(prompt, max_new_tokens=5), expected)


def test_types():
    model = make()
    expected = model.generate(ids(2, 5), max_new_tokens=9)
    got = model.generate(ids(2, 5).int(), max_new_tokens=9)
    assert (got.dtype, got.requires_grad) == (torch.int64, False)
    assert torch.equal(got, expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids(2, 5), max_new_tokens=9), expected)
    for dtype in (torch.bfloat16, torch.float64):
        assert model.to(dtype).generate(ids(2, 5), max_new_tokens=9).shape == (2, 14)


def test_autocast():
    model, x = make(), ids(2, 5)
    ragged = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (None, ragged):
            cached = model.generate(x, attention_mask=mask, max_new_tokens=4)
            uncached = model.generate(x, attention_mask=mask, max_new_tokens=4, use_cache=False)
            assert torch.equal(cached, uncached)
        assert model(x, use_cache=True).past_key_values.k.dtype == torch.bfloat16


def test_training_mode_stays_and_drops():
    model = make().train()
    texts = {tuple(model.generate(ids(1, 5), max_new_tokens=20)[0].tolist()) for _ in range(3)}
    assert len(texts) > 1
    assert model.training
    ragged = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    refused = pytest.raises(ValueError, match=r"attention_mask leaves rows of different length: .* model.eval\(\)")
    with refused:
        model.generate(ids(2, 5), attention_mask=ragged)
    model.eval().transformer.train()
    with _dispatch.record() as choices, refused:
        model.generate(ids(2, 5), attention_mask=ragged)
    assert choices == []
    assert model.generate(ids(2, 5), attention_mask=ragged, use_cache=False).shape == (2, 25)
    model.gradient_checkpointing_enable()
    assert model.generate(ids(1, 5)).shape == (1, 25)


# ---- sampling ----


def by_brute_force(logits, temperature, top_k, top_p):
    """The definitions, a token at a time."""
    rows = []
    for row in logits.double() / temperature:
        order = sorted(range(len(row)), key=lambda i: -float(row[i]))
        kept = order[: top_k or None]
        if top_p is not None:
            p = {i: float(row[i].exp()) for i in kept}
            total, mass, nucleus = sum(p.values()), 0.0, []
            for i in kept:
                if mass >= top_p:
                    break
                nucleus.append(i)
                mass += p[i] / total
            kept = nucleus
        weights = torch.zeros_like(row)
        weights[kept] = row[kept].exp()
        rows.append(weights / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 0, 1, 3, V, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
def test_sampling_against_brute_force(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    got = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = by_brute_force(logits, temperature, top_k, top_p).float()
    assert torch.equal(got > 0, expected > 0)
    assert_close(got, expected)


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.4}])
def test_equally_likely_tokens_stay_together(how):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    before = logits.clone()
    assert_close(distribution(logits, **how), torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]]))
    assert torch.equal(logits, before)


def test_a_draw_is_where_the_running_sum_passes():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(p.expand(6, -1), uniform).tolist() == [1, 1, 3, 3, 4, 4]


def test_unlikely_tokens_are_not_lost_in_a_large_vocabulary():
    """Behind a likely token, a float32 running sum of 40,000 small ones would be off by many of them."""
    p = torch.full((1, 40000), 0.5 / 39999)
    p[0, 0] = 0.5
    uniform = torch.tensor([0.5 + 0.5 * i / 39999 for i in (100.5, 20000.5, 39998.5)], dtype=torch.float64)
    assert draw(p.expand(3, -1), uniform).tolist() == [101, 20001, 39999]


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = torch.rand(40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(draw(p.expand(40000, -1), uniform).bincount() / 40000, p, 0.01)


def test_seeds():
    model, x = make(), ids(2, 5)
    how = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 20}
    before = torch.get_rng_state()
    first = model.generate(x, seed=1, **how)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, model.generate(x, seed=1, **how))
    assert not torch.equal(first, model.generate(x, seed=3, **how))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [model.generate(x, generator=generator, **how) for generator in generators]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], model.generate(x, generator=generators[0], **how))  # it goes on
    assert torch.equal(first, model.generate(x, seed=1, use_cache=False, **how))
    torch.manual_seed(5)
    unseeded = model.generate(x, **how)
    torch.manual_seed(5)
    assert torch.equal(unseeded, model.generate(x, **how))
    assert not torch.equal(unseeded, model.generate(x, **how))
    likeliest = model.generate(x, max_new_tokens=20)
    assert torch.equal(likeliest, model.generate(x, do_sample=True, top_k=1, max_new_tokens=20))
    assert torch.equal(likeliest, model.generate(x, do_sample=True, top_p=1e-9, max_new_tokens=20))


@pytest.mark.parametrize("how", [{"top_k": 0}, {"top_k": 20}, {"top_p": 0.9, "repetition_penalty": 1.2}], ids=str)
def test_a_row_draws_as_it_would_alone(how):
    """Whatever stands beside it, on whichever side its padding, however many tokens are asked for."""
    model, T = make(), 6
    settings = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20, **how}
    mask = torch.tensor([[1] * T, [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    x = ids(3, T)
    together = model.generate(x, attention_mask=mask, seed=7, **settings)[:, T:]
    chosen = model.generate(x, attention_mask=mask, seed=[7, 8, 9], **settings)[:, T:]
    assert torch.equal(chosen, together)
    for b in range(3):
        prompt = x[b][mask[b] > 0][None]
        alone = model.generate(prompt, seed=7 + b, **{**settings, "max_new_tokens": 15})[0, prompt.shape[1] :]
        assert torch.equal(together[b, :15], alone)
    same = model.generate(x[:1], num_return_sequences=2, seed=[7, 7], **settings)
    assert torch.equal(same[0], same[1])


def test_several_continuations_of_each_prompt():
    model, x = make(), ids(2, 5)
    got = model.generate(x, num_return_sequences=3, do_sample=True, temperature=3.0, seed=0, max_new_tokens=9)
    assert got.shape == (6, 14)
    assert torch.equal(got[:, :5], x.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in got}) == 6
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    greedy = model.generate(x, attention_mask=mask, num_return_sequences=2, max_new_tokens=9)
    assert torch.equal(greedy, model.generate(x, attention_mask=mask, max_new_tokens=9).repeat_interleave(2, 0))


# ---- stopping ----


def stopped(text, stops, pad):
    """``text`` [B, new] as it is with stop tokens: padding behind the first one, ended when all rows have."""
    ends = [next((i + 1 for i, t in enumerate(row) if t in stops), len(row)) for row in text.tolist()]
    text = text[:, : max(ends)].clone()
    for b, end in enumerate(ends):
        text[b, end:] = pad
    return text


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pick", [[(0, 3)], [(0, 3), (1, 7), (2, 5)], [(0, 0), (1, 0), (2, 0)], []])
def test_stop_tokens(pick, use_cache):
    model, x = make(), ids(3, 5)
    plain = model.generate(x, max_new_tokens=25)[:, 5:]
    stops = [int(plain[b, i]) for b, i in pick]
    expected = stopped(plain, stops, 11)
    got = model.generate(x, max_new_tokens=25, eos_token_id=stops, pad_token_id=11, use_cache=use_cache)
    assert torch.equal(got[:, 5:], expected)
    tensor = model.generate(x, max_new_tokens=25, eos_token_id=torch.tensor(stops, dtype=torch.int64), pad_token_id=11)
    assert torch.equal(tensor, got)
    if len(stops) == 1:
        assert (expected == 11).any()
        assert torch.equal(model.generate(x, max_new_tokens=25, eos_token_id=stops[0], pad_token_id=11), got)
    if len(stops) == 3:
        assert expected.shape[1] < 25


@pytest.mark.parametrize("every", [2, 7, 16, 100])
def test_stops_are_looked_for_in_batches_of_steps(every, monkeypatch):
    """As on a GPU, where a look costs a synchronisation: not a token more comes out, and no row goes on."""
    model, x = make(), ids(3, 5)
    plain = model.generate(x, max_new_tokens=25)[:, 5:]
    how = {"attention_mask": None, "max_new_tokens": 25, "pad_token_id": 11, "look_every": every}
    for pick in ([(0, 3), (1, 7), (2, 5)], [(0, 0), (1, 0), (2, 0)], [(0, 24), (1, 24), (2, 24)], [(0, 2)], []):
        stops = [int(plain[b, i]) for b, i in pick]
        expected = stopped(plain, stops, 11)
        assert torch.equal(torch.stack(list(model.generate_stream(x, eos_token_id=stops, **how)), 1), expected)
        assert torch.equal(model.generate(x, eos_token_id=stops, **how)[:, 5:], expected)
    with _dispatch.record() as choices:
        for step, _ in enumerate(model.generate_stream(x, **how)):
            assert choices.count(choices[0]) == min(25, (step // every + 1) * every)


def test_stop_and_padding_tokens_of_the_config():
    model, x = make(), ids(3, 5)
    plain = model.generate(x, max_new_tokens=25)[:, 5:]
    stop = int(plain[0, 3])
    model.config.eos_token_id = stop
    assert torch.equal(model.generate(x, max_new_tokens=25)[:, 5:], stopped(plain, [stop], stop))
    model.config.pad_token_id = 11
    assert torch.equal(model.generate(x, max_new_tokens=25)[:, 5:], stopped(plain, [stop], 11))
    assert torch.equal(model.generate(x, max_new_tokens=25, eos_token_id=[])[:, 5:], plain)


# ---- streaming ----


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.ended += 1


def test_streaming_is_generating():
    model, x = make(), ids(3, 5)
    plain = model.generate(x, max_new_tokens=25)
    how = {"max_new_tokens": 25, "eos_token_id": [int(plain[0, 8]), int(plain[1, 12]), int(plain[2, 9])]}
    recorder = Recorder()
    text = model.generate(x, streamer=recorder, pad_token_id=11, **how)
    assert torch.equal(text[:, 5:], torch.stack(list(model.generate_stream(x, pad_token_id=11, **how)), 1))
    assert recorder.ended == 1
    assert torch.equal(recorder.seen[0], x)
    assert torch.equal(torch.stack(recorder.seen[1:], 1), text[:, 5:])


def test_streaming_works_as_it_goes():
    """Each step runs only when its token is asked for; arguments are checked before the first."""
    model = make()
    with _dispatch.record() as choices:
        steps = model.generate_stream(ids(2, 5), max_new_tokens=9)
        assert choices == []
        first = next(steps)
        after_one = len(choices)
        next(steps)
        assert 0 < after_one < len(choices)
    assert torch.equal(first, model.generate(ids(2, 5), max_new_tokens=1)[:, 5])
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        model.generate_stream(ids(2, 5), max_new_tokens=0)


# ---- beyond the last position ----


def by_windows(model, prompt, new, P=P):
    """Greedy text [T + new] of one row by the definition: the window is read whole before each token, and moves when it
    is full, so that its last half, with the newest token, stays."""
    text, start = prompt.tolist(), 0
    while len(text) - start > P:
        start += P + 1 - P // 2
    for _ in range(new):
        if len(text) - start > P:
            start = len(text) - P // 2
        with torch.no_grad():
            text.append(int(model(torch.tensor([text[start:]])).logits[0, -1].argmax()))
    return torch.tensor(text)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("T", [1, P // 2, P - 1, P, P + 1, 2 * P + 5])
def test_sliding_reads_the_last_half_again(T, use_cache):
    model, x = make(), ids(1, T)
    got = model.generate(x, max_new_tokens=70, overflow="slide", use_cache=use_cache)
    assert torch.equal(got[0], by_windows(model, x[0], 70))


def test_sliding_rows_come_out_as_alone_and_may_be_cut_anywhere():
    model, T = make(), 2 * P
    lengths = [2 * P, P - 3, 3]
    prompts = [ids(n, seed=n) for n in lengths]
    x, mask = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        x[b, T - len(prompt) :], mask[b, T - len(prompt) :] = prompt, 1
    how = {"overflow": "slide", "do_sample": True, "top_k": 0, "seed": [4, 5, 6]}
    together = model.generate(x, attention_mask=mask, max_new_tokens=60, **how)[:, T:]
    for b, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], max_new_tokens=60, **{**how, "seed": 4 + b})
        assert torch.equal(together[b], alone[0, len(prompt) :])
    greedy = model.generate(x[:1], max_new_tokens=60, overflow="slide")
    for cut in (2 * P + 1, 2 * P + 20, 2 * P + 41):
        assert torch.equal(model.generate(greedy[:, :cut], max_length=2 * P + 60, overflow="slide"), greedy)


def test_sliding_changes_nothing_where_there_is_room():
    model, x = make(), ids(2, 5)
    assert torch.equal(model.generate(x, max_length=P, overflow="slide"), model.generate(x, max_length=P))
    tiny = make(n_positions=1)
    assert tiny.generate(ids(2, 1), max_new_tokens=5, overflow="slide").shape == (2, 6)


# ---- lengths, and what is refused before any work ----


def test_lengths():
    model = make()
    assert model.generate(ids(1, 5)).shape == (1, 25)
    assert model.generate(ids(1, 30)).shape == (1, P)
    assert model.generate(ids(1, P), overflow="slide").shape == (1, P + 20)
    mask = torch.ones(2, P).long()
    mask[:, 5:] = 0
    assert model.generate(ids(2, P), attention_mask=mask).shape == (2, P + 20)  # padding takes no room
    assert len(list(model.generate_stream(ids(2, P), attention_mask=mask))) == 20
    assert model.generate(ids(1, 5), max_length=7).shape == (1, 7)
    assert model.generate(ids(1, 5), max_length=7, max_new_tokens=4).shape == (1, 9)
    assert model.generate(ids(1, P - 1), max_new_tokens=1).shape == (1, P)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor, got list"),
    ({"input_ids": ids(5)}, ValueError, r"input_ids must be \[B, T\] .*, got shape \[5\]"),
    ({"input_ids": ids(0, 5)}, ValueError, r"input_ids must be \[B, T\] .*, got shape \[0, 5\]"),
    ({"input_ids": ids(2, 0)}, ValueError, r"input_ids must be \[B, T\] .*, got shape \[2, 0\]"),
    ({"input_ids": ids(2, 5).float()}, TypeError, "input_ids must be int32 or int64, got torch.float32"),
    ({"input_ids": ids(2, 5) + V}, ValueError, "input_ids contains .*, accepted are 0 to 96"),
    ({"input_ids": ids(1, P)}, ValueError, "max_new_tokens is 1 and input_ids has 40 positions.* n_positions = 40"),
    ({"input_ids": ids(1, P + 1)}, ValueError, "input_ids has 41 positions"),
    ({"max_new_tokens": P}, ValueError, "max_new_tokens is 40 and input_ids has 5 positions"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ({"max_length": 5}, ValueError, "max_length must exceed the prompt's 5 positions, got 5"),
    ({"max_length": P + 1}, ValueError, "max_new_tokens is 36 and input_ids has 5 positions"),
    ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask must be \[2, 5\], .*, got \[2, 4\]"),
    ({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask must be a tensor, got list"),
    ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, ValueError, "attention_mask has a row without any token"),
    ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature must be positive, got 0.0; .* do_sample=False"),
    ({"temperature": float("nan"), "do_sample": True}, ValueError, "temperature must be positive, got nan"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
    ({"top_k": 3.5}, TypeError, "top_k must be an int, got 3.5"),
    ({"top_p": 0.0, "do_sample": True}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.5, "do_sample": True}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator cannot both be given"),
    ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1, got 0"),
    ({"pad_token_id": -1}, ValueError, "pad_token_id must be from 0 to 96, got -1"),
    ({"pad_token_id": V}, ValueError, "pad_token_id must be from 0 to 96, got 97"),
    ({"num_beams": 4}, ValueError, "num_beams must be 1, got 4"),
    ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate must be False"),
    ({"max_new_tokens": 3.0}, TypeError, "max_new_tokens must be an int, got 3.0"),
    ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be at least 0, got -1"),
    ({"eos_token_id": "a"}, TypeError, "eos_token_id must be an int, got 'a'"),
    ({"eos_token_id": [1, V]}, ValueError, "eos_token_id must be below 97, got 97"),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be positive and finite, got 0.0"),
    ({"repetition_penalty": float("inf")}, ValueError, "repetition_penalty must be positive and finite, got inf"),
    ({"max_length": "7"}, TypeError, "max_length must be an int, got '7'"),
    ({"max_length": 7.0}, TypeError, "max_length must be an int, got 7.0"),
    ({"look_every": 0}, ValueError, "look_every must be at least 1, got 0"),
    ({"input_ids": ids(2, 5).to("meta")}, ValueError, "input_ids must be on cpu as the model is, got meta"),
    ({"past_key_values": None}, TypeError, r"generate_stream\(\) got an unexpected keyword argument 'past_key_values'"),
    ({"eos_token_id": torch.tensor(1.0)}, TypeError, "eos_token_id must be an int, got 1.0"),
    ({"seed": torch.tensor([1, 2, 3])}, ValueError, "seed must be an int or one for each of the 2 rows, got 3"),
    ({"seed": -1}, ValueError, "seed must be from 0 to"),
    ({"seed": [1, 2, 3]}, ValueError, "seed must be an int or one for each of the 2 rows, got 3"),
    ({"seed": 1.5, "do_sample": True}, TypeError, "seed must be an int, got 1.5"),
    ({"pad_token_id": 1.5}, TypeError, "pad_token_id must be an int, got 1.5"),
    ({"pad_token_id": "a"}, TypeError, "pad_token_id must be an int, got 'a'"),
    ({"overflow": "wrap"}, ValueError, "overflow must be 'error' or 'slide', got 'wrap'"),
    ({"generator": 1, "do_sample": True}, TypeError, "generator must be a torch.Generator, got 1"),
    ({"temperature": "a", "do_sample": True}, TypeError, "temperature must be a number, got 'a'"),
    ({"top_p": "a", "do_sample": True}, TypeError, "top_p must be a number, got 'a'"),
    ({"repetition_penalty": [1.1]}, TypeError, r"repetition_penalty must be a number, got \[1.1\]"),
    ({"beams": 4}, TypeError, "beams"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    model, recorder = make(), Recorder()
    with _dispatch.record() as choices, pytest.raises(error, match=message):
        model.generate(**{"input_ids": ids(2, 5), "streamer": recorder, **arguments})
    assert choices == []
    assert recorder.seen == []


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])  # the second is 0 in float32
def test_the_coldest_sampling_is_greedy(temperature):
    model, x = make(), ids(2, 5)
    cold = model.generate(x, max_new_tokens=9, do_sample=True, temperature=temperature, seed=0)
    assert torch.equal(cold, model.generate(x, max_new_tokens=9))


def test_the_hottest_sampling_is_uniform_and_draws_nothing_that_is_ruled_out():
    logits = torch.tensor([[3.0, -torch.inf, -4.0]])
    for temperature in (1e300, torch.inf):
        hot = distribution(logits, temperature=temperature)
        torch.testing.assert_close(hot, torch.tensor([[0.5, 0.0, 0.5]]))


def test_neutral_settings_change_nothing():
    model, x = make(), ids(2, 5)
    neutral = {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "num_beams": 1}
    assert torch.equal(model.generate(x), model.generate(x, **neutral, min_new_tokens=0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_huge_repetition_penalty_repeats_nothing(use_cache):
    model, x = make(), ids(3, 6)
    for row in model.generate(x, max_new_tokens=30, repetition_penalty=1e9, use_cache=use_cache)[:, 6:]:
        assert len(row.unique()) == 30
    shift = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    padded = model.generate(x, attention_mask=shift, repetition_penalty=1.3, use_cache=use_cache)
    assert torch.equal(padded[:, 6:], model.generate(x[:, 2:], repetition_penalty=1.3)[:, 4:])


def test_min_new_tokens_puts_stopping_off():
    model, x = make(), ids(1, 6)
    stop = int(model.generate(x)[0, 6])  # the first token it would write
    assert model.generate(x, eos_token_id=stop).shape[1] == 7
    text = model.generate(x, eos_token_id=stop, min_new_tokens=9)[0, 6:]
    assert len(text) >= 9
    assert stop not in text[:9]


def test_padding_is_seen_without_a_mask():
    model, x = make(pad_token_id=0), ids(2, 6).clamp(min=1)
    x[1, :3] = 0
    assert torch.equal(model.generate(x), model.generate(x, attention_mask=x != 0))
    assert not torch.equal(model.generate(x), model.generate(x, attention_mask=torch.ones_like(x)))
    stop = {"eos_token_id": 0}  # an id that is a stop token too says nothing of padding
    assert torch.equal(model.generate(x, **stop), model.generate(x, attention_mask=torch.ones_like(x), **stop))


# ---- the cache, through forward ----


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 7], [7, 1, 1, 3], [1, 11]], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_prefill_in_pieces(pieces, grad):
    model, x = make(), ids(2, 12)
    expected = model(x).logits
    cache: Any = None
    logits = []
    with torch.set_grad_enabled(grad):
        for piece in x.split(pieces, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert_close(torch.cat(logits, 1), expected)
    assert cache.get_seq_length() == cache.seqlens == 12
    assert (cache.batch_size, cache.max_length, cache.k.requires_grad) == (2, P, False)


@pytest.mark.parametrize("grad", [True, False])
def test_mask_positions_weights_and_states_with_a_cache(grad):
    model, x = make(), ids(2, 12)
    mask = torch.ones(2, 12).long()
    mask[0, :4] = mask[1, 5] = 0
    how = {"output_attentions": True, "output_hidden_states": True, "head_mask": torch.tensor([1.0, 0.5, 2.0])}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = gptfast.KVCache(model.config, 2, 12)
    with torch.set_grad_enabled(grad):
        expected = model(x, mask, position_ids=positions, **how)
        for a, b in itertools.pairwise((0, 7, 8, 12)):
            piece = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b], "past_key_values": cache}
            output = model(x[:, a:b], **piece, **how)
            assert output.past_key_values is None
            assert_close(output.logits, expected.logits[:, a:b])
            for got, whole in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_close(got, whole[:, a:b])
            for got, whole in zip(output.attentions, expected.attentions, strict=True):
                assert_close(got, whole[:, :, a:b, :b])
    assert cache.get_seq_length() == 12


def test_gradients_through_a_prefill_are_those_without_a_cache():
    model, x = make(), ids(2, 12)
    found = []
    for use_cache in (False, True):
        model.zero_grad()
        model(x, labels=x, use_cache=use_cache).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)


def test_no_gradient_flows_into_what_the_cache_holds():
    model, x = make(), ids(2, 12)
    first = model.transformer(inputs_embeds=torch.zeros(2, 4, 24, requires_grad=True), use_cache=True)
    output = model(x, past_key_values=first.past_key_values, labels=x)
    output.loss.backward()
    assert model.transformer.positions_embed.weight.grad[:4].abs().max() == 0
    assert model.transformer.positions_embed.weight.grad[4:16].abs().max() > 0


def test_dropout_falls_with_a_cache_too():
    model = make(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.5).train()
    with torch.no_grad():
        exact, first, second = (m(ids(1, 9), use_cache=True).logits for m in (make(), model, model))
    assert (first - exact).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


@torch.no_grad()
def test_a_block_in_training_mode_drops_with_a_cache_too():
    model, x = make(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.5), ids(1, 9)
    model.transformer.h[1].train()
    for how in ({"use_cache": True}, {"output_attentions": True}):
        first, second = (model(x, **how).logits for _ in range(2))
        assert (first - second).abs().max() > 1e-3
    first, second = (model(x[:, :1], past_key_values=model(x, use_cache=True).past_key_values).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_the_default_of_the_config():
    model, x = make(use_cache=True), ids(2, 5)
    assert isinstance(model(x).past_key_values, gptfast.KVCache)
    assert model(x, use_cache=False).past_key_values is None
    assert model.train()(x).past_key_values is None
    assert isinstance(model(x, use_cache=True).past_key_values, gptfast.KVCache)
    assert make()(x).past_key_values is None
    logits, cache = make()(x, use_cache=True, return_dict=False)
    assert (logits.shape, cache.get_seq_length()) == ((2, 5, V), 5)


@torch.no_grad()
def test_rows_of_different_length():
    """A hand-made batch: prompts of 3 and 6 tokens, padded right, then three steps together."""
    model, prompts = make(), [ids(1, 3), ids(1, 6, seed=1)]
    padded = torch.cat([torch.cat([prompts[0], ids(1, 3, seed=2)], 1), prompts[1]])
    cache = model(padded, use_cache=True).past_key_values
    cache.seqlens = torch.tensor([3, 6])
    new = ids(2, 3, seed=3)
    together = model(new[:, :2], past_key_values=cache).logits, model(new[:, 2:], past_key_values=cache).logits
    assert cache.get_seq_length() == 9
    for b, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, new[b : b + 1]], 1)).logits[0, -3:]
        assert_close(torch.cat(together, 1)[b], alone)
    for refused in ({"attention_mask": torch.ones(2, 10)}, {"output_attentions": True}):
        with pytest.raises(ValueError, match="past_key_values whose rows differ in length go without"):
            model(new[:, :1], past_key_values=cache, **refused)
    with torch.enable_grad(), pytest.raises(ValueError, match="past_key_values whose rows differ in length go without"):
        model(new[:, :1], past_key_values=cache)
    cache.seqlens = torch.tensor([3, P])
    with pytest.raises(ValueError, match="past_key_values has room for 0 of 40 positions, the input has 1"):
        model(new[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("held", "grad"),
    [(4, False), (torch.tensor([4, 2]), False), (4, True)],
    ids=["one length", "lengths", "autograd"],
)
def test_a_step_compiles_whole(held, grad):
    torch._dynamo.reset()
    model, x = make(n_layer=1), ids(2, 7)

    def step(tokens, past):
        return model(tokens, past_key_values=past).logits

    with torch.set_grad_enabled(grad):
        caches = [model(x[:, :4], use_cache=True).past_key_values for _ in range(2)]
        for made in caches:
            made.seqlens = held if isinstance(held, int) else held.clone()
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for t in (4, 5, 6):
            token = x[:, t : t + 1]
            assert_close(compiled(token, caches[0]), step(token, caches[1]))
    assert_close(caches[0].k, caches[1].k)


@torch.no_grad()
def test_rows_may_be_reordered_and_forgotten():
    model, x = make(), ids(3, 7)
    cache = model(x[:, :6], use_cache=True).past_key_values
    held = cache.seqlens = torch.tensor([4, 5, 6])
    cache.reorder(torch.tensor([2, 0, 0]))
    assert held.tolist() == [6, 4, 4]
    assert cache.seqlens is held  # a graph reads it where it is
    logits = model(x[[2, 0, 0], [6, 4, 4], None], past_key_values=cache).logits[:, 0]
    assert_close(logits, model(x).logits[[2, 0, 0], [6, 4, 4]])
    for rows in (torch.tensor([0]), torch.tensor([True, True, True]), [2, 0, 0]):
        with pytest.raises(ValueError, match=r"rows must be an int32 or int64 tensor \[3\], got"):
            cache.reorder(rows)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(model(x, past_key_values=cache).logits, model(x).logits)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, ValueError, "max_length must be from 1 to n_positions = 40, got 0"),
        ({"max_length": P + 1}, ValueError, "max_length must be from 1 to n_positions = 40, got 41"),
        ({"max_length": 4.0}, TypeError, "max_length must be an int, got 4.0"),
        ({"batch_size": "2"}, TypeError, "batch_size must be an int, got '2'"),
        ({"config": torch.nn.Linear(1, 1)}, TypeError, "config must be an OpenAIGPTConfig, got Linear"),
    ],
)
def test_a_cache_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=message):
        gptfast.KVCache(**{"config": make().config, "batch_size": 2, **settings})


@pytest.mark.parametrize("grad", [True, False])
def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(grad):
    model, x = make(), ids(2, 7)
    with torch.inference_mode():
        cache = model(x[:, :4], use_cache=True).past_key_values
    with torch.set_grad_enabled(grad):
        logits = model(x[:, 4:], past_key_values=cache).logits
        assert_close(logits, model(x).logits[:, 4:])
    assert logits.requires_grad == grad


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_blocks_put_in_or_taken_out(blocks, mode):
    """Models are cut short, or grown, without a word to the config."""
    model, x = make(), ids(2, 9)
    model.transformer.h = torch.nn.ModuleList(make(seed, n_layer=1).transformer.h[0] for seed in range(blocks))
    with mode():
        expected = model(x, output_attentions=True, head_mask=torch.full((blocks, 3), 0.5))
        past = model(x[:, :4], use_cache=True, head_mask=torch.full((blocks, 3), 0.5)).past_key_values
        got = model(x[:, 4:], past_key_values=past, output_attentions=True, head_mask=torch.full((3,), 0.5))
    assert (len(past.k), len(got.attentions)) == (blocks, blocks)
    assert_close(got.logits, expected.logits[:, 4:])
    text = model.generate(x)
    assert torch.equal(text, model.generate(x, use_cache=False))
    assert torch.equal(text[0], by_windows(model, x[0], 20))
    for refused in ({"past_key_values": cache()}, {"head_mask": torch.ones(3, 3)}):
        with _dispatch.record() as choices, pytest.raises(ValueError, match=rf"must .*\[{blocks}, 3.*, got .*\[3, 3"):
            model(x, **refused)
        assert choices == []


def cache(batch_size=2, max_length=None, held=0, dtype=torch.float32, device="cpu", **settings):
    config = gptfast.OpenAIGPTConfig(**{**SMALL, **settings})
    made = gptfast.KVCache(config, batch_size, max_length, dtype=dtype, device=device)
    made.seqlens = held
    return made


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"past_key_values": cache(3)}, ValueError, "past_key_values holds 3 rows, the input has 2"),
        ({"past_key_values": cache(max_length=4)}, ValueError, "past_key_values has room for 4 of 4 positions"),
        ({"past_key_values": cache(held=36)}, ValueError, "past_key_values has room for 4 of 40 positions"),
        ({"past_key_values": cache(n_layer=2)}, ValueError, r"past_key_values must have .*, got \[2, 3, 8\]"),
        ({"past_key_values": cache(n_head=2)}, ValueError, r"past_key_values must have .* \[3, 3, 8\], got"),
        ({"past_key_values": cache(dtype=torch.float64)}, TypeError, "past_key_values must be torch.float32"),
        ({"past_key_values": cache(device="meta")}, ValueError, "past_key_values must be on cpu as the model is"),
        ({"past_key_values": cache(held=-1)}, ValueError, "past_key_values.seqlens must be at least 0, got -1"),
        ({"past_key_values": cache(held=[3, 3])}, TypeError, "past_key_values.seqlens must be an int or a tensor, got"),
        ({"past_key_values": cache(held=torch.tensor(3))}, ValueError, r"seqlens must be an int or \[2\], got"),
        ({"past_key_values": cache(held=torch.ones(2).long().to("meta"))}, ValueError, "seqlens must be on cpu as the"),
        ({"past_key_values": cache(held=torch.tensor([3, -1]))}, ValueError, "seqlens must be at least 0, got -1"),
        ({"past_key_values": cache(held=torch.ones(2))}, TypeError, "seqlens must be int32 or int64, got"),
        ({"past_key_values": ()}, TypeError, "past_key_values must be a gptfast.KVCache, got tuple"),
        (
            {"past_key_values": cache(held=3), "attention_mask": torch.ones(2, 5)},
            ValueError,
            r"attention_mask must be \[2, 8\], got shape \[2, 5\]",
        ),
    ],
)
def test_a_cache_that_does_not_fit(arguments, error, message):
    model = make()
    with torch.no_grad(), _dispatch.record() as choices, pytest.raises(error, match=message):
        model(ids(2, 5), **arguments)
    assert choices == []
