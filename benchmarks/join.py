"""Puts records of one script into one: of each case the newest table, which says where it is from.

python -m benchmarks.join OLDER.json NEWER.json --out JOINED.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results_folder import Json

# What has to be the same for tables to stand in one record.
_SAME = ("format", "name", "smoke", "versions")
_ORIGIN = ("command", "date", "commit", "ceilings")


class JoinError(Exception):
    """Records do not belong together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the joined record.

    Returns:
        0 if done, 2 if the records do not belong together.
    """
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("records", type=Path, nargs="+", help="from the oldest to the newest")
    options.add_argument("--out", type=Path, required=True, help="may be one of them")
    options.add_argument("--without", help="a case that is to be measured again, and left out")
    arguments = options.parse_args(argv)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.records]
    try:
        joined = join(records, without=arguments.without)
    except JoinError as error:
        print(error, file=sys.stderr)
        return 2
    arguments.out.write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    return 0


def join(records: Sequence[Json], *, without: str | None = None) -> Json:
    """Joins records.

    Args:
        records: from the oldest to the newest.
        without: a case to leave out.

    Returns:
        The newest one with the tables of all: in the order of their first appearance, each as new
        as there is one. A table of an older record has its origin under "measured".

    Raises:
        JoinError: they are of several scripts, devices or versions.
    """
    newest = records[-1]
    for record in records:
        for key in _SAME:
            if record[key] != newest[key]:
                raise JoinError(f"records must have the same {key}; measure again what is older")
        if record["hardware"]["device"] != newest["hardware"]["device"]:
            raise JoinError("records must be of the same device; keep one file for each")
    tables: dict[str, Json] = {}
    for record in records:
        origin = {} if record is newest else {"measured": {key: record[key] for key in _ORIGIN}}
        for table in record["tables"]:
            # One that was joined before has its origin already.
            tables[table["case"]] = {**origin, **table}
    if without is not None and tables.pop(without, None) is None:
        raise JoinError(f"--without must be one of {', '.join(tables)}, got {without}")
    return {**newest, "tables": list(tables.values())}


if __name__ == "__main__":
    sys.exit(main())
