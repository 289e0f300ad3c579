"""Packages planted on a path for a fresh process: broken in every way that a loader knows."""

from __future__ import annotations

from pathlib import Path

UNDEFINED = "/site/flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"

BODIES = {
    "oserror": f"raise OSError({UNDEFINED!r})",
    "aborts": (
        "import os, sys\n"
        "print('terminate called after throwing c10::Error', file=sys.stderr, flush=True)\n"
        "os.abort()"
    ),
    "segfaults": "import ctypes; ctypes.string_at(0)",
    "exits": "import sys; sys.exit(3)",
    "hangs": "import time; time.sleep(600)",
    # A child of its own keeps the pipe open after its parent has died.
    "leaves_a_child": (
        "import os, pathlib, time\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    time.sleep(600)\n"
        "    os._exit(0)\n"
        "pathlib.Path(__file__).parents[1].joinpath('left').write_text(str(pid))\n"
        "os.abort()"
    ),
    "prints": "print('loading kernels ...', flush=True)\n",
}


def plant(folder: Path, kind: str, package: str = "flash_attn") -> None:
    """Writes a package whose import does what `kind` says, with its metadata."""
    home = folder / package
    home.mkdir(parents=True, exist_ok=True)
    (home / "__init__.py").write_text(BODIES[kind] + "\n")
    (home / "flash_attn_interface.py").write_text("")
    info = folder / f"{package}-2.8.3.dist-info"
    info.mkdir(exist_ok=True)
    name = package.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.8.3\n")
