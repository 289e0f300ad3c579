"""Faults planted in the unpadding: the checks of this suite turn red on every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import padless
from golden.documents import IGNORED
from golden.models import HAS_GQA, batch, build_model
from golden.patch_checks import (
    check_bound_labels,
    check_cache,
    check_documents,
    check_hole,
    check_hooks,
    check_outputs,
    check_step,
)
from golden.steps import Step, judge_step, labels_of, run_step, truth_step
from padless import VarlenLayout
from padless.unpadded import call, engagement, layer, outputs, structure

pytestmark = pytest.mark.case("mutants")

Plant = Callable[[pytest.MonkeyPatch], None]


def _with_layout(change: Callable[[VarlenLayout], VarlenLayout]) -> Plant:
    """Plants a change of the layouts that are read from batches."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        sound = structure.read_structure

        def read(*args: Any, **kwargs: Any) -> Any:
            found = sound(*args, **kwargs)
            return dataclasses.replace(found, layout=found.layout and change(found.layout))

        monkeypatch.setattr(call, "read_structure", read)

    return plant


def _of_rows(layout: VarlenLayout) -> VarlenLayout:
    real = layout.pad(torch.ones(layout.total, dtype=torch.bool))
    return VarlenLayout.from_mask(real)


def _relengthed(change: Callable[[list[int]], list[int]]) -> Plant:
    return _with_layout(
        lambda found: VarlenLayout.from_slots(
            change(list(found.lengths)), found.indices, found.batch, found.seqlen
        )
    )


def _shifted(layout: VarlenLayout) -> VarlenLayout:
    if layout.indices is None:
        return layout
    indices = (layout.indices + 1) % layout.padded_total
    return dataclasses.replace(layout, indices=indices.sort().values)


def _one_token_over(lengths: list[int]) -> list[int]:
    return [lengths[0] + 1, lengths[1] - 1, *lengths[2:]] if len(lengths) > 1 else lengths


def _attending(**changed: Any) -> Plant:
    """Plants a change of what layers hand to attention."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        sound = layer.run

        def run(plan: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            if "flipped" in changed:
                return sound(plan, q, k.flip(1), v.flip(1), **options)
            factor = changed.get("factor", 1.0)
            options = {**options, "softmax_scale": options["softmax_scale"] * factor}
            return sound(plan, q, k, v, **{**options, "causal": changed.get("causal", True)})

        monkeypatch.setattr(layer, "run", run)

    return plant


def _replacing(module: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    return lambda monkeypatch: monkeypatch.setattr(module, name, make(getattr(module, name)))


def _counting_real_tokens(sound: Any) -> Any:
    def flat(*args: Any) -> Any:
        made = sound(*args)
        layout, arguments = made.layout, args[2]
        starts = layout.cu_seqlens[:-1].repeat_interleave(torch.tensor(layout.lengths))
        arguments["position_ids"] = (torch.arange(layout.total) - starts)[None]
        made.position_ids = arguments["position_ids"]
        return made

    return flat


def _filled(sound: Any) -> Any:
    def pad(flat: Tensor, layout: VarlenLayout) -> Tensor:
        padded = sound(flat, layout)
        real = layout.pad(torch.ones(layout.total, dtype=torch.bool))
        return padded.masked_fill(~real.view(*real.shape, *[1] * (padded.dim() - 2)), 1.0)

    return pad


def _keys_of_the_row_before(sound: Any) -> Any:
    return lambda module, k, v, layout, *rest: sound(module, k.roll(1, 0), v, layout, *rest)


MUTANTS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "labels of row starts kept": (
        _replacing(
            call, "flatten_labels", lambda _: lambda layout, labels: layout.unpad(labels)[None]
        ),
        check_step,
    ),
    "a label more ignored in each row": (
        _replacing(
            call,
            "flatten_labels",
            lambda sound: (
                lambda layout, labels: sound(
                    layout, labels.clone().index_fill_(1, torch.tensor(12), IGNORED)
                )
            ),
        ),
        check_step,
    ),
    "labels at padding served": (
        _replacing(structure, "_bound", lambda _: lambda real, *_: torch.zeros_like(real)),
        check_bound_labels,
    ),
    "documents dropped": (_with_layout(_of_rows), check_documents),
    "documents joined": (_relengthed(lambda n: [n[0] + n[1], *n[2:]]), check_documents),
    "a document's last token given to the next": (_relengthed(_one_token_over), check_documents),
    "rows joined": (_relengthed(lambda lengths: [sum(lengths)]), check_step),
    "a row's first token given to the one before": (_relengthed(_one_token_over), check_step),
    "padding shifted by one": (_with_layout(_shifted), check_step),
    "positions of real tokens alone": (
        _replacing(call, "_flat", _counting_real_tokens),
        check_hole,
    ),
    "scale off by 2 %": (_attending(factor=1.02), check_step),
    "causality lost": (_attending(causal=False), check_step),
    "KV heads swapped": (_attending(flipped=True), check_step),
    "cache of the row before": (_replacing(layer, "_keep", _keys_of_the_row_before), check_cache),
    "ones at padding": (_replacing(outputs, "_pad", _filled), check_outputs),
    "hidden states left flat": (
        _replacing(outputs, "_PER_TOKEN", lambda _: ("last_hidden_state",)),
        check_outputs,
    ),
    "hooked projections written over": (
        _replacing(layer, "is_plain", lambda _: lambda module: True),
        check_hooks,
    ),
}


@pytest.fixture
def _unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    # Patching proves itself by numbers, and would refuse most of these before any check could.
    monkeypatch.setattr(engagement, "prove", lambda *_: None)


@pytest.mark.usefixtures("_unproven")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_turns_the_checks_red(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    if mutant == "KV heads swapped" and not HAS_GQA:
        pytest.skip("grouped KV heads came with 4.31")
    plant, check = MUTANTS[mutant]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check in MUTANTS.values()))
def test_checks_are_green_without_a_mutant(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "mutant",
    ["labels of row starts kept", "rows joined", "padding shifted by one", "causality lost"],
)
def test_patching_refuses_a_mutant_by_itself(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr("padless.unpadded.proof._proven", set())
    MUTANTS[mutant][0](monkeypatch)
    model = build_model()
    before = dict(vars(model.model))
    with pytest.raises(padless.EngagementError, match="must compute what transformers"):
        padless.patch(model)
    assert dict(vars(model.model)) == before
    with pytest.raises(padless.EngagementError, match="must compute what transformers"):
        padless.patch_llama()


def test_a_step_is_judged_by_every_gradient() -> None:
    model = build_model().train()
    ids, real = batch("left")
    labels = labels_of(ids, real)
    stock = run_step(model, ids, real.long(), labels=labels)
    stock = stock._replace(logits=stock.logits * real[..., None])
    truth = truth_step(model, ids, real, labels)
    judge_step(stock, stock, truth, real)
    for name in stock.gradients:
        wrong = {**stock.gradients, name: stock.gradients[name] * 1.001}
        with pytest.raises(AssertionError, match=name):
            judge_step(Step(stock.loss, stock.logits, wrong), stock, truth, real)
