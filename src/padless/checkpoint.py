"""Loads a LLaMA and its tokenizer from a local folder, or says in one sentence why it cannot.

Owns the checks that transformers leaves out or spreads over a page: what a folder must hold, and
that no weight of a loaded model is a fresh random number. Never downloads anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor

from padless.environment import package_version
from padless.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
_LONGEST_REASON = 300


def load_llama(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    num_layers: int | None = None,
) -> LlamaForCausalLM:
    """Loads a LlamaForCausalLM in eval mode, with the attention implementation left at its default.

    Args:
        folder: holds config.json and the weights, as `save_pretrained` writes them.
        dtype: the type that the weights are converted to.
        device: where the model ends up.
        num_layers: how many of its decoder layers are loaded, from the first on; default all.

    Raises:
        ValueError: the model has not so many layers.
        CheckpointError: the folder or a file of it is missing or damaged, the model is not a
            LLaMA, weights are missing, or the installed transformers would misread the config.
    """
    from transformers import LlamaForCausalLM

    folder = Path(folder)
    config = _read_config(folder)
    _check_config_is_understood(config, folder)
    if not any((folder / name).is_file() for name in _WEIGHT_NAMES):
        raise CheckpointError(
            f"model folder {folder} has no weights; it needs one of {', '.join(_WEIGHT_NAMES)}"
        )
    stored = config.get("num_hidden_layers", 32)
    if num_layers is not None and not 1 <= num_layers <= stored:
        raise ValueError(f"num_layers must be in 1 to {stored}, the model's own, got {num_layers}")
    # Renamed in 4.56: versions before it do not know the new name, later ones warn of the old.
    dtype_keyword = "torch_dtype" if _is_transformers_before("4.56.0") else "dtype"
    options: dict[str, Any] = {
        dtype_keyword: dtype,
        "local_files_only": True,
        "output_loading_info": True,
        # From 5.0 on the loader's refusal of a shape names no tensor; _check_weights_fit does.
        "ignore_mismatched_sizes": not _is_transformers_before("5.0.0"),
    }
    if num_layers is not None:
        options["num_hidden_layers"] = num_layers
    from_pretrained: Any = LlamaForCausalLM.from_pretrained
    try:
        loaded, info = from_pretrained(folder, **options)
    except Exception as error:  # each loader and version has its own class for a damaged file
        raise CheckpointError(
            f"the model in {folder} does not load ({_one_line(error)}); "
            "check that its files are whole and belong together"
        ) from error
    _check_weights_fit(info, config, folder)
    model: LlamaForCausalLM = loaded.to(device).eval()
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a model folder; its pad token is eos where it has none.

    Raises:
        CheckpointError: the folder or its tokenizer is missing or damaged, or the tokenizer has
            neither a pad token nor an eos token.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    _read_config(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_NAMES):
        raise CheckpointError(
            f"model folder {folder} has no tokenizer; it needs one of {', '.join(_TOKENIZER_NAMES)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(
            f"the tokenizer in {folder} does not load ({_one_line(error)}); "
            "check that its files are whole"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer in {folder} has neither a pad token nor an eos token; "
                "name one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, padding_side: str
) -> dict[str, Tensor]:
    """Tokenises texts, adds no special tokens, and pads them to the longest.

    The padding is done here and not by the tokenizer, so the batch is the same under every
    transformers version and the tokenizer keeps its own padding side.

    Args:
        tokenizer: one with a pad token, as `load_tokenizer` returns.
        texts: at least one, each of at least one token.
        padding_side: "left" or "right".

    Returns:
        `input_ids` and `attention_mask`, both int64 `(batch, seqlen)` on the CPU; the mask is 1 at
        tokens and 0 at padding.

    Raises:
        ValueError: another padding side, no texts, a text without tokens, or no pad token.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a sequence of at least one text, got {texts!r}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a pad token, got none; use load_tokenizer")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"texts must hold tokens, got none in texts[{index}]")

    seqlen = max(map(len, rows))
    input_ids = torch.full((len(rows), seqlen), tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        start = seqlen - len(row) if padding_side == "left" else 0
        input_ids[index, start : start + len(row)] = torch.tensor(row)
        attention_mask[index, start : start + len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a LLaMA folder."""
    if not folder.is_dir():
        raise CheckpointError(
            f"model folder {folder} does not exist; give a local folder, padless downloads nothing"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"model folder {folder} has no config.json; give the folder that save_pretrained wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({_one_line(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    if config.get("model_type") != "llama":
        raise CheckpointError(
            f"model_type in {path} must be 'llama', got {config.get('model_type')!r}; "
            "padless knows no other model"
        )
    return config


def _check_config_is_understood(config: dict[str, Any], folder: Path) -> None:
    """Refuses fields that this transformers would ignore, and so compute another model."""
    heads = config.get("num_attention_heads")
    # Field, whether it asks for more than its default, and the first version that reads it. The
    # first three are dropped without a word by older ones; the last is what 5.x saves instead.
    fields = (
        ("num_key_value_heads", config.get("num_key_value_heads") not in (None, heads), "4.31.0"),
        ("rope_scaling", config.get("rope_scaling") is not None, "4.31.0"),
        ("rope_theta", config.get("rope_theta", 10000.0) != 10000.0, "4.33.0"),
        ("rope_parameters", _needs_rope_parameters(config), "5.0.0"),
    )
    for name, is_used, since in fields:
        if is_used and _is_transformers_before(since):
            raise CheckpointError(
                f"config.json in {folder} sets {name} to {config[name]!r}, which transformers "
                f"{package_version('transformers')} ignores; use transformers {since} or later"
            )


def _needs_rope_parameters(config: dict[str, Any]) -> bool:
    """Whether rope_parameters says more than the older fields beside it."""
    rope = config.get("rope_parameters") or {}
    is_theta_new = rope.get("rope_theta", 10000.0) != config.get("rope_theta", 10000.0)
    is_type_new = rope.get("rope_type", "default") != "default" and not config.get("rope_scaling")
    return bool(rope) and (is_theta_new or is_type_new)


def _check_weights_fit(info: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Refuses a model in which transformers filled in random weights of its own."""
    for name, stored, wanted in sorted(info["mismatched_keys"], key=str):
        raise CheckpointError(
            f"config.json in {folder} asks for shape {tuple(wanted)} of {name}, "
            f"got {tuple(stored)} in the weights; take both from one checkpoint"
        )
    # Computed at construction, and a stored buffer only in checkpoints of older transformers.
    absent = {name for name in info["missing_keys"] if not name.endswith("rotary_emb.inv_freq")}
    if config.get("tie_word_embeddings"):
        absent.discard("lm_head.weight")
    if absent:
        raise CheckpointError(
            f"the weights in {folder} lack {len(absent)} tensors of the model, such as "
            f"{min(absent)}, which would be random numbers; use a complete checkpoint"
        )


def _is_transformers_before(version: str) -> bool:
    installed = package_version("transformers")
    return installed is not None and installed < Version(version)


def _one_line(error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 3] + "..."
