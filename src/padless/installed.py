"""What is installed: versions, importable packages, the user's cache. Does without torch.

So that a broken torch can be reported; all else that a process can run is in `environment`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from packaging.version import InvalidVersion, Version


def package_version(distribution: str) -> Version | None:
    """Reads the version of an installed distribution; None if it is not installed."""
    try:
        return Version(importlib.metadata.version(distribution))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def import_optional(module: str) -> tuple[ModuleType | None, str]:
    """Imports a package that may be missing or broken.

    Returns:
        The module and an empty string, or None and the reason in one line. A compiled extension
        built for another torch raises OSError or ImportError on loading, some builds anything else:
        each is a reason here and never an error of the caller.
    """
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        # Not BaseException: Ctrl-C during a slow import must still end the program.
        lines = str(error).splitlines() or [""]
        return None, f"import {module} failed: {type(error).__name__}: {lines[0]}"


def is_found(module: str) -> bool:
    """Whether a module is on the path; imports nothing, also not the packages that it is in."""
    package, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
        if not parts or spec is None:
            return spec is not None
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        for part in parts[:-1]:
            folders = [folder / part for folder in folders if (folder / part).is_dir()]
        finder = importlib.machinery.PathFinder
        return finder.find_spec(module, [str(folder) for folder in folders]) is not None
    except (ImportError, ValueError):
        return False


def cache_folder() -> Path:
    """Finds where padless keeps files between runs: `$PADLESS_CACHE`, else the user's cache."""
    if own := os.environ.get("PADLESS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "padless"


def nvidia_driver(limit_s: float = 20.0) -> tuple[str | None, tuple[str, ...]]:
    """Asks the NVIDIA driver itself, which also sees GPUs that torch cannot use.

    Args:
        limit_s: how long it may take, in seconds.

    Returns:
        Its version and the names of its GPUs; None and nothing where there is none, or no answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, ()
    query = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=limit_s)
    except (OSError, subprocess.SubprocessError):
        return None, ()
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        return None, ()
    return rows[0][0], tuple(name.strip() for _, name in rows)
