"""How each transformers version calls its LLaMA attention: one record per era.

An era is a run of releases in which nothing changed that a replacement `LlamaAttention.forward`
has to know. A new era is one more record.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from padless.errors import UnsupportedError

OLDEST = Version("4.28")
NEWEST_TESTED = Version("5.23")


@dataclass(frozen=True)
class Era:
    """The contract between a decoder layer and its attention in some releases.

    Attributes:
        name: letter of the era.
        first: first release of it.
        change: what is new in it.
        classes: attention classes of `modeling_llama`, each with a forward of its own.
        returned: values that the decoder layer unpacks.
        rotary: where cos and sin come from when the caller hands none over: the module's own
            table by length ("seq_len") or by position ("position_ids"), or, since modules have
            lost theirs, one made from the config ("config").
        cache_attribute: a static cache hangs on the module as `past_key_value`.
        has_mask_hook: `LlamaModel._prepare_decoder_attention_mask` exists.
    """

    name: str
    first: str
    change: str
    classes: tuple[str, ...]
    returned: Literal[2, 3]
    rotary: Literal["seq_len", "position_ids", "config"]
    cache_attribute: bool = False
    has_mask_hook: bool = False

    @property
    def mask_made_by(self) -> str:
        """Where `LlamaModel.forward` makes the mask of its layers.

        A method's name; or "functions" of its module; or "create_causal_mask", which hands on a 4D
        mask as it is, and then unknown arguments reach the layers.
        """
        first = Version(self.first)
        if self.has_mask_hook:
            return "_prepare_decoder_attention_mask"
        if first < Version("4.38"):
            return "functions"
        return "_update_causal_mask" if first < Version("4.53") else "create_causal_mask"


_ONE = ("LlamaAttention",)
_TWO = ("LlamaAttention", "LlamaFlashAttention2")
_THREE = ("LlamaAttention", "LlamaFlashAttention2", "LlamaSdpaAttention")

ERAS = (
    Era("A", "4.28", "the first LLaMA, tuple caches", _ONE, 3, "seq_len", has_mask_hook=True),
    Era("B", "4.31", "grouped KV heads, pretraining_tp", _ONE, 3, "seq_len", has_mask_hook=True),
    Era("C", "4.34", "padding_mask argument", _TWO, 3, "seq_len", has_mask_hook=True),
    Era("D", "4.35", "4D masks only", _TWO, 3, "seq_len"),
    Era("E", "4.36", "Cache objects, SDPA by default", _THREE, 3, "seq_len"),
    Era("F", "4.38", "cache_position", _THREE, 3, "position_ids", cache_attribute=True),
    Era("G", "4.39", "masks of the call's size", _THREE, 3, "position_ids", cache_attribute=True),
    Era("H", "4.41", "static cache as an argument", _THREE, 3, "position_ids"),
    Era("I", "4.43", "position_embeddings argument", _THREE, 3, "position_ids"),
    Era("I'", "4.47", "unknown arguments reach the layer", _THREE, 3, "position_ids"),
    Era("J", "4.48", "one class, attention through the interface", _ONE, 2, "config"),
    Era("K", "4.51", "the interface is a class", _ONE, 2, "config"),
    Era("L", "4.53", "bool masks", _ONE, 2, "config"),
    Era("M", "4.54", "outputs recorded by hooks", _ONE, 2, "config"),
    Era("N", "4.56", "past_key_values", _ONE, 2, "config"),
    Era("O", "5.0", "rope_parameters", _ONE, 2, "config"),
    Era("P", "5.4", "no cache_position", _ONE, 2, "config"),
    Era("Q", "5.14", "no mask for a static-cache prefill", _ONE, 2, "config"),
)


def era_of(version: Version) -> Era:
    """Finds the era of a transformers release; releases newer than all known are of the last.

    Raises:
        UnsupportedError: older than the first era.
    """
    release = Version(version.base_version)
    if release < OLDEST:
        raise UnsupportedError(
            f"transformers must be {OLDEST} or newer, got {version}; upgrade transformers"
        )
    return [era for era in ERAS if Version(era.first) <= release][-1]


def installed_era() -> Era:
    """Finds the era of the transformers in this process.

    Raises:
        UnsupportedError: transformers is missing, or older than the first era.
    """
    try:
        from transformers import __version__
    except ImportError as error:
        raise UnsupportedError(
            f"transformers must be installed ({OLDEST} or newer), got: {error}"
        ) from error
    return _era_of_text(__version__)


@functools.cache
def _era_of_text(version: str) -> Era:
    # Every layer of every forward asks.
    return era_of(Version(version))
