"""GPT-1's heads: language model, language model with multiple choice, sequence classification.

Shapes: B batch, N choices, T positions, C width, V vocabulary, L labels.
"""

import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .config import OpenAIGPTConfig
from .generation import GenerationMixin
from .model import OpenAIGPTModel
from .outputs import CausalLMOutput, OpenAIGPTDoubleHeadsModelOutput, SequenceClassifierOutput
from .pretrained import OpenAIGPTPreTrainedModel


def _make_lm_head(config: OpenAIGPTConfig) -> nn.Linear:
    # a tied weight is the token table: nothing to allocate
    device = "meta" if config.tie_word_embeddings else None
    return nn.Linear(config.n_embd, config.vocab_size, bias=False, device=device)


def _check_labels(name: str, labels: Tensor, shape: torch.Size, size: int, ignore_index: int = -100) -> None:
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= size))]
        if bad.numel():
            raise ValueError(f"{name} contains {int(bad[0])}, accepted are 0 to {size - 1} and {ignore_index}")


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
        if targets is not None:
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError(f"logits_to_keep cannot go with labels, got {logits_to_keep!r}")
            x = input_ids if input_ids is not None else inputs_embeds
            if x is not None:
                shape = x.shape if input_ids is not None else x.shape[:-1]
                _check_labels(
                    "labels" if shift_labels is None else "shift_labels",
                    targets,
                    shape,
                    self.config.vocab_size,
                    ignore_index,
                )

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
        logits = self.lm_head(_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if targets is not None:
            if shift_labels is None:
                targets = F.pad(targets[..., 1:], (0, 1), value=ignore_index)
            loss = F.cross_entropy(
                logits.flatten(0, -2).float(),
                targets.flatten(),
                ignore_index=ignore_index,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            past_key_values=outputs.past_key_values,
        )
        return output if return_dict else output.to_tuple()


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of ``hidden`` [..., T, C] whose logits are wanted."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be >= 0, got {logits_to_keep}")
        return hidden[..., -logits_to_keep:, :] if logits_to_keep else hidden
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    if logits_to_keep.ndim == 1:
        return hidden[..., logits_to_keep, :]
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, logits_to_keep]


class SequenceSummary(nn.Module):
    """Pools a sequence to one vector and projects it: the multiple-choice head."""

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        self.summary_type = config.summary_type
        if self.summary_type not in ("last", "first", "mean", "cls_index"):
            raise NotImplementedError(
                f"summary_type must be one of last, first, mean, cls_index, got {self.summary_type!r}"
            )
        out_features = config.num_labels if config.summary_proj_to_labels and config.num_labels > 0 else config.n_embd
        self.summary = nn.Linear(config.n_embd, out_features) if config.summary_use_proj else nn.Identity()
        self.activation = _activation(config.summary_activation)
        self.first_dropout = nn.Dropout(config.summary_first_dropout or 0.0)
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


def _activation(name: str | None) -> nn.Module:
    activations = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "sigmoid": nn.Sigmoid}
    if not name:
        return nn.Identity()
    if name in ("gelu", "gelu_new"):
        return nn.GELU(approximate="tanh" if name == "gelu_new" else "none")
    if name not in activations:
        raise KeyError(f"summary_activation must be one of gelu, gelu_new, {', '.join(activations)}, got {name!r}")
    return activations[name]()


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
        x = input_ids if input_ids is not None else inputs_embeds
        if x is not None:
            shape = x.shape if input_ids is not None else x.shape[:-1]
            if mc_token_ids is not None:
                _check_labels("mc_token_ids", mc_token_ids, shape[:-1], shape[-1], ignore_index=0)
            if labels is not None:
                _check_labels("labels", labels, shape, self.config.vocab_size)
            if mc_labels is not None:
                choices = shape[1] if len(shape) > 2 else shape[0]
                _check_labels("mc_labels", mc_labels.flatten(), torch.Size([shape[:-1].numel() // choices]), choices)

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
        logits = self.lm_head(hidden)
        mc_logits = self.multiple_choice_head(hidden, mc_token_ids).squeeze(-1)
        loss = mc_loss = None
        if mc_labels is not None:
            mc_loss = F.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.flatten())
        if labels is not None:
            loss = F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())
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
        x = input_ids if input_ids is not None else inputs_embeds
        if x is not None and self.config.pad_token_id is None and x.shape[0] != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        if labels is not None and x is not None:
            self._check_labels(labels, x.shape[0])

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
            if self.config.problem_type == "regression":
                loss = (
                    F.mse_loss(logits.squeeze(), labels.squeeze())
                    if self.num_labels == 1
                    else F.mse_loss(logits, labels)
                )
            elif self.config.problem_type == "single_label_classification":
                loss = F.cross_entropy(logits, labels.view(-1))
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if return_dict else output.to_tuple()

    def _check_labels(self, labels: Tensor, B: int) -> None:
        config = self.config
        if config.problem_type is None:
            if self.num_labels == 1:
                config.problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                config.problem_type = "single_label_classification"
            else:
                config.problem_type = "multi_label_classification"
        if config.problem_type == "single_label_classification":
            _check_labels("labels", labels.view(-1), torch.Size([B]), self.num_labels)
        elif config.problem_type in ("regression", "multi_label_classification"):
            if labels.numel() != B * self.num_labels:
                raise ValueError(f"labels must be [{B}, {self.num_labels}], got shape {list(labels.shape)}")
        else:
            raise ValueError(
                "config.problem_type must be regression, single_label_classification or multi_label_classification, "
                f"got {config.problem_type!r}"
            )
