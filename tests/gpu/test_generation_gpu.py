"""`generate` on a CUDA device: the same tokens, by replays of one CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_gpu_cases import (
    DTYPES,
    EAGER_STEPS,
    HEADS,
    LENGTHS,
    VOCAB,
    build_model,
    generate,
)
from torch import Tensor
from transformers import LogitsProcessorList

import padless
from padless.backends import fa4, sdpa, torch_varlen
from padless.backends.request import AttentionRequest
from padless.generation import runner
from padless.generation import store as stores
from padless.qualification.decoding import judge_decoding
from padless.unpadded import ended, session

pytestmark = pytest.mark.gpu


def _without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "uncapturable_reason", lambda model: "planted")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"do_sample": True, "top_k": 20}, id="sampled"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="three-sequences"),
        pytest.param({"repetition_penalty": 1.3}, id="processor"),
    ],
)
def test_tokens_are_those_of_the_unpatched_model(heads: str, options: dict[str, Any]) -> None:
    model = build_model(heads=heads)
    want = generate(model, **options)
    with padless.patch(model) as handle:
        got = generate(model, **options)
        report = handle.report()
    assert report.computed_tokens == sum(LENGTHS)
    assert (report.generations, report.decoding_steps) == (1, 47)
    assert report.graph_replays == 47 - EAGER_STEPS, str(report)
    assert report.generation_notes == {} and report.stock == {}
    assert torch.equal(got, want)


def test_256_tokens_are_those_of_the_unpatched_model() -> None:
    model = build_model()
    want = generate(model, new=256)
    with padless.patch(model) as handle:
        got = generate(model, new=256)
        assert handle.report().graph_replays == 255 - EAGER_STEPS
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_graph_computes_what_the_step_computes(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(dtype)
    kept = {"return_dict_in_generate": True, "output_logits": True, **options}
    with padless.patch(model) as handle:
        replayed = generate(model, **kept)
        assert handle.report().graph_replays == 47 - EAGER_STEPS, str(handle.report())
        _without_graphs(monkeypatch)
        eager = generate(model, **kept)
        assert handle.report().graph_replays == 47 - EAGER_STEPS
    assert torch.equal(replayed.sequences, eager.sequences)
    for step, (a, b) in enumerate(zip(replayed.logits, eager.logits, strict=True)):
        assert torch.equal(a, b), f"step {step}"


class _Force:
    """A logits processor that lets nothing but given tokens follow."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -1e9)
        return forced.scatter_(1, self.tokens[:, ids.shape[1] - self.start, None], 0.0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_half_precision_is_as_near_to_float32_as_unpatched(
    heads: str, dtype: torch.dtype, head_dim: int
) -> None:
    truth_model = build_model(dtype, heads=heads, head_dim=head_dim).float()
    model = build_model(dtype, heads=heads, head_dim=head_dim)
    tokens = torch.randint(3, VOCAB, (len(LENGTHS), 48), device="cuda")
    kept = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "logits_processor": LogitsProcessorList([_Force(tokens, max(LENGTHS))]),
    }
    truth, stock = (torch.stack(generate(m, **kept).logits) for m in (truth_model, model))
    with padless.patch(model) as handle:
        got = torch.stack(generate(model, **kept).logits)
        assert handle.report().graph_replays == 47 - EAGER_STEPS, str(handle.report())
        assert set(handle.report().decoding_backends) <= {"torch_varlen", "fa4"}
    for row in range(len(LENGTHS)):
        error, baseline = (
            (x[:, row].double() - truth[:, row].double()).square().mean().sqrt().item()
            for x in (got, stock)
        )
        assert error <= 2 * baseline, (row, error, baseline)


def test_rows_end_early() -> None:
    model = build_model()
    plain = generate(model)
    eos = int(plain[1, max(LENGTHS) + 5])
    want = generate(model, eos_token_id=eos)
    assert (want[1, max(LENGTHS) + 6 :] == 0).all()
    with padless.patch(model) as handle:
        got = generate(model, eos_token_id=eos)
        assert handle.report().graph_replays > 0
    assert torch.equal(got, want)


def test_rows_that_have_ended_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 4)
    monkeypatch.setattr(ended, "_CAPTURE_BYTES", 0)
    model = build_model()
    plain = generate(model)[:, max(LENGTHS) :].tolist()
    # Ends three rows early, and the first not at all.
    ends = [next(t for t in row[2:] if t not in plain[0]) for row in plain[1:]]
    want = generate(model, eos_token_id=ends)
    with padless.patch(model) as handle:
        got = generate(model, eos_token_id=ends)
        report = handle.report()
    assert torch.equal(got, want)
    assert report.rows_left_out == 3
    # Each capture anew runs a step eagerly in front of it.
    assert 0 < report.graph_replays < report.decoding_steps - EAGER_STEPS


def test_calls_of_other_shapes_follow_each_other() -> None:
    model = build_model()
    shapes = [(LENGTHS, 20), ((9, 3), 31), ((300, 5, 120, 64, 2), 9), (LENGTHS, 20)]
    wants = [generate(model, lengths, new=new) for lengths, new in shapes]
    with padless.patch(model) as handle:
        for (lengths, new), want in zip(shapes, wants, strict=True):
            assert torch.equal(generate(model, lengths, new=new), want)
        assert handle.report().generations == len(shapes)


class _StopAt:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        done = ids.shape[1] >= self.length
        return torch.full((ids.shape[0],), done, device=ids.device)


def test_a_graph_is_captured_anew_where_buffers_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_STEP", 16)
    model = build_model()
    want = generate(model, new=120)
    captured = []
    capture = runner.StepGraph
    monkeypatch.setattr(runner, "StepGraph", lambda *args: (captured.append(1), capture(*args))[1])
    with padless.patch(model) as handle:
        stop = [_StopAt(max(LENGTHS) + 120)]
        got = generate(model, new=None, max_length=10_000, stopping_criteria=stop)
        assert handle.report().graph_replays == 119 - len(captured) * EAGER_STEPS
    assert len(captured) > 1
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_without_a_token_change_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(dtype)
    # A mask weighs values by zero, which leaves nothing of what is finite.
    poison = 1000.0 if dtype is torch.float32 else float("nan")
    begin = stores.RaggedStore.begin_step

    def poisoned(self: stores.RaggedStore, *, with_mask: bool) -> None:
        slots = torch.arange(self.capacity, device="cuda")
        unused = (slots >= self.rows.lengths[:, None])[..., None, None]
        for buffers in self.layers:
            for buffer in buffers or ():
                buffer.masked_fill_(unused, poison)
        begin(self, with_mask=with_mask)

    kept = {"return_dict_in_generate": True, "output_logits": True}
    with padless.patch(model):
        want = generate(model, **kept)
        monkeypatch.setattr(stores.RaggedStore, "begin_step", poisoned)
        got = generate(model, **kept)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(8, 8, 64), (8, 2, 128), (32, 8, 128), (9, 3, 64), (8, 1, 80)])
@pytest.mark.parametrize("backend", [torch_varlen, fa4, sdpa], ids=lambda module: module.NAME)
def test_backends_decode_right(backend: Any, heads: tuple[int, int, int], dtype: Any) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    request = AttentionRequest(device, dtype, heads[2], heads[0], heads[1], causal=False)
    reason = backend.reject_decode(request)
    if reason is not None:
        pytest.skip(reason)
    assert judge_decoding(backend.decode, request) is None


@pytest.mark.parametrize("backend", ["torch_varlen", "fa4", "sdpa"])
def test_a_named_backend_decodes(backend: str) -> None:
    model = build_model(torch.bfloat16)
    with padless.patch(model, backend=backend) as handle:
        try:
            generate(model)
        except padless.BackendUnavailableError as error:
            pytest.skip(str(error))
        report = handle.report()
    if report.generation_notes:
        pytest.skip(str(report.generation_notes))
    assert report.graph_replays == 47 - EAGER_STEPS, str(report)
