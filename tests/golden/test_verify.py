"""`padless.verify` itself works on every transformers version: green when sound, red when not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from golden.models import batch, build_model
from padless.llama import attend, paths
from padless.verification import verify

pytestmark = pytest.mark.case("verify")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_patch_is_the_same_model(dtype: str) -> None:
    ids, real = batch("mixed")
    model = build_model().to(getattr(torch, dtype))
    report = verify(model, {"input_ids": ids, "attention_mask": real}, new_tokens=6)
    assert report.passed, [c for path in report.paths for c in path.checks if not c.passed]
    assert report.truth_dtype == {"float32": "float64", "bfloat16": "float32"}[dtype]


def test_scale_off_by_1_percent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = attend.attend_flash
    monkeypatch.setattr(
        paths,
        "attend_flash",
        lambda module, call, p: sound(
            module, call, dataclasses.replace(p, softmax_scale=p.softmax_scale * 1.01)
        ),
    )
    monkeypatch.setattr("padless.llama.engage.prove_engaged", lambda before: None)
    ids, real = batch("mixed")
    batch_of_user = {"input_ids": ids, "attention_mask": real}
    report = verify(build_model(), batch_of_user, paths=("flash",), new_tokens=2)
    failed = {check.name for check in report.paths[0].checks if not check.passed}
    assert {"logits, right pad", "gradients, left pad"} <= failed
