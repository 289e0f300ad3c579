"""MLPs of a `generate` call with one kernel between their products: which ones, and when not.

The kernel is for CUDA; on the CPU its twin stands in where a test says that it serves. What fusing
does to modules, and to whom it is hidden, is tested with the norms.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import padless
from norm_cases import LAYERS, NEW, build_model, generate, plant_kernel
from padless.kernels.silu_mul import silu_mul
from padless.unpadded import mlp, session
from padless.unpadded.fused import FusedModules
from padless.unpadded.mlp import MLP, is_fusable
from padless.unpadded.norms import NORM
from padless.workload import is_little_layer


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Says that the kernel serves the CPU; lists the shapes that it is given from now on."""
    seen: list[tuple[int, ...]] = []

    def counted(gate: Tensor, up: Tensor) -> Tensor:
        seen.append(tuple(gate.shape))
        return silu_mul(gate, up)

    monkeypatch.setattr(mlp, "reject_silu_mul", lambda device, dtype: None)
    monkeypatch.setattr(mlp, "silu_mul", counted)
    # As prompts are that the device takes longer for than the host.
    monkeypatch.setattr(session, "is_little_layer", lambda tokens, width, trains: False)
    return seen


def _is_clean(model: nn.Module) -> bool:
    return not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_tokens_are_those_of_the_unpatched_model(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    want = generate(model, new=64, **options)
    assert calls == []
    with padless.patch(model) as handle:
        got = generate(model, new=64, **options)
        assert handle.report().decoding_steps == 63
    assert torch.equal(got, want)
    rows = 3 * options.get("num_beams", 1)
    assert calls == LAYERS * [(1, 9, 48)] + 63 * LAYERS * [(1, rows, 48)]
    assert _is_clean(model)


def test_the_prompt_of_a_few_tokens_is_left_to_torch(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_little_layer", is_little_layer)
    with padless.patch(model):
        generate(model)
    assert calls == (NEW - 1) * LAYERS * [(1, 3, 48)]


def test_a_wrong_kernel_would_be_seen(
    model: LlamaForCausalLM, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = generate(model)
    monkeypatch.setattr(mlp, "silu_mul", lambda gate, up: gate * up)
    with padless.patch(model):
        assert not torch.equal(generate(model), want)


def test_norms_and_mlps_are_fused_together(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = plant_kernel(monkeypatch)
    want = generate(model)
    with padless.patch(model):
        assert torch.equal(generate(model), want)
    assert (len(norms), len(calls)) == (NEW * (2 * LAYERS + 1), NEW * LAYERS)
    assert _is_clean(model)


def test_an_mlp_is_bit_for_bit_its_class_s_own(calls: list[tuple[int, ...]]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        module = _mlp().to(dtype)
        x = torch.randn(1, 5, 8, dtype=dtype)
        with torch.no_grad():
            want = module(x)
            with FusedModules(module.modules(), [NORM, MLP]).in_force():
                assert torch.equal(module(x), want)
                # By name it is the class's forward.
                assert torch.equal(module(x=x), want)
    assert len(calls) == 2


def test_the_cpu_is_left_alone(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError("no kernel for it")

    monkeypatch.setattr(mlp, "silu_mul", refuse)
    with padless.patch(model):
        generate(model)


# Who is left as it is


def _mlp(**changed: Any) -> Any:
    return LlamaMLP(
        LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12, **changed)
    )


class _Subclass(LlamaMLP):
    pass


class _SubLinear(nn.Linear):
    pass


class _SubSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return x


class _Weight(nn.Parameter):
    pass


def _nothing(*args: Any) -> None:
    pass


def _bound(module: Any) -> None:
    module.forward = MethodType(lambda self, x: x, module)


def _accelerated(module: Any) -> None:
    module._old_forward = module.forward


def _other_product(module: Any) -> None:
    module.up_proj = _SubLinear(8, 12)


def _other_weight(module: Any) -> None:
    module.down_proj.weight = _Weight(module.down_proj.weight.detach())


def _other_activation(module: Any) -> None:
    module.act_fn = nn.GELU()


def _sub_activation(module: Any) -> None:
    module.act_fn = _SubSiLU()


def _bound_activation(module: Any) -> None:
    module.act_fn.forward = lambda x: x


def _in_slices(module: Any) -> None:
    module.config.pretraining_tp = 2


@pytest.mark.parametrize(
    "change",
    [
        _bound,
        _accelerated,
        _other_product,
        _other_weight,
        _other_activation,
        _sub_activation,
        _bound_activation,
        _in_slices,
        lambda module: module.register_forward_hook(_nothing),
        lambda module: module.register_forward_pre_hook(_nothing),
        lambda module: module.act_fn.register_forward_hook(_nothing),
        lambda module: module.act_fn.register_forward_pre_hook(_nothing),
        lambda module: module.gate_proj.register_forward_hook(_nothing),
    ],
)
def test_mlps_that_somebody_has_changed(change: Callable[[Any], Any], calls: Any) -> None:
    module = _mlp()
    assert is_fusable(module)
    change(module)
    assert not is_fusable(module)


def test_activations_by_either_name(calls: Any) -> None:
    assert is_fusable(_mlp(hidden_act="silu")) and is_fusable(_mlp(hidden_act="swish"))
    assert not is_fusable(_mlp(hidden_act="gelu"))


def test_mlps_of_other_classes(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_fusable(_Subclass(_mlp().config))
    assert not is_fusable(nn.Linear(2, 2))
    module = _mlp()
    monkeypatch.setattr(type(module.act_fn), "forward", lambda self, x: x)
    assert not is_fusable(module)
    monkeypatch.undo()


def test_a_class_whose_forward_was_replaced(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _mlp()
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    assert not is_fusable(module)


def test_a_changed_activation_stays_in_effect(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    want = generate(model)
    with padless.patch(model):
        assert torch.equal(generate(model), want)
    assert len(calls) == NEW * (LAYERS - 1)


def test_a_pre_hook_on_a_product_runs(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    """Products are called as modules."""
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *args: seen.append(1))
    with padless.patch(model):
        generate(model)
    assert len(seen) == NEW and len(calls) == NEW * LAYERS
