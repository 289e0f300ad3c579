"""Small LLaMAs that can show a fault, the batches they run on, and how their outputs are judged.

Weights have a standard deviation of 0.2, which makes attention far from uniform, and there are
fewer KV heads than heads: with near-zero weights and equal heads a swapped GQA group or a softmax
scale off by 2 % would pass unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from golden import oracle
from padless.llama.engage import engage
from padless.llama.handle import Handle

VERSION = Version(transformers.__version__)
HAS_GQA = Version("4.31") <= VERSION
VOCAB, LAYERS, HEAD_DIM, SEQLEN = 96, 2, 16, 13
PATHS = ("sdpa", "flash")
HEADS = {"mha": 4, "gqa": 2}
PADDINGS = ("none", "right", "left", "mixed")


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skips before the version that brought a feature."""
    return pytest.mark.skipif(Version(version) > VERSION, reason=f"{what} came with {version}")


def until(version: str, what: str) -> pytest.MarkDecorator:
    """Skips from the version on that dropped a feature."""
    return pytest.mark.skipif(Version(version) <= VERSION, reason=f"{what} ended with {version}")


def build_model(heads: str | None = None, *, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Builds a small model with fixed weights, the same in every transformers version.

    Grouped KV heads unless "mha" is asked for or the version has none.
    """
    heads = heads or ("gqa" if HAS_GQA else "mha")
    if heads == "gqa" and not HAS_GQA:
        pytest.skip("grouped KV heads came with 4.31")
    if HAS_GQA:
        config.setdefault("num_key_value_heads", HEADS[heads])
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    # Drawn by name rather than by the version's own initialisation, which differs.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator) * 0.2
            weight.copy_(1.0 + drawn if "norm" in name else drawn)
    return model


def batch(padding: str, *, seed: int = 1, seqlen: int = SEQLEN) -> tuple[Tensor, Tensor]:
    """Draws ids and a bool mask, `(3, seqlen)` each; one row is real from end to end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, seqlen), generator=generator)
    real = torch.ones(3, seqlen, dtype=torch.bool)
    if padding == "right":
        real[1, -4:] = real[2, 3:] = False
    elif padding == "left":
        real[1, :4] = real[2, :-3] = False
    elif padding == "mixed":
        real[0, -2:] = real[1, :5] = real[2, :2] = real[2, -3:] = False
    return ids.masked_fill(~real, 0), real


@contextlib.contextmanager
def patched(path: str) -> Iterator[Handle]:
    """Engages a path and checks on leaving that every layer of the body went through it."""
    with engage(path) as handle:  # type: ignore[arg-type]
        yield handle
        report = handle.report()
        assert report.layers, "no attention layer went through padless"
        assert not any(layer.stock for layer in report.layers), report.layers


def truth_logits(model: LlamaForCausalLM, ids: Tensor, real: Tensor, **options: Any) -> Tensor:
    """Computes the model's logits in float64 by the oracle."""
    weights = {k: w.detach().double() for k, w in model.state_dict().items() if w.dim()}
    return oracle_logits(model, weights, ids, real, **options)


def oracle_logits(
    model: LlamaForCausalLM, weights: dict[str, Tensor], ids: Tensor, real: Tensor, **options: Any
) -> Tensor:
    """Computes logits by the oracle from the given float64 weights."""
    return oracle.logits(
        weights,
        ids,
        real,
        head_dim=HEAD_DIM,
        num_layers=model.config.num_hidden_layers,
        eps=model.config.rms_norm_eps,
        **options,
    )


def judge(name: str, got: Tensor, stock: Tensor, truth: Tensor) -> None:
    """Asserts that the patched error is the stock model's own, up to the order of operations.

    RMS at most twice the stock model's against float64, the largest error at most three times,
    each plus a floor of a few roundings.
    """
    got, stock = got.detach().double(), stock.detach().double()
    assert torch.isfinite(got).all(), f"{name}: not finite"
    eps = torch.finfo(torch.float32).eps
    error, baseline = got - truth, stock - truth
    for kind, factor, measure in (
        ("RMS", 2.0, lambda x: x.pow(2).mean().sqrt().item()),
        ("max", 3.0, lambda x: x.abs().max().item()),
    ):
        budget = factor * measure(baseline) + 4 * eps * measure(truth)
        assert measure(error) <= budget, (
            f"{name}: {kind} error {measure(error):.3g} over budget {budget:.3g} "
            f"(stock {measure(baseline):.3g}), worst at {int(error.abs().argmax())}"
        )


def run_logits(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Runs the model and returns its logits."""
    logits: Tensor = model(ids, attention_mask=mask, return_dict=True, **options).logits
    return logits


def both(path: str, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Runs unpatched and patched."""
    stock = run()
    with patched(path):
        return stock, run()
