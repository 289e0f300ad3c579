"""What `patch` refuses, what its handle reports, and the patch of every LLaMA of the process."""

from __future__ import annotations

import contextlib
import gc
import logging
from types import MethodType
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import padless
from golden.models import LAYERS, batch, build_model, run_logits
from golden.steps import said_by_padless, step_of, steps_equal
from golden.test_patch_scope import class_state
from padless.hf.eras import installed_era

pytestmark = pytest.mark.case("patch")


def _same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


def test_report_counts() -> None:
    model = build_model()
    ids, real = batch("left")
    with padless.patch(model) as handle:
        assert handle.report().forwards == 0 and "none yet" in str(handle.report())
        for _ in range(3):
            run_logits(model, ids, real.long(), use_cache=False)
        run_logits(model, ids, real.long(), output_attentions=True)
        report = handle.report()
    assert report.is_engaged and report.era == installed_era().name
    assert report.transformers == handle.transformers
    assert (report.forwards, report.compiled_forwards) == (3, 0)
    assert report.computed_tokens == 3 * int(real.sum())
    assert report.skipped_tokens == 3 * int((~real).sum())
    assert report.host_syncs == 0
    assert report.stock == {"output_attentions": 1}
    assert [layer.backends for layer in report.layers] == [{"sdpa": 3}] * LAYERS
    assert all(layer.name.endswith(f"[{i}]") for i, layer in enumerate(report.layers))
    assert "torch_varlen" in {candidate.name for candidate in report.passed_over["sdpa"]}
    assert any(change.endswith("layers.1.self_attn.forward") for change in report.changes)
    text = str(report)
    for part in ("3 forwards", "2 layers (sdpa)", "needs CUDA", "own path: output_attentions"):
        assert part in text, text


def test_named_backend_is_used_by_every_layer() -> None:
    model = build_model()
    stock = step_of(model)
    with padless.patch(model, backend="reference") as handle:
        got = step_of(model)
        report = handle.report()
    assert [layer.backends for layer in report.layers] == [{"reference": 1}] * LAYERS
    torch.testing.assert_close(got.loss, stock.loss)
    with padless.patch(model, backend="torch_varlen") as handle:
        with pytest.raises(padless.BackendUnavailableError, match="needs CUDA"):
            step_of(model)
        assert handle.report().forwards == 0


def test_second_patch_is_refused_and_changes_nothing() -> None:
    model = build_model()
    with padless.patch(model) as handle:
        got = step_of(model)
        with pytest.raises(padless.EngagementError, match=r"undo\(\) the first handle"):
            padless.patch(model)
        with pytest.raises(padless.EngagementError, match="patched already"):
            padless.patch(model.model)
        assert torch.equal(step_of(model).loss, got.loss) and handle.report().forwards == 2


class _OwnModel(modeling_llama.LlamaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class _OwnAttention(modeling_llama.LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _attend_otherwise(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _with_own(part: str) -> nn.Module:
    model = build_model()
    if part == "model":
        model.model.__class__ = _OwnModel
    elif part == "attention class":
        model.model.layers[1].self_attn.__class__ = _OwnAttention
    else:
        attention = model.model.layers[1].self_attn
        attention.forward = MethodType(_attend_otherwise, attention)
    return model


@pytest.mark.parametrize("part", ["model", "attention class", "attention instance"])
def test_forwards_of_somebody_else_are_refused(part: str) -> None:
    # Its attention may be another: to replace it by LLaMA's would change what is computed.
    model = _with_own(part)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(padless.UnsupportedError, match="forward"):
        padless.patch(model)
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}


def test_patch_llama_reaches_models_built_before_and_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    classes = class_state()
    before = build_model()
    stock = step_of(before)
    handle = padless.patch_llama()
    after = build_model()
    for count, model in enumerate((before, after), 1):
        torch.testing.assert_close(step_of(model).loss, stock.loss)
        assert handle.report().forwards == count
    state = class_state()
    assert padless.patch_llama() is handle and _same(class_state(), state)
    assert any("patched already" in line for line in said_by_padless(caplog))
    with pytest.raises(padless.EngagementError, match=r"undo\(\) the handle of patch_llama"):
        padless.patch(before)
    handle.undo()
    assert _same(class_state(), classes)
    assert steps_equal(step_of(before), stock) and steps_equal(step_of(after), stock)
    with padless.patch_llama() as second:
        assert second is not handle
    assert _same(class_state(), classes)


@pytest.mark.parametrize("padding", ["none", "right", "left", "mixed"])
def test_patch_llama_computes_what_patch_computes(padding: str) -> None:
    model = build_model().train()
    _, real = batch(padding)
    with padless.patch(model):
        want = step_of(model, padding)
    with padless.patch_llama(backend="auto") as handle:
        got = step_of(model, padding)
        assert handle.report().computed_tokens == int(real.sum())
        assert len(handle.report().layers) == LAYERS
    assert steps_equal(got, want)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("parts", ["body", "attention", "all"])
def test_patch_llama_reaches_models_under_hooks_of_accelerate(when: str, parts: str) -> None:
    model = build_model()
    stock = step_of(model)
    modules = {"body": [model.model], "attention": [la.self_attn for la in model.model.layers]}
    modules["all"] = [model, *modules["body"], *modules["attention"]]
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(padless.patch_llama()) if when == "after" else None
        for module in modules[parts]:
            add_hook_to_module(module, ModelHook())
        handle = handle or stack.enter_context(padless.patch_llama())
        torch.testing.assert_close(step_of(model).loss, stock.loss)
        assert handle.report().forwards == 1 and len(handle.report().layers) == LAYERS
    # Also where the hook came while ours stood there.
    assert steps_equal(step_of(model), stock) and handle.report().forwards == 1


@pytest.mark.parametrize("first_out", ["model", "process"])
def test_patch_of_a_model_and_of_the_process(first_out: str) -> None:
    classes = class_state()
    model, other = build_model(), build_model()
    stock = step_of(model)
    handles = {"model": padless.patch(model), "process": padless.patch_llama()}
    torch.testing.assert_close(step_of(model).loss, stock.loss)
    torch.testing.assert_close(step_of(other).loss, stock.loss)
    assert [handles[name].report().forwards for name in ("model", "process")] == [1, 1]
    handles.pop(first_out).undo()
    torch.testing.assert_close(step_of(model).loss, stock.loss)
    handles.popitem()[1].undo()
    assert _same(class_state(), classes) and steps_equal(step_of(model), stock)


@pytest.mark.parametrize("scope", ["model", "process"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_beside_the_replaced_attention(scope: str, mode: str) -> None:
    classes = class_state()
    model = build_model().train(mode == "train")
    ids, real = batch("left")
    stock = step_of(model)
    attentions = model(ids, attention_mask=real.long(), use_cache=True, return_dict=True)
    with padless.replace_llama_attn_with_flash_attn() as replaced:
        handle = padless.patch(model) if scope == "model" else padless.patch_llama()
        got = step_of(model)
        assert handle.report().forwards == 1
        torch.testing.assert_close(got.loss, stock.loss)
        # What is left to the stock path finds the replaced attention there.
        before = sum(layer.calls for layer in replaced.report().layers)
        options = {"past_key_values": attentions.past_key_values, "use_cache": True}
        longer = torch.cat([real, torch.ones(3, 1, dtype=torch.bool)], 1).long()
        model(ids[:, :1], attention_mask=longer, **options)
        assert handle.report().stock == {"a call behind a cache": 1}
        assert sum(layer.calls for layer in replaced.report().layers) == before + LAYERS
        handle.undo()
    assert _same(class_state(), classes) and steps_equal(step_of(model), stock)


def test_replacing_the_attention_proves_itself_while_other_models_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The proof counts calls; those of a model that is collected meanwhile are not among them.
    ids, real = batch("left")
    train, stock = nn.Module.train, modeling_llama.LlamaAttention.forward

    def collecting(self: nn.Module, mode: bool = True) -> nn.Module:
        if modeling_llama.LlamaAttention.forward is not stock:
            gc.collect()
        return train(self, mode)

    # Collections see what is made from here on: all of torch would take seconds.
    gc.freeze()
    try:
        model = build_model()
        model.itself = [model]
        with padless.replace_llama_attn_with_flash_attn():
            run_logits(model, ids, real.long())
        del model
        monkeypatch.setattr(nn.Module, "train", collecting)
        with padless.replace_llama_attn_with_flash_attn() as handle:
            assert handle.report().layers == ()
    finally:
        gc.unfreeze()


def test_replacing_the_attention_of_a_patched_process_is_refused() -> None:
    classes = class_state()
    model = build_model()
    stock = step_of(model)
    with padless.patch_llama() as handle:
        state = class_state()
        with pytest.raises(padless.EngagementError, match=r"patch_llama\(\) is in force"):
            padless.replace_llama_attn_with_flash_attn()
        assert _same(class_state(), state)
        torch.testing.assert_close(step_of(model).loss, stock.loss)
        assert handle.report().forwards
    assert _same(class_state(), classes) and steps_equal(step_of(model), stock)


def test_engaging_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="padless"), padless.patch(build_model()):
        pass
    assert any("engaged" in record.getMessage() for record in caplog.records)
