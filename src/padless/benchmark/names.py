"""Names of rows that records, tables and plots share."""

from __future__ import annotations

import re

PADLESS = "padless"
UNPATCHED = "unpatched"


def with_liger(name: str) -> str:
    """Makes the name of a row's twin with Liger-Kernel."""
    return f"{name} + Liger"


def slug(device: str) -> str:
    """Makes a part of a file name of a device's name."""
    plain = re.sub(r"\((r|tm)\)|@.*|\bprocessor\b", " ", device.lower())
    return "-".join(re.findall(r"[a-z0-9]+", plain))
