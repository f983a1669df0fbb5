"""GPT-1 whole, of one set of random weights: transformers, the model one would write by hand, and ours.

    forward      ids -> last hidden state, without logits
    autotuned    the same beside the rivals under torch.compile(mode="max-autotune"), which compile for minutes
    loss         ids and labels -> loss, no gradients
    train        loss and its gradients; timed with GPT-1's dropout, checked without
    prefill      a prompt -> the logits behind its last token, and the cache that decoding goes on from
    decode       one token behind S others -> its logits
    first token  a prompt -> one token, through ``generate``
    generate     a prompt -> many tokens, the likeliest each
    launch       host microseconds of a forward pass with nothing to compute
    parts        where a forward pass spends its time, by torch's profiler
    memory       what a call takes above what was held; on a CPU in a process of its own, by the kernel's account
    start        import, first call and steady state of a fresh process; on a GPU its first call with warm caches too

On a GPU a model is timed as its caller waits for it, launches and all; decoding waits once in ``STEPS`` tokens.

FLOPs of a position: 24 C^2 a layer, 4 C a layer and visible key, 2 V C where its logits are made. Bytes: the weights
once, the cache once.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel

import gptfast
from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast_kernels import use_backend

from .harness import DTYPES, Cell, Contender, Settings, Task, Unavailable, installed, times
from .op import capture, host_us

SIZES: dict[str, dict[str, Any]] = {
    "gpt1": {},
    "thin": {"vocab_size": 64, "n_positions": 16, "n_embd": 192, "n_head": 12},  # all launches, no work
    "toy": {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_head": 2, "n_layer": 2},  # for the suite's tests
}
# What coarser weights may be off in the last hidden state or the logits, some times what they were seen to be
COARSE = 6e-2
ALONE_SECONDS = 300
STEPS = 32  # of decoding, one behind another
NO_GRAPH = ("train", "memory", "first token", "generate")  # ``generate`` replays graphs by itself, and memory is theirs
PARTS = {  # of a profile, the first pattern that an operator's or a kernel's name holds
    "matmul": r"gemm|addb?mm|linear|aten::mm|aten::bmm|matmul|nvjet|cutlass(?!.*fmha)|cublas|embedding_bag",
    "attention": r"attention|flash|fmha|softmax|attn",
    "LayerNorm": r"norm",
    "GELU": r"gelu|tanh|aten::pow|pow_tensor",
    "embedding": r"embedding|index_?select|gather",
    "copies, masks, additions": r"copy|contiguous|clone|cat|where|fill|add|mul|div|sub|elementwise|split|permute",
}


def cells(
    dtype: str, shapes: Mapping[str, Sequence[tuple[int, ...]]], size: str = "gpt1", without: Sequence[str] = ()
) -> Iterator[Cell]:
    """Cells of each mode: (B, T), (B, T, S) for decode with T = 1, (B, T, new) for generate."""
    third = {"decode": "S", "generate": "new"}
    for mode, wanted in shapes.items():
        for B, T, *rest in wanted:
            shape = {"size": size, "B": B, "T": T} | ({third[mode]: rest[0]} if rest else {})
            yield Cell("model", mode, dtype, shape, seconds=_about(mode, shape), without=without)


def _about(mode: str, shape: dict[str, Any]) -> float:
    """Seconds that a cell of GPT-1 takes on two cores, for the progress bar; compilation is half a minute of them."""
    if shape["size"] != "gpt1":
        return 2.0
    tokens = shape["B"] * (shape["T"] + shape.get("S", 0))
    if mode == "autotuned":
        return 300.0
    if mode == "generate":
        return 450.0 * shape["new"] / 448
    if mode in ("memory", "start"):
        return 20.0 + 0.012 * tokens
    return {"parts": 5.0, "launch": 3.0}.get(mode, 30.0 + (0.15 if mode == "train" else 0.05) * tokens)


# -- the models -----------------------------------------------------------------------------------------------------


@functools.cache
def weights(size: str, device: str) -> OpenAIGPTLMHeadModel:
    """Ours in float32, whose random weights all others take: the same in every process.

    Positions weigh ten times what they are drawn as: the head is the token table, so that the likeliest token would be
    the last one again otherwise, whatever the layers between do.
    """
    torch.manual_seed(0)
    model: Any = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**SIZES[size]))
    model.transformer.positions_embed.weight.data.mul_(10)
    return model.to(device).eval()


@functools.cache
def _built(name: str, size: str, dtype: torch.dtype, device: str) -> Any:
    source = weights(size, device)
    if name == "transformers":
        installed("transformers")
        from transformers import OpenAIGPTConfig as Config
        from transformers import OpenAIGPTLMHeadModel as Model

        theirs: Any = Model(Config(**SIZES[size]))
        theirs.load_state_dict({k: v.to(dtype) for k, v in source.state_dict().items()}, assign=True)
        theirs.tie_weights()
        return theirs.to(device, dtype)  # its mask is a buffer: in float32 it would make the scores so
    if name == "hand-made":
        return HandMade(_built("gptfast", size, dtype, device))
    if name == "gptfast" and dtype == torch.float32:
        return source
    model = OpenAIGPTLMHeadModel(source.config).to(device, dtype)
    model.load_state_dict(source.state_dict())
    if name in ("int8", "packed"):
        (gptfast.quantize if name == "int8" else gptfast.pack)(model.eval())
    return model


def built(name: str, size: str, dtype: torch.dtype, device: str) -> Any:
    """One of "transformers", "hand-made", "gptfast", "packed", "int8", all of the same weights, in eval mode."""
    return _built(name, size, dtype, device).eval()


class HandMade(nn.Module):
    """The fair rival: HuggingFace's weights in what one writes by hand, with PyTorch's own fused operators.

    Packed heads are viewed, not copied; SDPA, addmm, native GELU, additions in place; a key/value cache for decoding.
    """

    def __init__(self, lm: OpenAIGPTLMHeadModel):
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, cache: Sequence[tuple[Tensor, Tensor]] | None = None, held: int = 0) -> Tensor:
        """ids [B, T] -> hidden [B, T, C]; cache [B, H, S, D] a layer, which holds ``held`` positions."""
        body: Any = self.lm.transformer
        p = self.lm.config.resid_pdrop if self.training else 0.0
        (B, T), H = ids.shape, self.lm.config.n_head
        x = F.embedding(ids, body.tokens_embed.weight) + body.positions_embed.weight[held : held + T]
        x = F.dropout(x, p) if p else x
        C = x.shape[-1]
        for layer, block in enumerate(body.h):
            q, k, v = _linear(x, block.attn.c_attn).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
            if cache is not None:
                keys, values = cache[layer]
                keys[:, :, held : held + T], values[:, :, held : held + T] = k, v
                k, v = keys[:, :, : held + T], values[:, :, : held + T]
            a = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=p)
            n = self._norm(_linear(a.transpose(1, 2).reshape(B, T, C), block.attn.c_proj), x, block.ln_1, p)
            h = F.gelu(_linear(n, block.mlp.c_fc), approximate="tanh")
            x = self._norm(_linear(h, block.mlp.c_proj), n, block.ln_2, p)
        return x

    def _norm(self, x: Tensor, residual: Tensor, ln: nn.LayerNorm, p: float) -> Tensor:
        x = F.dropout(x, p) if p else x
        return F.layer_norm(x.add_(residual), ln.normalized_shape, ln.weight, ln.bias, ln.eps)

    def loss(self, ids: Tensor) -> Tensor:
        logits = F.linear(self(ids)[:, :-1], self.lm.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def logits(self, ids: Tensor, cache: Any = None, held: int = 0) -> Tensor:  # of the last position, [B, V]
        return F.linear(self(ids, cache, held)[:, -1], self.lm.lm_head.weight)

    def new_cache(self, B: int, S: int) -> list[tuple[Tensor, Tensor]]:
        c, w = self.lm.config, self.lm.lm_head.weight
        k, v = w.new_zeros(2, c.n_layer, B, c.n_head, S, c.n_embd // c.n_head)
        return list(zip(k, v, strict=True))

    def generate(self, ids: Tensor, new: int) -> Tensor:
        B, T = ids.shape
        cache, made = self.new_cache(B, T + new), [ids]
        for step in range(new):
            made.append(self.logits(made[-1], cache, T + step - 1 if step else 0).argmax(-1, keepdim=True))
        return torch.cat(made, 1)


def _linear(x: Tensor, layer: Any) -> Tensor:  # Conv1D's weight is [in, out]
    return torch.addmm(layer.bias, x.flatten(0, 1), layer.weight).view(*x.shape[:2], -1)


def exact_logits(size: str, ids: Tensor, keep: int = 0) -> Tensor:
    """By the formulas, in float64: the oracle."""
    with use_backend("reference"), torch.no_grad():
        return built("gptfast", size, torch.float64, str(ids.device))(ids, logits_to_keep=keep, use_cache=False).logits


def exact_hidden(size: str, ids: Tensor) -> Tensor:
    with use_backend("reference"), torch.no_grad():
        body = built("gptfast", size, torch.float64, str(ids.device)).transformer
        return torch.cat([body(row, use_cache=False).last_hidden_state for row in ids.split(1)])


def exact_loss(size: str, ids: Tensor, gradients: bool = False) -> list[Tensor]:
    """[loss], with the gradients of ``_watched`` behind it. One row at a time: every row counts as many labels."""
    model = built("gptfast", size, torch.float64, str(ids.device))
    with use_backend("reference"), torch.set_grad_enabled(gradients):
        total: list[Tensor] = []
        for row in ids.split(1):
            logits = model(row, use_cache=False).logits[:, :-1]  # its own loss is float32
            loss = F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()) / len(ids)
            terms = [loss, *(torch.autograd.grad(loss, _watched(model)) if gradients else ())]
            total = [a + b.detach() for a, b in zip(total or [torch.zeros_like(t) for t in terms], terms, strict=True)]
    return total


def _watched(model: Any) -> list[Tensor]:
    """Parameters whose gradients the gate sees: the shared table, the first layer's first and the last one's last."""
    body = model.transformer
    return [body.tokens_embed.weight, body.h[0].attn.c_attn.weight, body.h[-1].mlp.c_proj.weight]


# -- the work -------------------------------------------------------------------------------------------------------


def work(size: str, B: int, T: int, held: int = 0, logits: int = 0) -> tuple[float, float]:
    """(FLOPs, weights and cache entries read) of T positions in each of B rows behind ``held`` others."""
    c = OpenAIGPTConfig(**SIZES[size])
    C, L, V = c.n_embd, c.n_layer, c.vocab_size
    flops = B * T * L * (24 * C**2 + 4 * C * (held + (T + 1) / 2)) + 2 * B * logits * V * C
    read = L * (12 * C**2 + 13 * C) + (V * C if logits else 0) + 2 * B * held * L * C
    return flops, read


# -- modes ----------------------------------------------------------------------------------------------------------


def task(cell: Cell, settings: Settings) -> Task:
    modes: dict[str, Callable[[Cell, Settings], Task]] = {
        "forward": _forward,
        "autotuned": _forward,
        "loss": _loss,
        "train": _train,
        "prefill": _prefill,
        "decode": _decode,
        "first token": _generate,
        "generate": _generate,
        "launch": _launch,
        "parts": _parts,
        "memory": _alone,
        "start": _alone,
    }
    return modes[cell.mode](cell, settings)


Wrap = Callable[[Callable[[], Any]], Callable[[], Any]]  # torch.compile, or nothing
Make = Callable[[Any, Wrap], Any]  # of a model: what is timed, or a Contender where what is checked differs


def _contenders(
    cell: Cell,
    settings: Settings,
    theirs: Make,
    hand_made: Make,
    ours: Make,
    *,
    captured: Make | None = None,
    compiles: str = "",
    judge: Callable[[Any], Sequence[Tensor]] = lambda out: [out],
    read: float = 0,
) -> dict[str, Callable[[], Contender]]:
    """The providers of a mode, transformers first.

    Args:
        theirs, hand_made, ours: how each model is run.
        captured: how ours is run as a CUDA graph, as the hand-made model's are; None: what is run without is captured.
        compiles: why torch.compile cannot serve; "" where it can.
        judge: what of an output the gate sees.
        read: numbers read from memory, in each provider's own dtype.
    """
    makes = {"transformers": theirs, "hand-made": hand_made, "gptfast": ours, "packed": ours, "int8": ours}
    on_cpu = torch.device(settings.device).type == "cpu"

    def contender(name: str, mode: str | None = None, dtype: str = cell.dtype) -> Contender:
        kind, around = name.split()[0], AROUND.get(name, contextlib.nullcontext)
        model = built(kind, cell.shape["size"], DTYPES[dtype], settings.device)
        wrap: Wrap = lambda call: call  # noqa: E731
        if mode in ("default", "max-autotune"):
            if compiles:
                raise Unavailable(compiles)
            wrap = functools.partial(torch.compile, dynamic=False, mode=mode)
        with around():
            if mode == "CUDA graph" and kind == "gptfast" and captured is not None:
                made = Contender(_without_gradients(captured(model, wrap)))
            elif not isinstance(made := makes[kind](model, wrap), Contender):
                run = _without_gradients(made)
                made = Contender(capture(run, settings.device) if mode == "CUDA graph" else run)
        coarse = "int8" if name == "int8" else dtype
        return dataclasses.replace(
            made,
            run=_inside(around, made.run),
            results=made.results and _inside(around, made.results),
            judge=judge,
            tolerance=COARSE if coarse != cell.dtype else None,
            moved=read * (1 if name == "int8" else DTYPES[dtype].itemsize),
            computes_in=coarse,
        )

    table: dict[str, Callable[[], Contender]] = {}
    shown_as = {"transformers": "transformers", "hand-made": "hand-made SDPA", "gptfast": "gptfast"}
    if not on_cpu:
        shown_as["gptfast triton"] = "gptfast triton"
    for name, shown in shown_as.items():
        table[shown] = functools.partial(contender, name)
        if cell.mode != "autotuned" and name not in AROUND:
            table[f"{shown} torch.compile"] = functools.partial(contender, name, "default")
        if not on_cpu and name != "transformers" and cell.mode not in NO_GRAPH:
            table[f"{shown} CUDA graph"] = functools.partial(contender, name, "CUDA graph")
    if cell.mode == "autotuned":
        for name in ("hand-made cuDNN", "transformers"):
            table[f"{name} torch.compile max-autotune"] = functools.partial(contender, name, "max-autotune")
    if on_cpu and cell.dtype == "float32" and cell.mode != "train":
        table["gptfast packed"] = functools.partial(contender, "packed")
        table["gptfast bfloat16"] = functools.partial(contender, "gptfast", None, "bfloat16")
        table["gptfast int8"] = functools.partial(contender, "int8")
    return table


# What a provider is made and called in: the one backend that it may take
AROUND: dict[str, Callable[[], Any]] = {
    "hand-made cuDNN": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
    "gptfast triton": lambda: use_backend("triton"),
}


def _inside(around: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with around():
            return call()

    return run


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


def random_ids(shape: Mapping[str, Any], device: str, T: int) -> Tensor:
    vocab = OpenAIGPTConfig(**SIZES[shape["size"]]).vocab_size
    return torch.randint(vocab, (shape["B"], T), generator=torch.Generator().manual_seed(0)).to(device)


def _forward(cell: Cell, settings: Settings) -> Task:
    size, B, T = (cell.shape[name] for name in ("size", "B", "T"))
    ids, rows = random_ids(cell.shape, settings.device, T), sorted({0, B - 1})
    flops, read = work(size, B, T)
    providers = _contenders(
        cell,
        settings,
        lambda model, wrap: wrap(lambda: model.transformer(ids).last_hidden_state),
        lambda model, wrap: wrap(lambda: model(ids)),
        lambda model, wrap: wrap(lambda: model.transformer(ids, use_cache=False).last_hidden_state),
        captured=lambda model, wrap: _captured(gptfast.capture(model.transformer, [(B, T)]), ids),
        judge=lambda hidden: [hidden[rows]],
        read=read,
    )
    return Task(providers, lambda: [exact_hidden(size, ids[rows])], flops=flops, tokens=B * T, wait_every=1)


def _captured(fast: Callable[[Tensor], Any], ids: Tensor) -> Callable[[], Tensor]:
    return lambda: fast(ids).last_hidden_state


def _loss(cell: Cell, settings: Settings) -> Task:
    size, B, T = (cell.shape[name] for name in ("size", "B", "T"))
    ids = random_ids(cell.shape, settings.device, T)
    flops, read = work(size, B, T, logits=T - 1)
    providers = _contenders(
        cell,
        settings,
        lambda model, wrap: wrap(lambda: model(ids, labels=ids).loss),
        lambda model, wrap: wrap(lambda: model.loss(ids)),
        lambda model, wrap: wrap(lambda: model(ids, labels=ids, use_cache=False).loss),
        read=read,
    )
    return Task(providers, lambda: exact_loss(size, ids), flops=flops, tokens=B * T, wait_every=1)


def _train(cell: Cell, settings: Settings) -> Task:
    size, B, T = (cell.shape[name] for name in ("size", "B", "T"))
    ids = random_ids(cell.shape, settings.device, T)
    flops, _ = work(size, B, T, logits=T - 1)

    def step(loss: Callable[[Any], Tensor]) -> Make:
        def make(model: Any, wrap: Wrap) -> Contender:
            call, parameters = wrap(lambda: loss(model)), list(model.parameters())

            def run() -> None:
                if not model.training:
                    model.train()
                torch.autograd.grad(call(), parameters)

            def results() -> Sequence[Tensor]:
                model.eval()
                value = call()
                return value, *torch.autograd.grad(value, _watched(getattr(model, "lm", model)))

            return Contender(run, results)

        return make

    providers = _contenders(
        cell,
        settings,
        step(lambda model: model(ids, labels=ids).loss),
        step(lambda model: model.loss(ids)),
        step(lambda model: model(ids, labels=ids, use_cache=False).loss),
        judge=list,
    )
    exact = functools.partial(exact_loss, size, ids, gradients=True)
    return Task(providers, exact, flops=3 * flops, tokens=B * T, wait_every=1)


def _prefill(cell: Cell, settings: Settings) -> Task:
    size, B, T = (cell.shape[name] for name in ("size", "B", "T"))
    ids = random_ids(cell.shape, settings.device, T)
    flops, read = work(size, B, T, logits=1)

    def ours(model: Any, wrap: Wrap) -> Callable[[], Tensor]:
        cache = model.transformer.new_cache(B, T)

        def run() -> Tensor:
            cache.reset()
            return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        return wrap(run)

    def hand_made(model: HandMade, wrap: Wrap) -> Callable[[], Tensor]:
        cache = model.new_cache(B, T)
        return wrap(lambda: model.logits(ids, cache))

    providers = _contenders(
        cell,
        settings,
        lambda model, wrap: wrap(lambda: model(ids, logits_to_keep=1).logits[:, -1]),
        hand_made,
        ours,
        read=read,
    )
    return Task(providers, lambda: [exact_logits(size, ids, 1)[:, -1]], flops=flops, tokens=B * T, wait_every=1)


def _decode(cell: Cell, settings: Settings) -> Task:
    size, B, S = (cell.shape[name] for name in ("size", "B", "S"))
    ids = random_ids(cell.shape, settings.device, S + 1)
    flops, read = work(size, B, 1, held=S, logits=1)

    def ours(model: Any, wrap: Wrap) -> Callable[[], Tensor]:
        cache = model.transformer.new_cache(B, S + 1)
        with torch.inference_mode():
            model.transformer(ids[:, :S], past_key_values=cache, use_cache=True)

        def run() -> Tensor:
            cache.seqlens = S
            return model(ids[:, S:], past_key_values=cache, use_cache=True).logits[:, -1]

        return wrap(run)

    def captured(model: Any, wrap: Wrap) -> Callable[[], Tensor]:
        """As ``generate`` captures its steps: the rows' lengths are a tensor, which is what auto has our kernel for."""
        cache, held = model.transformer.new_cache(B, S + 1), torch.full((B,), S, device=ids.device)
        with torch.inference_mode():
            model.transformer(ids[:, :S], past_key_values=cache, use_cache=True)

        def run() -> Tensor:
            cache.seqlens = held.fill_(S)
            return model(ids[:, S:], past_key_values=cache, use_cache=True).logits[:, -1]

        return capture(_without_gradients(run), settings.device)

    def hand_made(model: HandMade, wrap: Wrap) -> Callable[[], Tensor]:
        cache = model.new_cache(B, S + 1)
        with torch.inference_mode():
            model(ids[:, :S], cache)
        return wrap(lambda: model.logits(ids[:, S:], cache, S))

    providers = _contenders(
        cell,
        settings,
        # it keeps no cache: a token is a pass over all of them
        lambda model, wrap: wrap(lambda: model(ids, logits_to_keep=1).logits[:, -1]),
        hand_made,
        ours,
        captured=captured,
        read=read,
    )
    return Task(providers, lambda: [exact_logits(size, ids, 1)[:, -1]], flops=flops, tokens=B, wait_every=STEPS)


def _generate(cell: Cell, settings: Settings) -> Task:
    size, B, T = (cell.shape[name] for name in ("size", "B", "T"))
    new = cell.shape.get("new", 1)
    ids, rows = random_ids(cell.shape, settings.device, T), sorted({0, B - 1})
    steps = [work(size, B, T, logits=1), *(work(size, B, 1, held=held, logits=1) for held in range(T, T + new - 1))]
    flops, read = map(sum, zip(*steps, strict=True))

    def likelihood(made: Tensor) -> Sequence[Tensor]:
        """Each token's logit over the highest there, in float64: 1 where it is the likeliest."""
        made = made[rows]
        logits = exact_logits(size, made[:, :-1], new)
        return [logits.gather(-1, made[:, T:, None])[..., 0] / logits.amax(-1)]

    providers = _contenders(
        cell,
        settings,
        lambda model, wrap: (
            lambda: model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        ),
        lambda model, wrap: lambda: model.generate(ids, new),
        lambda model, wrap: lambda: model.generate(ids, max_new_tokens=new, do_sample=False),
        compiles="each token is another length to compile for: not measured",
        judge=likelihood,
        read=read,
    )
    exact = [torch.ones(len(rows), new, device=settings.device)]
    return Task(providers, lambda: exact, flops=flops, tokens=B * new, wait_every=1)


def _launch(cell: Cell, settings: Settings) -> Task:
    """Of a model so thin that a forward pass is its launches alone; on a GPU the queue is not waited for."""
    task = _forward(cell, settings)
    return dataclasses.replace(task, providers={k: _measured(v, host_us) for k, v in task.providers.items()}, flops=0)


def _parts(cell: Cell, settings: Settings) -> Task:
    task = _forward(cell, settings)
    names = [name for name in task.providers if "compile" not in name and "graph" not in name]
    return dataclasses.replace(task, providers={name: _measured(task.providers[name], _profile) for name in names})


def _measured(make: Callable[[], Contender], metrics: Callable[[Callable[[], Any]], dict]) -> Callable[[], Contender]:
    def measured() -> Contender:
        contender = make()
        return dataclasses.replace(contender, metrics=functools.partial(metrics, contender.run))

    return measured


def _profile(run: Callable[[], Any], calls: int = 3) -> dict[str, Any]:
    """{"parts": {part: ms a call}}, time in a kernel or an operator itself, and the "part" that holds the rest."""
    cuda = torch.cuda.is_initialized()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(calls):
            run()
        if cuda:
            torch.cuda.synchronize()
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        if cuda and (event.device_type == DeviceType.CPU or event.is_user_annotation):
            continue  # an operator's device time is that of its kernels, which are events of their own
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, event.key.lower())), "other")
        parts[part] += us / 1e3 / calls
    return {"parts": parts}


# -- processes of their own -----------------------------------------------------------------------------------------


def _alone(cell: Cell, settings: Settings) -> Task:
    """Each provider in a fresh process, ``alone.py``: what it imports, holds and first does is its own."""
    size, B, T = (cell.shape[name] for name in ("size", "B", "T"))
    if cell.mode == "memory" and torch.device(settings.device).type == "cuda":
        return _loss(cell, settings)  # torch counts there, in this process
    ids = random_ids(cell.shape, settings.device, T)
    names = ["transformers", "hand-made SDPA", "gptfast"]
    if cell.mode == "start":
        names[1:] = ["transformers torch.compile", "hand-made SDPA", "gptfast", "gptfast torch.compile"]

    def contender(name: str) -> Contender:
        if name.startswith("transformers"):
            installed("transformers")
        found: dict[str, Any] = {}

        def run() -> Tensor:
            found.update(_ask_alone(cell, settings, name))
            return torch.tensor(found.pop("loss"))

        def metrics() -> dict[str, Any]:
            samples = found.pop("samples_ms", None)
            return found | (times(samples) if samples else {})

        return Contender(run, metrics=metrics)

    providers: dict[str, Callable[[], Contender]] = {name: functools.partial(contender, name) for name in names}
    return Task(providers, lambda: exact_loss(size, ids), tokens=B * T)


def _ask_alone(cell: Cell, settings: Settings, provider: str) -> dict[str, Any]:
    what = dataclasses.asdict(cell) | {"provider": provider, "device": settings.device, "threads": settings.threads}
    command = [sys.executable, "-m", f"{__package__}.alone", json.dumps(what)]
    with tempfile.TemporaryDirectory() as caches:  # of compiled code: another process may have filled the usual ones
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }

        def once() -> dict[str, Any]:
            started = time.perf_counter()
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=ALONE_SECONDS)
            process_ms = 1e3 * (time.perf_counter() - started)
            if done.returncode:
                raise RuntimeError(f"exit code {done.returncode}: {''.join(done.stderr.strip().splitlines()[-1:])}")
            return json.loads(done.stdout.splitlines()[-1]) | {"process_ms": process_ms}

        found = once()
        if cell.mode == "start" and torch.device(settings.device).type == "cuda":
            found["warm_call_ms"] = once()["cold_call_ms"]
    return found
