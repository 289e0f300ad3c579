"""`padless.checkpoint`: what it loads, and one sentence for everything that it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from padless.checkpoint import encode_batch, load_llama, load_tokenizer  # noqa: E402
from padless.errors import CheckpointError, PadlessError  # noqa: E402
from tiny_llama import edit_json, write_llama_folder, write_tokenizer  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    write_llama_folder(path)
    return path


def drop_weights(path: Path, *, part: str) -> None:
    weights = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_llama_gives_the_stored_weights_in_eval_mode(folder, dtype):
    model = load_llama(folder, dtype=dtype, device="cpu")

    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    loaded = model.state_dict()
    for name, stored in load_file(folder / "model.safetensors").items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], stored.to(dtype)), name


@pytest.mark.parametrize("form", ["pytorch_model.bin", "sharded"])
def test_load_llama_reads_other_forms_of_weights(folder, form):
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "sharded":
        shards, names = {}, sorted(stored)
        for index, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-0000{index}-of-00002.safetensors"
            save_file({n: stored[n] for n in part}, folder / shard, metadata={"format": "pt"})
            shards.update(dict.fromkeys(part, shard))
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    else:
        torch.save(stored, folder / form)

    loaded = load_llama(folder, dtype=torch.float32).state_dict()

    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_load_llama_accepts_tied_embeddings_stored_once(folder):
    drop_weights(folder, part="lm_head")
    edit_json(folder / "config.json", tie_word_embeddings=True)

    model = load_llama(folder, dtype=torch.float32)

    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_load_llama_refuses_missing_attention_weights(folder):
    drop_weights(folder, part="layers.1.self_attn.q_proj")
    with pytest.raises(CheckpointError, match=r"lack 1 tensors .* model\.layers\.1\.self_attn\.q_"):
        load_llama(folder, dtype=torch.float32)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.31.0"),
    reason="transformers before 4.31 do not report a missing lm_head",
)
def test_load_llama_refuses_a_missing_untied_head(folder):
    drop_weights(folder, part="lm_head")
    with pytest.raises(CheckpointError, match=r"such as lm_head\.weight, which would be random"):
        load_llama(folder, dtype=torch.float32)


def test_load_llama_refuses_weights_of_another_shape(folder):
    edit_json(folder / "config.json", intermediate_size=64)
    # Ours from transformers 5.0 on, where the loader's own names no tensor; the loader's before.
    ours = r"asks for shape \(32, 64\) of \S*down_proj\.weight, got \(32, 48\) in the weights"
    theirs = r"does not load \(RuntimeError: .*size mismatch for"
    is_ours = Version(transformers.__version__) >= Version("5.0.0")
    with pytest.raises(CheckpointError, match=ours if is_ours else theirs):
        load_llama(folder, dtype=torch.float32)


def test_load_llama_says_what_the_loader_said_of_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(
        CheckpointError, match=r"does not load \(SafetensorError: .*; check"
    ) as info:
        load_llama(folder, dtype=torch.float32)

    assert "\n" not in str(info.value)
    assert info.value.__cause__ is not None


@pytest.mark.parametrize("load", [lambda f: load_llama(f, dtype=torch.float32), load_tokenizer])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, r"model folder .*model does not exist; give a local folder"),
        ("", r"config\.json is not valid JSON \(JSONDecodeError: "),
        ("{", r"config\.json is not valid JSON \(JSONDecodeError: "),
        ("[]", r"config\.json must hold a JSON object, got list"),
        ("{}", r"model_type in .* must be 'llama', got None"),
        ('{"model_type": "gpt2"}', r"model_type in .* must be 'llama', got 'gpt2'"),
    ],
    ids=["no folder", "empty", "cut off", "list", "no type", "gpt2"],
)
def test_loaders_refuse_a_bad_config(tmp_path, load, damage, message):
    path = tmp_path / "model"
    if damage is not None:
        path.mkdir()
        (path / "config.json").write_text(damage)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_load_llama_refuses_a_folder_without_config_or_weights(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the folder that"):
        load_llama(tmp_path, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; it needs one of model\.safe"):
        load_llama(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("4.30.2", {"num_key_value_heads": 2}),
        ("4.30.2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("4.32.1", {"rope_theta": 500000.0}),
        ("4.57.6", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("4.57.6", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_load_llama_refuses_a_config_that_transformers_would_ignore(
    folder, monkeypatch, version, fields
):
    plain = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0}
    edit_json(folder / "config.json", **{**plain, **fields})
    monkeypatch.setattr("padless.checkpoint.package_version", lambda name: Version(version))
    with pytest.raises(CheckpointError, match=rf"sets {next(iter(fields))} to .*{version} ignores"):
        load_llama(folder, dtype=torch.float32)


def test_checkpoint_errors_are_padless_and_runtime_errors():
    assert issubclass(CheckpointError, PadlessError)
    assert issubclass(CheckpointError, RuntimeError)


def test_load_tokenizer_keeps_the_pad_token_it_finds(folder):
    assert load_tokenizer(folder).pad_token == "<pad>"


def test_load_tokenizer_falls_back_to_eos_for_padding(folder):
    write_tokenizer(folder, bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 2)


def test_load_tokenizer_refuses_one_without_pad_and_eos(folder):
    write_tokenizer(folder, bos_token="<s>")
    with pytest.raises(CheckpointError, match="has neither a pad token nor an eos token; name one"):
        load_tokenizer(folder)


def test_load_tokenizer_refuses_a_missing_or_damaged_one(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* does not load \(\w+: "):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer; it needs one of tokenizer\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("side", "input_ids", "attention_mask"),
    [
        ("left", [[3, 3, 4, 5], [4, 5, 6, 7], [3, 3, 3, 8]], ["0011", "1111", "0001"]),
        ("right", [[4, 5, 3, 3], [4, 5, 6, 7], [8, 3, 3, 3]], ["1100", "1111", "1000"]),
    ],
)
def test_encode_batch_pads_the_named_side_and_adds_no_bos(folder, side, input_ids, attention_mask):
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left" if side == "right" else "right"
    assert tokenizer("the cat")["input_ids"] == [1, 4, 5]  # it would add <s> by itself

    batch = encode_batch(tokenizer, ["the cat", "the cat sat on", "mat"], padding_side=side)

    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].tolist() == input_ids
    assert batch["attention_mask"].tolist() == [[int(bit) for bit in row] for row in attention_mask]


@pytest.mark.parametrize(
    ("texts", "side", "message"),
    [
        (["the"], "both", "padding_side must be 'left' or 'right', got 'both'"),
        ([], "left", r"texts must be a sequence of at least one text, got \[\]"),
        ("the", "left", "texts must be a sequence of at least one text, got 'the'"),
        (["the", ""], "left", r"texts must hold tokens, got none in texts\[1\]"),
    ],
)
def test_encode_batch_refuses_bad_arguments(folder, texts, side, message):
    with pytest.raises(ValueError, match=message):
        encode_batch(load_tokenizer(folder), texts, padding_side=side)


def test_encode_batch_refuses_a_tokenizer_without_pad_token(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a pad token, got none"):
        encode_batch(tokenizer, ["the"], padding_side="left")


@pytest.mark.parametrize("module", ["checkpoint", "demo", "gguf_folder"])
def test_import_leaves_transformers_alone(module):
    code = f"import sys, padless.{module}; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
