"""Groups of processes that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parallel.group import Groups, running


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    yield from running()
