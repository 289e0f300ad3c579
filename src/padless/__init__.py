"""padless: a Hugging Face LLaMA computes its real tokens only, and can prove that it is the same.

Importing this package changes nothing and touches no GPU; public names load when they are used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from padless.attention import varlen_attention
    from padless.balance import BalancedBatchSampler, Imbalance, SequenceCost
    from padless.benchmark import BenchReport, bench
    from padless.collators import PackingCollator, PaddingCollator
    from padless.diagnosis import Diagnosis, doctor
    from padless.errors import (
        BackendUnavailableError,
        CheckpointError,
        EngagementError,
        PadlessError,
        UnsupportedError,
    )
    from padless.layout import VarlenLayout
    from padless.lengths import LengthsReport, lengths_report
    from padless.llama import replace_llama_attn_with_flash_attn
    from padless.training import TokensCallback
    from padless.unpadded import PatchHandle, PatchReport, patch, patch_llama
    from padless.verification import VerifyReport, verify

__version__ = "0.1.0.dev0"

logging.getLogger("padless").addHandler(logging.NullHandler())

_HOME = {
    "BackendUnavailableError": "padless.errors",
    "BenchReport": "padless.benchmark",
    "BalancedBatchSampler": "padless.balance",
    "CheckpointError": "padless.errors",
    "Diagnosis": "padless.diagnosis",
    "EngagementError": "padless.errors",
    "LengthsReport": "padless.lengths",
    "Imbalance": "padless.balance",
    "PackingCollator": "padless.collators",
    "PaddingCollator": "padless.collators",
    "PadlessError": "padless.errors",
    "PatchHandle": "padless.unpadded",
    "PatchReport": "padless.unpadded",
    "TokensCallback": "padless.training",
    "SequenceCost": "padless.balance",
    "UnsupportedError": "padless.errors",
    "VarlenLayout": "padless.layout",
    "VerifyReport": "padless.verification",
    "bench": "padless.benchmark",
    "lengths_report": "padless.lengths",
    "doctor": "padless.diagnosis",
    "patch": "padless.unpadded",
    "patch_llama": "padless.unpadded",
    "replace_llama_attn_with_flash_attn": "padless.llama",
    "varlen_attention": "padless.attention",
    "verify": "padless.verification",
}

__all__ = [
    "BackendUnavailableError",
    "BalancedBatchSampler",
    "BenchReport",
    "CheckpointError",
    "Diagnosis",
    "EngagementError",
    "Imbalance",
    "LengthsReport",
    "PackingCollator",
    "PaddingCollator",
    "PadlessError",
    "PatchHandle",
    "PatchReport",
    "SequenceCost",
    "TokensCallback",
    "UnsupportedError",
    "VarlenLayout",
    "VerifyReport",
    "bench",
    "doctor",
    "lengths_report",
    "patch",
    "patch_llama",
    "replace_llama_attn_with_flash_attn",
    "varlen_attention",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'padless' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
