"""GPT-1 as a transformers model: ``PreTrainedModel`` and ``GenerationMixin`` around gptfast's own classes.

Each class here is gptfast's of the same name, whose forward pass it inherits, with transformers' machinery in front:
its ``from_pretrained``, ``generate``, ``Trainer``, ``pipeline`` and PEFT, and its output classes. Parameters have the
same names, so files go from one to the other and to transformers' own OpenAI GPT. What that one lacks and this has: a
key/value cache, fused attention, gradient checkpointing. ``attn_implementation`` chooses nothing here; gptfast's
backends do.
"""

# Both bases have a config, a generate and more, and transformers' come first, as they should:
# mypy: disable-error-code="misc"

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, OpenAIGPTConfig, PreTrainedModel, pytorch_utils
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.models.openai.modeling_openai import OpenAIGPTDoubleHeadsModelOutput

from .. import heads, linear, model, outputs
from ..cache import KVCache
from ..pretrained import OpenAIGPTPreTrainedModel as OurPreTrainedModel

OUTPUTS: dict[type, type] = {
    outputs.BaseModelOutput: BaseModelOutputWithPast,
    outputs.CausalLMOutput: CausalLMOutputWithPast,
    outputs.OpenAIGPTDoubleHeadsModelOutput: OpenAIGPTDoubleHeadsModelOutput,
    outputs.SequenceClassifierOutput: SequenceClassifierOutput,
}


class OpenAIGPTCache(Cache):
    """Our cache as transformers' ``generate`` handles one. Its memory is allocated by the first forward pass.

    Args:
        max_length: positions a row may come to; the model's n_positions if None. More are made room for when they come.
    """

    def __init__(self, max_length: int | None = None):
        super().__init__(layers=[])
        self.max_length = max_length
        self.kv: KVCache | None = None

    def prepare(self, body: model.OpenAIGPTModel, rows: int, new: int) -> KVCache:
        """The cache for a forward pass of ``body`` with ``new`` positions more in each of ``rows``."""
        n_positions, held = body.config.n_positions, self.get_seq_length()
        length = min(n_positions, self.max_length or n_positions)
        if self.kv is None:
            self.kv = body.new_cache(rows, max(length, min(new, n_positions)))
        elif held + new > self.kv.max_length and self.kv.max_length < n_positions:
            old, self.kv = self.kv, body.new_cache(rows, n_positions)
            self.kv.k[:, :, :held], self.kv.v[:, :, :held] = old.k[:, :, :held], old.v[:, :, :held]
            self.kv.seqlens = old.seqlens
        return self.kv

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.kv is None else self.kv.get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # it grows

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was."""
        if self.kv is not None:
            held = self.get_seq_length()  # what stands behind it is nobody's
            for x in (self.kv.k, self.kv.v):
                x[:, :, :held] = x[:, beam_idx.to(x.device), :held]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -``tokens_to_remove`` positions."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative, the positions to forget, got {tokens_to_remove}")
        if self.kv is not None:
            self.kv.seqlens = max(0, self.get_seq_length() + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self.kv.k, self.kv.v = (x.repeat_interleave(repeats, 1) for x in (self.kv.k, self.kv.v))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv is not None:
            self.kv.k, self.kv.v = self.kv.k[:, indices], self.kv.v[:, indices]

    def reset(self) -> None:
        self.kv = None

    @property
    def batch_size(self) -> int:
        return -1 if self.kv is None else self.kv.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.kv is not None


class Conv1D(linear.Conv1D, pytorch_utils.Conv1D):
    """Our projection under the name that PEFT looks for."""

    nx = property(lambda self: self.weight.shape[0])  # type: ignore[assignment]
    nf = property(lambda self: self.weight.shape[1])  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx})"


class _StopConstructing:
    """Follows transformers' classes and precedes ours, whose constructor is called by itself, with its own config."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]


class OpenAIGPTPreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = OpenAIGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["Block"]
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"attn\.bias$", r"position_ids$"]  # causal masks of older releases
    _ours: ClassVar[type[nn.Module]]

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(copy.deepcopy(config))  # transformers writes to it
        own: Any = self.config
        with no_init_weights():  # post_init does that, for what no file fills
            self._ours.__init__(self, own)
        for module in self.modules():
            if type(module) is linear.Conv1D:
                module.__class__ = Conv1D
        self.config = self._body.config = own
        self.post_init()

    def post_init(self) -> None:
        if isinstance(self.config, OpenAIGPTConfig):  # our constructor ends with it too
            super().post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            linear.check_savable(self)
        return super().save_pretrained(*args, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        OurPreTrainedModel._check_head(self)  # type: ignore[arg-type]
        return super().tie_weights(*args, **kwargs)

    # transformers 5 initialises a Conv1D's weight with 0.02 whatever the config says
    _init_weights = OurPreTrainedModel._init_weights

    @property
    def _body(self) -> model.OpenAIGPTModel:
        return self.base_model  # type: ignore[return-value]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, every_n_layers: int = 1
    ) -> None:
        func = gradient_checkpointing_func
        if func is not None and getattr(func, "func", func) is not torch.utils.checkpoint.checkpoint:
            raise ValueError("activations are recomputed here, not offloaded: offload must be False")
        if every_n_layers != 1:
            raise ValueError(f"every block is checkpointed: every_n_layers must be 1, got {every_n_layers}")
        self._body.gradient_checkpointing = enable
        self._body.checkpoint_kwargs = {"use_reentrant": False, **getattr(func, "keywords", {})}

    def _check_adapters(self) -> None:
        """Raises where an adapter is around a weight that is read without calling the module that holds it."""
        body: Any = self._body
        norms = [ln for block in body.h for ln in (block.ln_1, block.ln_2)]
        for module in (body.tokens_embed, body.positions_embed, *norms):
            if type(module).__module__.startswith("peft.tuners"):
                raise NotImplementedError(
                    f"{type(module).__name__} on an embedding or a LayerNorm: adapters are supported on c_attn, "
                    "c_proj, c_fc and the heads; train those in full with modules_to_save"
                )


def _forward_of(ours: type[nn.Module]) -> Callable:
    """The forward pass of ``ours``, taking transformers' caches and giving transformers' outputs."""
    signature = inspect.signature(ours.forward)
    has_cache = "past_key_values" in signature.parameters

    @functools.wraps(ours.forward)
    def forward(self, *args: Any, past_key_values: Any = None, use_cache: bool | None = None, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        del arguments["self"]
        return_dict = arguments.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        self._check_adapters()
        cache = None
        if has_cache:
            cache = _cache(past_key_values, use_cache)
            kv = cache.prepare(self._body, *_rows_and_length(arguments)) if isinstance(cache, OpenAIGPTCache) else cache
            arguments.update(past_key_values=kv, use_cache=False)
        elif past_key_values is not None or use_cache:
            raise TypeError(f"{type(self).__name__} takes no past_key_values and no use_cache=True")
        output = ours.forward(self, **arguments, return_dict=True)
        values = dict(output.items())
        if cache is not None:
            values["past_key_values"] = cache
        theirs = OUTPUTS[type(output)](**values)
        return theirs if return_dict else theirs.to_tuple()

    # Trainer takes every parameter named after labels for one that a batch must have
    shown = [parameter for name, parameter in signature.parameters.items() if name != "shift_labels"]
    forward.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return forward


def _cache(given: Any, use_cache: bool | None) -> OpenAIGPTCache | KVCache | None:
    if given is None:
        return OpenAIGPTCache() if use_cache else None
    if not isinstance(given, OpenAIGPTCache | KVCache):
        raise TypeError(f"past_key_values must be a gptfast.hf.OpenAIGPTCache, got {type(given).__name__}")
    return given


def _rows_and_length(arguments: dict[str, Any]) -> tuple[int, int]:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    shape = ids.shape if isinstance(ids, Tensor) else embeds.shape[:-1] if isinstance(embeds, Tensor) else (1, 1)
    return max(1, torch.Size(shape[:-1]).numel()), max(1, shape[-1])  # what does not fit, our checks name


class OpenAIGPTModel(OpenAIGPTPreTrainedModel, _StopConstructing, model.OpenAIGPTModel):
    """The body: ids in, the last hidden state out. Arguments are ``gptfast.OpenAIGPTModel``'s."""

    _ours = model.OpenAIGPTModel
    forward = _forward_of(model.OpenAIGPTModel)


class OpenAIGPTLMHeadModel(OpenAIGPTPreTrainedModel, GenerationMixin, _StopConstructing, heads.OpenAIGPTLMHeadModel):
    """GPT-1 as a language model, with transformers' ``generate``. Arguments are ``gptfast.OpenAIGPTLMHeadModel``'s."""

    _ours = heads.OpenAIGPTLMHeadModel
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.tokens_embed.weight"}
    accepts_loss_kwargs = True  # num_items_in_batch
    forward = _forward_of(heads.OpenAIGPTLMHeadModel)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation not in (None, "dynamic"):
            kind = generation_config.cache_implementation
            raise ValueError(f"cache_implementation must be None, there is one kind of cache here, got {kind!r}")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = OpenAIGPTCache(max(1, max_cache_length))


class OpenAIGPTDoubleHeadsModel(OpenAIGPTPreTrainedModel, _StopConstructing, heads.OpenAIGPTDoubleHeadsModel):
    """GPT-1 with two heads. Arguments are ``gptfast.OpenAIGPTDoubleHeadsModel``'s."""

    _ours = heads.OpenAIGPTDoubleHeadsModel
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.tokens_embed.weight"}
    forward = _forward_of(heads.OpenAIGPTDoubleHeadsModel)


class OpenAIGPTForSequenceClassification(
    OpenAIGPTPreTrainedModel, _StopConstructing, heads.OpenAIGPTForSequenceClassification
):
    """GPT-1 as a classifier. Arguments are ``gptfast.OpenAIGPTForSequenceClassification``'s."""

    _ours = heads.OpenAIGPTForSequenceClassification
    forward = _forward_of(heads.OpenAIGPTForSequenceClassification)


AUTO_CLASSES: dict[Any, type[PreTrainedModel]] = {
    transformers.AutoModel: OpenAIGPTModel,
    transformers.AutoModelForCausalLM: OpenAIGPTLMHeadModel,
    transformers.AutoModelForSequenceClassification: OpenAIGPTForSequenceClassification,
}


def register_auto_classes() -> None:
    """From now on transformers' Auto classes give these models for a GPT-1, in this process."""
    for auto, ours in AUTO_CLASSES.items():
        auto.register(OpenAIGPTConfig, ours, exist_ok=True)


def unregister_auto_classes() -> None:
    """Undoes ``register_auto_classes``: the Auto classes give transformers' own GPT-1 again."""
    for auto in AUTO_CLASSES:
        auto._model_mapping._extra_content.pop(OpenAIGPTConfig, None)
