"""Turns a GGUF file of a LLaMA with a byte-level BPE tokenizer into a transformers model folder.

Owns the names, layouts and forms of the files. Knows neither where the GGUF file comes from nor
where the folder is kept: that is `demo`, the only caller.

The file is read with the `gguf` package and not through transformers: one code path then serves
every transformers version, and the special tokens stay what the file says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from padless.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray

WEIGHTS_NAME = "model.safetensors"
FILE_NAMES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    WEIGHTS_NAME,
)

_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # the GGUF token type of tokens that never come out of plain text


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes the files of `FILE_NAMES` into an existing folder.

    Args:
        gguf_path: a GGUF file of a LLaMA with tied embeddings and a `gpt2` tokenizer that splits
            digits (`tokenizer.ggml.pre` is `smollm`).
        folder: receives float16 weights and the configuration in the form every transformers reads.

    Raises:
        CheckpointError: a package for reading is missing, or the file is damaged.
        OSError: the folder cannot be written.
    """
    try:
        from gguf import GGUFReader
        from safetensors.numpy import save
    except ImportError as error:
        raise CheckpointError(
            f"converting a GGUF file needs the package {error.name}, which is not installed; "
            "run `pip install gguf safetensors`, or name a LLaMA folder with --model DIR"
        ) from error
    try:
        reader = GGUFReader(gguf_path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(meta)
        weights = save(_weights(reader, config), metadata={"format": "pt"})
        tokenizer, special_tokens = _tokenizer(meta), _special_tokens(meta)
    except Exception as error:  # a damaged file surfaces as any of a dozen classes
        raise CheckpointError(
            f"the GGUF file {gguf_path} cannot be read ({type(error).__name__}: {error}); "
            "install or copy it again"
        ) from error

    (folder / WEIGHTS_NAME).write_bytes(weights)
    write_json(folder / "config.json", config)
    token_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", token_ids)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "special_tokens_map.json", special_tokens)
    tokenizer_config = {
        # Not GPT2Tokenizer: transformers 5 rebuilds that class without the digit splitter.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
        **special_tokens,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes readable JSON, in the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    """The classical config.json: transformers 5 reads it, and no 4.x reads the newer form."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "max_position_embeddings": meta["llama.context_length"],
        "hidden_act": "silu",
        # GGUF keeps float32: six digits give back the 1e-05 and 100000.0 that were meant.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(f"{meta['llama.rope.freq_base']:.6g}"),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.041666666666666664,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "float16",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, NDArray[np.float16]]:
    """The tensors under their transformers names; lm_head is the embedding and is left out."""
    import numpy as np
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = ""
        if (name := _TOP_TENSORS.get(tensor.name)) is None:
            _, layer, kind, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.{suffix}"
        if kind in ("attn_q", "attn_k"):
            role = "num_attention_heads" if kind == "attn_q" else "num_key_value_heads"
            # GGUF interleaves the two halves that a rotation pairs; transformers keeps them apart.
            heads, rows = config[role], values.shape[0]
            halves = values.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2)
            values = halves.reshape(values.shape)
        weights[name] = np.ascontiguousarray(values, dtype=np.float16)
    if len(weights) != len(_TOP_TENSORS) + config["num_hidden_layers"] * len(_LAYER_TENSORS):
        raise ValueError(f"the file holds {len(weights)} tensors, which is not a whole model")
    return weights


def _special_tokens(meta: dict[str, Any]) -> dict[str, Any]:
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    tokens = meta["tokenizer.ggml.tokens"]
    return {role: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json: byte-level BPE in which every digit is a token of its own."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags, "special": True}
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            # "a b" and not ["a", "b"]: tokenizers before 0.20 read only the former.
            "merges": meta["tokenizer.ggml.merges"],
        },
    }
