"""Backends prove themselves by numbers: right ones pass, and every planted fault is caught."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from padless.backends import reference, sdpa
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.qualification import Verdict, forget_verdicts, known_verdict, qualify
from padless.qualification import probe as probe_module
from padless.qualification import verdict as verdict_module
from padless.qualification.isolation import isolated
from padless.qualification.judgement import judge
from padless.qualification.probe import draw_codes, draw_gaussian, draw_outliers, probed_heads
from padless.qualification.record import describe_machine
from planted_backends import FAULTS, flash_like, gradient_with, planted, with_inputs, with_out

CPU = torch.device("cpu")
TRAINING = AttentionRequest(
    CPU, torch.bfloat16, head_dim=64, num_heads=6, num_kv_heads=2, causal=True, needs_grad=True
)
FLOAT32 = replace(TRAINING, dtype=torch.float32)
HALF_AND_FLOAT = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and no verdict in memory before and after it."""
    monkeypatch.setenv("PADLESS_CACHE", str(tmp_path))
    monkeypatch.delenv("PADLESS_REQUALIFY", raising=False)
    forget_verdicts()
    yield tmp_path
    forget_verdicts()


def only_file(cache: Path) -> Path:
    """The one file in the cache."""
    (path,) = cache.iterdir()
    return path


# Groups of one, three, all, and many; heads below, at and above what kernels are built for.
FAMILIES = [
    replace(TRAINING, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
    for num_heads, num_kv_heads, head_dim in [(2, 2, 64), (6, 2, 64), (3, 1, 33), (32, 1, 16)]
    for options in (
        {},
        {"causal": False},
        {"needs_grad": False},
        {"window_size": (7, 0)},
        {"causal": False, "window_size": (200, 3)},
        {"deterministic": True},
    )
]


def in_words(request: AttentionRequest) -> str:
    words = [str(request.head_dim), str(request.num_heads), str(request.num_kv_heads)]
    words += ["causal"] * request.causal + ["grad"] * request.needs_grad
    words += ["det"] * request.deterministic + [f"w{n}" for n in request.window_size if n]
    return "-".join(words)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("family", FAMILIES, ids=in_words)
@pytest.mark.parametrize("backend", [sdpa, reference], ids=lambda backend: backend.NAME)
def test_right_backends_pass_with_room_to_spare(
    backend: Any, family: AttentionRequest, dtype: torch.dtype
) -> None:
    request = replace(family, dtype=dtype)
    assert backend.reject(request) is None
    judgement = judge(backend.varlen, request, seed=3)
    assert judgement.reason == ""
    assert judgement.ratio < 0.8, judgement


@HALF_AND_FLOAT
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_backend_that_rounds_as_flash_kernels_do_passes_with_room_to_spare(
    dtype: torch.dtype, needs_grad: bool
) -> None:
    for num_heads, num_kv_heads, head_dim in [(6, 2, 64), (4, 1, 128), (2, 2, 40)]:
        verdict = qualify(
            planted(),
            replace(
                TRAINING,
                dtype=dtype,
                needs_grad=needs_grad,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
            ),
        )
        assert verdict.passed
        assert verdict.reason == ""
        assert 0 < verdict.ratio < 0.7
        assert verdict.elapsed_ms > 0


@HALF_AND_FLOAT
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str, dtype: torch.dtype) -> None:
    verdict = qualify(planted(FAULTS[fault]), replace(TRAINING, dtype=dtype))
    assert not verdict.passed
    assert verdict.reason
    assert verdict.ratio > 1


# What the reason has to say of it, in bfloat16.
REASONS = {
    "dq_off_by_2_percent": r"dq of head \d is off by 2\.?\d* % on gaussian inputs, 1\.\d+ times",
    "dk_of_one_head_off_by_5_percent": r"dk of head 1 is off by [45]\.\d+ % on gaussian inputs, ",
    "wrong_kv_head": r"out of head \d is off by 1\d\d % on gaussian inputs, 1\d\d times its budget",
    "dq_wrong_on_outliers_only": r"dq of head \d is off by \d+\.?\d* % on outlier inputs, ",
    "nan_on_outliers_only": r"out of head 0 is not finite on outlier inputs",
    "nan_without_keys": r"out of head \d is not finite on outlier inputs",
    "memory_in_dv_without_queries": r"dv of head \d is not finite on outlier inputs",
    "another_dtype": r"out has shape \(100, 6, 64\) and dtype torch\.float64 on gaussian inputs",
    "another_shape": r"raised RuntimeError: The size of tensor a \(384\) must match",
}


@pytest.mark.parametrize("fault", REASONS)
def test_the_reason_names_tensor_error_and_inputs(fault: str) -> None:
    assert re.match(REASONS[fault], qualify(planted(FAULTS[fault]), TRAINING).reason)


def ignoring(option: str, value: Any) -> Any:
    """A backend that takes an option and does not heed it."""

    def attend(*args: Any, **options: Any) -> Tensor:
        return flash_like(*args, **{**options, option: value})

    return planted(attend)


def noisy(*args: Any, **options: Any) -> Tensor:
    """A backend whose dk depends on which of its sums came first."""
    q, k, v, *layouts = args
    noise = 2.0**-9 * torch.randn(k.shape)
    return flash_like(
        q, gradient_with(k, lambda dk: (dk * (1 + noise)).to(k)), v, *layouts, **options
    )


def wrong_when_decoding(*args: Any, **options: Any) -> Tensor:
    out = flash_like(*args, **options)
    return 1.1 * out if args[3].max_seqlen == 1 else out


@HALF_AND_FLOAT
@pytest.mark.parametrize(
    "backend, changes",
    [
        (ignoring("window_size", (None, None)), {"window_size": (7, 0)}),
        # Longer than every sequence of a probe, as the windows of models are.
        (ignoring("window_size", (None, None)), {"window_size": (4096, 0)}),
        (ignoring("window_size", (None, None)), {"causal": False, "window_size": (None, 5)}),
        (ignoring("causal", False), {}),
        (ignoring("causal", True), {"causal": False}),
        (ignoring("softmax_scale", 0.13), {}),
        (planted(noisy), {"deterministic": True}),
        (planted(wrong_when_decoding), {"needs_grad": False}),
    ],
    ids=[
        "window",
        "long window",
        "right window",
        "causal",
        "not causal",
        "scale",
        "noise",
        "decode",
    ],
)
def test_an_option_that_is_not_heeded_fails(
    backend: Any, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    request = replace(TRAINING, dtype=dtype, **changes)
    assert not qualify(backend, request).passed
    assert qualify(planted(name="heeding"), request).passed


def test_a_single_wrong_number_fails() -> None:
    def spoil(out: Tensor, q: Tensor, *_: Any) -> Tensor:
        # Not where q is zero: the mask probe is finer.
        if q.any():
            out[70, 1, 5] += 0.15
        return out

    verdict = qualify(planted(with_out(spoil)), TRAINING)
    assert re.match(r"the largest out is off by \d\.\d+ % on gaussian inputs, ", verdict.reason)


def test_noise_in_the_last_bits_is_no_fault_where_it_was_not_excluded() -> None:
    assert qualify(planted(noisy), TRAINING).passed
    assert qualify(planted(noisy), replace(TRAINING, deterministic=True)).reason == (
        "a second run gives other numbers"
    )


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mask_probe_sees_every_single_wrong_pair(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int
) -> None:
    request = replace(
        TRAINING, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=32
    )
    probe = draw_codes(request, 0)
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        # Within a sequence and across, seen and unseen, first and last rows too.
        query, key = (
            min(int(torch.randint(-3, layout.total, (), generator=generator)), layout.total - 1)
            for layout in (probe.layout_q, probe.layout_k)
        )

        def flipped(mask: Tensor, pair: tuple[int, int] = (query, key)) -> Tensor:
            if mask.shape == (probe.layout_q.total, probe.layout_k.total):
                mask[pair] = ~mask[pair]
            return mask

        def attend(*args: Any, flipped: Any = flipped, **options: Any) -> Tensor:
            return flash_like(*args, mask=flipped, **options)

        assert "(the mask probe)" in judge(attend, request).reason, (i, query, key)


def test_a_large_group_is_no_false_alarm_at_the_lengths_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe_module, "_kind", lambda request: "gpu")
    request = replace(TRAINING, num_heads=32, num_kv_heads=1, head_dim=16, causal=False)
    judgement = judge(sdpa.varlen, request)
    assert judgement.reason == ""
    assert judgement.ratio < 0.8


def test_the_mask_probe_sees_one_wrong_pair_in_dv_alone() -> None:
    # By which the gradient of that key moves: one row of signs in the scale of dout.
    def one_more(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        def spoil(dv: Tensor) -> Tensor:
            dv[17, -1, ::2] += 1 / 16
            dv[17, -1, 1::2] -= 1 / 16
            return dv

        return (q, k, v) if q.any() else (q, k, gradient_with(v, spoil))

    verdict = qualify(planted(with_inputs(one_more)), TRAINING)
    assert verdict.reason == "dv is not of exactly the visible keys (the mask probe)"


def test_numbers_that_are_not_finite_in_the_mask_probe_fail() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return gradient_with(q, lambda dq: dq if q.any() else dq * float("nan")), k, v

    verdict = qualify(planted(with_inputs(attend)), TRAINING)
    assert verdict.reason == "numbers are not finite on the mask probe"


def test_outlier_inputs_have_the_spread_of_activations() -> None:
    probe = draw_outliers(TRAINING, 0)
    for x in (probe.q, probe.k, probe.v, probe.dout):
        by_channel = x.float().square().mean((0, 1)).sqrt()
        assert 15 < by_channel.max() / by_channel.median() < 100
        assert by_channel.sort().values[-4] < 3 * by_channel.median()
    assert probe.k.float().mean((0, 1)).max() > 25
    assert not any(x.is_contiguous() for x in (probe.q, probe.k, probe.v))
    scores = torch.einsum("shd,td->hst", probe.q.float(), probe.k[:, 0].float()) / 8
    largest = scores[:, :20, :33].softmax(-1).amax(-1).median(1).values
    # Flat in the first head, peaked in the fifth, and far from zero in the last.
    assert largest[0] < 0.3
    assert largest[4] > 0.5
    assert scores[-1].mean() > 20
    assert scores[:-1].abs().max() < 60


def test_probes_stay_within_float16() -> None:
    for head_dim in (16, 128, 256, 512):
        request = replace(TRAINING, dtype=torch.float16, head_dim=head_dim)
        for draw in (draw_gaussian, draw_outliers, draw_codes):
            probe = draw(request, 0)
            assert all(x.isfinite().all() for x in (probe.k, probe.v, probe.dout))
        assert judge(reference.varlen, request).reason == ""


def test_float32_is_judged_by_what_kernels_of_tf32_products_reach() -> None:
    # Three TF32 products have errors of some 1e-6, one has 1e-3 and is not float32.
    def rounded(bits: int) -> Any:
        def change(out: Tensor, *_: Any) -> Tensor:
            return out * (1 + 2.0**-bits * torch.rand(out.shape).sub(0.5))

        return planted(with_out(change))

    assert qualify(rounded(16), FLOAT32).passed
    assert not qualify(rounded(10), replace(FLOAT32, head_dim=72)).passed


def test_probes_have_the_groups_of_the_request_and_few_heads() -> None:
    for (num_heads, num_kv_heads), on_cpu, on_gpu in [
        ((32, 8), (8, 2), (32, 8)),
        ((64, 8), (16, 2), (32, 4)),
        ((71, 1), (71, 1), (71, 1)),
        ((128, 128), (2, 2), (32, 32)),
        ((9, 3), (6, 2), (9, 3)),
    ]:
        request = replace(TRAINING, num_heads=num_heads, num_kv_heads=num_kv_heads)
        assert probed_heads(request) == on_cpu
        assert probed_heads(replace(request, device=torch.device("cuda", 0))) == on_gpu


class _Recording(TorchDispatchMode):
    """A mode that sees every operation, as selective checkpointing is one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _inside_backward(act: Callable[[], None]) -> None:
    x = torch.ones(2, requires_grad=True)

    def spoil(grad: Tensor) -> Tensor:
        act()
        return grad

    gradient_with(x, spoil).sum().backward()


def _inside_operator(act: Callable[[], None]) -> None:
    library = torch.library.Library("padless_test", "FRAGMENT")
    library.define("act(Tensor x) -> Tensor")

    def run(x: Tensor) -> Tensor:
        act()
        return x.clone()

    library.impl("act", run, "CPU")
    torch.ops.padless_test.act(torch.ones(2))


def _inside_checkpoint(act: Callable[[], None], *, use_reentrant: bool) -> None:
    done = []

    def region(x: Tensor) -> Tensor:
        # In the first pass alone, as a verdict is remembered.
        if not done:
            act()
            done.append(True)
        return (x @ x).exp()

    x = torch.randn(3, 3, requires_grad=True)
    checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()


def _inside_trace(act: Callable[[], None]) -> None:
    def traced(x: Tensor) -> Tensor:
        act()
        return x * 2

    graph = torch.jit.trace(traced, torch.ones(3), check_trace=False).graph
    assert len(list(graph.nodes())) <= 3


def _inside_transform(act: Callable[[], None]) -> None:
    torch.func.vmap(lambda x: (act(), 2 * x)[1])(torch.ones(3))
    torch.func.grad(lambda x: (act(), 2 * x.sum())[1])(torch.ones(3))


def _within(context: Callable[[], AbstractContextManager[Any]]) -> Callable[..., None]:
    def place(act: Callable[[], None]) -> None:
        with context():
            act()

    return place


PLACES: dict[str, Callable[[Callable[[], None]], None]] = {
    "nowhere special": _within(nullcontext),
    "inference_mode": _within(torch.inference_mode),
    "no_grad": _within(torch.no_grad),
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "default device": _within(lambda: torch.device("meta")),
    "fake tensors": _within(FakeTensorMode),
    "saved tensor hooks": _within(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: 1 / 0, lambda x: x)
    ),
    "no saved tensor hooks": _within(
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here")
    ),
    "backward": _inside_backward,
    "operator": _inside_operator,
    "checkpoint": lambda act: _inside_checkpoint(act, use_reentrant=False),
    "reentrant checkpoint": lambda act: _inside_checkpoint(act, use_reentrant=True),
    "trace": _inside_trace,
    "transform": _inside_transform,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", [None, "dq_off_by_2_percent"])
def test_the_verdict_is_the_same_in_every_mode(place: str, fault: str | None) -> None:
    backend = planted(FAULTS[fault] if fault else flash_like)
    expected = qualify(backend, TRAINING)
    verdicts = []

    def act() -> None:
        forget_verdicts()
        (Path(os.environ["PADLESS_CACHE"])).joinpath(only_name()).unlink(missing_ok=True)
        verdicts.append(qualify(backend, TRAINING))

    PLACES[place](act)
    assert verdicts
    for verdict in verdicts:
        assert replace(verdict, elapsed_ms=0) == replace(expected, elapsed_ms=0)
    assert len(backend.calls) == 3 * (1 + len(verdicts)) or fault


def only_name() -> str:
    return only_file(Path(os.environ["PADLESS_CACHE"])).name


def test_isolation_is_as_a_fresh_thread() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), isolated(CPU):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_cpu_enabled()
        x = torch.ones(2, 2, requires_grad=True)
        assert (x @ x).dtype == torch.float32
        assert (x @ x).requires_grad


def test_a_mode_around_it_sees_nothing_of_it() -> None:
    with _Recording() as recording:
        assert qualify(sdpa, TRAINING).passed
    assert recording.seen == []


def test_nothing_of_the_process_is_changed() -> None:
    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_cpu_enabled(),
            torch.get_float32_matmul_precision(),
            str(torch._C._dispatch_tls_local_include_set()),
            str(torch._C._dispatch_tls_local_exclude_set()),
        ]

    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        before = state()
        assert qualify(sdpa, TRAINING).passed
        with torch.inference_mode():
            inside = state()
            assert qualify(sdpa, FLOAT32).passed
            assert state() == inside
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_a_family_is_measured_once_and_remembered(cache: Path) -> None:
    backend = planted()
    assert known_verdict(backend, TRAINING) is None
    first = qualify(backend, TRAINING)
    calls = len(backend.calls)
    assert calls > 0
    # More heads of the same groups, a longer window than any probe: the same family.
    assert qualify(backend, replace(TRAINING, num_heads=30, num_kv_heads=10)) is first
    assert known_verdict(backend, TRAINING) is first
    assert len(backend.calls) == calls
    # From disk, as a later process does.
    forget_verdicts()
    assert qualify(backend, TRAINING) == first
    assert len(backend.calls) == calls


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float16},
        {"head_dim": 72},
        {"num_heads": 8},
        {"num_heads": 3, "num_kv_heads": 1},
        {"causal": False},
        {"window_size": (9, 0)},
        {"deterministic": True},
        {"needs_grad": False},
    ],
    ids=str,
)
def test_another_family_is_measured_by_itself(changes: dict[str, Any]) -> None:
    backend = planted()
    qualify(backend, TRAINING)
    assert known_verdict(backend, replace(TRAINING, **changes)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(torch, "__version__", "9.9.9"),
        lambda patch: patch.setattr("padless.__version__", "9.9.9"),
        lambda patch: patch.setattr("padless.qualification.record.PROBE_VERSION", 99),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "new"),
    ],
    ids=["torch", "padless", "probes", "processor"],
)
def test_another_machine_measures_anew_and_keeps_a_file_of_its_own(
    change: Callable[[pytest.MonkeyPatch], None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = planted()
    qualify(backend, TRAINING)
    change(monkeypatch)
    describe_machine.cache_clear()
    try:
        assert known_verdict(backend, TRAINING) is None
        qualify(backend, TRAINING)
        assert len(list(cache.iterdir())) == 2
    finally:
        monkeypatch.undo()
        describe_machine.cache_clear()


def test_another_version_of_the_backend_is_measured_anew(cache: Path) -> None:
    assert not qualify(planted(FAULTS["wrong_kv_head"], version="1.0"), TRAINING).passed
    assert qualify(planted(version="1.1"), TRAINING).passed
    assert qualify(planted(name="other", version="1.0"), TRAINING).passed
    forget_verdicts()
    assert not qualify(planted(version="1.0"), TRAINING).passed
    assert len(json.loads(only_file(cache).read_text())["verdicts"]) == 3


def test_deterministic_algorithms_of_torch_are_another_family() -> None:
    def refuses(*args: Any, **options: Any) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("flash does not have a deterministic implementation")
        return flash_like(*args, **options)

    backend = planted(refuses)
    torch.use_deterministic_algorithms(True)
    try:
        assert not qualify(backend, TRAINING).passed
    finally:
        torch.use_deterministic_algorithms(False)
    assert qualify(backend, TRAINING).passed


def test_the_file_is_json_of_machine_and_verdicts(cache: Path) -> None:
    passed, failed = planted(), planted(FAULTS["nan_without_keys"], name="wrong")
    expected = [qualify(passed, TRAINING), qualify(failed, TRAINING)]
    assert expected[1].error == expected[1].ratio == float("inf")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(only_file(cache).read_text(), parse_constant=refuse)
    assert content["machine"]["torch"] == torch.__version__
    family = "bfloat16, head_dim 64, heads 6/2, causal, window None/None, with gradients"
    assert list(content["verdicts"]) == [f"planted 1.0, {family}", f"wrong 1.0, {family}"]
    forget_verdicts()
    assert [known_verdict(passed, TRAINING), known_verdict(failed, TRAINING)] == expected


@pytest.mark.parametrize("value, is_read", [("1", False), ("yes", False), ("0", True), ("", True)])
def test_requalify_measures_again_and_writes_the_new_verdict(
    value: str, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not qualify(planted(FAULTS["wrong_kv_head"]), TRAINING).passed
    forget_verdicts()
    monkeypatch.setenv("PADLESS_REQUALIFY", value)
    assert qualify(planted(), TRAINING).passed != is_read
    forget_verdicts()
    monkeypatch.delenv("PADLESS_REQUALIFY")
    verdict = known_verdict(planted(), TRAINING)
    assert verdict is not None
    assert verdict.passed != is_read


GOOD = {"passed": True, "reason": "", "error": 0.1, "ratio": 0.2, "elapsed_ms": 3.0}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "",
        lambda content: "{" + json.dumps(content),
        lambda content: "[]",
        lambda content: "null",
        lambda content: json.dumps({**content, "machine": {"torch": "1.0"}}),
        lambda content: json.dumps({**content, "verdicts": []}),
        lambda content: json.dumps({**content, "verdicts": dict.fromkeys(content["verdicts"], 1)}),
        lambda content: json.dumps(
            {**content, "verdicts": {key: {} for key in content["verdicts"]}}
        ),
        *(
            lambda content, wrong=wrong: json.dumps(
                {**content, "verdicts": {key: {**GOOD, **wrong} for key in content["verdicts"]}}
            )
            for wrong in ({"passed": 1}, {"passed": False}, {"reason": None}, {"error": "small"})
        ),
    ],
)
def test_a_file_that_is_not_ours_is_not_believed_and_is_replaced(
    spoil: Callable[[Any], str], cache: Path
) -> None:
    wrong = planted(FAULTS["wrong_kv_head"])
    qualify(wrong, TRAINING)
    path = only_file(cache)
    path.write_text(spoil(json.loads(path.read_text())))
    forget_verdicts()
    assert known_verdict(wrong, TRAINING) is None
    assert not qualify(wrong, TRAINING).passed
    forget_verdicts()
    found = known_verdict(wrong, TRAINING)
    assert found is not None
    assert not found.passed


def test_a_cache_that_cannot_be_used_is_said_once_at_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PADLESS_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level("DEBUG", logger="padless"):
        for head_dim in (32, 64):
            assert qualify(planted(), replace(TRAINING, head_dim=head_dim)).passed
    said = [record for record in caplog.records if "cannot be kept" in record.message]
    assert len(said) == 1
    assert said[0].levelname == "DEBUG"


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADLESS_CACHE", "~nobody-of-this-name/cache")
    assert qualify(planted(), TRAINING).passed


def test_writers_keep_what_others_wrote_and_leave_no_other_file(cache: Path) -> None:
    qualify(planted(name="mine"), TRAINING)
    path = only_file(cache)
    content = json.loads(path.read_text())
    content["verdicts"]["theirs"] = GOOD
    path.write_text(json.dumps(content))
    qualify(planted(name="mine too"), TRAINING)
    names = [
        family.split(" 1.0")[0] for family in json.loads(only_file(cache).read_text())["verdicts"]
    ]
    assert names == ["mine", "theirs", "mine too"]


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from planted_backends import planted
from padless.backends.request import AttentionRequest
from padless.qualification import known_verdict
request = AttentionRequest(torch.device("cpu"), torch.bfloat16, 64, 6, 2, True, needs_grad=True)
verdict = known_verdict(planted(), request)
print(verdict.passed, verdict.reason)
"""


def test_a_fresh_process_reads_the_verdict() -> None:
    reason = qualify(planted(FAULTS["wrong_kv_head"]), TRAINING).reason
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == f"False {reason}", done.stderr


def test_threads_measure_a_family_once() -> None:
    backend = planted()
    verdicts: list[Verdict] = []
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait()
        verdicts.append(qualify(backend, TRAINING))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(verdicts) == 8
    assert len({id(verdict) for verdict in verdicts}) == 1
    assert len(backend.calls) == 3


def test_a_backward_pass_waits_for_nobody() -> None:
    # As if another thread were measuring, and waited for gradients from this one.
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with verdict_module._lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    verdicts: list[Verdict] = []
    asker = threading.Thread(
        target=lambda: _inside_backward(lambda: verdicts.append(qualify(planted(), TRAINING)))
    )
    asker.start()
    asker.join(30)
    done.set()
    holder.join(60)
    assert [verdict.passed for verdict in verdicts] == [True]


def test_a_backend_that_raises_has_failed_for_this_process_alone(cache: Path) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        raise ImportError("libcudart.so.13: cannot open\nshared object file")

    verdict = qualify(planted(broken), TRAINING)
    assert not verdict.passed
    assert verdict.reason == "raised ImportError: libcudart.so.13: cannot open"
    assert qualify(planted(), TRAINING) is verdict
    assert list(cache.iterdir()) == []
    forget_verdicts()
    assert qualify(planted(), TRAINING).passed


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_error_without_words_is_named(text: str) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        raise NotImplementedError(text)

    assert qualify(planted(broken), TRAINING).reason == "raised NotImplementedError: "


def test_an_interrupt_is_no_verdict() -> None:
    def interrupted(*args: Any, **options: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qualify(planted(interrupted), TRAINING)
    assert qualify(planted(), TRAINING).passed


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[AttentionRequest, list[str]]:
    """A CUDA request on a machine without CUDA, and the synchronisations that were made."""
    synchronised: list[str] = []
    monkeypatch.setattr(verdict_module, "isolated", lambda device: nullcontext())
    monkeypatch.setattr(verdict_module, "describe_machine", lambda device: '{"device": "H"}')
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: synchronised.append(str(device)))
    return replace(TRAINING, device=torch.device("cuda", 1)), synchronised


def test_a_backend_that_kills_the_device_is_remembered_and_the_error_raised(
    on_cuda: tuple[AttentionRequest, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, _ = on_cuda

    def illegal(*args: Any, **options: Any) -> Any:
        def dead(device: torch.device) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", dead)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel")

    monkeypatch.setattr(verdict_module, "judge", illegal)
    with pytest.raises(BackendUnavailableError) as caught:
        qualify(planted(), request)
    assert str(caught.value) == (
        "planted raised RuntimeError: CUDA error: an illegal memory access was encountered while "
        "it was measured, and CUDA cannot go on in this process; start it again: planted is passed "
        "over then"
    )
    forget_verdicts()
    found = known_verdict(planted(), request)
    assert found is not None
    assert not found.passed


def test_a_launch_that_fails_leaves_the_device_alive(
    on_cuda: tuple[AttentionRequest, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, synchronised = on_cuda

    def no_image(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(verdict_module, "judge", no_image)
    assert qualify(planted(), request).reason.startswith("raised RuntimeError: CUDA error: no ker")
    # Before, so that errors of the caller's kernels are not taken for the backend's; and after.
    assert synchronised == ["cuda:1", "cuda:1"]
    assert list(cache.iterdir()) == []


def test_an_error_of_the_callers_own_kernels_is_the_callers(
    on_cuda: tuple[AttentionRequest, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(device: torch.device) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match=r"^CUDA error: device-side assert triggered$"):
        qualify(planted(), on_cuda[0])
    assert known_verdict(planted(), on_cuda[0]) is None


def test_nothing_is_measured_on_tensors_without_numbers() -> None:
    backend = planted()
    assert qualify(backend, replace(TRAINING, device=torch.device("meta"))).passed
    assert backend.calls == []


def test_sdpa_in_float32_is_measured_in_milliseconds() -> None:
    qualify(sdpa, FLOAT32)  # what torch sets up at the first backward pass of a process
    times_ms = []
    for head_dim in (40, 48, 56):
        times_ms.append(qualify(sdpa, replace(FLOAT32, head_dim=head_dim)).elapsed_ms)
    # 20 ms on one core of a server of 2024; the rest is room for a loaded machine.
    assert min(times_ms) < 150
