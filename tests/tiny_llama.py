"""A tiny LLaMA folder with a word tokenizer, for tests that load one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCAB = ["<unk>", "<s>", "</s>", "<pad>", "the", "cat", "sat", "on", "mat"]


def write_llama_folder(path: Path) -> None:
    """Writes a random two-layer LLaMA in one safetensors file, and a word tokenizer."""
    torch.manual_seed(0)
    # Equal head counts: transformers before 4.31 know no others.
    config = transformers.LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(path)
    edit_json(path / "config.json", architectures=["LlamaForCausalLM"])
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("inv_freq")}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path)


def write_tokenizer(path: Path, **config: Any) -> None:
    # A template that prepends <s>, as real LLaMA tokenizers have.
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [bos, a],
        "pair": [bos, a, b],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": template,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate(VOCAB)},
            "unk_token": "<unk>",
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = config or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
