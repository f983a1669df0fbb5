"""attn_implementation="gptfast" in small models of transformers, held against their own eager attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers >= 5")

from transformers import masking_utils  # noqa: E402

from gptfast.hf import KeyMask, attention  # noqa: E402

V, C, H, L = 61, 32, 4, 2
SIZES = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": 48}
ROTARY = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}


def configs():
    t = transformers
    yield "gpt2", t.GPT2Config(vocab_size=V, n_positions=64, n_embd=C, n_layer=L, n_head=H)
    yield "llama", t.LlamaConfig(**ROTARY)
    yield "mistral", t.MistralConfig(**ROTARY, sliding_window=5)
    yield "qwen3", t.Qwen3Config(**ROTARY)
    hybrid = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    yield "qwen3 hybrid", t.Qwen3Config(**ROTARY, **hybrid)
    opt = {"ffn_dim": 48, "word_embed_proj_dim": C, "max_position_embeddings": 64}
    yield "opt", t.OPTConfig(**{**SIZES, "intermediate_size": None}, **opt)
    yield "gpt_neox", t.GPTNeoXConfig(**SIZES, max_position_embeddings=64)


CONFIGS = dict(configs())
DECODERS = list(CONFIGS)


def build(name, implementation, **settings):
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()


def pair(name, **settings):
    theirs, ours = build(name, "eager", **settings), build(name, "gptfast", **settings)
    for model in (theirs, ours):  # larger weights, so that what a query sees shows in the output
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    assert ours.config._attn_implementation == "gptfast"
    return theirs, ours


def ids(*shape, seed=0):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def mask(side, lengths, T):
    rows = [[1] * n + [0] * (T - n) for n in lengths]
    return torch.tensor(rows if side == "right" else [row[::-1] for row in rows])


def close(a, b, rows=None):
    a, b = (a, b) if rows is None else (a[rows], b[rows])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def seen(monkeypatch):
    """What the layers were handed, by kind, and whether SDPA computed any of them in our place."""
    kinds = set()
    forward, stock = attention.attention_forward, attention.sdpa_attention_forward

    def record(module, q, k, v, m, **kwargs):
        kinds.add("KeyMask" if isinstance(m, KeyMask) else None if m is None else f"{m.ndim}-D")
        return forward(module, q, k, v, m, **kwargs)

    def fallback(*args, **kwargs):
        kinds.add("sdpa")
        return stock(*args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", fallback)
    transformers.AttentionInterface.register("gptfast", record)
    yield kinds
    attention.register_attention()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits(name, side, seen):
    theirs, ours = pair(name)
    x, m = ids(3, 11), None if side is None else mask(side, [11, 4, 7], 11)
    with torch.no_grad():
        a, b = ours(x, attention_mask=m).logits, theirs(x, attention_mask=m).logits
    close(a, b, None if m is None else m.bool())
    assert a.isfinite().all()
    assert "sdpa" not in seen  # our kernels' own call, not a mask of T x T
    assert seen <= {None, "KeyMask"}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_generate(name, cache, side):
    theirs, ours = pair(name)
    x, m = ids(2, 7), None if side is None else mask(side, [7, 4], 7)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": m}
    how = {**how, "return_dict_in_generate": True, "output_logits": True}
    if cache == "static":  # where a GPU compiles it; here it is the same cache, run eagerly
        how["cache_implementation"], how["disable_compile"] = "static", True
    a, b = ours.generate(x, **how), theirs.generate(x, **how)
    assert torch.equal(a.sequences, b.sequences)
    close(torch.stack(a.logits), torch.stack(b.logits))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3 hybrid"])
@pytest.mark.parametrize("side", [None, "left"])
def test_a_prompt_in_chunks(name, side, seen):
    """Several queries behind a cache: the last query sees the last key."""
    theirs, ours = pair(name)
    x, m = ids(2, 12), None if side is None else mask(side, [12, 8], 12)
    results = []
    for model in (ours, theirs):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            chunks = [
                model(x[:, a:b], attention_mask=None if m is None else m[:, :b], past_key_values=cache).logits
                for a, b in ((0, 6), (6, 7), (7, 12))
            ]
        results.append(torch.cat(chunks, 1))
    close(*results, None if m is None else m.bool())
    assert "sdpa" not in seen


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_packed_sequences(name, seen):
    """Sequences side by side in a row, told apart by positions that start anew: each sees itself alone."""
    theirs, ours = pair(name)
    x = ids(2, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        a = ours(x, position_ids=positions, use_cache=False).logits
        b = theirs(x, position_ids=positions, use_cache=False).logits
        alone = ours(x[1:, 2:], use_cache=False).logits
    close(a, b)
    close(a[1:, 2:], alone)
    assert "KeyMask" in seen
    assert seen <= {"KeyMask", None}


@pytest.mark.parametrize("padded", [False, True])
def test_bert_sees_both_ways(padded, seen):
    models = []
    for implementation in ("gptfast", "eager"):
        config = transformers.BertConfig(**SIZES, max_position_embeddings=64)
        torch.manual_seed(0)
        models.append(transformers.BertModel._from_config(config, attn_implementation=implementation).eval())
    x, m = ids(2, 9), mask("right", [9, 5], 9) if padded else None
    with torch.no_grad():
        a, b = (model(x, attention_mask=m).last_hidden_state for model in models)
    close(a, b, None if m is None else m.bool())
    assert seen == {"KeyMask"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_gradients(name):
    theirs, ours = pair(name)
    x, m = ids(2, 9), mask("left", [9, 5], 9)
    labels = torch.where(m.bool(), x, -100)
    labels[1, 4] = -100  # it would be told from padding, whose row sees nothing
    for model in (ours, theirs):
        model(x, attention_mask=m, labels=labels).loss.backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_pattern(reentrant):
    _, ours = pair("mistral")
    x, m = ids(2, 9), mask("left", [9, 5], 9)
    grads = []
    for checkpointed in (False, True):
        ours.train().zero_grad()
        if checkpointed:
            ours.activation_checkpointing_enable({"use_reentrant": reentrant})
        ours(x, attention_mask=m, labels=x).loss.backward()
        grads.append(ours.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_a_mask_of_ones_own_goes_to_sdpa(seen):
    theirs, ours = pair("llama")
    x = ids(1, 6)
    own = torch.ones(6, 6).tril()[None, None].bool()
    own[..., 3, 1] = False
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~own, torch.finfo(torch.float32).min)
    with torch.no_grad():
        close(ours(x, attention_mask=own).logits, theirs(x, attention_mask=additive).logits)
    assert "sdpa" in seen


def test_dropout_is_drawn_in_training():
    _, ours = pair("llama", attention_dropout=0.5)
    x = ids(1, 6)
    assert torch.equal(ours(x).logits, ours(x).logits)
    ours.train()
    assert not torch.equal(ours(x).logits, ours(x).logits)


REFUSED = {"softcap": 30.0, "s_aux": torch.zeros(H), "position_bias": torch.zeros(1), "sinks": torch.zeros(H)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_raises(name):
    q = torch.randn(1, H, 3, 8)
    with pytest.raises(ValueError, match="which Identity asks for"):
        attention.attention_forward(torch.nn.Identity(), q, q, q, None, **{name: REFUSED[name]})


def test_models_that_need_more_raise():
    gemma = transformers.Gemma2Config(**ROTARY, attn_logit_softcapping=50.0, query_pre_attn_scalar=8)
    model = transformers.AutoModelForCausalLM.from_config(gemma, attn_implementation="gptfast")
    with pytest.raises(ValueError, match="soft-capped"):
        model(ids(1, 4))


def test_attention_weights_are_refused():
    q = torch.randn(1, H, 3, 8)
    with pytest.raises(ValueError, match="eager"):
        attention.attention_forward(torch.nn.Identity(), q, q, q, None, output_attentions=True)


PATTERNS = {
    "causal": (masking_utils.causal_mask_function, (None, 0)),
    "window": (masking_utils.sliding_window_causal_mask_function(3), (2, 0)),
    "both ways": (masking_utils.bidirectional_mask_function, (None, None)),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(3), (3, 3)),
    "chunked": (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)), None),
    "one's own": (lambda b, h, q, k: k <= q, None),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("offset", "T", "S"), [(0, 8, 8), (5, 3, 8), (0, 5, 8)])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_say_what_transformers_say(name, offset, T, S, padded):
    """Attention with our mask equals attention with their [T, S] one; an unknown pattern is handed on as theirs."""
    function, window = PATTERNS[name]
    padding = torch.ones(2, S, dtype=torch.bool)
    if padded:
        padding[1, :2] = False
    shape = {"batch_size": 2, "q_length": T, "kv_length": S, "q_offset": offset, "mask_function": function}
    shape = {**shape, "attention_mask": padding if padded else None}
    if "window" in name or name == "chunked":
        shape["local_size"] = 3
    both_ways = {"allow_is_causal_skip": "both" not in name, "allow_is_bidirectional_skip": "both" in name}
    ours = attention.attention_mask(**shape, **both_ways)
    theirs = masking_utils.sdpa_mask(**shape, allow_is_causal_skip=False)
    if window is None:
        assert not isinstance(ours, KeyMask)
    q, k, v = (torch.randn(2, H, n, 8, generator=torch.Generator().manual_seed(n)) for n in (T, S, S))
    out, _ = attention.attention_forward(torch.nn.Identity(), q, k, v, ours)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=theirs).transpose(1, 2)
    sees = theirs.any(-1)[:, 0]  # [B, T]: a query that sees nothing is zeros here
    close(out, expected, sees)
    assert out.isfinite().all()


def test_key_masks_keep_their_pattern():
    m = KeyMask.make(torch.ones(2, 5, dtype=torch.bool), attention.Pattern((3, 0), True))
    for other in (m.detach(), m.to("cpu", copy=True), m.contiguous(), m[:1], m.clone()):
        assert isinstance(other, KeyMask)
        assert other.pattern == m.pattern
    q = torch.randn(2, H, 5, 8)
    lost = m.as_subclass(torch.Tensor)  # no silent attention with the wrong mask
    with pytest.raises(RuntimeError, match="dtype"):
        attention.attention_forward(torch.nn.Identity(), q, q, q, lost)


def test_saved_config_names_no_implementation(tmp_path):
    _, ours = pair("llama")
    ours.save_pretrained(tmp_path)
    assert "gptfast" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gptfast")
    x = ids(1, 5)
    assert torch.equal(again(x).logits, ours(x).logits)
