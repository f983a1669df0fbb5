from .attention import KeyMask, register_attention
register_attention()
__all__ = ["KeyMask", "register_attention"]
