"""Text, one token at a time: greedy or sampled, with a key/value cache.

A batch of prompts of different length is first pushed together to the left of its cache rows, wherever its padding
stands, so that positions count from 0 in every row and a row comes out as it would alone.

A step runs the model on each row's newest token and chooses the next one. All that a step changes is in tensors that
it changes in place, and it reads nothing back, so that on a GPU it is captured once and replayed (graphs.py).

Shapes: B batch, T prompt length with padding, V vocabulary, N tokens to be made, P positions of the model.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache import KVCache
from .inputs import check_ids, check_tensor
from .linear import is_plain

# What a step, and a recorded pass, asks a forward pass for besides the cache, whatever the config says.
PLAIN = {"use_cache": False, "output_attentions": False, "output_hidden_states": False, "return_dict": True}

# Steps on a GPU between two looks at whether all rows have stopped: a look waits for the GPU. On a CPU it is free.
LOOK_EVERY = 16


class Streamer(Protocol):
    """Takes tokens as they come: first the prompt [B, T], then [B] a step. transformers' streamers fit."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


# ---- choosing a token


def distribution(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities, float32 [B, V], that a token is drawn by, from logits [B, V].

    ``top_k`` keeps the k likeliest, then ``top_p`` the fewest of them whose probabilities reach p (Holtzman et al.
    2019, arXiv:1904.09751). Tokens as likely as the last one that is kept are kept too.
    """
    V = logits.shape[-1]
    logits = logits.float()
    limits = torch.finfo(torch.float32)  # beyond them 0 / 0 and inf / inf would be NaN
    temperature = min(max(temperature, limits.tiny), limits.max)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # from 0 down: the smallest overflows nothing
    top_p = None if top_p is None or top_p >= 1 else top_p
    if top_k or top_p is not None:
        best = logits.topk(min(top_k or V, V)).values  # falling
        if top_p is not None:
            p = best.softmax(-1)
            likelier = p.cumsum(-1) - p  # probability of all likelier tokens
            best = best.masked_fill_(likelier >= top_p, torch.inf)
        logits.masked_fill_(logits < best.amin(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token [B] at which the running sum of ``probabilities`` [B, V] passes ``uniform``, float64 [B] in [0, 1)."""
    cdf = probabilities.cumsum(-1, dtype=torch.float64)  # a float32 sum of 40,000 would lose the unlikely ones
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and when a row ends."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    min_new_tokens: int
    stops: tuple[int, ...]
    pad_token_id: int


class Decoder:
    """A batch being decoded: a cache, the tokens made so far, and all that choosing the next ones depends on.

    Every tensor is made once and changed in place. ``start`` makes it ready for prompts; ``step`` is one token.

    Attributes:
        cache: for B rows. tokens: int64 [B], the newest. made: int64 [B, N], all of them.
        alive: int64 [1], 1 + the number of steps behind which some row went on: the tokens that count.
    """

    def __init__(self, model: Any, B: int, S: int | None, N: int, how: Settings):
        """S: positions of the cache; None: no cache."""
        from .heads import OpenAIGPTLMHeadModel  # which can generate by this

        self.body, self.head, self.how = model.transformer, model.lm_head, how
        # the logits of a model with hooks or a forward pass of its own are for that to make
        self.whole = None if is_plain(model, OpenAIGPTLMHeadModel) else model
        device = self.body.tokens_embed.weight.device
        V = getattr(self.head, "out_features", model.config.vocab_size)  # another's head may not say
        self.cache = None if S is None else self.body.new_cache(B, S)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.count = zeros(1)  # of tokens made
        self.alive = zeros(1)
        self.tokens = zeros(B)
        self.made = zeros(B, N)
        self.running = zeros(B, dtype=torch.bool)
        self.uniforms = zeros(B, N, dtype=torch.float64) if how.do_sample else None
        self.seen = None if how.repetition_penalty is None else zeros(B, V, dtype=torch.bool)  # tokens a row holds
        self.stops = zeros(V, dtype=torch.bool)
        for stop in how.stops:
            self.stops[stop] = True

    @torch.inference_mode()
    def start(self, prompts: Sequence[Tensor], seeds: Sequence[int]) -> None:
        """Makes ready for B prompts, each int64 [T_b]. A row's draws depend on its seed alone."""
        if self.cache is not None:
            self.cache.reset()  # a length known on the host: a prompt goes to the kernel for many queries
        self.count.zero_()
        self.alive.fill_(1)
        self.running.fill_(True)
        if self.uniforms is not None:
            import numpy as np  # its generator mixes seeds that are close, and gives a CPU and a GPU the same numbers

            rows = [torch.from_numpy(np.random.default_rng(seed).random(self.uniforms.shape[1])) for seed in seeds]
            self.uniforms.copy_(torch.stack(rows))
        if self.seen is not None:
            self.seen.zero_()
            for seen, prompt in zip(self.seen, prompts, strict=True):
                seen[prompt] = True

    def hold(self, seqlens: int | Tensor) -> None:
        """Says how many positions of each row the cache holds."""
        if self.cache is not None:
            self.cache.seqlens = seqlens

    def release(self) -> None:
        """Behind the last token of a generation."""

    @torch.inference_mode()
    def run(self, ids: Tensor, cache: KVCache | None) -> Tensor:
        """What logits are made from for ids [B, T] behind what the cache holds: hidden states [B, T, C].

        The logits themselves [B, T, V] of a model with hooks or a forward pass of its own.
        """
        if self.whole is None:
            return self.body(ids, past_key_values=cache, **PLAIN).last_hidden_state
        logits = getattr(self.whole(ids, past_key_values=cache, **PLAIN), "logits", None)
        if logits is None or logits.shape[:2] != ids.shape:
            name, (B, T), got = type(self.whole).__name__, ids.shape, "none" if logits is None else list(logits.shape)
            raise TypeError(f"{name}.forward must return an output with logits [{B}, {T}, V], got {got}")
        return logits

    @torch.inference_mode()
    def reread(self, rows: list[int], windows: list[Tensor]) -> None:
        """Forgets what ``rows`` hold and reads ``windows`` instead, tokens [T] of each."""
        assert self.cache is not None
        ids = torch.stack(windows)
        T = ids.shape[1]
        if T:
            fresh = self.body.new_cache(len(rows), T)
            self.run(ids, fresh)
            self.cache.k[:, rows, :T], self.cache.v[:, rows, :T] = fresh.k, fresh.v
        if isinstance(self.cache.seqlens, Tensor):
            self.cache.seqlens[rows] = T
        else:
            self.cache.seqlens = T

    @torch.inference_mode()
    def step(self) -> None:
        """Runs the newest tokens and chooses the next."""
        self.choose(self.run(self.tokens[:, None], self.cache)[:, -1])

    @torch.inference_mode()
    def choose(self, last: Tensor) -> None:
        """Makes the next token of every row from what ``run`` gave for its last one. No host synchronisation."""
        how = self.how
        logits: Any = self.head(last[:, None])[:, 0] if self.whole is None else last  # [B, 1, C], as heads know them
        if self.seen is not None:
            weaker = torch.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
            logits = torch.where(self.seen, weaker, logits)
        if how.stops and how.min_new_tokens:
            logits = logits.masked_fill(self.stops & (self.count < how.min_new_tokens), -torch.inf)
        if self.uniforms is None:
            tokens = logits.argmax(-1)
        else:
            p = distribution(logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
            tokens = draw(p, self.uniforms.index_select(1, self.count)[:, 0])
        if how.stops:
            tokens = torch.where(self.running, tokens, how.pad_token_id)
            self.running.logical_and_(~self.stops[tokens])
            self.alive += self.running.any()
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.tokens.copy_(tokens)
        self.made.index_copy_(1, self.count, tokens[:, None])
        self.count += 1


# ---- generating


def check_int(name: str, value: int) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")


def _check_number(name: str, value: float | None) -> None:
    if not isinstance(value, (Real, NoneType)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    check_int(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _unboxed(numbers: Any) -> Any:
    """What a tensor or an array holds."""
    return numbers.tolist() if hasattr(numbers, "tolist") else numbers


def _check_forward(model: Any) -> None:
    """Raises unless the forward pass that ``Decoder.run`` calls, which may be somebody's own, takes its keywords."""
    from .heads import OpenAIGPTLMHeadModel

    called = model.transformer if is_plain(model, OpenAIGPTLMHeadModel) else model
    parameters = inspect.signature(called.forward).parameters
    missing = [name for name in ("past_key_values", *PLAIN) if name not in parameters]
    if missing and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"{type(called).__name__}.forward must take {', '.join(missing)}: generate passes them")


def _seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, B: int, do_sample: bool
) -> Sequence[int]:
    """One for each row."""
    if not isinstance(generator, (torch.Generator, NoneType)):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator cannot both be given")
    if seed is None:
        if not do_sample:
            return range(B)
        device = None if generator is None else generator.device
        return torch.randint(2**63 - 1, (B,), generator=generator, device=device).tolist()
    seed = _unboxed(seed)
    seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    for one in seeds:
        check_int("seed", one)
        if not 0 <= one < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {one}")
    if isinstance(seed, int):
        return [seed + row for row in range(B)]
    if len(seeds) != B:
        raise ValueError(f"seed must be an int or one for each of the {B} rows, got {len(seeds)}")
    return seeds


def _window_start(length: int, n_positions: int) -> int:
    """Where the window of a text begins that holds its last token: every time that it is full, its last half stays."""
    moves = n_positions + 1 - max(1, n_positions // 2)
    return -(-max(0, length - n_positions) // moves) * moves


class GenerationMixin:
    """``generate`` for a language model whose forward pass takes a KVCache."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        streamer: Streamer | None = None,
        pad_token_id: int | None = None,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        return_dict_in_generate: bool = False,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continues each prompt.

        Args:
            input_ids: int [B, T], padded left or right where ``attention_mask`` is 0.
            max_new_tokens: tokens to add; or ``max_length``, of prompt and all, with its padding.
            streamer: sees the prompt, then every token as it comes.
            pad_token_id: fills a row behind its stop token; the config's, else the stop token, else 0.
            num_return_sequences: continuations of each prompt, rows b * n … b * n + n - 1.
            num_beams, return_dict_in_generate: only 1 and False.
            attention_mask: [B, T], 1 for the prompt's tokens. If None and there is a pad_token_id that is no stop
                token, positions that hold it are padding, as HuggingFace has it.
            settings: ``generate_stream``'s.

        Returns:
            int64 [B * num_return_sequences, T + new]: the prompts as given, then what was added.

        Raises:
            ValueError, TypeError: as ``generate_stream``.
        """
        self._check_prompt(input_ids, attention_mask)
        check_count("num_return_sequences", num_return_sequences)
        if num_beams != 1:
            raise ValueError(f"num_beams must be 1, got {num_beams}: there is no beam search")
        if return_dict_in_generate:
            raise ValueError("return_dict_in_generate must be False: only the ids are returned")
        if pad_token_id is None:
            pad_token_id = self.config.pad_token_id  # type: ignore[attr-defined]
        if pad_token_id is not None:
            check_int("pad_token_id", pad_token_id)
        stops = self._stop_tokens(settings.pop("eos_token_id", None))
        if attention_mask is None and pad_token_id is not None and pad_token_id not in stops:
            attention_mask = input_ids != pad_token_id
        if pad_token_id is None:
            pad_token_id = stops[0] if stops else 0
        if num_return_sequences > 1:
            input_ids = input_ids.repeat_interleave(num_return_sequences, 0)
            attention_mask = (
                None if attention_mask is None else attention_mask.repeat_interleave(num_return_sequences, 0)
            )
        if max_length is not None:
            check_int("max_length", max_length)
            T = input_ids.shape[1]
            if max_new_tokens is None and max_length <= T:
                raise ValueError(f"max_length must exceed the prompt's {T} positions, got {max_length}")
            max_new_tokens = max_length - T if max_new_tokens is None else max_new_tokens

        settings.setdefault("look_every", LOOK_EVERY if input_ids.is_cuda and streamer is None else 1)
        steps = self.generate_stream(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad_token_id,
            **settings,
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        new = []
        for tokens in steps:
            new.append(tokens)
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids.long(), torch.stack(new, 1)], 1)

    def generate_stream(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int | None = None,
        attention_mask: Tensor | None = None,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = 50,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        use_cache: bool = True,
        overflow: str = "error",
        look_every: int = 1,
    ) -> Iterator[Tensor]:
        """Yields the next token of every row, int64 [B], until each row has stopped or ``max_new_tokens`` are made.

        Args:
            input_ids, attention_mask: as in ``generate``.
            max_new_tokens: if None, 20, or as many as there is room for.
            min_new_tokens: no row stops before these.
            do_sample: draw from the distribution; else take the likeliest token, whatever temperature, top_k and top_p.
            temperature: divides the logits, > 0 (None: 1). top_k: draw among the k likeliest (None or 0: all).
            top_p: draw among the likeliest that together reach this probability, in (0, 1].
            repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the row
                holds already, > 0 (Keskar et al. 2019, arXiv:1909.05858).
            seed: for draws that can be repeated, row by row: row b of a batch draws as it would alone with seed + b; or
                one seed for each row. If None, the rows' seeds are drawn from ``generator``, or torch's own.
            eos_token_id: one or more ids that end a row; the config's if None.
            pad_token_id: what a row that has ended yields.
            use_cache: keep keys and values; False runs the whole prefix every step, as HuggingFace's GPT-1 does.
            overflow: what happens at the model's last position. "error": a text that would pass it is refused. "slide":
                the row goes on behind the last half of its window, which is read again from position 0. What a row
                sees then depends on its length alone.
            look_every: steps between two looks at whether all rows have stopped, for which a GPU is waited; their
                tokens come together.

        Raises:
            ValueError, TypeError: an argument is not accepted, the text would pass n_positions, or a subclass's forward
                lacks a keyword; before any work.
        """
        mask = self._check_prompt(input_ids, attention_mask)
        P = self.config.n_positions  # type: ignore[attr-defined]
        _check_forward(self)
        check_count("look_every", look_every)
        check_count("max_new_tokens", 1 if max_new_tokens is None else max_new_tokens)
        check_count("min_new_tokens", min_new_tokens, 0)
        check_count("top_k", 0 if top_k is None else top_k, 0)
        for name, value in (("temperature", temperature), ("top_p", top_p), ("repetition_penalty", repetition_penalty)):
            _check_number(name, value)
        temperature = 1.0 if temperature is None else temperature
        if do_sample and not temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; for the likeliest token, do_sample=False"
            )
        if do_sample and top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive and finite, got {repetition_penalty}")
        if overflow not in ("error", "slide"):
            raise ValueError(f"overflow must be 'error' or 'slide', got {overflow!r}")
        vocab_size = self.config.vocab_size  # type: ignore[attr-defined]
        check_int("pad_token_id", pad_token_id)
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(f"pad_token_id must be from 0 to {vocab_size - 1}, got {pad_token_id}")
        rows = [row[keep] for row, keep in zip(input_ids, mask, strict=True)] if mask is not None else [*input_ids]
        lengths = [len(row) for row in rows]
        if min(lengths) == 0:
            raise ValueError("attention_mask has a row without any token")
        if use_cache and self.transformer.training and min(lengths) < max(lengths):  # type: ignore[attr-defined]
            raise ValueError("attention_mask leaves rows of different length: use_cache=True needs model.eval()")
        if max_new_tokens is None:
            max_new_tokens = 20 if overflow == "slide" else max(1, min(20, P - max(lengths)))
        if overflow == "error" and max(lengths) + max_new_tokens > P:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens} and input_ids has {max(lengths)} positions, "
                f"but the model has room for n_positions = {P}; overflow='slide' goes on"
            )
        how = Settings(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            min_new_tokens=min_new_tokens,
            stops=tuple(self._stop_tokens(eos_token_id)),
            pad_token_id=pad_token_id,
        )
        seeds = _seeds(seed, generator, len(input_ids), do_sample)
        return self._steps([row.long() for row in rows], how, max_new_tokens, seeds, use_cache, look_every)

    @torch.no_grad()
    def _steps(
        self, prompts: list[Tensor], how: Settings, N: int, seeds: Sequence[int], use_cache: bool, look_every: int
    ) -> Iterator[Tensor]:
        """prompts: each row's tokens, int64 [T_b]."""
        from . import graphs  # which decodes by what is above

        P = self.config.n_positions  # type: ignore[attr-defined]
        B, lengths, device = len(prompts), [len(prompt) for prompt in prompts], prompts[0].device
        starts = [_window_start(n, P) for n in lengths]  # of what each row sees
        held = [n - start for n, start in zip(lengths, starts, strict=True)]
        seqlens: int | Tensor = held[0] if len(set(held)) == 1 else torch.tensor(held, device=device)
        S = min(max(lengths) + N, P) if use_cache else None
        decoder = Decoder(self, B, S, N, how) if S is None else graphs.decoder(self, B, S, N, how)

        def window(row: int, start: int, count: int) -> Tensor:
            """What a row holds from position ``start`` of its text on, once ``count`` tokens are made."""
            return torch.cat([prompts[row], decoder.made[row, :count]])[start:]

        def read(count: int) -> Tensor:
            """What ``run`` gives for every row's last token, from its whole window."""
            ids = [window(row, start, count) for row, start in enumerate(starts)]
            last = torch.tensor([len(row) - 1 for row in ids], device=device)
            states = decoder.run(pad_sequence(ids, batch_first=True), decoder.cache)
            return states[torch.arange(B, device=device), last]

        def next_full() -> int:
            """The count of tokens made at which a row will have no room for the newest."""
            return min(P + 1 + start - n for start, n in zip(starts, lengths, strict=True))

        try:
            decoder.start(prompts, seeds)
            full = next_full()
            decoder.choose(read(0))
            decoder.hold(seqlens)  # padding behind a row's prompt is overwritten
            shown = 0
            for count in range(1, N + 1):
                if count - shown == look_every or count == N:
                    valid = int(decoder.alive) if how.stops else N
                    yield from decoder.made[:, shown : min(count, valid)].clone().unbind(1)
                    shown = count
                    if valid <= count or count == N:
                        return
                if count == full:  # a row has no room for its newest token
                    slid = [row for row, n in enumerate(lengths) if n + count - starts[row] > P]
                    for row in slid:
                        starts[row] = _window_start(lengths[row] + count, P)
                    if decoder.cache is not None:
                        decoder.reread(slid, [window(row, starts[row], count)[:-1] for row in slid])
                    full = next_full()
                if decoder.cache is not None:
                    decoder.step()
                else:
                    decoder.choose(read(count))
        finally:
            decoder.release()

    def _check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask as bool [B, T], or None where nothing is masked."""
        check_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids must be [B, T] with at least one row and one position, got shape {list(input_ids.shape)}"
            )
        device = self.transformer.tokens_embed.weight.device  # type: ignore[attr-defined]
        if input_ids.device != device:
            raise ValueError(f"input_ids must be on {device} as the model is, got {input_ids.device}")
        check_ids("input_ids", input_ids, self.config.vocab_size)  # type: ignore[attr-defined]
        if attention_mask is None:
            return None
        check_tensor("attention_mask", attention_mask)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be {list(input_ids.shape)}, the shape of input_ids, "
                f"got {list(attention_mask.shape)}"
            )
        mask = attention_mask >= 1
        return None if bool(mask.all()) else mask

    def _stop_tokens(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        if eos_token_id is None:
            eos_token_id = self.config.eos_token_id  # type: ignore[attr-defined]
        if eos_token_id is None:
            return []
        eos_token_id = _unboxed(eos_token_id)
        stops = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
        vocab_size = self.config.vocab_size  # type: ignore[attr-defined]
        for stop in stops:
            check_count("eos_token_id", stop, 0)
            if stop >= vocab_size:
                raise ValueError(f"eos_token_id must be below {vocab_size}, got {stop}")
        return [int(stop) for stop in stops]
