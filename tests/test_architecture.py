"""What DESIGN.md and CONTRIBUTING.md promise of the source: its rooms, arrows and sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SOURCE = CHECKOUT / "src" / "padless"
DESIGN = (CHECKOUT / "DESIGN.md").read_text(encoding="utf-8")
ROOMS = DESIGN.split("## Rooms")[1].split("\n## ")[0]
MODULES = sorted(path for path in SOURCE.rglob("*.py"))
# What the child process of `doctor` answers by.
SPEAKS = {SOURCE / "diagnosis" / "child.py"}


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def _arrows() -> dict[str, int]:
    """Numbers the rooms by the sentence that puts them in order."""
    sentence = re.search(r"Arrows point one way: ([^.]*)\.", ROOMS)
    assert sentence is not None
    stages = sentence[1].split("<-")
    return {room.strip(): number for number, s in enumerate(stages) for room in s.split(",")}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _upwards(room: str, imported: str) -> bool:
    """Whether a module of one room must not import another."""
    arrows = _arrows()
    parts = imported.split(".")
    if parts[0] != "padless" or len(parts) == 1 or room not in arrows:
        return False
    return arrows.get(parts[1], -1) > arrows[room]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    room = _room(path)
    assert not [name for name in _imports(path) if _upwards(room, name)]
    if room in _arrows() and _arrows()[room] < _arrows()["hf"]:
        assert not [name for name in _imports(path) if name.split(".")[0] == "transformers"]
    if room != "cli" and path not in SPEAKS:
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert not [call for call in calls if getattr(call.func, "id", "") == "print"]


def test_arrows_are_read_and_an_import_against_them_is_seen() -> None:
    arrows = _arrows()
    assert len(arrows) > 20 and arrows["errors"] == 0 and arrows["cli"] == max(arrows.values())
    assert _upwards("hf", "padless.llama.engage") and not _upwards("llama", "padless.hf.call")


def test_every_room_is_in_the_plan_and_the_plan_names_no_other() -> None:
    # `name.py` and `name/` of the list of rooms, and what stands by its room.
    named = set(re.findall(r"([\w/]+\.py)\b", ROOMS)) | set(re.findall(r"(\w+/)", ROOMS))
    for path in SOURCE.iterdir():
        if path.name.startswith("__") and path.name != "__init__.py":
            continue
        if path.is_dir() or path.suffix == ".py":
            assert path.name + "/" * path.is_dir() in named, path.name
    known = {path.name for path in (CHECKOUT / "src").rglob("*.py")}
    known |= {path.name for path in (CHECKOUT / "benchmarks").glob("*.py")}
    assert {Path(name).name for name in named if name.endswith(".py")} <= known


@pytest.mark.parametrize(
    "room", ["balance", "generation", "hf", "lengths", "llama", "parallel", "unpadded"]
)
def test_rooms_whose_files_are_listed_list_them_all(room: str) -> None:
    entry = re.search(rf"^      {room}/ .*?(?=^      \w|^    \w)", ROOMS, re.S | re.M)
    assert entry is not None
    for path in (SOURCE / room).glob("[!_]*.py"):
        assert path.name in entry[0], path.name
