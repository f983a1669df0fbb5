"""Trainer, PEFT and lm_eval with our models, and with transformers' own once they are patched."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers >= 5")

from gptfast import hf  # noqa: E402
from tests.test_hf_models import CLASSIFIER, DOUBLE, LM, build, close, ids, pair, tokenizer  # noqa: E402

# what PEFT and Trainer say of transformers' older names, and PEFT of a layer it has no name for
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


class Rows(torch.utils.data.Dataset):
    def __init__(self, label=None):
        self.label = label

    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = ids(10, seed=i)
        return {"input_ids": x, "labels": x if self.label is None else torch.tensor(i % 2)}


def train(model, folder, data, **settings):
    """The losses of four steps and an evaluation by transformers' Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-3,
        report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=4, seed=0, use_cpu=True,
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]]


WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("kind", [LM, CLASSIFIER])
@pytest.mark.parametrize("who", ["ours", "patched"])
def test_trainer(kind, who, tmp_path):
    """The same losses as transformers' own model, step by step, and a checkpoint that loads."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    theirs, ours = pair(kind, **WITHOUT_DROPOUT)
    if who == "patched":
        ours = build(kind, transformers, **WITHOUT_DROPOUT)
        ours.load_state_dict(theirs.state_dict())
        hf.apply_gptfast_to_openai_gpt(ours)
    data = Rows(None if kind == LM else 2)
    settings = {"gradient_accumulation_steps": 2 if kind == LM else 1}  # then num_items_in_batch divides the loss
    a = train(ours, tmp_path / "ours", data, **settings)
    b = train(theirs, tmp_path / "theirs", data, **settings)
    assert a == pytest.approx(b, abs=2e-3)
    assert len(a) == 5
    again = type(ours).from_pretrained(tmp_path / "ours" / "checkpoint-4").eval()
    close(again(ids(1, 5)).logits, ours.eval()(ids(1, 5)).logits)


def test_trainer_with_gradient_checkpointing(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    losses = [
        train(build(**WITHOUT_DROPOUT), tmp_path, Rows(), gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# -- PEFT -------------------------------------------------------------------------------------------------------

TARGETS = ["c_attn", "c_proj", "c_fc"]


def lora(model, **settings):
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = {"r": 4, "target_modules": TARGETS, "fan_in_fan_out": True, "init_lora_weights": False, **settings}
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


@pytest.mark.parametrize("who", ["ours", "patched"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc"], TARGETS], ids=str)
def test_lora_equals_transformers(who, targets):
    """An adapter on a projection whose weight is else read without calling it must not be passed by."""
    theirs, ours = pair()
    if who == "patched":
        ours = build(package=transformers)
        ours.load_state_dict(theirs.state_dict())
        hf.apply_gptfast_to_openai_gpt(ours)
    plain = ours(ids(2, 7)).logits
    a, b = lora(ours, target_modules=targets), lora(theirs, target_modules=targets)
    logits = a(ids(2, 7)).logits
    assert not torch.allclose(logits, plain, atol=1e-2)
    close(logits, b(ids(2, 7)).logits)
    with torch.no_grad():
        close(a(ids(2, 7)).logits, b(ids(2, 7)).logits)
    for model in (a, b):
        model(ids(2, 7), labels=ids(2, 7)).loss.backward()
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (x.grad is not None) == ("lora" in name)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    with a.disable_adapter():
        close(a(ids(2, 7)).logits, plain)
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(a.generate(input_ids=ids(1, 5), **how), b.generate(input_ids=ids(1, 5), **how))
    close(a.merge_and_unload()(ids(2, 7)).logits, logits)


@pytest.mark.parametrize("kind", [LM, CLASSIFIER, DOUBLE])
def test_lora_is_saved_and_loaded(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    x = ids(2, 3, 7) if kind == DOUBLE else ids(2, 7)
    head = {CLASSIFIER: ["score"], DOUBLE: ["multiple_choice_head"]}.get(kind)
    model = lora(build(kind), modules_to_save=head)
    with torch.no_grad():
        expected = model(x)[0]
        model.save_pretrained(tmp_path)
        close(peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()(x)[0], expected)


def test_modules_trained_in_full():
    pytest.importorskip("peft", reason="needs peft")
    theirs, ours = pair()
    a, b = (lora(model, modules_to_save=["ln_1", "tokens_embed"]) for model in (ours, theirs))
    for model in (a, b):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.add_(0.3)
        model(ids(2, 7), labels=ids(2, 7)).loss.backward()
    close(a(ids(2, 7)).logits, b(ids(2, 7)).logits)
    grads = [{n: p.grad for n, p in m.named_parameters() if "modules_to_save" in n} for m in (a, b)]
    assert grads[0]
    for name, x in grads[0].items():
        torch.testing.assert_close(x, grads[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["tokens_embed", "ln_1"])
def test_adapters_that_would_be_passed_by_raise(target):
    peft = pytest.importorskip("peft", reason="needs peft")
    kind = peft.LoraConfig if target == "tokens_embed" else peft.LNTuningConfig
    settings = {"target_modules": [target]}
    if kind is peft.LNTuningConfig:
        settings["task_type"] = "CAUSAL_LM"
    model = peft.get_peft_model(build(), kind(**settings))
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        model(ids(1, 4))


def test_lora_with_gradient_checkpointing():
    model = lora(build(**WITHOUT_DROPOUT)).train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        model(ids(2, 7), labels=ids(2, 7)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert grads[0]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# -- lm_eval ----------------------------------------------------------------------------------------------------


def test_lm_eval():
    """A task of our own, offline: the harness's log-likelihoods and text with our model are those with theirs."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (not in [test]: it brings pyarrow, scikit-learn and more)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs, ours = pair()
    words = ["w3 w4 w5 w6", "w9 w8", "w20 w21 w22"]
    results = []
    text = tokenizer()
    text.eos_token = "w58"
    for model in (ours, theirs):
        lm = HFLM(pretrained=model, tokenizer=text, backend="causal", batch_size=2, max_length=16, device="cpu")
        likely = [Instance("loglikelihood", {}, (word, " w7 w9"), n) for n, word in enumerate(words)]
        until = {"until": ["w13"], "max_gen_toks": 5, "do_sample": False}
        texts = [Instance("generate_until", {}, (word, until), n) for n, word in enumerate(words)]
        results.append((lm.loglikelihood(likely, disable_tqdm=True), lm.generate_until(texts, disable_tqdm=True)))
    (a, text_a), (b, text_b) = results
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-4)
    assert text_a == text_b
