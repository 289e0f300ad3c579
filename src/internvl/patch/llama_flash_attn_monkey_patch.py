"""The import path of OpenGVLab InternVL's patch, kept for scripts that name it.

No `__init__.py` stands above this file: with an InternVL checkout on the path, its own
`internvl.patch` is found instead.
"""

from padless.llama import (
    _prepare_decoder_attention_mask,
    forward,
    forward_2,
    replace_llama_attn_with_flash_attn,
)

__all__ = [
    "_prepare_decoder_attention_mask",
    "forward",
    "forward_2",
    "replace_llama_attn_with_flash_attn",
]
