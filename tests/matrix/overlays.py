"""The eras of `pins.toml` and, for each, a folder to put before the environment on the path.

An overlay holds one transformers and its pins, without their dependencies: torch and the rest
come from the environment that runs this, so that eighteen versions share one torch.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tomllib
from packaging.specifiers import SpecifierSet

CHECKOUT = Path(__file__).resolve().parents[2]
PINS = Path(__file__).with_name("pins.toml")
ERAS = CHECKOUT / ".eras"
# Names the pins that an overlay was built from; written last.
STAMP = ".pins"


class MatrixError(Exception):
    """What the user asked for does not exist, or an overlay could not be built."""


@dataclass(frozen=True)
class Era:
    """One row of the matrix.

    Attributes:
        letter: short name of the era.
        transformers: the version that stands for it.
        pins: requirements that this version needs beside it.
        peft: version for the LoRA cases; None takes the environment's.
        python: Python versions for which every pin has a wheel.
    """

    letter: str
    transformers: str
    pins: tuple[str, ...]
    peft: str | None = None
    python: str = ""

    @property
    def requirements(self) -> list[str]:
        """What the overlay holds."""
        peft = [f"peft=={self.peft}"] if self.peft else []
        return [f"transformers=={self.transformers}", *self.pins, *peft]

    def runs_on(self, python: str = platform.python_version()) -> bool:
        """Whether every pin has a wheel for this Python."""
        return SpecifierSet(self.python).contains(python, prereleases=True)


def load_eras(path: Path = PINS) -> list[Era]:
    """Read the rows, oldest first."""
    with path.open("rb") as file:
        rows = tomllib.load(file)["era"]
    return [Era(**{**row, "pins": tuple(row["pins"])}) for row in rows]


def select_eras(eras: list[Era], wanted: str, python: str = platform.python_version()) -> list[Era]:
    """Pick rows by a comma-separated list of versions, letters, `oldest`, `newest` or `all`.

    `oldest` and `newest` are the outermost rows that have wheels for this Python.
    """
    known = {name: [era] for era in eras for name in (era.letter, era.transformers)}
    usable = [era for era in eras if era.runs_on(python)]
    known |= {"all": eras, "oldest": usable[:1], "newest": usable[-1:]}
    picked = set()
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        if name not in known:
            names = ", ".join(era.transformers for era in eras)
            raise MatrixError(
                f"no version {name!r} in the matrix; it has all, oldest, newest, {names}"
            )
        picked.update(known[name])
    if not picked:
        raise MatrixError(f"no versions in {wanted!r}")
    return [era for era in eras if era in picked]


def overlay_is_current(era: Era, root: Path = ERAS) -> bool:
    """Whether the overlay of this era is whole and holds today's pins."""
    try:
        return (root / era.transformers / STAMP).read_text("utf-8") == _stamp(era)
    except OSError:
        return False


def build_overlay(era: Era, root: Path = ERAS) -> Path:
    """Return the overlay's folder, built by pip if it is missing or its pins changed.

    Raises:
        MatrixError: pip failed; the message ends with what it said.
    """
    overlay = root / era.transformers
    if overlay_is_current(era, root):
        return overlay
    root.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed when complete: an interrupted build is never taken for a whole one.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as scratch:
        fresh = Path(scratch, "overlay")
        # A source build of an old tokenizers takes a Rust compiler and minutes, then fails.
        flags = ["--no-deps", "--no-compile", "--only-binary", ":all:", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(fresh)]
        done = subprocess.run([*command, *era.requirements], capture_output=True, text=True)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise MatrixError(f"pip could not install {' '.join(era.requirements)}:\n{said}")
        (fresh / STAMP).write_text(_stamp(era), encoding="utf-8")
        shutil.rmtree(overlay, ignore_errors=True)
        fresh.rename(overlay)
    return overlay


def _stamp(era: Era) -> str:
    # The wheels hold binaries: another Python needs another overlay.
    tag = sys.implementation.cache_tag
    return "\n".join([f"{tag} {platform.machine()}", *era.requirements, ""])
