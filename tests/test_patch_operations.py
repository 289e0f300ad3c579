"""Which operations a patched step is made of: their sizes, which kernel, and how often it asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import padless
from golden.models import LAYERS, batch, build_model
from golden.steps import labels_of, run_step
from padless.layout import VarlenLayout

KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


class _Operations(TorchDispatchMode):
    """Keeps operations below autograd, the most memory of a result, and the shapes of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest_bytes = 0
        self.keys: list[torch.Size] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if self.names[-1] == KERNEL:
            self.keys.append(args[1].shape)
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.largest_bytes = max(self.largest_bytes, each.untyped_storage().size())
        return out


def _model(**config: Any) -> Any:
    return build_model("gqa", max_position_embeddings=1024, **config).train()


def _batch(form: str, seqlen: int) -> dict[str, Tensor]:
    if form == "packed":
        ids, _ = batch("none", seqlen=seqlen)
        positions = (torch.arange(seqlen) % (seqlen // 2)).expand(3, -1)
        return {"ids": ids, "mask": None, "labels": ids, "position_ids": positions}
    ids, real = batch(form, seqlen=seqlen)
    return {"ids": ids, "mask": real.long(), "labels": labels_of(ids, real)}


def _largest(model: Any, form: str, seqlen: int) -> int:
    with _Operations() as seen:
        run_step(model, **_batch(form, seqlen))
    return seen.largest_bytes


@pytest.mark.parametrize("form", ["right", "left", "packed"])
def test_no_tensor_grows_with_the_square_of_the_length(form: str) -> None:
    model = _model()
    with padless.patch(model):
        short, long = (_largest(model, form, seqlen) for seqlen in (256, 512))
    assert long < 2.1 * short
    # Unpatched there is one that does, the mask: the measure sees it.
    assert form == "packed" or _largest(model, form, 512) > 3.9 * _largest(model, form, 256)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_kernel_is_given_keys_of_as_many_heads_as_there_are(kv_heads: int) -> None:
    model = _model(num_key_value_heads=kv_heads)
    with padless.patch(model), _Operations() as seen:
        run_step(model, **_batch("left", 64))
    assert {shape[1] for shape in seen.keys} == {kv_heads}


@pytest.mark.parametrize("form", ["none", "left"])
def test_the_report_is_what_a_trace_shows(form: str) -> None:
    model = _model()
    with padless.patch(model) as handle:
        with _Operations() as seen:
            run_step(model, **_batch(form, 32))
        report = handle.report()
    lengths = {int(n) for n in batch(form, seqlen=32)[1].sum(1)}
    assert [layer.backends for layer in report.layers] == [{"sdpa": 1}] * LAYERS
    # SDPA serves sequences of one length by one call.
    assert seen.names.count(KERNEL) == LAYERS * len(lengths)
    assert "_softmax" not in seen.names, "the formula was computed too"


@pytest.mark.parametrize("form", ["none", "left", "packed"])
def test_boundaries_are_made_once_for_all_layers(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[VarlenLayout] = []
    check = VarlenLayout.__post_init__
    monkeypatch.setattr(
        VarlenLayout, "__post_init__", lambda self: (made.append(self), check(self))[1]
    )
    for layers in (2, 5):
        model = _model(num_hidden_layers=layers)
        with padless.patch(model):
            made.clear()
            run_step(model, **_batch(form, 32))
        assert len(made) == 1


def test_nothing_is_copied_between_projections_and_kernel() -> None:
    # One sequence, so that no kernel has to be asked twice. What rotates writes where it read; its
    # twin for the CPU takes a half aside (`mul`) and copies it back for q and for k.
    model = _model()
    seen = _Operations()
    with padless.patch(model):
        attention = model.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_: seen.names.clear())
        inside: list[str] = []
        attention.register_forward_hook(lambda *_: inside.extend(seen.names))
        ids = torch.ones(1, 64, dtype=torch.long)
        with seen:
            run_step(model, ids, None, labels=ids)
    views = {"view", "_unsafe_view", "t", "transpose", "split", "select", "unsqueeze", "detach"}
    work = [name for name in inside if name not in views and name != "promote_types"]
    rotation = ["mul", "addcmul_", "addcmul_", "copy_"]
    assert work == ["mm"] * 3 + rotation * 2 + [KERNEL, "mm"]
