"""Makes docs/performance.md and its plots from the records in benchmarks/results."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results_folder import Json, load
from benchmarks.tables import sections

_ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end: \2 -->)", re.S)


class MarkerError(Exception):
    """A page and the tables do not fit together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and the plots, or checks the page.

    Returns:
        0 if done or the page is as it would be written, 1 if it is not, 2 if it has wrong markers.
    """
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=_ROOT / "benchmarks" / "results")
    options.add_argument("--page", type=Path, default=_ROOT / "docs" / "performance.md")
    options.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    arguments = options.parse_args(argv)
    records = load(arguments.results)
    before = arguments.page.read_text(encoding="utf-8")
    try:
        after = fill(before, records)
    except MarkerError as error:
        print(f"{arguments.page.name}: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        if after != before:
            print(
                f"{arguments.page.name} is not what the records say; "
                f"run `python -m benchmarks.render`",
                file=sys.stderr,
            )
        return int(after != before)
    from benchmarks.plot_headline import draw_headline
    from benchmarks.plots import draw

    draw(records, arguments.page.parent / "img")
    draw_headline(records, arguments.page.parent / "img")
    arguments.page.write_text(after, encoding="utf-8")
    return 0


def fill(page: str, records: Sequence[Json]) -> str:
    """Puts the tables and the plots between the page's markers.

    Args:
        page: its text.
        records: as `results_folder.load` gives them.

    Raises:
        MarkerError: a section has no place on the page, or a place has no section.
    """
    from benchmarks.plot_names import images

    made = sections(records)
    placed = [name for _, name, _ in _MARKED.findall(page)]
    missing, unknown = sorted(set(made) - set(placed)), sorted(set(placed) - set(made))
    if missing or unknown or len(placed) != len(set(placed)):
        raise MarkerError(
            f"needs each marker once; missing: {', '.join(missing) or 'none'}, "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    pictures = images(records)

    def replaced(found: re.Match[str]) -> str:
        name = found[2]
        lines = [f"![{title}](img/{file})\n" for title, file in pictures.get(name, [])]
        body = "\n".join([*lines, made[name]])
        return f"{found[1]}\n{body}\n\n{found[3]}"

    return _MARKED.sub(replaced, page)


if __name__ == "__main__":
    sys.exit(main())
