"""GPT-1, fast: HuggingFace's names on fused kernels. Changing the import is all a user does.

Imports torch alone; what needs more (tokenizers, files, training) is imported when it is used.
"""

from gptfast_kernels import get_default_backend, set_default_backend, use_backend

from .cache import KVCache
from .config import OpenAIGPTConfig
from .explain import explain
from .graphs import capture
from .heads import OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification, OpenAIGPTLMHeadModel
from .linear import pack, quantize
from .model import OpenAIGPTModel
from .outputs import OpenAIGPTDoubleHeadsModelOutput
from .pretrained import OpenAIGPTPreTrainedModel
from .tokenizer import OpenAIGPTTokenizer
from .tokenizer_fast import OpenAIGPTTokenizerFast

__version__ = "0.1.0"


__all__ = [
    "KVCache",
    "OpenAIGPTConfig",
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTDoubleHeadsModelOutput",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTModel",
    "OpenAIGPTPreTrainedModel",
    "OpenAIGPTTokenizer",
    "OpenAIGPTTokenizerFast",
    "capture",
    "explain",
    "get_default_backend",
    "pack",
    "quantize",
    "set_default_backend",
    "use_backend",
]
