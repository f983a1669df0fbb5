"""What is minimised: the language-model loss, a task's own, or both (Radford et al. 2018, equation 5).

    loss = task loss + λ * language-model loss               means over a step's examples, and over its tokens

The state that a task's head reads goes to it directly, and ``linear_cross_entropy`` never holds all logits. OpenAI's
code took the mean over each sequence's tokens first; ours weighs every token alike, as HuggingFace's classes do.

Shapes: E examples, S sequences an example, C width, L labels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptfast_kernels import linear_cross_entropy

from ..heads import OpenAIGPTDoubleHeadsModel, OpenAIGPTLMHeadModel
from ..model import AttentionContext, OpenAIGPTModel
from .batch import Batch


def packed_states(body: OpenAIGPTModel, batch: Batch) -> Tensor:
    """The last hidden state of packed sequences, [1, total, C]: what ``body`` gives for each sequence alone."""
    context = AttentionContext(
        key_padding_mask=None,
        head_mask=None,
        cache=None,
        output_attentions=False,
        inference=False,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
    )
    x = body._embed(batch.input_ids, None, None, batch.position_ids, *batch.input_ids.shape)
    recompute = body._recomputes()
    for layer, block in enumerate(body.h):
        if recompute:
            x, _ = checkpoint(block, x, context, layer, **body.checkpoint_kwargs)
        else:
            x, _ = block(x, context, layer)
    return x


class Objective(nn.Module):
    """The loss of a model on a batch, as a module, so that DDP and FSDP can wrap it.

    Args:
        model: one of gptfast's heads. A classification model reads the sum of an example's extract states.
        lm_coef: λ; the language-model loss of a model that has no other head counts whole.
        classifier_dropout: on what a classification head reads; a multiple-choice head has a layer of its own for it.
        regression: the loss is the squared error of one number.

    Raises:
        ValueError: λ > 0 for a classification model whose language-model head is not its token table.
    """

    def __init__(self, model: Any, *, lm_coef: float = 0.5, classifier_dropout: float = 0.1, regression: bool = False):
        super().__init__()
        self.model = model
        self.has_task = not isinstance(model, OpenAIGPTLMHeadModel)
        self.lm_coef = lm_coef if self.has_task else 1.0
        self.classifier_dropout, self.regression = classifier_dropout, regression
        if self.lm_coef and model.get_output_embeddings() is None and not model.config.tie_word_embeddings:
            raise ValueError(f"lm_coef must be 0 for {type(model).__name__} with untied embeddings, got {lm_coef}")

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, language-model loss, task's logits [E, L] or [E, S]); losses are this batch's share of the step's."""
        body = self.model.transformer
        if batch.cu_seqlens is None:
            hidden = body(batch.input_ids, return_dict=True, use_cache=False).last_hidden_state
        else:
            hidden = packed_states(body, batch)

        lm_loss = hidden.new_zeros((), dtype=torch.float32)
        if self.lm_coef:
            head = self.model.get_output_embeddings() or body.tokens_embed
            lm_loss = linear_cross_entropy(hidden, head.weight, batch.targets, reduction="sum") / batch.tokens
        if not self.has_task:
            return lm_loss, lm_loss, None
        assert batch.extract is not None
        logits = self.task_logits(hidden.flatten(0, -2)[batch.extract])
        loss = self.lm_coef * lm_loss
        if batch.labels is not None:
            loss = loss + self._task_loss(logits.float(), batch.labels) / batch.examples
        return loss, lm_loss, logits

    def task_logits(self, states: Tensor) -> Tensor:
        """Of the extract states [E, S, C]: [E, L], or [E, S] for multiple choice."""
        if isinstance(self.model, OpenAIGPTDoubleHeadsModel):
            return self.model.multiple_choice_head(states[:, :, None], None).squeeze(-1)
        pooled = F.dropout(states.sum(1), self.classifier_dropout, self.training)
        return self.model.score(pooled)

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.regression:
            return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        return F.cross_entropy(logits, labels, reduction="sum")
