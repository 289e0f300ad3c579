"""The whole model on real tokens: unpadded once at its door, padded back once behind it."""

from padless.unpadded.engagement import patch, patch_llama
from padless.unpadded.handle import PatchHandle, PatchReport

__all__ = ["PatchHandle", "PatchReport", "patch", "patch_llama"]
