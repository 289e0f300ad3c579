"""Faults planted in the patched forward: the checks of this suite turn red on every one.

Hugging Face's own LLaMA suite, with near-zero weights and as many KV heads as heads, passes with
KV heads swapped and with a softmax scale off by 2 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from golden.models import HAS_GQA, PATHS, VOCAB, batch, build_model, judge, run_logits, truth_logits
from padless.errors import EngagementError
from padless.hf.attention import Projected
from padless.hf.masks import LayerMask
from padless.llama import attend, paths
from padless.llama import engage as engage_module
from padless.llama.engage import engage
from padless.verification import perturbation_probe

pytestmark = pytest.mark.case("mutants")


def _with_mask(p: Projected, raw: Tensor | None, *, is_causal: bool = True) -> Projected:
    batch_size, num_heads, seqlen_q, seqlen_k = p.mask.shape
    mask = LayerMask(
        raw,
        batch=batch_size,
        num_heads=num_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        is_causal=is_causal,
        cache_position=None,
        is_aligned=True,
        device=p.q.device,
    )
    return dataclasses.replace(p, mask=mask)


def _visible(p: Projected) -> Tensor:
    dense = p.mask.dense()
    assert dense is not None
    visible = dense if dense.dtype == torch.bool else dense > -1.0
    return visible.expand(p.q.shape[0], 1, *dense.shape[2:])


def _shift_causal(p: Projected) -> Projected:
    seqlen = p.q.shape[2]
    further = torch.ones(seqlen, seqlen, dtype=torch.bool).tril(1)
    real = _visible(p)[:, :, -1:]
    return _with_mask(p, further & real)


def _drop_last(p: Projected) -> Projected:
    # Each query loses its own key, but the first, which would be left with none.
    visible = _visible(p).clone()
    own = torch.eye(p.q.shape[2], dtype=torch.bool)
    own[0, 0] = False
    return _with_mask(p, visible & ~own)


MUTANTS: dict[str, Callable[[Projected], Projected]] = {
    "scale off by 2 %": lambda p: dataclasses.replace(p, softmax_scale=p.softmax_scale * 1.02),
    "scale off by 1 %": lambda p: dataclasses.replace(p, softmax_scale=p.softmax_scale * 0.99),
    "KV heads swapped": lambda p: dataclasses.replace(p, k=p.k.flip(1), v=p.v.flip(1)),
    "V heads swapped": lambda p: dataclasses.replace(p, v=p.v.flip(1)),
    "KV heads tiled": lambda p: dataclasses.replace(
        p,
        k=p.k.repeat(1, p.q.shape[1] // p.k.shape[1], 1, 1),
        v=p.v.repeat(1, p.q.shape[1] // p.v.shape[1], 1, 1),
    ),
    "mask dropped": lambda p: _with_mask(p, None),
    "causality lost": lambda p: _with_mask(p, _visible(p)[:, 0, -1], is_causal=False),
    "causality off by one": _shift_causal,
    "own token dropped": _drop_last,
    "padding on the other side": lambda p: _with_mask(p, _visible(p)[:, 0, -1].flip(1)),
    "q off by one position": lambda p: dataclasses.replace(p, q=p.q.roll(1, dims=2)),
}


def _check(path: str, mode: str) -> None:
    """Runs the suite's own checks on a left- and a right-padded batch."""
    model = build_model().train(mode == "train")
    for padding in ("left", "right"):
        ids, real = batch(padding)

        def run(changed: Tensor, real: Tensor = real) -> Tensor:
            return run_logits(model, changed, real.long(), use_cache=False)

        stock = run(ids)[real]
        with engage(path):  # type: ignore[arg-type]
            judge(padding, run(ids)[real], stock, truth_logits(model, ids, real)[real])
            result = perturbation_probe(run, ids, real, vocab_size=VOCAB)
        assert result.passed, str(result)


def _plant(monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Projected], Projected]) -> None:
    for name in ("attend_flash", "attend_2"):
        sound = getattr(attend, name)
        monkeypatch.setattr(
            paths,
            name,
            lambda module, call, p, sound=sound: sound(module, call, mutate(p)),
        )
    # Engaging proves itself by numbers and would refuse most of these before any check could.
    monkeypatch.setattr("padless.llama.engage.prove_engaged", lambda before: None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_turns_the_checks_red(
    monkeypatch: pytest.MonkeyPatch, path: str, mode: str, mutant: str
) -> None:
    if mutant == "KV heads tiled" and not HAS_GQA:
        pytest.skip("grouped KV heads came with 4.31")
    _plant(monkeypatch, MUTANTS[mutant])
    with pytest.raises(AssertionError):
        _check(path, mode)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_checks_are_green_without_a_mutant(
    monkeypatch: pytest.MonkeyPatch, path: str, mode: str
) -> None:
    _plant(monkeypatch, lambda p: p)
    _check(path, mode)


@pytest.mark.parametrize("mutant", ["scale off by 2 %", "KV heads swapped", "mask dropped"])
def test_engaging_refuses_a_mutant_by_itself(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    prove = engage_module.prove_engaged
    _plant(monkeypatch, MUTANTS[mutant])
    monkeypatch.setattr(engage_module, "prove_engaged", prove)
    with pytest.raises(EngagementError, match="must compute what transformers computes"):
        engage("flash")
