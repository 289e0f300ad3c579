"""`padless.verify`: green on a sound patch, red on every planted fault, and it leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import padless
from padless import dispatch, workload
from padless.answers import Candidate, Selection
from padless.backends import reference
from padless.errors import UnsupportedError
from padless.hf.attention import Projected
from padless.hf.masks import LayerMask
from padless.llama import attend, paths
from padless.llama import engage as engage_module
from padless.unpadded import layer
from padless.verification import VerifyReport, measure, verify
from padless.verification import run as run_module
from padless.verification.batch import PackedRow, PaddedBatch, pad_rows

VOCAB, LAYERS = 64, 2


def _model(dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=None,
            **config,
        )
    )
    return model.to(dtype)


def _batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _verify(model: LlamaForCausalLM, **options: object) -> VerifyReport:
    return verify(model, _batch(), new_tokens=8, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_patch_is_the_same_model(dtype: torch.dtype) -> None:
    report = _verify(_model(dtype))
    failed = [check for path in report.paths for check in path.checks if not check.passed]
    assert report.passed, failed
    assert report.truth_dtype == ("float64" if dtype is torch.float32 else "float32")
    assert [path.path for path in report.paths] == ["patch", "sdpa", "flash"]
    assert report.num_layers == LAYERS
    patch, sdpa, flash = report.paths
    assert (patch.computed_tokens, patch.batch_tokens) == (report.real_tokens, 36)
    assert patch.backends == ("sdpa",)
    assert (sdpa.computed_tokens, sdpa.batch_tokens) == (36, 36)
    assert (flash.computed_tokens, flash.batch_tokens) == (report.real_tokens, 36)
    assert report.real_tokens == 22
    assert all(len(path.layers) == LAYERS for path in report.paths)
    assert flash.backends == ("sdpa",)
    assert all(path.step.stock_ms > 0 and path.step.patched_ms > 0 for path in report.paths)


def test_patched_model_is_verified_and_given_back_patched() -> None:
    model = _model()
    handle = padless.patch(model)
    assert _verify(model, paths=("patch",)).passed
    assert handle.is_engaged and handle.report().forwards == 0
    model(**_batch())
    assert handle.report().forwards == 1


def test_patch_that_is_off_turns_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = layer.run
    monkeypatch.setattr(
        layer,
        "run",
        lambda *args, softmax_scale, **options: sound(
            *args, softmax_scale=softmax_scale * 1.01, **options
        ),
    )
    monkeypatch.setattr("padless.unpadded.engagement.prove", lambda *args: None)
    report = _verify(_model(), paths=("patch",))
    failed = {check.name for check in report.paths[0].checks if not check.passed}
    assert {"logits, right pad", "gradients, left pad"} <= failed


def test_error_of_the_unpatched_model_is_the_larger_one_of_its_runs() -> None:
    truth = torch.zeros(4)
    lucky, usual = torch.full((4,), 1e-4), torch.tensor([1e-3, 0.0, 0.0, 3e-3])
    baseline = measure.Baseline.of([(lucky, truth), (usual, truth)])
    assert baseline == pytest.approx((1.58e-3, 3e-3), rel=1e-2)

    def judge(error: torch.Tensor, baseline: measure.Baseline) -> bool:
        return measure.judge("gradients", {"q": (error, truth, baseline)}).passed

    assert judge(usual * 1.9, baseline)
    assert not judge(usual * 2.1, baseline)
    one_off = torch.tensor([0.0, 0.0, 0.0, 9.1e-3])
    assert not judge(one_off, baseline._replace(rms=1.0))


def test_packed_row_is_the_batch_without_its_padding() -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10])]
    for side in ("right", "left"):
        row = PackedRow.of(pad_rows(rows, side))
        assert row.ids.tolist() == [[5, 6, 7, 8, 9, 10]] and bool(row.real.all())
        assert row.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
        assert row.labels.tolist() == [[-100, 6, 7, -100, -100, 10]]
        sees = (row.mask_for(torch.float32)[0, 0] == 0).int()
        want = torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 1, 2))).int()
        assert torch.equal(sees, want)


def test_error_of_the_unpatched_model_is_that_of_a_row_without_padding_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, off = measure.training_step, 1e-3

    def less_exact_in_a_row(model: torch.nn.Module, batch: PaddedBatch) -> dict[str, Tensor]:
        grads = step(model, batch)
        exact = batch.ids.shape[0] > 1 and not hasattr(model, "_padless")
        return grads if exact else {name: grad * (1 + off) for name, grad in grads.items()}

    # As cuBLAS does it: what is off in a row of the unpatched model is off in the patched one too.
    monkeypatch.setattr(measure, "training_step", less_exact_in_a_row)
    patched = run_module._Run.patched

    def less_exact_when_patched(run: Any, *arguments: Any) -> Any:
        run.model._padless = True
        try:
            return patched(run, *arguments)
        finally:
            del run.model._padless

    monkeypatch.setattr(run_module._Run, "patched", less_exact_when_patched)
    assert _verify(_model(), paths=("patch",)).passed
    monkeypatch.setattr(run_module._Run, "_packed_gradients", lambda run: {})
    assert not _verify(_model(), paths=("patch",)).passed


def test_row_without_padding_is_not_trusted_if_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # As versions that do not know such a mask: everything sees everything before it.
    monkeypatch.setattr(
        PackedRow, "mask_for", lambda row, dtype: torch.ones_like(row.ids), raising=True
    )
    packed, found = run_module._Run._packed_gradients, []
    monkeypatch.setattr(
        run_module._Run, "_packed_gradients", lambda run: found.append(packed(run)) or found[-1]
    )
    assert _verify(_model(), paths=("patch",)).passed
    assert found == [{}]


def test_backend_of_large_batches_is_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two backends of a GPU, of which the small batch takes the second by itself.
    def little(*_: Any) -> bool:
        return not workload._as_if_much.get()

    def select(request: Any, backend: str, *, little_work: bool, **options: Any) -> Any:
        name = "sdpa" if little_work else "reference"
        return Selection(name, request.head_dim, (Candidate(name, request.head_dim, None),))

    monkeypatch.setattr(dispatch, "has_little_work", little)
    monkeypatch.setattr(dispatch, "select_backend", select)
    report = _verify(_model(), paths=("patch",)).paths[0]
    assert report.passed and report.backends == ("reference", "sdpa")
    broken = reference.varlen
    monkeypatch.setattr(reference, "varlen", lambda *a, **o: broken(*a, **o) * 1.001)
    failed = [c.name for c in _verify(_model(), paths=("patch",)).paths[0].checks if not c.passed]
    assert failed == ["logits, left pad", "gradients, left pad"]


def test_check_names_the_tensor_that_decided() -> None:
    truth, error, own = torch.zeros(4), torch.full((4,), 1e-3), measure.Baseline(1e-3, 1e-3)
    found = measure.judge(
        "gradients",
        {
            "0.q_proj.weight": (error, truth, own),
            "1.k_proj.weight": (2.5 * error, truth, own),
            "1.v_proj.weight": (1.5 * error, truth, own),
        },
    )
    assert not found.passed
    assert found.tensor == "1.k_proj.weight"
    assert found.detail.startswith("1.k_proj.weight: RMS error 2.50e-03")


def test_names_of_the_checks_cover_the_verdict() -> None:
    report = _verify(_model(), paths=("flash",))
    assert [check.name for check in report.paths[0].checks] == [
        "logits, right pad",
        "logits, left pad",
        "gradients, right pad",
        "gradients, left pad",
        "greedy tokens",
        "probe, right pad",
        "probe, left pad",
        "layers engaged",
    ]


def _without_mask(p: Projected) -> Projected:
    mask = LayerMask(
        None,
        batch=p.q.shape[0],
        num_heads=p.q.shape[1],
        seqlen_q=p.q.shape[2],
        seqlen_k=p.k.shape[2],
        is_causal=True,
        cache_position=None,
        is_aligned=True,
        device=p.q.device,
    )
    return dataclasses.replace(p, mask=mask)


def _acausal(p: Projected) -> Projected:
    dense = p.mask.dense()
    if dense is None:
        return p
    real = dense[:, 0, -1] if dense.dtype == torch.bool else dense[:, 0, -1] > -1.0
    mask = _without_mask(p).mask
    mask.raw, mask.is_causal = real.expand(p.q.shape[0], -1), False
    return dataclasses.replace(p, mask=mask)


# What each fault must turn red at the least; scale and heads leave the probe green by their nature.
FAULTS: dict[str, tuple[Callable[[Projected], Projected], set[str]]] = {
    "scale off by 1 %": (
        lambda p: dataclasses.replace(p, softmax_scale=p.softmax_scale * 1.01),
        {"logits, right pad", "logits, left pad", "gradients, right pad", "gradients, left pad"},
    ),
    "mask dropped": (_without_mask, {"logits, left pad", "gradients, left pad"}),
    "KV heads swapped": (
        lambda p: dataclasses.replace(p, k=p.k.flip(1), v=p.v.flip(1)),
        {"logits, right pad", "gradients, right pad", "greedy tokens"},
    ),
    "causality lost": (_acausal, {"logits, right pad", "probe, right pad", "probe, left pad"}),
}


def _plant(monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Projected], Projected]) -> None:
    for name in ("attend_flash", "attend_2"):
        sound = getattr(attend, name)
        monkeypatch.setattr(
            paths, name, lambda module, call, p, sound=sound: sound(module, call, mutate(p))
        )
    # Engaging would refuse most of these by itself: here the report has to see them.
    monkeypatch.setattr(engage_module, "prove_engaged", lambda before: None)


@pytest.mark.parametrize("path", ["sdpa", "flash"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_turns_the_verdict(
    monkeypatch: pytest.MonkeyPatch, fault: str, path: str
) -> None:
    mutate, expected = FAULTS[fault]
    _plant(monkeypatch, mutate)
    report = _verify(_model(), paths=(path,))
    failed = {check.name for check in report.paths[0].checks if not check.passed}
    assert not report.passed
    assert expected <= failed


def test_mask_dropped_leaks_padding_into_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    # Changing a token of padding changes real outputs once the mask is gone.
    from padless.llama.engage import engage
    from padless.verification import perturbation_probe
    from padless.verification.batch import pad_rows, read_rows

    model = _model().eval()
    left = pad_rows(read_rows(_batch(), VOCAB), "left")

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=left.real.long(), use_cache=False).logits

    def probe() -> bool:
        with engage("flash"):
            return perturbation_probe(
                run, left.ids, left.real, vocab_size=VOCAB, tokens=((2, 0),), documents=padding
            ).passed

    padding = (~left.real).long()
    assert probe()
    _plant(monkeypatch, _without_mask)
    assert not probe()


def test_layers_that_do_not_engage_turn_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(type(attention).forward, attention)
    report = _verify(model, paths=("sdpa",))
    failed = [check for check in report.paths[0].checks if not check.passed]
    assert [check.name for check in failed] == ["layers engaged"]
    assert "1 of 2 attention layers" in failed[0].detail


def test_not_a_number_turns_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, lambda p: dataclasses.replace(p, v=p.v * float("nan")))
    report = _verify(_model(), paths=("flash",))
    failed = {check.name for check in report.paths[0].checks if not check.passed}
    assert {"logits, right pad", "gradients, left pad"} <= failed


def test_leaves_no_trace_in_the_model() -> None:
    model = _model(attention_dropout=0.25).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = grad = torch.ones(64)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    batch = _batch()
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    assert verify(model, batch, new_tokens=8).passed
    assert torch.equal(torch.rand(1), want)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.requires_grad == (name != "lm_head.weight")
        assert weight.grad is (grad if name == "model.norm.weight" else None)
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


def test_an_engaged_patch_stays_as_it_was() -> None:
    model, batch = _model().eval(), _batch()
    with padless.replace_llama_attn_with_flash_attn() as handle:
        model(**batch)
        before = str(handle.report())
        assert _verify(model, paths=("flash",)).passed
        assert str(handle.report()) == before
        model(**batch)
        assert handle.report().layers[0].calls == 2


def test_progress_is_told_and_the_report_is_json() -> None:
    stages = []
    report = _verify(
        _model(),
        paths=("sdpa",),
        on_progress=lambda text, done, total: stages.append((done, total)),
    )
    assert stages == [(i, 7) for i in range(7)]
    data = json.loads(json.dumps(report.as_dict()))
    assert data["passed"] is True and data["paths"][0]["passed"] is True
    assert data["paths"][0]["checks"][0]["rms_error"] > 0


def test_public_name_is_the_function() -> None:
    assert padless.verify is verify


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, TypeError, "batch must map 'input_ids' to an integer tensor"),
        ({"input_ids": torch.rand(3, 12)}, TypeError, "integer tensor, got torch.float32"),
        (
            {"input_ids": torch.ones(3, 0, dtype=torch.long)},
            ValueError,
            r"input_ids must have shape \(batch, seqlen\) with at least one token, got \(3, 0\)",
        ),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, ValueError, r"got \(5,\)"),
        (
            {"attention_mask": torch.ones(3, 11)},
            ValueError,
            r"attention_mask must have input_ids' shape \(3, 12\), got \(3, 11\)",
        ),
        (
            {"attention_mask": torch.zeros(3, 12)},
            ValueError,
            "every row of the batch must hold a real token, got padding alone in row 0",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 12, [0] * 12, [1] * 12])},
            ValueError,
            "got padding alone in row 1; leave such rows out",
        ),
        (
            {"input_ids": torch.full((3, 12), VOCAB)},
            ValueError,
            r"input_ids must be in \[0, 64\), got 64 to 64",
        ),
    ],
)
def test_bad_batch_is_refused_in_one_sentence(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    model = _model()
    weights = [weight.clone() for weight in model.parameters()]
    with pytest.raises(error, match=message):
        verify(model, {**_batch(), **change})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_model_without_llama_attention_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB))
    with pytest.raises(
        UnsupportedError, match=r"model must be a LLaMA .* got GPT2LMHeadModel without any"
    ):
        verify(gpt2, _batch())


def test_model_without_its_weights_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=8))
    with pytest.raises(UnsupportedError, match=r"needs floating weights in memory, got .* on meta"):
        verify(model, _batch())
