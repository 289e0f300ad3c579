"""Which of torch's kernels is found and what it is asked; the grid is in `test_flash_kernels`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_cases import Case
from flash_stand_ins import aten_forward, varlen_with_flag
from kernel_stand_ins import forget, install, on_a_gpu
from padless.backends import torch_varlen
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout

REQUEST = AttentionRequest(
    torch.device("cpu"), torch.bfloat16, 64, 4, 2, causal=True, needs_grad=True
)
WINDOW = replace(REQUEST, window_size=(4, None))
LAYOUT = VarlenLayout.from_lengths([3, 2])


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


def test_the_operator_of_this_torch_is_the_one_that_is_known() -> None:
    operator, options = torch_varlen._operator()
    assert operator is torch.ops.aten._flash_attention_forward
    assert {"scale", "window_size_left", "window_size_right"} <= options


def test_the_backward_operator_of_this_torch_takes_what_it_is_given() -> None:
    schema = torch.ops.aten._flash_attention_backward.default._schema
    assert [argument.name for argument in schema.arguments] == (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal rng_state unused scale window_size_left window_size_right"
    ).split()


@pytest.mark.parametrize("version", ["2.1.2", "2.1.0+cu121"])
def test_torch_before_2_2_has_no_such_kernel(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert torch_varlen._operator()[0] is None
    reason = f"torch {version} has no varlen kernel (2.2 and later have it)"
    assert torch_varlen.reject(REQUEST) == reason


def operator(*names: str) -> Any:
    """Makes an operator whose schema has these arguments."""
    arguments = [SimpleNamespace(name=name) for name in names]
    return SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=arguments)))


@pytest.mark.parametrize(
    "found, known",
    [
        (operator(*torch_varlen._POSITIONAL), True),
        (operator(*torch_varlen._POSITIONAL, "scale"), True),
        (operator("query", "value", "key"), False),
        (operator(), False),
        (None, False),
    ],
)
def test_an_operator_with_other_arguments_is_not_called(
    found: Any, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace(_flash_attention_forward=found))
    assert (torch_varlen._operator()[0] is not None) == known


@pytest.mark.parametrize(
    "kernel, reason",
    [
        ("aten", None),
        ("varlen_window", None),
        ("varlen_gqa", None),
        ("varlen_flag", f"the varlen kernel of torch {torch.__version__} takes no window"),
    ],
)
def test_a_window_is_served_where_the_kernel_has_one(
    kernel: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, kernel)
    assert torch_varlen.reject(WINDOW) == reason
    assert torch_varlen.reject(REQUEST) is None


def test_an_operator_without_a_window_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    seen: list[dict[str, Any]] = []

    def early(*arguments: Any, scale: float | None = None) -> Any:
        seen.append({"scale": scale})
        return aten_forward(*arguments, scale=scale)

    monkeypatch.setattr(torch_varlen, "_operator", lambda: (early, frozenset({"scale"})))
    reason = f"the varlen kernel of torch {torch.__version__} takes no window"
    assert torch_varlen.reject(WINDOW) == reason
    case = Case("early", (3, 2), head_dim=16)
    case.attend(*case.inputs(torch.bfloat16), backend="torch_varlen")
    assert seen == [{"scale": 0.25}]


# Torch's own wrapper may prefer cuDNN, which plans for every length: not while it serves us.
@pytest.mark.requires("torch.nn.attention")
def test_the_wrapper_is_kept_from_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def kernel(*arguments: Any, **options: Any) -> Any:
        cuda = torch.backends.cuda
        seen.append((cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()))
        return varlen_with_flag(*arguments, **options)

    install(monkeypatch, "varlen_flag")
    monkeypatch.setattr(torch_varlen, "_kernel", lambda: (kernel, frozenset({"is_causal"})))
    case = Case("wrapper", (3, 2), head_dim=16)
    case.attend(*case.inputs(torch.bfloat16), backend="torch_varlen")
    assert seen == [(True, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    "changes, told, warn_only, repeats",
    [
        ({"deterministic": True}, True, False, True),
        ({"deterministic": True}, True, True, False),
        ({"deterministic": True}, False, False, False),
        ({"deterministic": True, "needs_grad": False}, False, False, True),
        ({}, False, False, True),
    ],
)
def test_gradients_repeat_only_if_torch_is_told_so(
    changes: dict[str, bool], told: bool, warn_only: bool, repeats: bool
) -> None:
    reason = "repeats its gradients under torch.use_deterministic_algorithms(True) only"
    try:
        torch.use_deterministic_algorithms(told, warn_only=warn_only)
        said = torch_varlen.reject_layout(replace(REQUEST, **changes), LAYOUT, LAYOUT)
    finally:
        torch.use_deterministic_algorithms(False)
    assert said == (None if repeats else reason)


def test_backward_of_thousands_of_short_sequences_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "aten")
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[3]) - 1)
        return aten_forward(*arguments, **options)

    monkeypatch.setattr(torch_varlen, "_operator", lambda: (counted, frozenset()))
    # 256 heads of 256 are 2**16 numbers a row: 255 sequences of 128 spare rows are 2**31.
    case = Case("many", (1,) * 300, num_heads=256, num_kv_heads=1, head_dim=256)
    inputs = case.inputs(torch.bfloat16)
    out = case.attend(*inputs, backend="torch_varlen")
    assert calls == [150, 150]
    with torch.no_grad():
        whole = case.attend(*inputs, backend="torch_varlen")
    assert calls == [150, 150, 300]
    assert torch.equal(out, whole)


def test_heads_that_are_slices_of_a_fused_tensor_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "aten")
    seen: list[int] = []

    def kernel(*arguments: Any, **options: Any) -> Any:
        seen.extend(x.data_ptr() for x in arguments[:3])
        return arguments[0], None

    monkeypatch.setattr(torch_varlen, "_operator", lambda: (kernel, frozenset()))
    views = list(torch.zeros(5, 3, 6, 16, dtype=torch.bfloat16).unbind(1))
    case = Case("fused", (3, 2), num_kv_heads=6, head_dim=16)
    case.attend(*views, backend="torch_varlen")
    assert seen == [view.data_ptr() for view in views]


@pytest.mark.parametrize("version, saves", [("2.9.1", False), ("2.10.0", True), ("2.13.0", True)])
def test_its_backward_is_called_alone_where_lse_has_a_known_shape(
    version: str, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "aten")
    monkeypatch.setattr(torch, "__version__", version)
    assert torch_varlen.saves_lse() == saves
