"""The original's contract: its functions, right on every transformers version, with a handle."""

from padless.llama.engage import replace_llama_attn_with_flash_attn
from padless.llama.handle import EngagementReport, Handle
from padless.llama.paths import _prepare_decoder_attention_mask, forward, forward_2

__all__ = [
    "EngagementReport",
    "Handle",
    "_prepare_decoder_attention_mask",
    "forward",
    "forward_2",
    "replace_llama_attn_with_flash_attn",
]
