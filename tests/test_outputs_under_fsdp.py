"""Logits of a module whose outputs FSDP2's hook reads: padded behind it, or in front of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from padless.layout import VarlenLayout
from padless.unpadded.outputs import is_read_on_return, pad_on_return, pad_outputs

PADDED = VarlenLayout.from_mask(torch.tensor([[True, True, False], [True, True, True]]))


class FSDPModule:
    """What FSDP2 puts in front of a module's class."""


class Model(FSDPModule, nn.Module):
    """A head as it stands under FSDP2, whose hook reads everything and returns another object."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.fails = False
        self.register_forward_hook(self._post_forward)

    def _post_forward(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if self.fails:
            raise RuntimeError("out of memory")
        self.seen.append(tuple(outputs.logits.shape))
        return type(outputs)(**{name: x * 2 for name, x in outputs.items()})

    def forward(self, flat: Tensor) -> Any:
        outputs = CausalLMOutputWithPast(loss=flat.sum(), logits=flat)
        if is_read_on_return(self):
            pad_on_return(self, PADDED)
            return outputs
        return pad_outputs(outputs, PADDED)


FLAT = torch.arange(1.0, 16.0).view(1, 5, 3)


def _is_lazy(outputs: Any) -> bool:
    return type(outputs) is not CausalLMOutputWithPast


def test_logits_are_padded_behind_the_hook_when_they_are_read() -> None:
    model = Model()
    for scale in (1.0, 2.0):
        out = model(FLAT * scale)
        assert model.seen[-1] == (1, 5, 3)
        assert _is_lazy(out) and out.loss == 2 * scale * FLAT.sum()
        assert torch.equal(out.logits, PADDED.pad(2 * scale * FLAT[0]))
    assert len(model._forward_hooks) == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_a_hook_of_somebody_else_sees_padded_logits(is_first: bool) -> None:
    model, seen = Model(), []
    model.register_forward_hook(
        lambda module, args, out: seen.append(out.logits.shape), prepend=is_first
    )
    out = model(FLAT)
    assert seen == [(2, 3, 3)] and model.seen == [(2, 3, 3)]
    assert torch.equal(out.logits, PADDED.pad(2 * FLAT[0]))


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = Model()
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(FLAT)
    model.fails = False
    assert torch.equal(model(FLAT * 3).logits, PADDED.pad(6 * FLAT[0]))
    assert len(model._forward_hooks) == 1


def test_a_module_without_fsdp_is_not_waited_for() -> None:
    assert not is_read_on_return(nn.Linear(2, 2))
