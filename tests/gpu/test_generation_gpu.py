"""`generate` on a CUDA device: steps as replays of one CUDA graph, and nothing left behind."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

import padless
from padless.backends import fa4, sdpa, torch_varlen
from padless.backends.request import AttentionRequest
from padless.generation import store as stores
from padless.qualification.decoding import judge_decoding
from padless.unpadded import session

pytestmark = pytest.mark.gpu

VOCAB, LAYERS, EAGER_STEPS = 512, 3, 1
LENGTHS = (70, 41, 17, 1)
HEADS = {"mha": 8, "gqa": 2}
DTYPES = [torch.float32, torch.bfloat16]


def _model(
    dtype: torch.dtype = torch.float32, *, heads: str = "gqa", head_dim: int = 64
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8 * 64,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=HEADS[heads],
        head_dim=head_dim,
        max_position_embeddings=2048,
        # Attention far from uniform, and tokens that differ.
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def _prompt(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    columns = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), columns), generator=generator)
    real = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~real, 0).cuda(),
        "attention_mask": real.long().cuda(),
    }


def _generate(
    model: LlamaForCausalLM, lengths: tuple[int, ...] = LENGTHS, *, new: int = 48, **options: Any
) -> Any:
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **options}
    return model.generate(**_prompt(lengths), **options)


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
    model = _model(heads=heads)
    want = _generate(model, **options)
    with padless.patch(model) as handle:
        got = _generate(model, **options)
        report = handle.report()
    assert report.computed_tokens == sum(LENGTHS)
    assert (report.generations, report.decoding_steps) == (1, 47)
    assert report.graph_replays == 47 - EAGER_STEPS, str(report)
    assert report.generation_notes == {} and report.stock == {}
    assert torch.equal(got, want)


def test_256_tokens_are_those_of_the_unpatched_model() -> None:
    model = _model()
    want = _generate(model, new=256)
    with padless.patch(model) as handle:
        got = _generate(model, new=256)
        assert handle.report().graph_replays == 255 - EAGER_STEPS
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_graph_computes_what_the_step_computes(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(dtype)
    kept = {"return_dict_in_generate": True, "output_logits": True, **options}
    with padless.patch(model) as handle:
        replayed = _generate(model, **kept)
        assert handle.report().graph_replays == 47 - EAGER_STEPS, str(handle.report())
        _without_graphs(monkeypatch)
        eager = _generate(model, **kept)
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
    truth_model = _model(dtype, heads=heads, head_dim=head_dim).float()
    model = _model(dtype, heads=heads, head_dim=head_dim)
    tokens = torch.randint(3, VOCAB, (len(LENGTHS), 48), device="cuda")
    kept = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "logits_processor": LogitsProcessorList([_Force(tokens, max(LENGTHS))]),
    }
    truth, stock = (torch.stack(_generate(m, **kept).logits) for m in (truth_model, model))
    with padless.patch(model) as handle:
        got = torch.stack(_generate(model, **kept).logits)
        assert handle.report().graph_replays == 47 - EAGER_STEPS, str(handle.report())
    for row in range(len(LENGTHS)):
        error, baseline = (
            (x[:, row].double() - truth[:, row].double()).square().mean().sqrt().item()
            for x in (got, stock)
        )
        assert error <= 2 * baseline, (row, error, baseline)


def test_rows_end_early() -> None:
    model = _model()
    plain = _generate(model)
    eos = int(plain[1, max(LENGTHS) + 5])
    want = _generate(model, eos_token_id=eos)
    assert (want[1, max(LENGTHS) + 6 :] == 0).all()
    with padless.patch(model) as handle:
        got = _generate(model, eos_token_id=eos)
        assert handle.report().graph_replays > 0
    assert torch.equal(got, want)


def test_calls_of_other_shapes_follow_each_other() -> None:
    model = _model()
    shapes = [(LENGTHS, 20), ((9, 3), 31), ((300, 5, 120, 64, 2), 9), (LENGTHS, 20)]
    wants = [_generate(model, lengths, new=new) for lengths, new in shapes]
    with padless.patch(model) as handle:
        for (lengths, new), want in zip(shapes, wants, strict=True):
            assert torch.equal(_generate(model, lengths, new=new), want)
        assert handle.report().generations == len(shapes)


class _StopAt:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        done = ids.shape[1] >= self.length
        return torch.full((ids.shape[0],), done, device=ids.device)


def test_a_graph_is_captured_anew_where_buffers_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_STEP", 16)
    model = _model()
    want = _generate(model, new=120)
    captured = []
    capture = session.StepGraph
    monkeypatch.setattr(session, "StepGraph", lambda *args: (captured.append(1), capture(*args))[1])
    with padless.patch(model) as handle:
        stop = [_StopAt(max(LENGTHS) + 120)]
        got = _generate(model, new=None, max_length=10_000, stopping_criteria=stop)
        assert handle.report().graph_replays == 119 - EAGER_STEPS
    assert len(captured) > 1
    assert torch.equal(got, want)


class _FailAt:
    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("in the middle")
        return scores


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("at", [None, 1, 2, 3, 10])
def test_nothing_stays_on_the_device(at: int | None) -> None:
    model = _model(torch.bfloat16)
    with padless.patch(model):
        _generate(model)  # libraries take their workspaces
        before = _allocated()
        if at is None:
            _generate(model)
        else:
            with pytest.raises(ZeroDivisionError):
                _generate(model, logits_processor=LogitsProcessorList([_FailAt(at)]))
        assert _allocated() == before
        assert session._current.get() is None


def test_after_an_exception_the_next_call_is_right() -> None:
    model = _model()
    want = _generate(model)
    with padless.patch(model) as handle:
        with pytest.raises(ZeroDivisionError):
            _generate(model, logits_processor=LogitsProcessorList([_FailAt(9)]))
        assert torch.equal(_generate(model), want)
        assert handle.report().generations == 2
    assert torch.equal(_generate(model), want)


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why() -> None:
    # Rope that scales with the longest position asks the device for it at every step.
    model = _model()
    want = _generate(model)

    class Asking(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert x.float().sum().item() == x.float().sum().item()
            return self.inner(x, *args, **kwargs)

    model.model.rotary_emb = Asking(model.model.rotary_emb)
    with padless.patch(model) as handle:
        got = _generate(model)
        report = handle.report()
        assert report.graph_replays == 0 and report.decoding_steps == 47
        (note,) = report.generation_notes
        assert note.startswith("steps without a CUDA graph: ")
        # And CUDA goes on.
        assert torch.equal(_generate(model), want)
    assert torch.equal(got, want)


def test_hooks_inside_the_model_are_run_at_every_step() -> None:
    model = _model()
    want = _generate(model)
    calls = []
    model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    with padless.patch(model) as handle:
        got = _generate(model)
        report = handle.report()
    assert torch.equal(got, want)
    assert len(calls) == 48
    assert report.graph_replays == 0 and report.decoding_steps == 47
    assert list(report.generation_notes) == [
        "steps without a CUDA graph: hooks on modules inside the model, which a graph would not run"
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_without_a_token_change_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(dtype)
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
        want = _generate(model, **kept)
        monkeypatch.setattr(stores.RaggedStore, "begin_step", poisoned)
        got = _generate(model, **kept)
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
    model = _model(torch.bfloat16)
    with padless.patch(model, backend=backend) as handle:
        try:
            _generate(model)
        except padless.BackendUnavailableError as error:
            pytest.skip(str(error))
        report = handle.report()
    if report.generation_notes:
        pytest.skip(str(report.generation_notes))
    assert report.graph_replays == 47 - EAGER_STEPS, str(report)


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_modes_of_the_caller(mode: str) -> None:
    model = _model()
    context = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cuda", torch.bfloat16),
    }[mode]
    with context, padless.patch(model) as handle:
        got = _generate(model)
        report = handle.report()
    assert report.decoding_steps == 47
    if mode == "inference":
        assert torch.equal(got, _generate(model))
        assert report.graph_replays == 47 - EAGER_STEPS, str(report)
    else:
        assert list(report.generation_notes) == ["steps without a CUDA graph: autocast"]


def test_weights_that_change_between_calls_are_used() -> None:
    model = _model()
    with padless.patch(model):
        _generate(model)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        got = _generate(model)
    assert torch.equal(got, _generate(model))


def test_the_padded_cache_is_handed_back() -> None:
    model = _model()
    stock = _generate(model, return_dict_in_generate=True)
    with padless.patch(model):
        got = _generate(model, return_dict_in_generate=True)
    assert torch.equal(got.sequences, stock.sequences)
    real = torch.cat([_prompt()["attention_mask"], torch.ones(4, 47, device="cuda")], 1).bool()
    for a, b in zip(got.past_key_values.layers, stock.past_key_values.layers, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            x, y = (t.transpose(1, 2)[real] for t in (x, y))
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
