"""Norms of a `generate` call on a CUDA device: torch's own kernel, in captured steps too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation_gpu_cases import DTYPES, EAGER_STEPS, LAYERS, build_model, generate, prompt_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import padless
from padless.environment import has_fused_rms_norm
from padless.unpadded import fused, norms, session
from padless.unpadded.fused import FusedModules
from padless.unpadded.norms import NORM

NORMS = 2 * LAYERS + 1
NEW = 48

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kernel_of_torch() -> None:
    if not has_fused_rms_norm("cuda"):
        pytest.skip("this torch has no fused rms_norm for CUDA (2.9 and later)")


class _Launched(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Lists what each forward of a session launches: the prompt, the eager step, the capture."""
    seen: list[Counter[str]] = []
    hidden = session.Session._hidden

    def counted(self: Any, *args: Any) -> Tensor:
        with _Launched() as launched:
            out = hidden(self, *args)
        seen.append(launched.names)
        return out

    monkeypatch.setattr(session.Session, "_hidden", counted)
    return seen


def _is_clean(model: nn.Module) -> bool:
    return not any("forward" in vars(m) for m in model.modules() if type(m) is LlamaRMSNorm)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [64, 100, 4096])
@pytest.mark.parametrize("rows", [1, 16, 3000])
def test_a_norm_is_no_less_exact(dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    norm = LlamaRMSNorm(hidden_size, eps=1e-5).to("cuda", dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    scales = torch.logspace(-3, 3, rows, device="cuda")[:, None]
    x = torch.randn(rows, hidden_size, device="cuda").mul(scales).to(dtype)[None]
    double, weight = x.double(), norm.weight.double()
    truth = weight * double * (double.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    with torch.no_grad():
        plain = norm(x)
        with FusedModules(norm.modules(), [NORM]).in_force(), _Launched() as launched:
            got = norm(x)
    assert launched.names["_fused_rms_norm"] == 1, launched.names
    assert got.dtype == dtype
    error, allowed = ((y.double() - truth).square().mean().sqrt() for y in (got, plain))
    if dtype is torch.float32:
        # The order of a sum, which all of a row share.
        allowed = 2 * allowed + torch.finfo(dtype).eps * truth.square().mean().sqrt()
    # Half precision has a rounding less.
    assert error <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_forward_of_a_call_has_them(
    dtype: torch.dtype, forwards: list[Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(dtype)
    with padless.patch(model) as handle:
        generate(model, new=NEW)
        assert handle.report().graph_replays == NEW - 1 - EAGER_STEPS, str(handle.report())
        by_kernel = list(forwards)
        forwards.clear()
        monkeypatch.setattr(norms, "has_fused_rms_norm", lambda device_type: False)
        generate(model, new=NEW)
    assert len(by_kernel) == len(forwards) == 2 + EAGER_STEPS
    for with_kernel, without in zip(by_kernel, forwards, strict=True):
        assert with_kernel["_fused_rms_norm"] == NORMS
        assert without["_fused_rms_norm"] == 0
        for name in ("pow", "mean", "rsqrt"):
            assert (with_kernel[name], without[name]) == (0, NORMS)
    assert _is_clean(model)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_tokens_are_those_of_the_unpatched_model(
    options: dict[str, Any], forwards: list[Counter[str]]
) -> None:
    model = build_model()
    with torch.no_grad():
        for module in model.modules():
            if type(module) is LlamaRMSNorm:
                module.weight.uniform_(0.5, 1.5)
    want = generate(model, new=256, **options)
    assert forwards == []
    with padless.patch(model):
        assert torch.equal(generate(model, new=256, **options), want)
    assert forwards[-1]["_fused_rms_norm"] == NORMS
    assert _is_clean(model)


def test_another_model_computes_as_ever_between_the_steps(forwards: list[Counter[str]]) -> None:
    model, other = build_model(), build_model()
    seen = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        with _Launched() as launched:
            for each in (model, other):
                each(**prompt_of(), use_cache=False)
        seen.append(launched.names["_fused_rms_norm"])
        assert _is_clean(model) and _is_clean(other)
        return scores

    with padless.patch(model):
        generate(model, new=8, logits_processor=LogitsProcessorList([look]))
    assert seen == 8 * [0]
    assert forwards[-1]["_fused_rms_norm"] == NORMS


class _FailAt:
    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("in the middle")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Plants an exception inside of the n-th forward of a model's second layer, without a hook."""
    model: LlamaForCausalLM = build_model()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def plant(at: int) -> LlamaForCausalLM:
        fail = _FailAt(at)
        mlp.forward = lambda x: (fail(), forward(x))[1]
        return model

    yield plant


@pytest.mark.parametrize("at", [1, 2, 3], ids=["prompt", "eager step", "capture"])
def test_nothing_stays_after_an_exception_inside_the_model(at: int, failing: Any) -> None:
    model = failing(10**9)
    want = generate(model)
    failing(at)
    with padless.patch(model) as handle:
        if at < 3:
            with pytest.raises(ZeroDivisionError):
                generate(model)
        else:
            # A capture that fails is no failure of the call.
            assert torch.equal(generate(model), want)
            assert handle.report().graph_replays == 0
        assert _is_clean(model) and not fused._in_force.get()
        failing(10**9)
        assert torch.equal(generate(model), want)
    assert _is_clean(model)


def test_autocast_leaves_them_as_they_are(forwards: list[Counter[str]]) -> None:
    model = build_model()
    with torch.autocast("cuda", torch.bfloat16), padless.patch(model):
        generate(model, new=4)
    assert forwards
    assert all(names["_fused_rms_norm"] == 0 and names["rsqrt"] == NORMS for names in forwards)
    assert _is_clean(model)
