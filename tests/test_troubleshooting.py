"""docs/troubleshooting.md quotes messages as the source has them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import padless

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
SOURCE = Path(padless.__file__).parent
# Stands in a text of the source for what an f-string puts in.
_HOLE = "\0"


def _texts(source: str) -> list[str]:
    """Finds all texts of a module, pieces side by side joined as Python joins them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%[sd]", _HOLE, node.value))
        elif isinstance(node, ast.JoinedStr):
            pieces = [
                part.value if isinstance(part, ast.Constant) else _HOLE for part in node.values
            ]
            found.append("".join(map(str, pieces)))
    return found


def _is_quoted_from(message: str, texts: list[str]) -> bool:
    """Whether a text of the source has the message, whose `...` stand for what differs."""
    # Nowhere else: what `...` stands for has to hold something that the source puts in, or to be
    # the message's beginning or end.
    first, *rest = message.split("...")
    pattern = re.escape(first)
    for number, part in enumerate(rest, 1):
        is_end = number == len(rest) and not part
        is_beginning = number == 1 and not first
        pattern += ".*" if is_end or is_beginning else f"[^{_HOLE}]*{_HOLE}.*"
        pattern += re.escape(part)
    return any(re.search(pattern, text, re.S) for text in texts)


TEXTS = [text for file in SOURCE.rglob("*.py") for text in _texts(file.read_text("utf-8"))]
PAGE_TEXT = PAGE.read_text(encoding="utf-8")
OURS = PAGE_TEXT.split("## Messages of padless")[1].split("## Messages of other")[0]
MESSAGES = re.findall(r"^### `(.*)`$", OURS, re.M)


def test_the_page_quotes_messages() -> None:
    assert len(MESSAGES) >= 12
    assert OURS.count("\n### ") == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert _is_quoted_from(message, TEXTS), message


@pytest.mark.parametrize(
    "message",
    [
        "model must hold a llama (transformers' LlamaModel), got ... without one",
        "the patch must serve every layer",
        "... is passed over at head_dim ... instead of ...",
    ],
)
def test_a_message_that_has_changed_is_found_out(message: str) -> None:
    assert not _is_quoted_from(message, TEXTS)


def test_every_name_of_padless_on_the_page_exists() -> None:
    names = set(re.findall(r"padless\.(\w+)\b(?!\.md)", PAGE_TEXT)) - {"md"}
    assert {"patch", "patch_llama", "Diagnosis"} <= names
    for name in names:
        assert hasattr(padless, name), name


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE_TEXT):
        name, _, anchor = target.partition("#")
        page = PAGE.parent / name if name else PAGE
        assert page.exists(), target
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
        assert not anchor or anchor in anchors, target


def test_every_entry_says_what_to_do() -> None:
    for part in PAGE_TEXT.split("## Symptoms")[0].split("\n### ")[1:]:
        assert "*What to do.*" in part, part.splitlines()[0]
