"""The perturbation probe on the patched model: exactly what may depend on a token follows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden.models import PADDINGS, PATHS, VOCAB, batch, build_model, patched, run_logits
from padless.verification import perturbation_probe

pytestmark = pytest.mark.case("probe")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_exactly_the_successors_follow(path: str, mode: str, padding: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)

    def run(changed: Tensor) -> Tensor:
        return run_logits(model, changed, real.long(), use_cache=False)

    with patched(path):
        result = perturbation_probe(run, ids, real, vocab_size=VOCAB)
    assert len(result.probed) == 9
    assert result.passed, str(result)


@pytest.mark.parametrize("fault", ["acausal", "deaf", "crosstalk", "documents"])
def test_probe_sees_a_planted_fault(fault: str) -> None:
    ids, real = batch("none")
    documents = torch.arange(ids.shape[1]).expand_as(ids) // 7

    def run(changed: Tensor) -> Tensor:
        sums = changed.double().cumsum(1)
        out = {
            "acausal": changed.double().sum(1, keepdim=True).expand(-1, ids.shape[1]),
            "deaf": sums * (torch.arange(ids.shape[1]) != ids.shape[1] - 1),
            "crosstalk": sums.sum(0, keepdim=True).expand_as(sums),
            "documents": sums,
        }[fault]
        return out[..., None]

    given = documents if fault == "documents" else None
    result = perturbation_probe(run, ids, real, vocab_size=VOCAB, documents=given)
    assert not result.passed
    assert bool(result.missed) == (fault == "deaf")
    assert bool(result.leaked) == (fault != "deaf")
    assert ("missed" if fault == "deaf" else "leaked") in str(result)
