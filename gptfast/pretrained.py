"""What every GPT-1 class has besides its forward pass: initialisation, tied weights, resizing, loading and saving."""

import math
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import OpenAIGPTConfig
from .linear import BlockedLinear, is_quantized


class OpenAIGPTPreTrainedModel(nn.Module):
    """Base class. The model keeps its own copy of the config it is given."""

    config_class = OpenAIGPTConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        if not isinstance(config, OpenAIGPTConfig):  # transformers' own config class, say
            if not hasattr(config, "to_dict"):
                raise TypeError(f"config must be an OpenAIGPTConfig, got {type(config).__name__}")
            config = OpenAIGPTConfig.from_dict(config.to_dict())
        self.config = config.copy()
        self.name_or_path = ""

    def post_init(self) -> None:
        """Initialises and ties the weights; the last line of every constructor. The body initialises itself."""
        for name, child in self.named_children():
            if name != self.base_model_prefix:
                child.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) for every matrix; LayerNorm to the identity; biases to zero."""
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif getattr(module, "weight", None) is not None:
            nn.init.normal_(module.weight, std=self.config.initializer_range)  # type: ignore[arg-type]
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    # -- parts --------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights; a tied one counts once."""
        sizes = {id(m.weight): math.prod(m.features) for m in self.modules() if isinstance(m, BlockedLinear)}
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else ()
        return sum(
            sizes.get(id(p), p.numel())
            for p in self.parameters()
            if id(p) not in embeddings and (p.requires_grad or not only_trainable)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.get_input_embeddings()  # type: ignore[operator]

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self._check_head()
        self.base_model.set_input_embeddings(new_embeddings)  # type: ignore[operator]
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def tie_weights(self) -> None:
        """Makes the LM head's weight the token table, unless ``config.tie_word_embeddings`` is False."""
        self._check_head()
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    def _check_head(self) -> None:
        if is_quantized(self):
            raise ValueError("the LM head has int8 weights, apart from the token table: change that before quantizing")

    # -- a vocabulary of another size ---------------------------------------------------------------------------

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Keeps the first rows of the token table (and of an untied LM head) and draws the new ones.

        Args:
            new_num_tokens: rows wanted; as many as now if None.
            pad_to_multiple_of: rounds the number up.
            mean_resizing: draw new rows from a normal with the old rows' mean and (tiny) covariance, which keeps the
                logits of old tokens nearly as they were (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
                Language Models"); else from N(0, initializer_range).

        Returns:
            The token table. ``config.vocab_size`` is set.
        """
        self._check_head()
        old = self.get_input_embeddings()
        n = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if pad_to_multiple_of <= 0:
                raise ValueError(f"pad_to_multiple_of must be positive, got {pad_to_multiple_of}")
            n = -(-n // pad_to_multiple_of) * pad_to_multiple_of
        if n <= 0:
            raise ValueError(f"new_num_tokens must be positive, got {n}")
        if n == old.num_embeddings:
            return old
        head = self.get_output_embeddings()
        untied = head is not None and head.weight is not old.weight
        new = nn.Embedding(n, old.embedding_dim, device="meta")
        new.weight = self._resized(old.weight, n, mean_resizing)
        new.train(old.training)
        if head is not None:
            head.out_features = n
            if untied:
                head.weight = self._resized(head.weight, n, mean_resizing)
        self.base_model.set_input_embeddings(new)  # type: ignore[operator]
        self.config.vocab_size = n
        self.tie_weights()
        return new

    @torch.no_grad()
    def _resized(self, weight: Tensor, n: int, mean_resizing: bool) -> nn.Parameter:
        rows = weight.new_empty(n, weight.shape[1])
        kept = min(n, len(weight))
        rows[:kept] = weight[:kept]
        if n > kept and mean_resizing:
            old = weight.float()
            covariance = torch.cov(old.T, correction=0) * 1e-9
            scale, directions = torch.linalg.eigh(covariance)  # the covariance is only positive semi-definite
            noise = torch.randn(n - kept, old.shape[1], device=old.device) * scale.clamp(min=0).sqrt()
            rows[kept:] = (old.mean(0) + noise @ directions.T).to(weight.dtype)
        elif n > kept:
            nn.init.normal_(rows[kept:], std=self.config.initializer_range)
        return nn.Parameter(rows, requires_grad=weight.requires_grad)

    # -- memory for compute -------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes each block in the backward pass: about a third more time, a fraction of the memory.

        Args:
            gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; use_reentrant=False if None.
        """
        self.base_model.checkpoint_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}  # type: ignore[assignment]
        self.base_model.gradient_checkpointing = True  # type: ignore[assignment]

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False  # type: ignore[assignment]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.base_model.gradient_checkpointing)

    # -- files --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Loads a checkpoint from a folder or the Hub, in eval mode. See ``gptfast.checkpoint.load_pretrained``."""
        from .checkpoint import load_pretrained

        return load_pretrained(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes config.json and model.safetensors. See ``gptfast.checkpoint.save_pretrained``."""
        from .checkpoint import save_pretrained

        save_pretrained(self, save_directory, **kwargs)
