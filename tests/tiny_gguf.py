"""A GGUF LLaMA of a few kilobytes, laid out as llama.cpp lays out real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

HEADS, KV_HEADS, HEAD_DIM, LAYERS, FEED_FORWARD = 4, 2, 8, 2, 48
HIDDEN = HEADS * HEAD_DIM
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def to_gguf_rows(weight: Any, heads: int) -> Any:
    """Reorders the rows of a q or k projection as GGUF has them: pairs side by side."""
    half = weight.shape[0] // heads // 2
    order = [
        head * 2 * half + part * half + pair
        for head in range(heads)
        for pair in range(half)
        for part in range(2)
    ]
    return weight[order]


def write_tiny_gguf(path: Path) -> dict[str, Any]:
    """Writes a two-layer GGUF LLaMA and returns its weights under their transformers names."""
    np, gguf = pytest.importorskip("numpy"), pytest.importorskip("gguf")
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    # The merge "2 2" is there to show that digits stay apart all the same.
    tokens = [*CONTROL, *alphabet, "he", "22"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["h e", "2 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")

    rng = np.random.default_rng(0)
    weights = {}

    def add(gguf_name: str, name: str, *shape: int, heads: int = 0) -> None:
        weight = rng.standard_normal(shape).astype(np.float16)
        weights[name] = weight
        stored = to_gguf_rows(weight, heads) if heads else weight
        writer.add_tensor(gguf_name, stored.astype(np.float32))

    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    kv_size = KV_HEADS * HEAD_DIM
    for i in range(LAYERS):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", HIDDEN)
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", HIDDEN)
        add(f"{block}.attn_q.weight", f"{attn}.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add(f"{block}.attn_k.weight", f"{attn}.k_proj.weight", kv_size, HIDDEN, heads=KV_HEADS)
        add(f"{block}.attn_v.weight", f"{attn}.v_proj.weight", kv_size, HIDDEN)
        add(f"{block}.attn_output.weight", f"{attn}.o_proj.weight", HIDDEN, HIDDEN)
        add(f"{block}.ffn_gate.weight", f"{mlp}.gate_proj.weight", FEED_FORWARD, HIDDEN)
        add(f"{block}.ffn_up.weight", f"{mlp}.up_proj.weight", FEED_FORWARD, HIDDEN)
        add(f"{block}.ffn_down.weight", f"{mlp}.down_proj.weight", HIDDEN, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
