"""A run's record: hardware, versions, what was counted how, and a row for each variant."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Ceilings, Clock, measure_ceilings
from benchmarks.timing import spread
from benchmarks.variant import Timing

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
PACKAGES = (
    "torch", "triton", "transformers", "flash-attn-4", "flash-attn", "liger-kernel", "padless",
)  # fmt: skip
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
        self.hardware = _hardware(arguments.device)
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


def rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """Makes the rows of a table: figures or a reason, and the time over each other row's.

    Args:
        timings: of the variants.
    """
    made = []
    for timing in timings:
        row: dict[str, Any] = {"name": timing.name, "reason": timing.reason}
        if timing.reason is None:
            row.update({f"{key}_ms": spread(found) for key, found in timing.samples.items()})
            row["peak_bytes"] = timing.peak_bytes
            if "again" in timing.samples:
                pairs = zip(
                    timing.samples["forward_backward"], timing.samples["again"], strict=True
                )
                row["first_over_again"] = statistics.median(a / b for a, b in pairs)
        row.update(timing.facts)
        made.append(row)
    times = {row["name"]: headline(row) for row in made}
    for row in made:
        own = times[row["name"]]
        if own is not None:
            row["over"] = {
                name: own / other for name, other in times.items() if other and name != row["name"]
            }
    return made


def headline(row: dict[str, Any]) -> float | None:
    """Reads the milliseconds that a row is compared by: the median of all that it does, or None."""
    measures = ("forward_backward_ms", "forward_ms", "decode_ms")
    found = next((row[measure] for measure in measures if row.get(measure)), None)
    return float(found["median"]) if found else None


def slug(device: str) -> str:
    """Makes a part of a file name of a device's name."""
    plain = re.sub(r"\((r|tm)\)|@.*|\bprocessor\b", " ", device.lower())
    return "-".join(re.findall(r"[a-z0-9]+", plain))


def versions() -> dict[str, str | None]:
    """Reads the versions of everything that takes part."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)
    if found["padless"] is None:
        import padless

        found["padless"] = getattr(padless, "__version__", "from source")
    return found


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


def _hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
    }
    found["device"] = found["cpu"]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found.update(
            device=properties.name,
            gpus=torch.cuda.device_count(),
            memory_bytes=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            driver=_driver(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    return found


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return " ".join(found[1].split()) if found else platform.machine() or "unknown"


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    folder = Path(__file__).parent
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "-C", str(folder), "status", "--porcelain", "-uno")
    return f"{commit}, with changes" if changed else commit


def _output(*command: str) -> str | None:
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
