"""Checkpoints of patched models under engines: they load where there is no padless."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golden.models import build_model
from parallel.checkpoint_cases import WAYS
from parallel.group import Groups

# Loads every checkpoint of a folder with padless refused, and keeps the weights.
CHILD = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "padless":
            raise ImportError("padless is refused")

sys.meta_path.insert(0, Refuse())
import torch
import torch.distributed.checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM

root = Path(sys.argv[1])
for folder in sorted(each for each in root.iterdir() if each.is_dir()):
    if (folder / "model.pt").exists():
        model = torch.load(folder / "model.pt", weights_only=False)
    elif (folder / "config.json").exists():
        model = LlamaForCausalLM.from_pretrained(folder)
    else:
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(root / "config.json"))
        weights = model.state_dict()
        dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
        model.load_state_dict(weights)
    model(input_ids=torch.arange(3, 9)[None], attention_mask=torch.ones(1, 6))
    torch.save(model.state_dict(), root / f"{folder.name}.weights")
"""


@pytest.fixture(scope="module")
def loaded(groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each checkpoint, what a process without padless read of it, and the truth."""
    root = tmp_path_factory.mktemp("checkpoints")
    build_model().config.to_json_file(root / "config.json")
    for way in WAYS:
        options = {"way": way, "folder": str(root / way)}
        weights = groups[2].run("parallel.checkpoint_cases", "save", **options)
        torch.save(weights[0], root / f"{way}.truth")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("way", WAYS)
def test_checkpoint_loads_without_padless(loaded: Path, way: str) -> None:
    want, got = (torch.load(loaded / f"{way}.{kind}") for kind in ("truth", "weights"))
    before = build_model().state_dict()
    assert got.keys() == want.keys() == before.keys()
    for name, weight in want.items():
        assert torch.equal(got[name], weight), name
        assert not torch.equal(weight, before[name]), f"{name} was not trained"
    for file in (loaded / way).rglob("*"):
        # A pickled module has the names of our attributes, with nothing in them.
        if file.is_file() and file.name != "model.pt":
            assert b"padless" not in file.read_bytes(), file
