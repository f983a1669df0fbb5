"""Models that leave Python: torch.export, .pt2 files and ONNX, with batch and length left open."""

import pytest
import torch
from torch.export import Dim

import gptfast

V = 61
LM, CLASSIFIER = "OpenAIGPTLMHeadModel", "OpenAIGPTForSequenceClassification"
OPEN = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=32)}
SHAPES = [(2, 7), (1, 2), (3, 32), (5, 9)]


def make(kind=LM):
    torch.manual_seed(0)
    settings = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    return getattr(gptfast, kind)(gptfast.OpenAIGPTConfig(**settings)).eval()


def inputs(B, T, padded=True):
    x = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(T))
    if not padded:
        return {"input_ids": x}
    mask = torch.ones(B, T, dtype=torch.long)
    mask[-1, : T // 2] = 0
    return {"input_ids": x.masked_fill(mask == 0, 0), "attention_mask": mask}


def export(model, given):
    with torch.no_grad():
        return torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, OPEN))


@pytest.mark.parametrize("kind", [LM, CLASSIFIER])
@pytest.mark.parametrize("padded", [False, True])
def test_export_and_pt2_round_trip(kind, padded, tmp_path):
    model = make(kind)
    program = export(model, inputs(2, 7, padded))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for B, T in SHAPES:
        with torch.no_grad():
            expected = model(**inputs(B, T, padded)).logits
            for module in (program.module(), again):
                torch.testing.assert_close(module(**inputs(B, T, padded))["logits"], expected)


@pytest.mark.filterwarnings("ignore")  # torch's exporter uses names that torch has deprecated
def test_onnx(tmp_path):
    """Through PyTorch's operators, into which our own decompose, and computed by another runtime."""
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported model")
    model = make()
    with gptfast.use_backend("torch"), torch.no_grad():
        program = torch.onnx.export(export(model, inputs(2, 7)), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert all(isinstance(size, str) for x in session.get_inputs() for size in x.shape)  # a name, not a number
    for B, T in SHAPES:
        given = inputs(B, T)
        (logits,) = session.run(None, {name: x.numpy() for name, x in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(**given).logits, rtol=1e-4, atol=1e-5)


def test_what_is_not_in_the_range_is_refused():
    model = make()
    length = {1: OPEN[1]}  # the batch stays what it is
    with torch.no_grad():
        program = torch.export.export(model, (), inputs(2, 7, False), dynamic_shapes={"input_ids": length})
    for T in (2, 32):
        torch.testing.assert_close(
            program.module()(**inputs(2, T, False))["logits"], model(**inputs(2, T, False)).logits
        )
    with pytest.raises(AssertionError, match=r"33|32"):
        program.module()(**inputs(2, 33, False))
