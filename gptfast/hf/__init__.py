"""gptfast inside HuggingFace transformers, which importing this needs; ``import gptfast`` does not import it.

import gptfast.hf                                       # from now on attn_implementation="gptfast" is known
patch = gptfast.hf.apply_gptfast(model)                 # their model, our ops; patch.revert() undoes it
gptfast.hf.OpenAIGPTLMHeadModel.from_pretrained(...)    # GPT-1 as a transformers model around our own body
gptfast.hf.register_auto_classes()                      # AutoModelForCausalLM gives that one from now on
"""

from .attention import KeyMask, register_attention
from .models import (
    OpenAIGPTCache,
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
    register_auto_classes,
    unregister_auto_classes,
)
from .patching import Patch, apply_gptfast, apply_gptfast_to_gpt2, apply_gptfast_to_openai_gpt

register_attention()

__all__ = [
    "KeyMask",
    "OpenAIGPTCache",
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTModel",
    "Patch",
    "apply_gptfast",
    "apply_gptfast_to_gpt2",
    "apply_gptfast_to_openai_gpt",
    "register_attention",
    "register_auto_classes",
    "unregister_auto_classes",
]
