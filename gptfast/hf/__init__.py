from .attention import KeyMask, register_attention
from .patching import *
from .patching import Patch, apply_gptfast, apply_gptfast_to_gpt2, apply_gptfast_to_openai_gpt
register_attention()
