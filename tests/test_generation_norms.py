"""Norms of a `generate` call as torch's own kernel: numbers, tokens, and which are left alone.

Torch's kernel is for CUDA; on the CPU the same function is a composition, and stands in for it
where a test says that there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import padless
from graph_cases import plant_graphs
from norm_cases import NEW, NORMS, build_model, generate, is_clean, plant_kernel
from padless import environment
from padless.generation import runner
from padless.generation.graph import StepGraph
from padless.unpadded import fused, norms
from padless.unpadded.fused import FusedModules
from padless.unpadded.norms import NORM, is_fusable, normalise

pytestmark = pytest.mark.skipif(
    not hasattr(F, "rms_norm"), reason="torch before 2.4 has no rms_norm"
)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    return plant_kernel(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [32, 100, 4096])
def test_a_norm_is_no_less_exact(dtype: torch.dtype, hidden_size: int) -> None:
    norm = LlamaRMSNorm(hidden_size, eps=1e-5).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(64, hidden_size).mul(torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    double, weight = x.double(), norm.weight.double()
    truth = weight * double * (double.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    with torch.no_grad():
        plain = norm(x)
        got = normalise(norm, x)
    assert got is not None
    assert got.dtype == plain.dtype == dtype
    error, allowed = ((y.double() - truth).square().mean().sqrt() for y in (got, plain))
    assert error <= allowed * (1.1 if dtype is torch.float32 else 1.0)
    if dtype is not torch.float32:
        # One rounding less; also what tells that it was not the stock forward.
        assert error < 0.9 * allowed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "sampled", "sequences"],
)
def test_tokens_are_those_of_the_unpatched_model(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    want = generate(model, new=64, **options)
    assert calls == []
    with padless.patch(model) as handle:
        torch.manual_seed(3)
        got = generate(model, new=64, **options)
        assert handle.report().decoding_steps == 63
    assert torch.equal(got, want)
    # The prompts' real tokens, once; then one token a row.
    rows = 3 * options.get("num_beams", 1)
    assert calls == NORMS * [(1, 9, 32)] + 63 * NORMS * [(1, rows, 32)]
    assert is_clean(model)


def test_a_capture_has_them_too(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph replays what the step launched while it was captured."""
    counts = []

    class Captured(StepGraph):
        def __init__(self, step: Callable[..., Tensor], *given: Tensor) -> None:
            self.step = step
            assert step.__self__._runner._graph is None  # type: ignore[attr-defined]

        def replay(self, *given: Tensor) -> Tensor:
            before = len(calls)
            logits = self.step(*given)
            counts.append(len(calls) - before)
            return logits

        def release(self) -> None:
            pass

    plant_graphs(monkeypatch)
    monkeypatch.setattr(runner, "StepGraph", Captured)
    want = generate(model)
    with padless.patch(model):
        assert torch.equal(generate(model), want)
    assert counts == 8 * [NORMS]


# Who is left as it is


def test_the_cpu_is_left_alone(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError("no kernel for it")

    monkeypatch.setattr(norms.F, "rms_norm", refuse)
    with padless.patch(model):
        generate(model)
    assert not environment.has_fused_rms_norm("cpu")
    assert not environment.has_fused_rms_norm("mps")


@pytest.mark.parametrize(
    ("answer", "want"), [(True, True), (False, False), (RuntimeError, False), (None, False)]
)
def test_torch_is_asked_for_its_kernel(
    answer: Any, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(name: str, key: str) -> bool:
        assert (name, key) == ("aten::_fused_rms_norm", "CUDA")
        if answer is RuntimeError:
            raise RuntimeError("operator does not exist")
        return bool(answer)

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", ask)
    if answer is None:
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
    assert environment.has_fused_rms_norm.__wrapped__("cuda") is want


class _Subclass(LlamaRMSNorm):
    pass


def _bound(norm: Any) -> None:
    norm.forward = MethodType(lambda self, x: x, norm)


def _hooked(norm: Any) -> None:
    norm.register_forward_hook(lambda *args: None)


def _pre_hooked(norm: Any) -> None:
    norm.register_forward_pre_hook(lambda *args: None)


def _accelerated(norm: Any) -> None:
    norm._old_forward = norm.forward


def _in_double(norm: Any) -> None:
    norm.double()


class _Weight(nn.Parameter):
    pass


def _other_weight(norm: Any) -> None:
    norm.weight = _Weight(norm.weight.detach())


@pytest.mark.parametrize(
    "change", [_bound, _hooked, _pre_hooked, _accelerated, _in_double, _other_weight]
)
def test_norms_that_somebody_has_changed(change: Callable[[Any], None], calls: Any) -> None:
    norm = LlamaRMSNorm(8)
    assert is_fusable(norm)
    change(norm)
    assert not is_fusable(norm)


def test_norms_of_other_classes(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_fusable(_Subclass(8))
    assert not is_fusable(nn.Linear(2, 2))
    if hasattr(nn, "RMSNorm"):
        assert not is_fusable(nn.RMSNorm(8))
    norm = LlamaRMSNorm(8)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: x)
    assert not is_fusable(norm)


def test_a_changed_norm_stays_in_effect(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.forward = MethodType(lambda self, x: LlamaRMSNorm.forward(self, x).flip(-1), norm)
    forward = norm.forward
    want = generate(model)
    with padless.patch(model):
        assert torch.equal(generate(model), want)
    assert len(calls) == NEW * (NORMS - 1)
    assert norm.forward is forward


def test_a_norm_in_float32_of_a_model_in_half_precision(calls: list[tuple[int, ...]]) -> None:
    norm = LlamaRMSNorm(8)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    want = norm(x)
    with torch.no_grad(), FusedModules(norm.modules(), [NORM]).in_force():
        got = norm(x)
        assert calls == [] and "forward" in vars(norm)
        norm(x.float())
        assert calls == [(3, 8)]
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["autocast", "gradients", "traced", "compiled", "compiled layer"])
def test_modes_that_are_left_alone(
    mode: str,
    model: LlamaForCausalLM,
    calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if mode == "traced":
        monkeypatch.setattr(fused, "is_tracing", lambda: True)
    if mode == "compiled":
        model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    if mode == "compiled layer":
        model.model.layers[0].compile(backend="eager")
    contexts = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "gradients": torch.enable_grad(),
    }
    found = FusedModules(model.modules(), [NORM])
    with torch.set_grad_enabled(False), contexts.get(mode, torch.no_grad()), found.in_force():
        assert is_clean(model)
    # And otherwise not.
    if mode in contexts:
        with torch.no_grad(), found.in_force():
            assert not is_clean(model)


def test_what_is_compiled_piece_by_piece_has_the_class_s_forward(
    calls: list[tuple[int, ...]],
) -> None:
    norm, x = LlamaRMSNorm(8), torch.randn(3, 8)
    compiled = torch.compile(lambda x: norm(x), backend="eager", fullgraph=True)
    want = norm(x)
    with torch.no_grad(), FusedModules(norm.modules(), [NORM]).in_force():
        assert torch.equal(compiled(x), want)
        assert calls == []
        norm(x)
        assert calls == [(3, 8)]
    assert torch.equal(compiled(x), want)
