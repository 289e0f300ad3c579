"""Verdicts are measured once for a family and machine, kept on disk, and survive bad files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from padless.backends import sdpa
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.qualification import Verdict, forget_verdicts, known_verdict, qualify
from padless.qualification import verdict as verdict_module
from padless.qualification.record import describe_machine
from planted_backends import FAULTS, flash_like, planted
from qualification_cases import FLOAT32, TRAINING, inside_backward, only_file

pytestmark = pytest.mark.usefixtures("cache")


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
        target=lambda: inside_backward(lambda: verdicts.append(qualify(planted(), TRAINING)))
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
