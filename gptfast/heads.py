"""GPT-1's heads: language model, language model with multiple choice, sequence classification.

Shapes: B batch, N choices, T positions, C width, V vocabulary, L labels.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast_kernels import linear_cross_entropy

from .cache import KVCache
from .config import OpenAIGPTConfig
from .generation import GenerationMixin
from .inputs import check_labels, check_logits_to_keep, check_tensor, text_shape
from .linear import is_plain
from .model import OpenAIGPTModel
from .outputs import CausalLMOutput, DeferredLogits, OpenAIGPTDoubleHeadsModelOutput, SequenceClassifierOutput
from .pretrained import OpenAIGPTPreTrainedModel


def _make_lm_head(config: OpenAIGPTConfig) -> nn.Linear:
    # a tied weight is the token table: nothing to allocate
    device = "meta" if config.tie_word_embeddings else None
    return nn.Linear(config.n_embd, config.vocab_size, bias=False, device=device)


class OpenAIGPTLMHeadModel(OpenAIGPTPreTrainedModel, GenerationMixin):
    """GPT-1 as a language model. ``lm_head.weight`` is the token table unless the config unties it."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.tokens_embed.weight"}

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.transformer = OpenAIGPTModel(self.config)
        self.transformer.config = self.config
        self.lm_head = _make_lm_head(self.config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        head_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        ignore_index: int = -100,
    ) -> tuple | CausalLMOutput:
        """Logits, and the loss of predicting the next token where ``labels`` are given.

        Args:
            labels: int64, the shape of ``input_ids``; shifted here, so pass the ids themselves. ``ignore_index`` is
                not counted.
            logits_to_keep: compute only the last k positions (0: all), or the positions of an index tensor: int [K]
                for all rows, int [B, K] for each, or a bool mask [B, T], which flattens.
            num_items_in_batch: divides the summed loss; None takes the mean over the counted labels.
            shift_labels: labels that are shifted already, in place of ``labels``.
            The others are ``OpenAIGPTModel``'s.

        Returns:
            CausalLMOutput: loss (float32 scalar), logits [..., T, V], hidden_states, attentions, past_key_values.

        Raises:
            ValueError: ``labels`` together with ``logits_to_keep``, or an argument of the wrong shape or range.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        targets = labels if shift_labels is None else shift_labels
        shape = text_shape(input_ids, inputs_embeds)
        if shape:
            check_logits_to_keep(logits_to_keep, shape)
        if targets is not None:
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError(f"logits_to_keep cannot go with labels, got {logits_to_keep!r}")
            name = "labels" if shift_labels is None else "shift_labels"
            if shape is not None:
                check_labels(name, targets, shape, self.lm_head.out_features, ignore_index)

        outputs = self.transformer(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
            head_mask=head_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden = _keep(outputs.last_hidden_state, logits_to_keep)
        if targets is None:
            loss, logits = None, self.lm_head(hidden)
        else:
            shift, reduction = shift_labels is None, "mean" if num_items_in_batch is None else "sum"
            loss, logits = _loss(self.lm_head, hidden, targets, ignore_index, reduction, shift)
            loss = loss.float() if num_items_in_batch is None else loss.float() / num_items_in_batch
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            past_key_values=outputs.past_key_values,
        )
        return output if return_dict else output.to_tuple()


def _loss(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: bool = True,
) -> tuple[Tensor, Tensor | DeferredLogits]:
    """The language-model loss of hidden [..., T, C] in float32 at least, and its logits: a plain head defers them."""
    labels = labels.to(hidden.device)  # as HuggingFace's loss has it
    if is_plain(head, nn.Linear) and head.bias is None and not torch.compiler.is_compiling():
        how: Any = {"ignore_index": ignore_index, "reduction": reduction, "shift": shift}
        return linear_cross_entropy(hidden, head.weight, labels.long(), **how), DeferredLogits(hidden, head.weight)
    logits = head(hidden)
    if shift:
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    rows = logits.flatten(0, -2).float()
    return F.cross_entropy(rows, labels.flatten(), ignore_index=ignore_index, reduction=reduction), logits


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of ``hidden`` [..., T, C] whose logits are wanted."""
    if isinstance(logits_to_keep, int):
        return hidden[..., -logits_to_keep:, :] if logits_to_keep else hidden
    if logits_to_keep.ndim == 1:
        return hidden[..., logits_to_keep, :]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, logits_to_keep]


_tanh_gelu = functools.partial(nn.GELU, approximate="tanh")
# summary_activation, by transformers' names
SUMMARY_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": nn.GELU,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "linear": nn.Identity,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


class SequenceSummary(nn.Module):
    """Pools a sequence to one vector and projects it: the multiple-choice head."""

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        self.n_embd = config.n_embd
        self.summary_type = config.summary_type
        if self.summary_type not in ("last", "first", "mean", "cls_index"):
            raise NotImplementedError(
                f"summary_type must be one of last, first, mean, cls_index, got {self.summary_type!r}"
            )
        out_features = config.num_labels if config.summary_proj_to_labels and config.num_labels > 0 else config.n_embd
        self.summary = nn.Linear(config.n_embd, out_features) if config.summary_use_proj else nn.Identity()
        activation = config.summary_activation or "linear"
        if activation not in SUMMARY_ACTIVATIONS:
            raise KeyError(f"summary_activation must be one of {', '.join(SUMMARY_ACTIVATIONS)}, got {activation!r}")
        self.activation = SUMMARY_ACTIVATIONS[activation]()
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(getattr(config, "summary_last_dropout", None) or 0.0)

    def forward(self, hidden_states: Tensor, cls_index: Tensor | None) -> Tensor:
        """hidden_states [..., T, C], cls_index [...] -> [..., out_features]."""
        if self.summary_type == "last":
            x = hidden_states[:, -1]
        elif self.summary_type == "first":
            x = hidden_states[:, 0]
        elif self.summary_type == "mean":
            x = hidden_states.mean(1)
        elif cls_index is None:
            x = hidden_states[..., -1, :]
        else:
            index = cls_index[..., None, None].expand(*cls_index.shape, 1, hidden_states.shape[-1])
            x = hidden_states.gather(-2, index).squeeze(-2)
        return self.last_dropout(self.activation(self.summary(self.first_dropout(x))))

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of what ids of ``shape`` [..., T] come to, without a last dimension of 1."""
        pooled = shape[:-1] if self.summary_type == "cls_index" else (shape[0], *shape[2:])
        width = self.summary.out_features if isinstance(self.summary, nn.Linear) else self.n_embd
        return (*pooled, width) if width > 1 else tuple(pooled)


class OpenAIGPTDoubleHeadsModel(OpenAIGPTPreTrainedModel):
    """GPT-1 with a language-model head and a multiple-choice head on the position ``mc_token_ids`` names."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.tokens_embed.weight"}

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.config.num_labels = 1
        self.transformer = OpenAIGPTModel(self.config)
        self.transformer.config = self.config
        self.lm_head = _make_lm_head(self.config)
        self.multiple_choice_head = SequenceSummary(self.config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Tensor | None = None,
    ) -> tuple | OpenAIGPTDoubleHeadsModelOutput:
        """Logits of both heads, and the loss of each whose labels are given. The losses are not summed.

        Args:
            input_ids: int [B, N, T] (or [B, T]).
            mc_token_ids: int64 [B, N], the position each choice is judged at, in [0, T); the last if None.
            labels: int64 like ``input_ids``, shifted here; -100 is not counted.
            mc_labels: int64 [B], the right choice, in [0, N).
            The others are ``OpenAIGPTModel``'s.

        Returns:
            OpenAIGPTDoubleHeadsModelOutput: loss, mc_loss, logits [B, N, T, V], mc_logits [B, N], hidden_states,
            attentions.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or range, before anything is computed.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        shape = text_shape(input_ids, inputs_embeds)
        if shape:
            if mc_token_ids is not None:
                check_labels("mc_token_ids", mc_token_ids, shape[:-1], shape[-1], ignore_index=None)
            if labels is not None:
                check_labels("labels", labels, shape, self.lm_head.out_features)
            if mc_labels is not None:
                *rows, choices = self.multiple_choice_head.output_shape(shape) or (1,)
                check_tensor("mc_labels", mc_labels)
                check_labels("mc_labels", mc_labels.flatten(), (math.prod(rows),), choices)

        outputs = self.transformer(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
            head_mask=head_mask,
            use_cache=False,
        )
        hidden = outputs.last_hidden_state
        loss = mc_loss = None
        logits: Any
        if labels is None:
            logits = self.lm_head(hidden)
        else:
            loss, logits = _loss(self.lm_head, hidden, labels)
            loss = loss.to(hidden.dtype)  # as HuggingFace has it here
        mc_logits = self.multiple_choice_head(hidden, mc_token_ids).squeeze(-1)
        if mc_labels is not None:
            mc_loss = F.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.flatten())
        output = OpenAIGPTDoubleHeadsModelOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()


class OpenAIGPTForSequenceClassification(OpenAIGPTPreTrainedModel):
    """GPT-1 with a linear layer on the last token that is not padding."""

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.transformer = OpenAIGPTModel(self.config)
        self.transformer.config = self.config
        self.score = nn.Linear(self.config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Tensor | None = None,
    ) -> tuple | SequenceClassifierOutput:
        """Logits of the last real token of each row: the rightmost id that is not ``config.pad_token_id``.

        Args:
            labels: int64 [B] for one label of ``num_labels``; float [B] for regression (num_labels 1); float
                [B, num_labels] for several at once. ``config.problem_type`` is taken, or set from this.
            The others are ``OpenAIGPTModel``'s.

        Returns:
            SequenceClassifierOutput: loss, logits [B, num_labels], hidden_states, attentions.

        Raises:
            ValueError: more than one row without ``config.pad_token_id``; or an argument of the wrong shape or range.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        shape = text_shape(input_ids, inputs_embeds)
        if shape is not None:
            if input_ids is not None and len(shape) != 2:
                raise ValueError(f"input_ids must be [B, T], got shape {list(shape)}")
            if self.config.pad_token_id is None and shape[0] != 1:
                raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
            if labels is not None:
                self._check_labels(labels, shape[0])

        outputs = self.transformer(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
            head_mask=head_mask,
            use_cache=False,
        )
        hidden = outputs.last_hidden_state
        B, T = hidden.shape[:2]
        if self.config.pad_token_id is not None and input_ids is not None:
            positions = torch.arange(T, device=hidden.device)
            last = (positions * (input_ids != self.config.pad_token_id)).argmax(-1)  # a row of padding gives 0
            pooled = hidden[torch.arange(B, device=hidden.device), last]
        else:
            if self.config.pad_token_id is not None:
                warnings.warn(
                    "inputs_embeds do not show which positions are padding: the last position is classified",
                    stacklevel=2,
                )
            pooled = hidden[:, -1]
        logits = self.score(pooled)

        loss = None
        if labels is not None:
            if self.config.problem_type == "single_label_classification":
                loss = F.cross_entropy(logits, labels.flatten())
            elif self.config.problem_type == "regression":
                loss = F.mse_loss(logits, labels.view_as(logits))
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if return_dict else output.to_tuple()

    def _check_labels(self, labels: Tensor, B: int) -> None:
        """Raises unless ``labels`` fit ``config.problem_type``, which is set here where it is None."""
        check_tensor("labels", labels)
        config, L = self.config, self.num_labels
        kind = config.problem_type
        if kind is None:
            integers = labels.dtype in (torch.int64, torch.int32)
            kind = "single_label_classification" if integers else "multi_label_classification"
            kind = "regression" if L == 1 else kind
        if kind == "single_label_classification":
            check_labels("labels", labels.flatten(), (B,), L)
        elif kind in ("regression", "multi_label_classification"):
            if labels.shape not in ((B, L), (B,) if L == 1 else (B, L)):
                raise ValueError(f"labels must be [{B}, {L}] for {kind}, got shape {list(labels.shape)}")
            if not labels.is_floating_point():
                raise TypeError(f"labels must be floating point for {kind}, got {labels.dtype}")
        else:
            raise ValueError(
                "config.problem_type must be regression, single_label_classification or multi_label_classification, "
                f"got {kind!r}"
            )
        config.problem_type = kind
