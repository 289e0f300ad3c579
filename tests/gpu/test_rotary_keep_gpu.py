"""The kernel that rotates a decoding step and keeps it, on a GPU: numbers, and in `generate`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from generation_gpu_cases import EAGER_STEPS, HEADS, LAYERS, build_model, generate

import padless
import rotary_keep_cases
from padless.generation.store import RaggedStore
from padless.kernels import rotary_keep
from padless.unpadded import layer
from rotary_keep_cases import SHAPES, inputs, twin

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEW = 48

pytestmark = [pytest.mark.gpu, pytest.mark.requires("triton")]


@pytest.mark.parametrize("tables", [None, torch.float32], ids=["tables", "float32-tables"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 8, 8, 64)], ids=str)
def test_numbers_are_the_twin_s(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tables: torch.dtype | None
) -> None:
    rotary_keep_cases.assert_right(shape, dtype, "cuda", tables=tables)


def test_trial_passes() -> None:
    assert rotary_keep._fault(torch.device("cuda", 0)) is None


def test_slots_beyond_int32_are_right() -> None:
    given = inputs((2, 4, 2, 128), torch.bfloat16, "cuda")
    slots = 2**31 // 256 + 2
    given[5] = torch.zeros(slots, 2, 128, dtype=torch.bfloat16, device="cuda")
    given[6] = torch.zeros_like(given[5])
    given[7] = torch.tensor([slots - 1, 0], device="cuda")
    want = [x.index_select(0, given[7]) for x in twin(given)[1:]]
    with torch.no_grad():
        assert rotary_keep.rotate_and_keep(*given)
    for kept, other in zip(given[5:7], want, strict=True):
        torch.testing.assert_close(kept.index_select(0, given[7]), other, rtol=2**-7, atol=1e-6)


def test_a_captured_call_replays() -> None:
    given = inputs((16, 32, 8, 128), torch.bfloat16, "cuda")
    fresh = [x.clone() for x in given]
    want = twin([x.clone() for x in given])
    with torch.no_grad():
        assert rotary_keep.rotate_and_keep(*[x.clone() for x in given])  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert rotary_keep.rotate_and_keep(*given)
        for x, before in zip(given, fresh, strict=True):
            x.copy_(before)
        graph.replay()
    for got, other in zip((given[0], *given[5:7]), want, strict=True):
        torch.testing.assert_close(got, other, rtol=2**-7, atol=1e-6)


# In a call of generate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts who keeps keys and values of a step."""
    seen: Counter[str] = Counter()
    sound, put = layer.rotate_and_keep, RaggedStore.put_newest

    def by_kernel(*given: Any) -> bool:
        done = sound(*given)
        seen["kernel"] += done
        return done

    def by_torch(self: RaggedStore, *args: Any) -> None:
        seen["torch"] += 1
        put(self, *args)

    monkeypatch.setattr(layer, "rotate_and_keep", by_kernel)
    monkeypatch.setattr(RaggedStore, "put_newest", by_torch)
    return seen


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("heads", HEADS)
def test_tokens_are_those_of_the_unpatched_model(
    heads: str, options: dict[str, Any], calls: Counter[str]
) -> None:
    model = build_model(heads=heads)
    want = generate(model, new=256, **options)
    assert not calls
    with padless.patch(model) as handle:
        assert torch.equal(generate(model, new=256, **options), want)
        assert handle.report().graph_replays == 255 - EAGER_STEPS, str(handle.report())
    assert calls == {"kernel": LAYERS * (EAGER_STEPS + 1)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_near_those_of_three_kernels(
    dtype: torch.dtype, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(dtype)

    def first_logits() -> torch.Tensor:
        out: Any = generate(model, new=2, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits).float()

    with padless.patch(model):
        ours = first_logits()
        assert calls["kernel"] and not calls["torch"]
        monkeypatch.setattr(rotary_keep, "_fault", lambda device: "planted")
        theirs = first_logits()
    assert calls["torch"]
    # Rounded once in either; what is contracted of two products may differ in its last bit.
    error = (ours - theirs).square().mean().sqrt()
    bits = 32 if dtype is torch.float32 else 4
    assert error <= bits * torch.finfo(dtype).eps * theirs.square().mean().sqrt()
