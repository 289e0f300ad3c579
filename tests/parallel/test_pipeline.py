"""A patched LLaMA whose layers are stages of torch's pipelining, two microbatches a step."""

from __future__ import annotations

import pytest
import torch

from golden.models import judge
from parallel.group import Groups
from parallel.test_engines import truth_of


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("kind", ["uneven", "left"])
def test_pipeline_step_is_that_of_one_process(
    groups: Groups, schedule: str, when: str, kind: str
) -> None:
    found = groups[2].run(
        "parallel.pipeline_cases", "step", schedule=schedule, when=when, kind=kind
    )
    stock, got = ({**found[0][i][0], **found[1][i][0]} for i in (0, 1))
    truth = truth_of(2, kind)
    assert got.keys() == stock.keys() == truth.gradients.keys()
    for name, expected in truth.gradients.items():
        judge(f"gradient of {name}", got[name], stock[name], expected)
    losses = [torch.stack(found[1][i][1]).sum()[None] for i in (1, 0)]
    judge("loss", losses[0], losses[1], truth.loss[None])
