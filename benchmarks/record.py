"""A run's record: hardware, versions, what was counted how, and a row for each variant."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from padless.benchmark.clock import Ceilings, Clock, measure_ceilings
from padless.benchmark.names import slug
from padless.benchmark.rows import rows
from padless.benchmark.variant import Timing
from padless.environment import hardware, versions

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
COUNTING = (
    "FLOPs: 2 m n k for a matrix product forward and twice that backward; causal attention half of "
    "4 seqlen^2 num_heads head_dim forward and 2.5 times that backward; nothing else. Bytes: each "
    "input read once, each output written once. Peak memory: tensors alive at the highest point "
    "of a turn, weights and gradients included. Times: medians, by turns in one process, caches "
    "overwritten in between."
)
_logger = logging.getLogger("benchmarks")


def parser(description: str | None, *, seconds: float) -> argparse.ArgumentParser:
    """Makes a parser with the options that all scripts share.

    Args:
        description: what the script measures.
        seconds: default of its measuring time in all, without building and warming up.
    """
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    options.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs")
    options.add_argument("--seconds", type=float, default=seconds, help="measuring time in all")
    options.add_argument("--seed", type=int, default=0, help="of lengths, weights and tokens")
    options.add_argument("--commit", help="of this checkout, where there is no git")
    return options


class Record:
    """Collects the tables of one run and writes them.

    Args:
        name: of the script.
        arguments: of the command line, as `parser` gives them.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        if arguments.device is None:
            arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = name
        self.smoke: bool = arguments.smoke
        self.out: Path = arguments.out
        self.clock = Clock(arguments.device)
        self.hardware = hardware(arguments.device)
        self.ceilings: Ceilings = measure_ceilings(self.clock, smoke=self.smoke)
        torch.manual_seed(arguments.seed)
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "command": _command(name),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "commit": arguments.commit or _commit(),
            "smoke": self.smoke,
            "seed": arguments.seed,
            "hardware": self.hardware,
            "versions": versions(),
            "counting": COUNTING,
            "ceilings": self.ceilings._asdict(),
            "tables": [],
        }

    def add(
        self,
        case: str,
        timings: list[Timing],
        *,
        flops: float | None = None,
        forward_flops: float | None = None,
        forward_bytes: float | None = None,
        tokens_real: int | None = None,
        tokens_padded: int | None = None,
        **facts: Any,
    ) -> None:
        """Adds a table, and writes the record as far as it is.

        Args:
            case: what was computed, as a short name.
            timings: a row for each.
            flops: of forward and backward, by the counting rule; they give the table's floor.
            forward_flops: of forward alone.
            forward_bytes: that forward moves, by the counting rule.
            tokens_real: of a batch.
            tokens_padded: of a batch, padding included.
            facts: shapes and dtypes.
        """
        table: dict[str, Any] = {
            "case": case,
            "tokens_real": tokens_real,
            "tokens_padded": tokens_padded,
            **facts,
            "flops": flops,
            "forward_flops": forward_flops,
            "forward_bytes": forward_bytes,
            "rows": rows(timings),
        }
        rates = (
            ("tflops", "forward_backward_ms", flops, 1e9),
            ("forward_tflops", "forward_ms", forward_flops, 1e9),
            ("forward_gb_s", "forward_ms", forward_bytes, 1e6),
        )
        for row in table["rows"]:
            for rate, measure, amount, unit in rates:
                if amount is not None and measure in row:
                    row[rate] = amount / row[measure]["median"] / unit
        if flops is not None:
            table["floor_ms"] = flops / self.ceilings.matmul_tflops / 1e9
        self.content["tables"].append(table)
        self.write()
        _logger.info("%s\n%s", case, _listing(table))

    def write(self) -> Path:
        """Writes the record, named by the script and the device."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}-{slug(self.hardware['device'])}.json"
        path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        return path


def _command(name: str) -> str:
    """Makes the command that repeats this run; where its record went is nobody's concern."""
    given = iter(sys.argv[1:])
    kept: list[str] = []
    for argument in given:
        if argument in ("--out", "--commit"):
            next(given, None)
        elif not argument.startswith(("--out=", "--commit=")):
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{name}", *kept])


def _commit() -> str | None:
    folder = Path(__file__).parent
    commit = _first_line_of("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = commit and _first_line_of("git", "-C", str(folder), "status", "--porcelain", "-uno")
    return f"{commit}, with changes" if changed else commit


def _first_line_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _listing(table: dict[str, Any]) -> str:
    lines = []
    for row in table["rows"]:
        if row["reason"] is not None:
            lines.append(f"  {row['name']:52} -  {row['reason']}")
            continue
        times = "  ".join(
            f"{key.removesuffix('_ms')} {found['median']:.2f}"
            for key, found in row.items()
            if key.endswith("_ms")
        )
        peak = row.get("peak_bytes")
        memory = f"  {peak / 2**30:.1f} GiB" if peak else ""
        counts = "  ".join(f"{key} {found}" for key, found in row.items() if type(found) is int)
        lines.append(f"  {row['name']:52} {times or counts}{memory}")
    return "\n".join(lines)
