"""Our ops in somebody else's model: one instance, told apart from all others, and back again bit for bit.

    patch = apply_gptfast(model)
    print(patch)           # what was changed, and what was left and why
    patch.revert()         # the model is what it was

A module gets one of our classes, or one of ours takes its place where it holds no weights. Parameters, buffers, hooks
and ``state_dict`` keys stay what they are, so that ``generate``, ``Trainer``, ``save_pretrained`` and PEFT go on.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, activations
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.openai import modeling_openai
from transformers.pytorch_utils import Conv1D

from gptfast_kernels import flash_attention_qkvpacked, linear_gelu
from gptfast_kernels.modules import GELU, LayerNorm

from ..linear import is_plain
from ..pretrained import OpenAIGPTPreTrainedModel as OurPreTrainedModel
from .attention import NAME, register_attention

# Modules that compute GELU, and which form.
GELUS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "none",
    activations.AccurateGELUActivation: "tanh",
    activations.FastGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
    activations.NewGELUActivation: "tanh",
}


@dataclass
class Patch:
    """What was done to a model.

    Attributes:
        changed: module name -> what it is now. left: module name -> why it is as it was.
    """

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _undo: list[Any] = field(default_factory=list, repr=False)  # each has check() and undoes itself when called

    def revert(self) -> None:
        """Makes the model what it was. A second call does nothing.

        Raises:
            RuntimeError: something else has replaced a module since; undo that first. Nothing is changed then.
        """
        for undo in self._undo:
            undo.check()
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{name or 'model'}: {what}" for name, what in self.changed.items()]
        lines += [f"{name or 'model'}: left as it was, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


@dataclass
class _SetClass:
    """A module of another class, over the same attributes."""

    name: str
    module: nn.Module
    new: type[nn.Module]
    old: type[nn.Module] = nn.Module

    def __post_init__(self) -> None:
        self.old, self.module.__class__ = type(self.module), self.new

    def check(self) -> None:
        _still(type(self.module) is self.new, self.name)

    def __call__(self) -> None:
        self.module.__class__ = self.old


@dataclass
class _SetChild:
    """Another module in a weightless one's place. It may be shared with other models, so its own class stays."""

    name: str
    parent: nn.Module
    key: str
    new: nn.Module
    old: Any = None

    def __post_init__(self) -> None:
        self.old = self.parent._modules[self.key]
        self.parent._modules[self.key] = self.new.train(self.old.training)

    def check(self) -> None:
        _still(self.parent._modules[self.key] is self.new, self.name)

    def __call__(self) -> None:
        self.parent._modules[self.key] = self.old.train(self.new.training)


@dataclass
class _SetAttention:
    """Another attention implementation in a model's config, which becomes the model's own."""

    model: PreTrainedModel
    old: Any = None

    def __post_init__(self) -> None:
        register_attention()
        own: dict[int, Any] = {}  # a config may be shared with another model: by the old one's id
        copy.deepcopy(self.model.config, own)
        for module in self.model.modules():
            if id(getattr(module, "config", None)) in own:
                module.config = own[id(module.config)]
        self.old = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)

    def check(self) -> None:
        _still(self.model.config._attn_implementation == NAME, "config._attn_implementation")

    def __call__(self) -> None:
        self.model.set_attn_implementation(self.old)


def _still(ours: bool, name: str) -> None:
    if not ours:
        raise RuntimeError(f"{name} was replaced after the patch: undo that first")


# -- OpenAI GPT and GPT-2 ---------------------------------------------------------------------------------------


class _Attention(modeling_openai.Attention):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False) -> list[Tensor]:
        """x [B, T, C]; attention_mask [B, 1, 1, T], added to the scores: 0 where the key takes part."""
        if output_attentions:  # the weights are not stored here
            return super().forward(x, attention_mask, output_attentions)
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        keys = None if attention_mask is None else (attention_mask[:, 0, 0] >= 0).expand(B, T)
        if keys is not None and keys.device.type == "cpu" and not torch.compiler.is_compiling() and bool(keys.all()):
            keys = None
        dropout_p = self.attn_dropout.p if self.training else 0.0
        a = flash_attention_qkvpacked(qkv, key_padding_mask=keys, dropout_p=dropout_p)
        return [self.resid_dropout(self.c_proj(a.reshape(B, T, C)))]


class _Block(modeling_openai.Block):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False) -> list[Tensor]:
        a, *weights = self.attn(x, attention_mask=attention_mask, output_attentions=output_attentions)
        n = _add_and_normalize(self.ln_1, a, x)
        return [_add_and_normalize(self.ln_2, self.mlp(n), n), *weights]


def _add_and_normalize(ln: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return ln(x, residual) if type(ln) is LayerNorm else ln(residual + x)


class _FusedMLP(nn.Module):
    """c_proj(gelu(c_fc(x))) with the tanh form, the first two in one."""

    def forward(self, x: Tensor) -> Tensor:
        c_fc: Any = self.c_fc
        if is_plain(c_fc, Conv1D):
            h = linear_gelu(x, c_fc.weight.t(), c_fc.bias)
        else:  # an adapter, or a hook, that wants to be called
            h = self.act(c_fc(x))  # type: ignore[operator]
        return self.dropout(self.c_proj(h))  # type: ignore[operator]


class _OpenAIGPTMLP(_FusedMLP, modeling_openai.MLP):
    pass


class _GPT2MLP(_FusedMLP, modeling_gpt2.GPT2MLP):  # type: ignore[misc]
    pass


FUSED_MLPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_openai.MLP: _OpenAIGPTMLP,
    modeling_gpt2.GPT2MLP: _GPT2MLP,
}


def apply_gptfast_to_openai_gpt(
    model: PreTrainedModel, *, attention: bool = True, layer_norm: bool = True, gelu: bool = True
) -> Patch:
    """Our ops in one of transformers' OpenAI GPT models, which has no fused attention of its own.

    The residual is added where the LayerNorm reads it, and GELU applied where the projection before it writes. Outputs
    are equal to rounding, but for queries that see only padding: they attend to nothing.

    Args:
        model: OpenAIGPTModel or one of its heads. Patched in place; no other instance is touched.
        attention, layer_norm, gelu: what to patch.

    Raises:
        TypeError: another model. ValueError: it is patched already.
    """
    if not isinstance(model, modeling_openai.OpenAIGPTPreTrainedModel):
        raise TypeError(f"model must be one of transformers' OpenAI GPT models, got {type(model).__name__}")
    return _apply(model, attention, layer_norm, gelu)


def apply_gptfast_to_gpt2(
    model: PreTrainedModel, *, attention: bool = True, layer_norm: bool = True, gelu: bool = True
) -> Patch:
    """Our ops in one of transformers' GPT-2 models. Arguments and errors are ``apply_gptfast_to_openai_gpt``'s."""
    if not isinstance(model, modeling_gpt2.GPT2PreTrainedModel):
        raise TypeError(f"model must be one of transformers' GPT-2 models, got {type(model).__name__}")
    return _apply(model, attention, layer_norm, gelu)


# -- any model --------------------------------------------------------------------------------------------------


def apply_gptfast(model: nn.Module, *, attention: bool = True, layer_norm: bool = True, gelu: bool = True) -> Patch:
    """Our LayerNorm, GELU and attention wherever they are recognised in ``model``.

    Args:
        model: any module; transformers' models get attention too. Patched in place.
        attention, layer_norm, gelu: what to patch.

    Returns:
        What was changed and what was left, with the reason; ``revert()`` undoes it.

    Raises:
        TypeError: ``model`` is no module. ValueError: it is patched already, or one of gptfast's own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _apply(model, attention, layer_norm, gelu)


def _apply(model: nn.Module, attention: bool, layer_norm: bool, gelu: bool) -> Patch:
    if any(isinstance(module, OurPreTrainedModel) for module in model.modules()):
        raise ValueError(f"model has gptfast's ops already: {type(model).__name__} is, or holds, one of gptfast's own")
    patched = [name for name, module in model.named_modules() if type(module).__module__ == __name__]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if patched or (attention and implementation == NAME):
        raise ValueError(f"model is patched already, at {patched[0] if patched else 'config._attn_implementation'}")

    patch = Patch()
    for name, parent, key, module in list(_modules(model)):
        kind = type(module)
        if layer_norm and _is_norm(kind):
            _patch_norm(patch, name, module)
        elif gelu and (kind in GELUS or kind is nn.GELU):
            _patch_gelu(patch, name, parent, key, module)
        elif gelu and _is_activation(kind):
            patch.left[name] = f"{kind.__name__} is no GELU that is computed here"
        elif attention and kind is nn.MultiheadAttention:
            patch.left[name] = "torch.nn.MultiheadAttention calls torch's attention itself"

    for name, module in model.named_modules():
        if gelu and type(module) in FUSED_MLPS and type(module.act) is GELU and module.act.approximate == "tanh":
            _set_class(patch, name, module, FUSED_MLPS[type(module)])
        elif layer_norm and type(module) is modeling_openai.Block:
            _set_class(patch, name, module, _Block)
        elif attention and type(module) is modeling_openai.Attention:
            _set_class(patch, name, module, _Attention)
    if attention and not isinstance(model, modeling_openai.OpenAIGPTPreTrainedModel):
        _patch_attention(patch, model)
    return patch


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, str, Any]]:
    """(name, parent, its key there, module) of each place in a model; a module in two places comes twice."""
    yield "", None, "", model
    for path, parent in model.named_modules():
        for key, module in parent._modules.items():
            if module is not None:
                yield f"{path}.{key}".lstrip("."), parent, key, module


def _set_class(patch: Patch, name: str, module: nn.Module, new: type[nn.Module]) -> None:
    if type(module) is new:  # in two places, and done at the first
        return
    patch.changed[name] = f"{type(module).__name__} -> {new.__name__.lstrip('_')}"
    patch._undo.append(_SetClass(name, module, new))


def _is_norm(kind: type[nn.Module]) -> bool:
    return kind is not LayerNorm and (kind.__name__.endswith("Norm") or issubclass(kind, nn.LayerNorm))


def _patch_norm(patch: Patch, name: str, module: Any) -> None:
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        _set_class(patch, name, module, LayerNorm)
    elif type(module) is nn.LayerNorm:
        patch.left[name] = f"it normalizes over {len(module.normalized_shape)} dimensions, ours over one"
    elif isinstance(module, nn.LayerNorm):
        patch.left[name] = f"{type(module).__name__} is a subclass of LayerNorm, whose forward may be another"
    else:
        patch.left[name] = f"{type(module).__name__} is no LayerNorm"


def _patch_gelu(patch: Patch, name: str, parent: nn.Module | None, key: str, module: Any) -> None:
    if parent is None:
        patch.left[name] = "it is all of the model: there is nowhere to put another"
    elif module._forward_hooks or module._forward_pre_hooks:
        patch.left[name] = "hooks are registered on it"
    else:
        patch.changed[name] = f"{type(module).__name__} -> GELU"
        approximate = GELUS.get(type(module)) or module.approximate
        patch._undo.append(_SetChild(name, parent, key, GELU(approximate)))


def _is_activation(kind: type[nn.Module]) -> bool:
    ours = kind.__module__ in (activations.__name__, nn.modules.activation.__name__)
    return ours and kind is not nn.MultiheadAttention


def _patch_attention(patch: Patch, model: nn.Module) -> None:
    reason = _why_not_attention(model)
    if reason:
        patch.left["attention"] = reason
        return
    assert isinstance(model, PreTrainedModel)
    change = _SetAttention(model)
    patch._undo.append(change)
    patch.changed["attention"] = f"attn_implementation {change.old} -> {NAME}"


def _why_not_attention(model: nn.Module) -> str | None:
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no transformers model"
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "its scores are soft-capped"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "it has attention sinks"
    if any(hasattr(module, "relative_attention_bias") for module in model.modules()):
        return "it adds a bias to the scores"
    if not (model._can_set_attn_implementation() and model._supports_sdpa):
        return f"{type(model).__name__} does not use transformers' attention interface"
    return None
