"""Text, one token at a time: greedy or sampled, with a key/value cache.

A batch of prompts of different length is first pushed together to the left of its cache rows, wherever its padding
stands, so that positions count from 0 in every row and a row comes out as it would alone.

Shapes: B batch, T prompt length with padding, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from .inputs import check_ids, check_tensor


class Streamer(Protocol):
    """Takes tokens as they come: first the prompt [B, T], then [B] a step. transformers' streamers fit."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


def sample(
    logits: Tensor,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the next token [B] from logits [B, V]; the likeliest one with ``do_sample=False``.

    ``top_k`` keeps the k likeliest. ``top_p`` keeps the fewest whose probabilities reach p (Holtzman et al. 2019,
    arXiv:1904.09751).
    """
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


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
            max_new_tokens: tokens to add; or ``max_length``, of prompt and all. 20 new ones if neither is given.
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
            ValueError: an argument is not accepted, or the text would pass n_positions; before any work.
        """
        self._check_prompt(input_ids, attention_mask)
        check_count("num_return_sequences", num_return_sequences)
        if num_beams != 1:
            raise ValueError(f"num_beams must be 1, got {num_beams}: there is no beam search")
        if return_dict_in_generate:
            raise ValueError("return_dict_in_generate must be False: only the ids are returned")
        if pad_token_id is None:
            pad_token_id = self.config.pad_token_id  # type: ignore[attr-defined]
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
        if max_new_tokens is None:
            T, room = input_ids.shape[1], self.config.n_positions - input_ids.shape[1]  # type: ignore[attr-defined]
            max_new_tokens = min(20, max(room, 1)) if max_length is None else max_length - T
            if max_length is not None and max_new_tokens < 1:
                raise ValueError(f"max_length must exceed the prompt's {T} positions, got {max_length}")

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
        return torch.cat([input_ids.long(), torch.stack(new, 1)], 1) if new else input_ids.long()

    def generate_stream(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = 50,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yields the next token of every row, int64 [B], until each row has stopped or ``max_new_tokens`` are made.

        Args:
            input_ids, attention_mask: as in ``generate``.
            min_new_tokens: no row stops before these.
            do_sample: draw from the distribution; else take the likeliest token, whatever temperature, top_k and top_p.
            temperature: divides the logits, > 0 (None: 1). top_k: draw among the k likeliest (None or 0: all).
            top_p: draw among the likeliest that together reach this probability, in (0, 1].
            repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the row
                holds already, > 0 (Keskar et al. 2019, arXiv:1909.05858).
            seed: for a draw that can be repeated; or ``generator``, on the model's device.
            eos_token_id: one or more ids that end a row; the config's if None.
            pad_token_id: what a row that has ended yields.
            use_cache: keep keys and values; False runs the whole prefix every step, as HuggingFace's GPT-1 does.

        Raises:
            ValueError: an argument is not accepted, or the text would pass n_positions; before any work.
        """
        mask = self._check_prompt(input_ids, attention_mask)
        n_positions = self.config.n_positions  # type: ignore[attr-defined]
        check_count("max_new_tokens", max_new_tokens)
        check_count("min_new_tokens", min_new_tokens, 0)
        check_count("top_k", 0 if top_k is None else top_k, 0)
        temperature = 1.0 if temperature is None else temperature
        if do_sample and not temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; for the likeliest token, do_sample=False"
            )
        if do_sample and top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if repetition_penalty is not None and not repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator cannot both be given")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
        vocab_size = self.config.vocab_size  # type: ignore[attr-defined]
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(f"pad_token_id must be from 0 to {vocab_size - 1}, got {pad_token_id}")
        lengths: int | Tensor = input_ids.shape[1]  # of each prompt without padding
        if mask is not None:
            lengths = mask.sum(1)
            if int(lengths.min()) == 0:
                raise ValueError("attention_mask has a row without any token")
            if use_cache and self.training:  # type: ignore[attr-defined]
                raise ValueError("attention_mask leaves rows of different length: use_cache=True needs model.eval()")
            order = mask.long().argsort(dim=1, descending=True, stable=True)  # tokens first, in order, then padding
            input_ids = input_ids.gather(1, order)
        longest = int(lengths.max()) if isinstance(lengths, Tensor) else lengths
        if longest + max_new_tokens > n_positions:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens} and input_ids has {longest} positions, "
                f"but the model has room for n_positions = {n_positions}"
            )
        device = input_ids.device
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
        return self._steps(
            input_ids[:, :longest].long(),
            lengths,
            max_new_tokens,
            {
                "do_sample": do_sample,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "generator": generator,
            },
            torch.tensor(self._stop_tokens(eos_token_id), dtype=torch.int64, device=device),
            min_new_tokens,
            repetition_penalty,
            pad_token_id,
            use_cache,
        )

    @torch.no_grad()
    def _steps(
        self, ids, lengths, max_new_tokens, sampling, stops, min_new_tokens, repetition_penalty, pad_token_id, use_cache
    ) -> Iterator[Tensor]:
        """ids [B, T], each row's tokens first; lengths int or [B]."""
        B, T = ids.shape
        body, head = self.transformer, self.lm_head  # type: ignore[attr-defined]
        rows = torch.arange(B, device=ids.device)
        cache = None
        if use_cache:
            cache = body.new_cache(B, T + max_new_tokens)
        seen = torch.zeros(B, len(head.weight), dtype=torch.bool, device=ids.device)  # [B, V], tokens a row holds
        if repetition_penalty is not None:
            padding = torch.arange(T, device=ids.device) >= torch.as_tensor(lengths, device=ids.device).reshape(-1, 1)
            seen.scatter_(1, torch.where(padding, ids[:, :1], ids), True)
        running = torch.ones(B, dtype=torch.bool, device=ids.device)

        def run(ids: Tensor) -> Tensor:
            settings = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
            return body(ids, past_key_values=cache, use_cache=False, **settings).last_hidden_state

        hidden = run(ids)
        for step in range(max_new_tokens):
            last = hidden[:, -1] if step and cache is not None else hidden[rows, lengths - 1]
            logits = head(last)
            if repetition_penalty is not None:
                weaker = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                logits = torch.where(seen, weaker, logits)
            if step < min_new_tokens:
                logits = logits.index_fill(1, stops, -torch.inf)
            tokens = sample(logits, **sampling)
            tokens = torch.where(running, tokens, pad_token_id)
            seen.scatter_(1, tokens[:, None], True)
            yield tokens
            if len(stops):
                running = running & ~torch.isin(tokens, stops)
                if not running.any():
                    return
            if step + 1 == max_new_tokens:
                return
            if cache is not None:
                if step == 0:
                    cache.seqlens = lengths  # padding behind a row's prompt is overwritten
                hidden = run(tokens[:, None])
            else:
                ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)
                ids[rows, lengths] = tokens
                lengths = lengths + 1
                hidden = run(ids)

    def _check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask as bool [B, T], or None where nothing is masked."""
        check_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids must be [B, T] with at least one row and one position, got shape {list(input_ids.shape)}"
            )
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
        stops = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
        vocab_size = self.config.vocab_size  # type: ignore[attr-defined]
        for stop in stops:
            check_count("eos_token_id", stop, 0)
            if stop >= vocab_size:
                raise ValueError(f"eos_token_id must be below {vocab_size}, got {stop}")
        return [int(stop) for stop in stops]
