"""Which backend serves a request and why not the others, with planted backends in their places."""

from __future__ import annotations

import logging
import threading
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from padless import selection
from padless.answers import Candidate, Selection
from padless.backends import sdpa
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout
from padless.qualification import known_verdict, qualify
from padless.selection import (
    BACKENDS,
    adapter,
    forget_selections,
    select_backend,
)
from planted_backends import FAULTS, flash_like, gradient_with, planted, with_inputs

CPU = AttentionRequest(
    torch.device("cpu"), torch.float32, head_dim=32, num_heads=4, num_kv_heads=2, causal=True
)
TRAINING = replace(CPU, needs_grad=True)
WRONG_HEADS = FAULTS["wrong_kv_head"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and nothing remembered before and after it."""
    monkeypatch.setenv("PADLESS_CACHE", str(tmp_path))
    monkeypatch.delenv("PADLESS_REQUALIFY", raising=False)
    forget_selections()
    yield tmp_path
    forget_selections()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts planted backends into the order of selection, before sdpa and the reference."""

    def put(*backends: Any, rest: tuple[str, ...] = ("sdpa", "reference")) -> None:
        registry = {backend.NAME: backend for backend in backends}
        monkeypatch.setattr(selection, "BACKENDS", (*registry, *rest))
        monkeypatch.setattr(
            selection, "adapter", lambda name: registry[name] if name in registry else adapter(name)
        )

    return put


def takes(*head_dims: int) -> Callable[[AttentionRequest], str | None]:
    """A `reject` that accepts some sizes of head."""
    return lambda request: (
        None if request.head_dim in head_dims else f"needs head_dim in {list(head_dims)}"
    )


def wrong_at(*head_dims: int) -> Any:
    """A backend whose dq is right in other sizes of head only, as FlashAttention-4's on Hopper."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        if q.shape[-1] in head_dims:
            q = gradient_with(q, lambda dq: 2.3 * dq)
        return flash_like(q, k, v, *rest, **options)

    return attend


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_an_adapter_of_its_name(name: str) -> None:
    module = adapter(name)
    assert module.NAME == name
    assert isinstance(module.version(), str)
    assert callable(module.reject)
    assert callable(module.varlen)


def test_request_describes_packed_tensors() -> None:
    q, k = torch.zeros(5, 4, 32), torch.zeros(7, 2, 32)
    assert AttentionRequest.of(q, k) == CPU
    assert AttentionRequest.of(q, k, k.clone().requires_grad_()) == TRAINING


def test_auto_on_the_cpu_takes_sdpa_and_says_why_not_the_faster(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = select_backend(TRAINING)
    assert (chosen.name, chosen.head_dim) == ("sdpa", 32)
    assert [candidate.name for candidate in chosen.trace] == list(BACKENDS[:5])
    assert all(c.rejected == "needs CUDA, got cpu" for c in chosen.trace[:-1])
    assert chosen.trace[-1] == Candidate("sdpa", 32, None)
    # What cannot run on this device is nothing to warn of.
    assert warnings_in(caplog) == []
    verdict = known_verdict(sdpa, TRAINING)
    assert verdict is not None
    assert verdict.passed


def test_auto_takes_the_first_that_is_right_and_asks_no_further(
    install: Callable[..., None],
) -> None:
    fast, next_one = planted(name="fast"), planted(name="next")
    install(fast, next_one)
    assert select_backend(TRAINING) == Selection("fast", 32, (Candidate("fast", 32, None),))
    assert next_one.calls == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_is_passed_over_with_the_reason(
    fault: str, install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    wrong, right = planted(FAULTS[fault], name="wrong"), planted(name="right")
    install(wrong, right)
    # The largest size of head, so that there is none to pad to.
    request = replace(TRAINING, head_dim=256, dtype=torch.bfloat16)
    reason = f"computes wrong here: {qualify(wrong, request).reason}"
    assert select_backend(request) == Selection(
        "right", 256, (Candidate("wrong", 256, reason), Candidate("right", 256, None))
    )
    assert warnings_in(caplog) == [
        f"wrong is passed over at head_dim 256 in torch.bfloat16: {reason}; right serves instead"
    ]


def test_a_backend_wrong_in_some_head_dims_is_used_padded(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    fast = planted(wrong_at(72, 80, 96, 112), name="fast")
    install(fast)
    for head_dim, padded in [(64, 64), (72, 128), (88, 88), (112, 128), (128, 128)]:
        request = replace(TRAINING, head_dim=head_dim)
        chosen = select_backend(request)
        assert (chosen.name, chosen.head_dim) == ("fast", padded)
        assert chosen.trace[-1] == Candidate("fast", padded, None)
        asked = [candidate.head_dim for candidate in chosen.trace]
        assert asked == sorted({head_dim, padded} | ({96} if head_dim == 72 else set()))
        for candidate in chosen.trace[:-1]:
            assert candidate.rejected is not None
            assert candidate.rejected.startswith("computes wrong here: dq of head ")
    first, second = warnings_in(caplog)
    assert first.startswith("fast is passed over at head_dim 72 in torch.float32: computes wrong ")
    assert first.endswith("; fast with heads padded from 72 to 128 serves instead")
    assert second.startswith("fast is passed over at head_dim 112 in torch.float32: ")


def test_a_backend_that_is_right_forward_only_serves_where_no_gradient_is_asked_for(
    install: Callable[..., None],
) -> None:
    install(planted(wrong_at(256), name="fast"))
    assert select_backend(replace(CPU, head_dim=256)).name == "fast"
    assert select_backend(replace(TRAINING, head_dim=256)).name == "sdpa"


def test_a_backend_that_rejects_a_head_dim_is_used_padded(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    fast = planted(name="fast", reject=takes(64, 128))
    install(fast)
    reason = "needs head_dim in [64, 128]"
    assert select_backend(replace(CPU, head_dim=33)) == Selection(
        "fast", 64, (Candidate("fast", 33, reason), Candidate("fast", 64, None))
    )
    assert select_backend(replace(CPU, head_dim=72)).head_dim == 128
    beyond = select_backend(replace(CPU, head_dim=192))
    assert (beyond.name, beyond.head_dim) == ("sdpa", 192)
    assert beyond.trace == (Candidate("fast", 192, reason), Candidate("sdpa", 192, None))
    assert warnings_in(caplog) == []


def test_padded_heads_give_the_attention_of_the_request(install: Callable[..., None]) -> None:
    from padless.attention import varlen_attention

    install(planted(wrong_at(24), name="fast", reject=takes(24, 64)))
    layout = VarlenLayout.from_lengths([5, 9])
    inputs = [torch.randn(14, 2, 24, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = varlen_attention(*inputs, layout, backend="reference")
    got = varlen_attention(*inputs, layout)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_reference_serves_where_nothing_else_is_right_and_says_so(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    request = replace(TRAINING, head_dim=256)
    install(planted(WRONG_HEADS, name="wrong"), rest=("reference",))
    for _ in range(2):
        assert select_backend(request).name == "reference"
    assert [m.split(":")[0] for m in warnings_in(caplog)] == [
        "wrong is passed over at head_dim 256 in torch.float32",
        f"no kernel serves {request}, only the formula, which is slow and takes memory",
    ]


def test_the_reference_is_not_measured_by_itself(install: Callable[..., None], cache: Path) -> None:
    install(rest=("reference",))
    assert select_backend(TRAINING).name == "reference"
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_named_backend_is_the_only_one_asked_and_is_not_measured(
    name: str, install: Callable[..., None], cache: Path
) -> None:
    backends = planted(name="first"), planted(WRONG_HEADS, name="second")
    install(*backends)
    assert select_backend(TRAINING, name) == Selection(name, 32, (Candidate(name, 32, None),))
    assert [backend.calls for backend in backends] == [[], []]
    assert list(cache.iterdir()) == []


def test_a_named_backend_known_to_be_wrong_is_used_and_said_once(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    wrong = planted(WRONG_HEADS, name="wrong")
    install(wrong)
    reason = qualify(wrong, TRAINING).reason
    # As a later process finds it, on disk.
    forget_selections()
    for request in (TRAINING, TRAINING, replace(TRAINING, num_heads=8, num_kv_heads=4)):
        assert select_backend(request, "wrong").name == "wrong"
    assert warnings_in(caplog) == [
        f"wrong computes wrong here: {reason}; it is used because it was named"
    ]


def test_a_named_backend_is_padded_to_what_it_takes_and_no_further(
    install: Callable[..., None],
) -> None:
    install(planted(wrong_at(96), name="fast", reject=takes(96, 128)))
    chosen = select_backend(replace(TRAINING, head_dim=72), "fast")
    assert (chosen.name, chosen.head_dim) == ("fast", 96)
    assert select_backend(replace(TRAINING, head_dim=96), "fast").head_dim == 96


def test_a_named_backend_that_rejects_raises(install: Callable[..., None]) -> None:
    install(planted(name="fast", reject=takes(64)))
    request = replace(CPU, head_dim=128)
    with pytest.raises(BackendUnavailableError) as caught:
        select_backend(request, "fast")
    assert str(caught.value) == (f"no backend can serve {request}: fast: needs head_dim in [64]")


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_integers_are_rejected_with_the_reason(name: str) -> None:
    request = replace(CPU, dtype=torch.int64)
    with pytest.raises(BackendUnavailableError, match=r"needs a floating dtype, got torch\.int64"):
        select_backend(request, name)


def test_the_error_lists_every_candidate_when_none_can_serve(
    install: Callable[..., None],
) -> None:
    install(planted(WRONG_HEADS, name="wrong", reject=takes(192, 256)), rest=())
    request = replace(TRAINING, head_dim=192)
    with pytest.raises(BackendUnavailableError) as caught:
        select_backend(request)
    reasons = [
        qualify(adapter_of("wrong"), replace(request, head_dim=d)).reason for d in (192, 256)
    ]
    assert str(caught.value) == (
        f"no backend can serve {request}: wrong: computes wrong here: {reasons[0]}; "
        f"wrong at head_dim 256: computes wrong here: {reasons[1]}"
    )


def adapter_of(name: str) -> Any:
    return selection.adapter(name)


@pytest.mark.parametrize("name", ["flash", "", "Auto", "request"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        select_backend(CPU, name)
    assert str(caught.value) == (
        "backend must be 'auto' or one of fa4, fa3, torch_varlen, fa2, sdpa, fa1, reference, "
        f"got {name!r}"
    )


def test_backends_to_pass_over_are_in_the_trace_and_not_asked(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = planted(name="first"), planted(name="second")
    install(first, second)
    usual = select_backend(TRAINING)
    reason = "too many sequences for its scratch buffer"
    assert select_backend(TRAINING, passing_over={"first": reason}) == Selection(
        "second", 32, (Candidate("first", 32, reason), Candidate("second", 32, None))
    )
    # It was of one batch: the next one gets the usual answer.
    assert select_backend(TRAINING) is usual
    assert warnings_in(caplog) == []


def _slow_and_quick(install: Callable[..., None], **quick: Any) -> tuple[Any, Any]:
    slow, other = planted(name="slow"), planted(name="quick", **quick)
    slow.SLOW_TO_LAUNCH, other.QUICK_TO_LAUNCH = True, True
    install(slow, other)
    return slow, other


def test_little_work_goes_to_what_is_launched_quickly(install: Callable[..., None]) -> None:
    slow, _ = _slow_and_quick(install)
    few = select_backend(TRAINING, little_work=True)
    reason = "so few tokens are done sooner by what takes the host less time to launch"
    assert few.trace == (Candidate("slow", 32, reason), Candidate("quick", 32, None))
    assert slow.calls == [], "it was measured, which takes seconds for a kernel that is not needed"
    assert select_backend(TRAINING, little_work=True) is few
    many = select_backend(TRAINING)
    assert many.name == "slow"
    assert select_backend(TRAINING, little_work=True) is few
    assert select_backend(TRAINING) is many
    named = select_backend(TRAINING, "slow", little_work=True)
    assert named.name == "slow"
    assert select_backend(TRAINING, "slow", little_work=True) is named


@pytest.mark.parametrize("case", ["wrong", "padded", "not quick", "none is slow"])
def test_little_work_changes_nothing_where_no_quick_one_serves(
    case: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = TRAINING
    if case == "wrong":
        _slow_and_quick(install, attend=WRONG_HEADS)
    else:
        slow, quick = _slow_and_quick(install)
        if case == "padded":
            request = replace(TRAINING, head_dim=56)
            quick.reject = lambda asked: "not 56" if asked.head_dim == 56 else None
        elif case == "not quick":
            del quick.QUICK_TO_LAUNCH
        else:
            del slow.SLOW_TO_LAUNCH
    first = select_backend(request, little_work=True)
    assert first == select_backend(request) and first.name == "slow"
    monkeypatch.setattr(selection, "_select", lambda *_: pytest.fail("asked again"))
    assert select_backend(request, little_work=True) is first


def test_an_answer_is_remembered_in_every_mode(install: Callable[..., None]) -> None:
    fast = planted(name="fast")
    install(fast)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = select_backend(TRAINING)
    calls = len(fast.calls)
    assert calls > 0
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert select_backend(replace(TRAINING)) is first
    assert len(fast.calls) == calls


def test_a_remembered_answer_costs_a_microsecond_or_two() -> None:
    q, k = torch.zeros(5, 4, 32), torch.zeros(7, 2, 32)
    request = AttentionRequest.of(q, k)
    select_backend(request)
    best = min(timeit.repeat(lambda: select_backend(request), number=2000, repeat=20)) / 2000
    # 1 us on one core of a server of 2024; the rest is room for a loaded machine.
    assert best < 10e-6


def test_forgetting_asks_again(install: Callable[..., None]) -> None:
    install(planted(name="fast"))
    first = select_backend(TRAINING)
    install(planted(name="faster"), planted(name="fast"))
    assert select_backend(TRAINING) is first
    forget_selections()
    assert select_backend(TRAINING).name == "faster"


def test_threads_agree(install: Callable[..., None]) -> None:
    fast = planted(name="fast")
    install(fast)
    answers: list[Selection] = []
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait()
        answers.append(select_backend(TRAINING))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [Selection("fast", 32, (Candidate("fast", 32, None),))] * 8
    assert len(fast.calls) == 3


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a CUDA graph is being captured, for the test to say; CUDA is not there otherwise."""
    captured = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    monkeypatch.setattr(
        selection, "qualify", lambda backend, request: qualify(backend, as_on_cpu(request))
    )
    monkeypatch.setattr(
        selection,
        "known_verdict",
        lambda backend, request: known_verdict(backend, as_on_cpu(request)),
    )
    return captured


def as_on_cpu(request: AttentionRequest) -> AttentionRequest:
    return replace(request, device=CPU.device)


def test_nothing_is_measured_while_a_cuda_graph_is_captured(
    capturing: list[bool], install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    unknown, known = planted(name="unknown"), planted(name="known")
    install(unknown, known)
    request = replace(TRAINING, device=torch.device("cuda", 0), head_dim=256)
    qualify(known, as_on_cpu(request))
    reason = (
        "not measured yet, which it cannot be while a CUDA graph is captured; "
        "make the call once before"
    )
    assert select_backend(request) == Selection(
        "known", 256, (Candidate("unknown", 256, reason), Candidate("known", 256, None))
    )
    assert unknown.calls == []
    assert warnings_in(caplog) == [
        f"unknown is passed over at head_dim 256 in torch.float32: {reason}; known serves instead"
    ]
    # That was no answer to remember.
    capturing[0] = False
    assert select_backend(request).name == "unknown"
    capturing[0] = True
    assert select_backend(request).name == "unknown"


def test_what_was_found_wrong_stays_passed_over_in_a_capture(
    capturing: list[bool], install: Callable[..., None]
) -> None:
    wrong = planted(WRONG_HEADS, name="wrong")
    install(wrong, rest=("reference",))
    request = replace(TRAINING, device=torch.device("cuda", 0), head_dim=256)
    qualify(wrong, as_on_cpu(request))
    chosen = select_backend(request)
    assert chosen.name == "reference"
    assert str(chosen.trace[0].rejected).startswith("computes wrong here: ")


def test_nothing_is_asked_of_cuda_for_a_request_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_device_capability", "get_device_properties", "is_current_stream_capturing"):
        monkeypatch.delattr(torch.cuda, name)
    assert select_backend(TRAINING).name == "sdpa"


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_asks_without_a_graph_break(
    dynamic: bool | None, install: Callable[..., None]
) -> None:
    fast = planted(wrong_at(24), name="fast", reject=takes(24, 64))
    install(fast)

    def double(q: Tensor, k: Tensor) -> Tensor:
        chosen = select_backend(AttentionRequest.of(q, k))
        return q * chosen.head_dim if chosen.name == "fast" else q

    torch._dynamo.reset()
    compiled = torch.compile(double, backend="eager", fullgraph=True, dynamic=dynamic)
    for total in (3, 5, 7):
        q = torch.ones(total, 4, 24, requires_grad=True)
        assert torch.equal(compiled(q, q[:, :2]), 64 * q)
    with torch.no_grad():
        assert torch.equal(compiled(q, q[:, :2]), 24 * q)


def test_a_fault_that_shows_on_outliers_only_is_caught_in_bfloat16(
    install: Callable[..., None],
) -> None:
    # Gaussian inputs alone would have let it pass.
    wrong = planted(FAULTS["dq_wrong_on_outliers_only"], name="wrong")
    install(wrong, planted(name="right"))
    request = replace(TRAINING, dtype=torch.bfloat16, head_dim=256)
    chosen = select_backend(request)
    assert chosen.name == "right"
    assert "on outlier inputs" in str(chosen.trace[0].rejected)


def test_inputs_that_a_backend_changes_are_seen(install: Callable[..., None]) -> None:
    install(planted(with_inputs(lambda q, k, v, *_: (q, k * 1.02, v)), name="wrong"))
    assert select_backend(replace(TRAINING, head_dim=256)).name == "sdpa"
