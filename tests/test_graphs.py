"""CUDA graphs without a GPU: what is recorded, replayed, refused and recorded anew.

In the place of a graph stands a tape: PyTorch's own operators as they were dispatched, run again over the same tensors.
As with a graph, nothing of the Python around them runs, whatever was a number on the host stays that number, and
reading a value back is an error. With a GPU the same tests run on graphs.
"""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptfast
from gptfast import graphs, inputs
from gptfast.generation import Decoder, Settings
from gptfast_kernels import _dispatch, _triton, use_backend
from tests.support import DEVICE

V, P = 61, 80
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Tape(TorchDispatchMode):
    """Stands in for ``graphs.Graph``."""

    def __init__(self, run, device, warm_up=None):
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.replays = 0
        (warm_up or run)()
        # what is being compiled does not look at values of tensors on a CPU either
        with mock.patch.object(torch.compiler, "_is_compiling_flag", True), self:
            self.result = run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back from the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def wait(self):
        pass

    def finish(self):
        pass

    @torch.inference_mode()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, before in self.calls:
            result = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def _tapes(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphs, "Graph", Tape)
        monkeypatch.setattr(graphs, "why_not", graphs._why_not_now)


def make(kind=gptfast.OpenAIGPTLMHeadModel, seed=0, **settings):
    config = gptfast.OpenAIGPTConfig(vocab_size=V, n_positions=P, n_embd=24, n_layer=2, n_head=3, **settings)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("ln_1.weight", "ln_2.weight")):
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model.to(DEVICE)


def ids(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ran(call):
    """(what ``call`` gives, how the forward pass ran, why)."""
    with torch.no_grad(), _dispatch.record() as choices:
        result = call()
    whole = [choice for choice in choices if choice.op == "forward pass"]
    return (result, *((whole[0].backend, whole[0].reason) if whole else (None, None)))


# ---- forward passes


@pytest.mark.parametrize("kind", [gptfast.OpenAIGPTModel, gptfast.OpenAIGPTLMHeadModel])
def test_replayed_is_run(kind):
    model = make(kind)
    fast = gptfast.capture(model, [(4, 64), (1, 16), (2, 16)])
    for shape, within in (((1, 16), "1 x 16"), ((1, 5), "1 x 16"), ((2, 7), "2 x 16"), ((3, 1), "4 x 64")):
        for seed in (0, 1):
            x = ids(*shape, seed=seed)
            got, how, reason = ran(lambda x=x: fast(x))
            assert (how, reason) == ("CUDA graph", f"of {within}")
            with torch.no_grad():
                expected = model(x)
            assert type(got) is type(expected)
            torch.testing.assert_close(got.to_tuple(), expected.to_tuple(), rtol=1e-5, atol=1e-5)
    assert len(fast._recorded) == 3


def test_outputs_are_nobody_elses():
    fast = gptfast.capture(make(), [(1, 8)])
    with torch.no_grad():
        first = fast(ids(1, 8)).logits
        before = first.clone()
        fast(ids(1, 8, seed=1))
        assert torch.equal(first, before)
        first.zero_()
        assert torch.equal(fast(ids(1, 8)).logits, before)


def test_masks():
    model, x = make(), ids(2, 9)
    mask = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]], device=DEVICE)
    fast = gptfast.capture(model, [(3, 16)], attention_mask=True)
    for m in (mask, mask.bool(), torch.ones_like(mask), mask.flip(0)):
        got, how, _ = ran(lambda m=m: fast(x, attention_mask=m).logits)
        with torch.no_grad():
            expected = model(x, attention_mask=m).logits
        assert how == "CUDA graph"
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert ran(lambda: fast(x))[1] == "CUDA graph"


def test_changed_weights_are_seen_and_replaced_ones_recorded():
    model, x = make(), ids(1, 8)
    fast = gptfast.capture(model, [(1, 8)])

    def check(recordings):
        got, how, _ = ran(lambda: fast(x).logits)
        with torch.no_grad():
            torch.testing.assert_close(got, model(x).logits, rtol=1e-4, atol=1e-4)
        assert how == "CUDA graph"
        seen.add(fast._recorded[1, 8, False].graph)
        assert len(seen) == recordings

    seen: set[Any] = set()
    check(1)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(2)
    check(1)
    model.load_state_dict(make(seed=1).state_dict())
    check(1)
    model.load_state_dict(make(seed=2).state_dict(), assign=True)
    model.tie_weights()
    check(2)
    model.transformer.h[1].mlp.c_fc.weight.data = torch.ones_like(model.transformer.h[1].mlp.c_fc.weight)
    check(3)
    model.transformer.h[0].ln_1 = torch.nn.LayerNorm(24).to(DEVICE).eval()
    check(4)
    model.resize_token_embeddings(V + 2)
    check(5)
    model.to(torch.float64)
    check(6)
    check(6)
    model.transformer.h.append(make(seed=3).double().transformer.h[0])
    check(7)


def test_another_backend_and_autocast_are_recorded():
    model, x = make(), ids(1, 8)
    fast = gptfast.capture(model, [(1, 8)])
    plain = ran(lambda: fast(x).logits)[0]
    with use_backend("reference"):
        assert ran(lambda: fast(x).logits)[1] == "CUDA graph"
        assert {c.backend for c in fast._recorded[1, 8, False].choices} == {"reference"}
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ran(lambda: fast(x).logits)[0].dtype == torch.bfloat16
    assert torch.equal(ran(lambda: fast(x).logits)[0], plain)


def test_autocast_casts_in_every_replay():
    """Its cache of casts ends with the block; a graph recorded over it would read freed memory, or old weights."""
    model, x = make(), ids(1, 8)
    fast = gptfast.capture(model, [(1, 8)])
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            got, how, _ = ran(lambda: (fast(x).logits, model.generate(x, max_new_tokens=5)))
        with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(got[0], model(x).logits)
            assert torch.equal(got[1], model.generate(x, max_new_tokens=5, use_cache=False))
        assert how == "CUDA graph"
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.5)


def test_what_runs_uncaptured_says_why():
    model = make()
    fast = gptfast.capture(model, [(2, 16)])
    x = ids(2, 8)
    for call, why in (
        (lambda: fast(ids(2, 17)), "2 x 17 fits in no shape that was captured"),
        (lambda: fast(ids(3, 1)), "3 x 1 fits in no shape"),
        (lambda: fast(ids(8)), r"input_ids are not [B, T]"),
        (lambda: fast(x, torch.ones_like(x)), "attention_mask was given, and capture(…, attention_mask=True)"),
        (lambda: fast(x, labels=x), "labels was given, and graphs take"),
        (lambda: fast(x, output_attentions=True, use_cache=True), "output_attentions, use_cache was given"),
        (lambda: torch.enable_grad()(fast)(x), "a gradient may be wanted"),
        (lambda: (model.train(), fast(x), model.eval())[1], "the model is in training mode"),
    ):
        output, how, reason = ran(call)
        assert how == "no CUDA graph"
        assert why in reason
        assert output.logits is not None
    assert fast._recorded == {}
    rows = gptfast.explain(fast, ids(2, 17))
    assert (rows[0].op, rows[0].backend) == ("forward pass", "no CUDA graph")
    assert len(rows) > 3
    assert [row.backend for row in gptfast.explain(fast, x)][:1] == ["CUDA graph"]


def test_threads_do_not_share_what_a_graph_writes():
    model = make()
    fast = gptfast.capture(model, [(2, 16)])
    prompts = [ids(2, 16, seed=seed) for seed in range(8)]
    with torch.inference_mode():
        expected = [(model(x).logits, model.generate(x[:1], max_new_tokens=8, use_cache=False)) for x in prompts]
        ran(lambda: fast(prompts[0]))

    @torch.inference_mode()
    def run(x):
        return fast(x).logits, model.generate(x[:1], max_new_tokens=8)

    with ThreadPoolExecutor(4) as pool:
        for (logits, text), (wanted, words) in zip(pool.map(run, prompts), expected, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(text, words)


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"use_cache": True}, {"return_dict": False}])
def test_a_config_that_asks_for_other_outputs_gets_them(asked):
    model, x = make(), ids(1, 8)
    fast = gptfast.capture(model, [(1, 8)])
    for name, value in asked.items():
        setattr(model.config, name, value)
    output, how, reason = ran(lambda: fast(x))
    assert (how, reason) == ("no CUDA graph", "the config asks for other outputs than graphs have")
    assert type(output) is type(model(x))
    assert len(output) == len(model(x))


def test_hooks_are_called_and_not_replayed():
    model, x, calls = make(), ids(1, 8), []
    fast = gptfast.capture(model, [(1, 8)])
    ran(lambda: fast(x))
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for seen in (1, 2):
        _, how, reason = ran(lambda: fast(x))
        assert (how, len(calls)) == ("no CUDA graph", seen)
        assert reason == "a module has hooks or a forward of its own, which a replay would not call"
    model.generate(x, max_new_tokens=3)
    assert len(calls) == 2 + 3
    handle.remove()
    assert ran(lambda: fast(x))[1] == "CUDA graph"


def test_what_a_model_refuses_a_captured_one_refuses(monkeypatch):
    model, x = make(), ids(1, 8)
    fast = gptfast.capture(model, [(1, 8)], attention_mask=True)
    monkeypatch.setattr(inputs, "CHECK_IDS_ON_GPU", True)
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"input_ids contains {V}, accepted are 0 to {V - 1}"):
            fast(torch.full_like(x, V))
        with pytest.raises(ValueError, match="input_ids is on meta, but token_weight is on"):
            fast(x.to("meta"))
        with pytest.raises(ValueError, match=r"attention_mask must be on .* as the other inputs are, got meta"):
            fast(x, torch.ones_like(x, device="meta"))
        with pytest.raises(TypeError, match=r"input_ids must be int32 or int64, got torch\.float32"):
            fast(x.float())
        with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
            fast(x, [[1] * 8])


def test_without_a_gpu_nothing_is_captured(monkeypatch):
    monkeypatch.undo()
    model, x = make().cpu(), ids(1, 8).cpu()
    fast = gptfast.capture(model, [(1, 8)])
    output, how, reason = ran(lambda: fast(x))
    assert (how, reason) == ("no CUDA graph", "CUDA graphs need a GPU, the model is on cpu")
    with torch.no_grad():
        assert torch.equal(output.logits, model(x).logits)
    model.generate(x, max_new_tokens=3)
    assert model not in graphs._decoders


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], r"shapes must name at least one \(B, T\)"),
        ([(0, 4)], r"shapes must be \(B, T\) with .* n_positions = 80, got \(0, 4\)"),
        ([(1, 81)], r"got \(1, 81\)"),
        ([(1, 8), (1, 0)], r"got \(1, 0\)"),
        ((1, 8), "got 1"),
        ([(1, 8.0)], r"got \(1, 8.0\)"),
    ],
)
def test_shapes_that_cannot_be(shapes, message):
    with pytest.raises(ValueError, match=message):
        gptfast.capture(make(), shapes)


def test_models_whose_outputs_depend_on_padding_are_refused():
    with pytest.raises(TypeError, match=r"model must be .*, got OpenAIGPTForSequenceClassification"):
        gptfast.capture(make(gptfast.OpenAIGPTForSequenceClassification), [(1, 8)])


# ---- decoding


def plain(model, monkeypatch):
    """``generate`` of ``model`` without graphs."""

    def generate(x, **how):
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "decoder", Decoder)
            return model.generate(x, **how)

    return generate


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "seed": 3},
        {"repetition_penalty": 1.3, "min_new_tokens": 6, "eos_token_id": [3, 7, 20]},
        {"overflow": "slide", "max_new_tokens": 150, "do_sample": True, "top_k": 0, "seed": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ragged", [False, True])
def test_replayed_steps_make_the_same_text(ragged, how, monkeypatch):
    model, x = make(), ids(3, 9)
    mask = torch.ones_like(x)
    if ragged:
        mask[1, :4] = mask[2, 6:] = 0
    how = {"attention_mask": mask, "max_new_tokens": 30, **how}
    for _ in range(2):  # the second time, all of it replayed
        assert torch.equal(model.generate(x, **how), plain(model, monkeypatch)(x, **how))
    (decoder,) = graphs._decoders[model]
    assert not decoder.taken
    assert torch.equal(
        torch.cat(list(model.generate_stream(x, pad_token_id=0, **how))[:1]), model.generate(x, **how)[:, 9]
    )


def test_few_sizes_are_recorded_and_few_kept(monkeypatch):
    model = make()
    for n in (1, 20, 50):
        model.generate(ids(1, 5), max_new_tokens=n)
        model.generate(ids(1, 14), max_new_tokens=n)
    assert len(graphs._decoders[model]) == 1
    for B in range(1, 8):
        model.generate(ids(B, 5), max_new_tokens=3)
    assert len(graphs._decoders[model]) == graphs.KEPT_DECODERS
    assert [graphs.round_up(n) for n in (1, 64, 65, 512)] == [64, 64, 128, 512]


def test_generations_at_once_do_not_share(monkeypatch):
    model = make()
    xs = ids(1, 5), ids(1, 5, seed=1)
    steps = [model.generate_stream(x, max_new_tokens=12) for x in xs]
    made = [torch.cat(tokens) for tokens in zip(*(zip(*steps, strict=True)), strict=True)]
    for x, tokens in zip(xs, made, strict=True):
        assert torch.equal(tokens, plain(model, monkeypatch)(x, max_new_tokens=12)[0, 5:])
    assert len(graphs._decoders[model]) == 2
    left = model.generate_stream(xs[0], max_new_tokens=12)
    next(left)
    left.close()
    assert not any(decoder.taken for decoder in graphs._decoders[model])


def test_decoders_follow_their_model(monkeypatch):
    model, x = make(), ids(1, 5)
    model.generate(x, max_new_tokens=5)
    (first,) = graphs._decoders[model]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(-2)
    assert torch.equal(model.generate(x, max_new_tokens=9), plain(model, monkeypatch)(x, max_new_tokens=9))
    assert graphs._decoders[model] == [first]
    model.to(torch.float64)
    assert torch.equal(model.generate(x, max_new_tokens=9), plain(model, monkeypatch)(x, max_new_tokens=9))
    (second,) = graphs._decoders[model]
    assert second is not first
    model.train()
    model.generate(x, max_new_tokens=5)
    assert graphs._decoders[model] == [second]
    gone = weakref.ref(second)
    del model, first, second
    gc.collect()
    assert gone() is None


def test_a_prompt_is_read_by_the_kernel_for_many_queries():
    with use_backend("reference"):
        model, x = make(), ids(2, 17)
        model.generate(x, max_new_tokens=2)  # what is recorded counts no prompt
        with _dispatch.record() as choices:
            model.generate(x, max_new_tokens=2)
    assert {choice.op for choice in choices if "attention" in choice.op} == {"flash_attention"}


def test_a_decoder_that_failed_is_free_again(monkeypatch):
    model, x = make(), ids(1, 5)
    with monkeypatch.context() as patch:
        patch.setattr(graphs.GraphDecoder, "start", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            model.generate(x, max_new_tokens=2)
    assert not any(decoder.taken for decoder in graphs._decoders[model])


# ---- what a GPU would be told


def test_a_step_reads_nothing_back():
    """The tape would have said so; here that it can."""
    tensor = torch.zeros(1)
    with pytest.raises(AssertionError, match="read back"):
        Tape(lambda: tensor.item(), tensor.device, warm_up=lambda: None)


class OnDevice(TorchDispatchMode):
    """Counts operators, and refuses any that touches the host: on a GPU it would wait for a copy."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        assert devices <= {"meta"}, f"{func} is on {devices}"
        self.calls += 1
        return result


def test_what_is_captured_stays_on_the_device(monkeypatch):
    """On tensors of shapes and dtypes alone, where no value can be read, with the operators that a GPU would be given.

    The tape cannot tell: on a CPU all is on one device.
    """
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "why_not", lambda x: None)
    sampled = Settings(True, 0.7, 50, 0.9, 1.3, 3, (1, 2), 0)
    with torch.device("meta"), torch.inference_mode():
        config = gptfast.OpenAIGPTConfig(n_layer=2, n_embd=48, n_head=3)
        model = gptfast.OpenAIGPTLMHeadModel(config).eval().bfloat16()
        x = torch.zeros(4, 16, dtype=torch.int64)
        decoder = Decoder(model, 4, 512, 64, sampled)
        decoder.hold(torch.zeros(4, dtype=torch.int64))
        with OnDevice() as seen, _dispatch.record() as choices:
            decoder.step()
            model(x, x > 0)
    assert seen.calls > 100
    ours = {choice.op for choice in choices if choice.backend == "triton"}
    assert ours == {"embedding", "flash_attention", "flash_attention_with_kvcache", "layer_norm"}


def test_values_are_not_looked_at_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(inputs, "CHECK_IDS_ON_GPU", True)
    on_a_gpu: Any = SimpleNamespace(device=torch.device("cuda"), is_meta=False)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda yes=capturing: yes)
        assert inputs._may_read(on_a_gpu) is not capturing


def test_a_graph_within_a_graph_runs_uncaptured(monkeypatch):
    monkeypatch.undo()  # no tape
    model = mock.Mock(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert graphs.why_not([model]) == "a CUDA graph is being captured around it"


def test_the_calls_that_record(monkeypatch):
    """Twice aside, then once into the graph: one at a time, on this device's stream, with a workspace of its own."""
    monkeypatch.undo()  # no tape
    cuda, order = mock.MagicMock(), []
    cuda.graph.return_value.__enter__.side_effect = lambda *_: order.append("begin")
    cuda.graph.return_value.__exit__.side_effect = lambda *_: order.append("end")
    cuda.stream.return_value.__enter__.side_effect = lambda *_: order.append("aside")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: order.append("clear"), raising=False)

    device = torch.device("cuda:1")
    graph = graphs.Graph(lambda: order.append(graphs._recording.locked()), device, lambda: order.append("warm up"))

    assert order == ["aside", "warm up", "warm up", "begin", "clear", True, "end", "clear"]
    assert not graphs._recording.locked()
    cuda.device.assert_called_once_with(device)
    cuda.stream.assert_called_once_with(cuda.Stream())
    cuda.graph.assert_called_once_with(graph.graph, stream=cuda.Stream(), capture_error_mode="thread_local")
    graph.wait()
    cuda.current_stream(device).wait_event.assert_called_once_with(graph.done)
    graph.replay()
    graph.graph.replay.assert_called_once_with()
    graph.finish()
    graph.done.record.assert_called_once_with(cuda.current_stream(device))


@gpu
def test_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    for device in ("cuda:0", "cuda:1"):
        model, x = make().to(device), ids(2, 8).to(device)
        fast = gptfast.capture(model, [(2, 8)])
        with torch.no_grad():
            torch.testing.assert_close(fast(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
            expected = model.generate(x, max_new_tokens=5, use_cache=False)
            assert torch.equal(model.generate(x, max_new_tokens=5), expected)


@gpu
def test_another_stream():
    model, x = make(), ids(1, 8)
    fast = gptfast.capture(model, [(1, 8)])
    with torch.no_grad():
        expected = [model(ids(1, 8, seed=seed)).logits for seed in range(20)]
        streams = [torch.cuda.Stream() for _ in range(4)]
        got = []
        for seed in range(20):
            with torch.cuda.stream(streams[seed % 4]):
                got.append(fast(ids(1, 8, seed=seed)).logits)
        torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert x.is_cuda
