"""`padless.bench(model)`: a step unpatched, patched and by what else there is, timed by turns."""

from padless.benchmark.distributions import DISTRIBUTIONS, read_lengths
from padless.benchmark.peers import DEFAULT_PEERS, PEERS
from padless.benchmark.report import BenchReport, BenchRow
from padless.benchmark.run import bench

__all__ = [
    "DEFAULT_PEERS",
    "DISTRIBUTIONS",
    "PEERS",
    "BenchReport",
    "BenchRow",
    "bench",
    "read_lengths",
]
