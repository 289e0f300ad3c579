"""silu(gate) * up on a GPU: numbers, launches, and in the steps of a `generate` call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from generation_gpu_cases import EAGER_STEPS, LAYERS, LENGTHS, build_model, generate
from torch import Tensor

import padless
import silu_mul_cases
from padless.kernels import silu_mul as module
from padless.kernels.silu_mul import reject_silu_mul, silu_mul
from padless.unpadded import mlp, session
from silu_mul_cases import HALF_TYPES, SHAPES

NEW = 48

pytestmark = [pytest.mark.gpu, pytest.mark.requires("triton")]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 16, 14336), (1, 2000, 14336)], ids=str)
def test_numbers_are_right_by_one_launch(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first call of a process tries the kernel.
    assert reject_silu_mul(torch.device("cuda", 0), dtype) is None
    launches = silu_mul_cases.count_launches(monkeypatch)
    silu_mul_cases.assert_right(shape, dtype, "cuda")
    assert len(launches) == (1 if shape[1] else 0)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_roundings_are_torch_s(dtype: torch.dtype) -> None:
    silu_mul_cases.assert_rounded_as_torch_rounds(dtype, "cuda")


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_what_is_not_finite_stays_and_nothing_beside_is_written(dtype: torch.dtype) -> None:
    silu_mul_cases.assert_what_is_not_finite_stays(dtype, "cuda")
    silu_mul_cases.assert_nothing_beside_is_written(dtype, "cuda")


def test_offsets_beyond_int32_are_right() -> None:
    gate = torch.zeros(2**18 + 1, 2**13, dtype=torch.bfloat16, device="cuda")
    gate[-1] = torch.linspace(-4, 4, 2**13, device="cuda")
    out = silu_mul(gate, gate)
    last = gate[-1]
    torch.testing.assert_close(out[-1], silu_mul(last, last), rtol=0, atol=0)
    assert not out[:-1].any() and out[-1].any()


def test_trial_passes_and_float32_is_torch_s() -> None:
    device = torch.device("cuda", 0)
    assert reject_silu_mul(device, torch.bfloat16) is None
    assert "float32" in str(reject_silu_mul(device, torch.float32))


def test_no_number_of_tokens_compiles_anything() -> None:
    from padless.kernels import silu_mul_triton

    def compiled() -> int:
        caches = silu_mul_triton._silu_mul_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    def run(tokens: int) -> None:
        x = torch.ones(1, tokens, 1408, dtype=torch.bfloat16, device="cuda")
        silu_mul(x, x)

    run(1)
    before = compiled()
    for tokens in range(1, 50):
        run(tokens)
    assert compiled() == before


# In a call of generate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lists the shapes that go by the kernel from now on."""
    seen: list[tuple[int, ...]] = []

    def counted(gate: Tensor, up: Tensor) -> Tensor:
        assert module._serves(gate, up)
        seen.append(tuple(gate.shape))
        return silu_mul(gate, up)

    monkeypatch.setattr(mlp, "silu_mul", counted)
    return seen


@pytest.mark.parametrize("little", [True, False], ids=["little", "much"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_every_step_of_a_call_has_it_and_a_large_prompt(
    dtype: torch.dtype, little: bool, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_little_layer", lambda tokens, width, trains: little)
    model = build_model(dtype)
    generate(model, new=4)
    assert calls == []
    with padless.patch(model) as handle:
        generate(model, new=NEW)
        report = handle.report()
    assert report.graph_replays == NEW - 1 - EAGER_STEPS, str(report)
    # The eager step and the capture; replays ask nobody.
    want = {(1, len(LENGTHS), 1024): LAYERS * (EAGER_STEPS + 1)}
    if not little:
        want[1, sum(LENGTHS), 1024] = LAYERS
    assert Counter(calls) == want
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_logits_are_those_of_torch_s_two_operations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same roundings give the same logits, but for an exponential's last bit now and then."""
    model = build_model(dtype)

    def logits() -> list[Tensor]:
        out: Any = generate(
            model, new=24, min_new_tokens=24, output_logits=True, return_dict_in_generate=True
        )
        return [torch.stack(out.logits), out.sequences]

    with padless.patch(model):
        ours, tokens = logits()
        monkeypatch.setattr(mlp, "reject_silu_mul", lambda device, dtype: "planted")
        theirs, other_tokens = logits()
    # Up to the first token that differs, and its own logits.
    same = (tokens == other_tokens).all(0)
    steps = int(same.long().cumprod(0).sum()) - max(LENGTHS) + 1
    assert steps >= 1
    scale = theirs[:steps].float().square().mean().sqrt()
    error = (ours[:steps].float() - theirs[:steps].float()).square().mean().sqrt()
    assert error <= 4 * torch.finfo(dtype).eps * scale


def test_float32_models_and_autocast_are_left_alone(calls: list[tuple[int, ...]]) -> None:
    model = build_model()
    with padless.patch(model):
        generate(model, new=4)
        with torch.autocast("cuda", torch.bfloat16):
            generate(model, new=4)
    assert calls == []
