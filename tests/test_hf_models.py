"""GPT-1 as a transformers model: what transformers' own test module for OpenAI GPT asks of one, asked of ours."""

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers >= 5")

import gptfast  # noqa: E402
from gptfast import hf  # noqa: E402

V = 61
KINDS = ["OpenAIGPTModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification"]
BODY, LM, DOUBLE, CLASSIFIER = KINDS


def config(**settings):
    small = {"vocab_size": V, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    return transformers.OpenAIGPTConfig(**{**small, **settings})


def build(kind=LM, package=hf, **settings):
    torch.manual_seed(0)
    model = getattr(package, kind)(config(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def pair(kind=LM, **settings):
    """(transformers' own, ours), with the same weights."""
    theirs, ours = build(kind, transformers, **settings), build(kind, **settings)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def ids(*shape, seed=0):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- outputs ----------------------------------------------------------------------------------------------------


def labelled(kind):
    """Inputs with every label that a class takes."""
    if kind == DOUBLE:
        chosen = {"mc_token_ids": torch.tensor([[6, 3, 4], [0, 1, 2]]), "mc_labels": torch.tensor([2, 0])}
        return {"input_ids": ids(2, 3, 7), "labels": ids(2, 3, 7), **chosen}
    more = {LM: {"labels": ids(2, 7)}, CLASSIFIER: {"labels": torch.tensor([1, 0])}, BODY: {}}
    return {"input_ids": ids(2, 7), **more[kind]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=["", "all"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_are_transformers(kind, more, return_dict):
    theirs, ours = pair(kind)
    with torch.no_grad():
        a = ours(**labelled(kind), **more, return_dict=return_dict)
        b = theirs(**labelled(kind), **more, return_dict=return_dict)
    assert isinstance(a, tuple if return_dict is False else transformers.utils.ModelOutput)
    if return_dict:
        assert list(a.keys()) == list(b.keys())
    flat = torch.utils._pytree.tree_leaves
    for x, y in zip(
        flat(tuple(a.values()) if return_dict else a), flat(b.to_tuple() if return_dict else b), strict=True
    ):
        close(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_token_types_and_masks(kind):
    theirs, ours = pair(kind)
    x = ids(2, 7)
    inputs = {"token_type_ids": ids(2, 7, seed=1), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    with torch.no_grad():
        a, b = ours(x, **inputs)[0], theirs(x, **inputs)[0]
    real = inputs["attention_mask"].bool()
    close(a[real] if a.ndim == 3 else a[:1], b[real] if b.ndim == 3 else b[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_signature_is_gptfasts(kind):
    ours, native = (list(inspect.signature(getattr(p, kind).forward).parameters) for p in (hf, gptfast))
    assert ours == [name for name in native if name != "shift_labels"]  # which Trainer would ask of every batch


def test_shifted_labels():
    model, x = build(), ids(2, 7)
    shifted = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    close(model(x, shift_labels=shifted, num_items_in_batch=12).loss, model(x, labels=x).loss)


def test_positional_arguments():
    model = build()
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    close(model(ids(1, 5), mask).logits, model(ids(1, 5), attention_mask=mask).logits)


def test_settings_of_the_config_reach_the_body():
    model = build()
    model.config.output_hidden_states = True
    assert len(model(ids(1, 3)).hidden_states) == 3
    model.config.return_dict = False
    assert isinstance(model(ids(1, 3)), tuple)


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_config_is_not_written_to(kind):
    settings = config(num_labels=3)
    before = settings.to_dict()
    getattr(hf, kind)(settings)
    assert settings.to_dict() == before
    assert settings._attn_implementation != "gptfast"
    getattr(transformers, kind)(settings)


def test_training_learns():
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids(2, 8), labels=ids(2, 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, reentrant):
    model = build(kind, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, summary_first_dropout=0.0).train()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.base_model.gradient_checkpointing
        output = model(**labelled(kind))
        (output[0] if kind != BODY else output[0].square().mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    model.activation_checkpointing_disable()
    assert not model.base_model.gradient_checkpointing


# -- weights and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_initialisation(kind, tie):
    """As the config says, for projections too, and a tied head is the token table."""
    torch.manual_seed(0)
    model = getattr(hf, kind)(config(initializer_range=0.5, tie_word_embeddings=tie, n_embd=64))
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 500:
            assert 0.4 < p.std() < 0.6, name
        elif name.endswith("bias"):
            assert not p.any(), name
        assert not p.is_meta
    head = model.get_output_embeddings()
    if head is not None:
        assert (head.weight is model.get_input_embeddings().weight) == tie


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [hf, gptfast, transformers], ids=["ours", "gptfast", "transformers"])
def test_files_go_both_ways(kind, reader, tmp_path):
    model = build(kind)
    x = labelled(kind)["input_ids"]
    with torch.no_grad():
        expected = model(x)[0]
        model.save_pretrained(tmp_path / "a")
        other = getattr(reader, kind).from_pretrained(tmp_path / "a").eval()
        close(other(x)[0], expected)
        other.save_pretrained(tmp_path / "b")
        close(getattr(hf, kind).from_pretrained(tmp_path / "b").eval()(x)[0], expected)


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("loaded", KINDS)
def test_loading_across_heads(saved, loaded, tmp_path):
    build(saved).save_pretrained(tmp_path)
    model, info = getattr(hf, loaded).from_pretrained(tmp_path, output_loading_info=True)
    heads = {DOUBLE: {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"}}
    heads[CLASSIFIER] = {"score.weight"}
    expected = heads.get(loaded, set()) if loaded != saved else set()
    assert set(info["missing_keys"]) == expected
    assert not any(p.is_meta or p.isnan().any() for p in model.parameters())
    body, source = model.base_model, build(saved).base_model
    assert torch.equal(body.h[1].mlp.c_fc.weight, source.h[1].mlp.c_fc.weight)
    assert torch.equal(body.tokens_embed.weight, source.tokens_embed.weight)


def test_another_number_of_labels(tmp_path):
    build(CLASSIFIER).save_pretrained(tmp_path)
    model = hf.OpenAIGPTForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(ids(1, 4)).logits.shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype, tmp_path):
    build().save_pretrained(tmp_path)
    model = hf.OpenAIGPTLMHeadModel.from_pretrained(tmp_path, dtype=dtype)
    assert model(ids(1, 4)).logits.dtype == dtype


@pytest.mark.parametrize("kind", [LM, DOUBLE])
@pytest.mark.parametrize("tie", [True, False])
def test_resized_embeddings(kind, tie):
    model = build(kind, tie_word_embeddings=tie)
    expected = model(ids(1, 4)).logits
    table = model.resize_token_embeddings(V + 5)
    assert table is model.get_input_embeddings()
    assert model.config.vocab_size == V + 5 == len(model.get_output_embeddings().weight)
    close(model(ids(1, 4)).logits[..., :V], expected)


# -- generate ---------------------------------------------------------------------------------------------------

GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, several": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(how, padded):
    """As transformers' own GPT-1, which keeps no cache, word for word."""
    theirs, ours = pair()
    inputs = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    if padded:
        inputs["attention_mask"][1, :3] = 0
        inputs["input_ids"][1, :3] = 0
    texts = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        texts.append(model.generate(**inputs, **GENERATE[how], max_new_tokens=9, eos_token_id=V - 1))
    assert torch.equal(*texts)


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_and_cache_are_returned(use_cache):
    theirs, ours = pair()
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    a = ours.generate(ids(2, 5), **how, use_cache=use_cache, output_hidden_states=True)
    b = theirs.generate(ids(2, 5), **how)
    close(torch.stack(a.logits), torch.stack(b.logits))
    if use_cache:
        assert a.past_key_values.get_seq_length() == 8
        assert a.hidden_states[-1][-1].shape == (2, 1, 32)  # one position a step
    else:
        assert a.past_key_values is None


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding(how):
    theirs, ours = pair()
    x = ids(1, 5).repeat(1, 2)
    more = {"assistant_model": build(n_layer=1)} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    text = ours.generate(x, **more, max_new_tokens=10, do_sample=False)
    assert torch.equal(text, theirs.generate(x, max_new_tokens=10, do_sample=False))


def test_a_text_up_to_the_last_position():
    theirs, ours = pair()
    how = {"max_new_tokens": 35, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids(1, 5), **how), theirs.generate(ids(1, 5), **how))
    with pytest.raises(ValueError, match="position_ids contains 40"):
        ours.generate(ids(1, 5), max_new_tokens=37, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_pieces(padded):
    model = build()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 1 - padded
    with torch.no_grad():
        whole = model(ids(2, 9), attention_mask=mask).logits
        cache, pieces = hf.OpenAIGPTCache(max_length=4), []
        for a, b in ((0, 4), (4, 5), (5, 9)):  # it grows
            output = model(ids(2, 9)[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
            assert output.past_key_values is cache
            pieces.append(output.logits)
    close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


def test_the_cache_is_reordered_cropped_and_repeated():
    model, x = build(), ids(3, 6)
    cache = hf.OpenAIGPTCache()
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1
    rows = torch.tensor([2, 0, 0])
    with torch.no_grad():
        model(x, past_key_values=cache)
        cache.reorder_cache(rows)
        cache.crop(-2)
        assert (cache.get_seq_length(), cache.batch_size) == (4, 3)
        close(model(x[rows, 4:], past_key_values=cache).logits, model(x[rows]).logits[:, 4:])
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        more = torch.cat([x[rows][1:2].repeat(2, 1), ids(2, 2, seed=5)], 1)
        close(model(more[:, 6:], past_key_values=cache).logits, model(more).logits[:, 6:])
    with pytest.raises(ValueError, match="negative"):
        cache.crop(2)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_gptfasts_own_generate_stream_is_there():
    model = build()
    tokens = list(model.generate_stream(ids(1, 4), max_new_tokens=5))
    assert (
        torch.stack(tokens, 1).tolist() == model.generate(ids(1, 4), max_new_tokens=5, do_sample=False)[:, 4:].tolist()
    )


# -- Auto classes, pipelines --------------------------------------------------------------------------------------


def test_auto_classes_are_opt_in(tmp_path):
    build().save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    assert type(auto.from_pretrained(tmp_path)) is transformers.OpenAIGPTLMHeadModel
    hf.register_auto_classes()
    try:
        assert type(auto.from_pretrained(tmp_path)) is hf.OpenAIGPTLMHeadModel
        assert type(transformers.AutoModel.from_pretrained(tmp_path)) is hf.OpenAIGPTModel
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert type(classifier) is hf.OpenAIGPTForSequenceClassification
    finally:
        hf.unregister_auto_classes()
    assert type(auto.from_pretrained(tmp_path)) is transformers.OpenAIGPTLMHeadModel


def tokenizer():
    import tokenizers

    words = ["<pad>", "<unk>", *(f"w{n}" for n in range(V - 2))]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    fast.padding_side = "left"
    return fast


def test_text_generation_pipeline():
    theirs, ours = pair()
    how = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    texts = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")(
            ["w3 w4 w5", "w7"], **how
        )
        for model in (ours, theirs)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0][0][0]["generated_text"].removeprefix("w3 w4 w5").split()) == 5


def test_text_classification_pipeline():
    theirs, ours = pair(CLASSIFIER)
    results = [
        transformers.pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")("w3 w4 w5")
        for model in (ours, theirs)
    ]
    assert results[0][0]["label"] == results[1][0]["label"]
    assert results[0][0]["score"] == pytest.approx(results[1][0]["score"], abs=1e-5)


# -- weights for inference on a CPU -----------------------------------------------------------------------------


def test_packed_weights(tmp_path):
    model = build()
    with torch.no_grad():
        expected = model(ids(2, 7)).logits
        close(gptfast.pack(model)(ids(2, 7)).logits, expected)
        model.save_pretrained(tmp_path)
        close(hf.OpenAIGPTLMHeadModel.from_pretrained(tmp_path)(ids(2, 7)).logits, expected)


def test_int8_weights_are_neither_saved_nor_tied(tmp_path):
    model = gptfast.quantize(build())
    with torch.no_grad():
        before = model(ids(2, 7)).logits
        with pytest.raises(ValueError, match="save it before quantize"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="the LM head has int8 weights"):
            model.tie_weights()
        assert torch.equal(model(ids(2, 7)).logits, before)
    assert list(tmp_path.iterdir()) == []


# -- errors -----------------------------------------------------------------------------------------------------


def test_errors():
    model = build()
    with pytest.raises(ValueError, match="input_ids contains 99"):
        model(torch.tensor([[99]]))
    with pytest.raises(TypeError, match="unexpected"):
        model(ids(1, 3), nonsense=1)
    with pytest.raises(TypeError, match=r"gptfast\.hf\.OpenAIGPTCache, got DynamicCache"):
        model(ids(1, 3), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids(1, 3), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(TypeError, match="no past_key_values"):
        build(CLASSIFIER)(ids(1, 3), use_cache=True)
    with pytest.raises(ValueError, match="every_n_layers"):
        model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="offload"):
        model.activation_checkpointing_enable(offload=True)
