"""Faults planted in decoding: the checks of `generate` turn red on every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import LlamaForCausalLM

import padless
from golden.models import VERSION, batch, build_model
from golden.test_patch_cache import keys_and_values
from padless.backends import sdpa
from padless.generation import decoder
from padless.generation.runner import StepRunner
from padless.generation.store import RaggedStore
from padless.unpadded import session

pytestmark = [
    pytest.mark.case("mutants"),
    pytest.mark.skipif(
        Version("4.48") > VERSION, reason="the cache of real tokens covers 4.48 and later"
    ),
]

Plant = Callable[[pytest.MonkeyPatch], None]


def _run(model: LlamaForCausalLM, **options: Any) -> Any:
    ids, real = batch("left")
    return model.generate(
        input_ids=ids,
        attention_mask=real.long(),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def check_generation(**options: Any) -> None:
    """Tokens, logits and the cache of a `generate` call, against the unpatched model's."""
    model = build_model()
    stock = _run(model, **options)
    with padless.patch(model) as handle:
        got = _run(model, **options)
        report = handle.report()
    assert report.decoding_steps == 23, "not decoded behind a cache of real tokens"
    assert report.generation_notes == {}, "left to transformers in part"
    assert torch.equal(got.sequences, stock.sequences), "other tokens"
    for a, b in zip(got.logits, stock.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), "other logits"
    real = torch.cat([batch("left")[1], torch.ones(3, 23, dtype=torch.bool)], 1)
    mask = real.repeat_interleave(options.get("num_beams", 1), 0)
    caches = (keys_and_values(out.past_key_values) for out in (got, stock))
    for a, b in zip(*caches, strict=True):
        assert a.shape == b.shape, "another cache"
        a, b = (x.transpose(1, 2)[mask] for x in (a, b))
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), "another cache"


def _decode(change: Callable[..., Tensor]) -> Plant:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        sound = sdpa.decode
        # Qualification would pass over it.
        monkeypatch.setattr(decoder, "decoding_fault", lambda backend, request: None)
        monkeypatch.setattr(
            sdpa, "decode", lambda *args, **options: change(sound, *args, **options)
        )

    return plant


def _shorter(sound: Any, q: Tensor, k: Tensor, v: Tensor, rows: Any, **options: Any) -> Tensor:
    rows.lengths.sub_(1)
    out: Tensor = sound(q, k, v, rows, **options)
    rows.lengths.add_(1)
    return out


def _longer(sound: Any, q: Tensor, k: Tensor, v: Tensor, rows: Any, **options: Any) -> Tensor:
    rows.lengths.add_(1)
    out: Tensor = sound(q, k, v, rows, **options)
    rows.lengths.sub_(1)
    return out


def _scaled(sound: Any, *args: Any, softmax_scale: float) -> Tensor:
    out: Tensor = sound(*args, softmax_scale=1.02 * softmax_scale)
    return out


def _swapped(sound: Any, q: Tensor, k: Tensor, v: Tensor, rows: Any, **options: Any) -> Tensor:
    out: Tensor = sound(q, k.flip(2), v.flip(2), rows, **options)
    return out


def _columns_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Positions of slots instead of those that generate hands over.
    sound = StepRunner.run

    def run(self: Any, step: Any, ids: Tensor, positions: Tensor) -> Tensor:
        store = step.__self__._batch.store
        return sound(self, step, ids, torch.full_like(positions, store.columns))

    monkeypatch.setattr(StepRunner, "run", run)


def _written_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = RaggedStore._slots
    monkeypatch.setattr(RaggedStore, "_slots", lambda self: sound(self) - 1)


def _not_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaggedStore, "select_rows", lambda self, indices: False)


def _other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = RaggedStore.put_prompt

    def put(self: RaggedStore, layer_idx: int, k: Tensor, v: Tensor) -> None:
        sound(self, layer_idx, k, v)
        layer = self.layers[layer_idx]
        assert layer is not None
        self.layers[layer_idx] = (layer[0].roll(1, 0), layer[1])

    monkeypatch.setattr(RaggedStore, "put_prompt", put)


def _first_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Those of the first token of each row, instead of the last.
    sound = session.Session._hidden

    def hidden(self: Any, flat: Any, arguments: dict[str, Any]) -> Tensor:
        return sound(self, flat, arguments).roll(1, 1)

    monkeypatch.setattr(session.Session, "_hidden", hidden)


def _rotated_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = RaggedStore.padded

    def padded(self: RaggedStore, layer_idx: int) -> Any:
        found = sound(self, layer_idx)
        assert found is not None
        return found[0].roll(1, 2), found[1]

    monkeypatch.setattr(RaggedStore, "padded", padded)


def _never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "prompt_reason", lambda modules, arguments: "planted")


MUTANTS: dict[str, tuple[Plant, dict[str, Any]]] = {
    "one key too few": (_decode(_shorter), {}),
    "one key too many": (_decode(_longer), {}),
    "another scale": (_decode(_scaled), {}),
    "heads of another group": (_decode(_swapped), {}),
    "positions that count padding": (_columns_of_padding, {}),
    "keys written one slot before": (_written_beside, {}),
    "keys of another row": (_other_row, {}),
    "beams that keep their keys": (_not_reordered, {"num_beams": 3}),
    "logits of another token": (_first_logits, {}),
    "a cache handed back with keys moved": (_rotated_back, {}),
    "the stock path": (_never, {}),
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_checks_pass_without_a_fault(options: dict[str, Any]) -> None:
    check_generation(**options)


@pytest.mark.parametrize("name", MUTANTS)
def test_checks_turn_red_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, options = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_generation(**options)
