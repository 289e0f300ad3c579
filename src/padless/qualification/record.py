"""Verdicts on disk: one small JSON file for each kind of device, versions included.

Nothing here raises: without a file, or with one that cannot be used, backends are measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import secrets
from pathlib import Path
from typing import Any

import torch

import padless
from padless.environment import cache_folder
from padless.qualification.probe import PROBE_VERSION

_logger = logging.getLogger("padless")

# What a verdict is remembered as, by the name of its family.
Records = dict[str, dict[str, Any]]


@functools.cache
def describe_machine(device: torch.device) -> str:
    """Describes a device and all that computes on it, as JSON; verdicts hold for these alone."""
    described = {
        "padless": padless.__version__,
        "probes": PROBE_VERSION,
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["device"] = properties.name
        described["capability"] = f"{properties.major}.{properties.minor}"
        described["runtime"] = torch.version.cuda or torch.version.hip
        described["driver"] = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    else:
        described["device"] = f"{device.type} {platform.machine()}"
        cpu = getattr(torch.backends, "cpu", None)
        described["capability"] = cpu.get_cpu_capability() if cpu else None
    return json.dumps(described, sort_keys=True)


def read_records(machine: str) -> Records:
    """Reads what earlier processes measured; nothing if `PADLESS_REQUALIFY` is set to 1.

    Args:
        machine: from `describe_machine`.
    """
    if os.environ.get("PADLESS_REQUALIFY", "0") not in ("", "0"):
        return {}
    return _read(machine)


def write_record(machine: str, family: str, record: dict[str, Any]) -> None:
    """Adds a verdict to the file, which is never seen half written.

    Args:
        machine: from `describe_machine`.
        family: name of what was measured.
        record: JSON values.
    """
    # Read again, for what other processes have added. Two that write at once may lose one of
    # theirs, which is then measured again.
    records = {**_read(machine), family: record}
    text = json.dumps({"machine": json.loads(machine), "verdicts": records}, indent=1)
    try:
        path = _path(machine)
        work = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.write_text(text + "\n", encoding="utf-8")
            os.replace(work, path)
        finally:
            work.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        _say_once(f"verdicts on backends cannot be kept ({error}); each process measures anew")


def _read(machine: str) -> Records:
    try:
        content = json.loads(_path(machine).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        _say_once(f"verdicts on backends cannot be read ({error}); they are measured anew")
        return {}
    # Of another machine if two of them share a folder and a hash, or somebody edits the file.
    if not isinstance(content, dict) or content.get("machine") != json.loads(machine):
        _say_once(f"{_path(machine).name} is not of this machine; backends are measured anew")
        return {}
    records = content.get("verdicts")
    if not isinstance(records, dict):
        return {}
    return {family: record for family, record in records.items() if isinstance(record, dict)}


def _path(machine: str) -> Path:
    # Path.expanduser raises RuntimeError where there is no home.
    key = hashlib.sha256(machine.encode()).hexdigest()[:12]
    return cache_folder() / f"qualification-{key}.json"


@functools.cache
def _say_once(message: str) -> None:
    _logger.debug("%s", message)
