"""Batches of a token budget whose cost is the same on every rank."""

from padless.balance.cost import SequenceCost
from padless.balance.imbalance import Imbalance
from padless.balance.sampler import BalancedBatchSampler

__all__ = ["BalancedBatchSampler", "Imbalance", "SequenceCost"]
