"""The patch takes effect wherever attention is built, says so, and goes without a trace."""

from __future__ import annotations

import logging
import types

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import Tensor

from golden.models import LAYERS, PATHS, batch, build_model, patched, run_logits, since, until
from padless.errors import EngagementError
from padless.hf.eras import installed_era
from padless.llama import forward, forward_2, replace_llama_attn_with_flash_attn
from padless.llama.engage import engage, suspended

pytestmark = pytest.mark.case("engagement")


def _class_state() -> dict[tuple[str, str], object]:
    return {
        (name, attribute): value
        for name in dir(modeling_llama)
        if isinstance(cls := getattr(modeling_llama, name), type) and name.startswith("Llama")
        for attribute, value in vars(cls).items()
        # Caches of the ABC and descriptors made on access are not what anybody patches.
        if not attribute.startswith(("_abc", "__")) and not attribute.endswith("_cached_value")
    }


def test_era_names_every_attention_class() -> None:
    found = {
        name
        for name in dir(modeling_llama)
        if isinstance(cls := getattr(modeling_llama, name), type)
        and issubclass(cls, modeling_llama.LlamaAttention)
    }
    assert found == set(installed_era().classes)


@pytest.mark.parametrize("path", PATHS)
def test_undo_is_bit_for_bit(path: str) -> None:
    model = build_model()
    ids, real = batch("mixed")
    want = run_logits(model, ids, real.long())
    state = _class_state()
    handle = engage(path)
    assert _class_state() != state
    run_logits(model, ids, real.long())
    handle.undo()
    after = _class_state()
    assert state.keys() == after.keys()
    assert all(state[key] is after[key] for key in state)
    assert torch.equal(run_logits(model, ids, real.long()), want)
    handle.undo()
    assert not handle.report().is_engaged


def test_second_call_changes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with replace_llama_attn_with_flash_attn() as first:
        state = _class_state()
        with caplog.at_level(logging.WARNING, logger="padless"):
            second = replace_llama_attn_with_flash_attn()
        assert second is first
        assert _class_state() == state
        assert "replaced already" in caplog.text


def test_other_path_is_refused_while_one_is_engaged() -> None:
    with (
        engage("sdpa"),
        pytest.raises(EngagementError, match=r"sdpa path is engaged already.*undo\(\)"),
    ):
        engage("flash")
    with engage("flash"):
        assert modeling_llama.LlamaAttention.forward is forward


@pytest.mark.parametrize("path", PATHS)
def test_every_layer_is_counted(path: str) -> None:
    model = build_model()
    ids, real = batch("left")
    with engage(path) as handle:
        for _ in range(3):
            run_logits(model, ids, real.long())
        report = handle.report()
    assert [layer.calls for layer in report.layers] == [3] * LAYERS
    slots = 3 * LAYERS * real.numel()
    assert report.batch_tokens == slots
    computed = 3 * LAYERS * int(real.sum()) if path == "flash" else slots
    assert report.computed_tokens == computed
    assert f"{computed} of {slots} tokens computed" in str(report)


def _served(path: str, model: torch.nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    with patched(path) as handle:
        logits = run_logits(model, ids, mask)
        assert [layer.calls for layer in handle.report().layers] == [1] * LAYERS
    return logits


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@since("4.36", "the choice of implementation")
def test_engages_whatever_implementation_is_configured(path: str, implementation: str) -> None:
    model = build_model(attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    ids, real = batch("left")
    want = run_logits(model, ids, real.long())[real]
    got = _served(path, model, ids, real.long())[real]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@since("4.36", "flash_attention_2 by name")
def test_engages_on_flash_attention_2(path: str, padding: str) -> None:
    # Set behind the check for the package: the mask then arrives at the layer as 2D or None.
    model = build_model()
    ids, real = batch(padding)
    want = run_logits(model, ids, real.long())[real]
    model.config._attn_implementation = "flash_attention_2"
    model.model._use_flash_attention_2 = True
    if hasattr(modeling_llama, "LlamaFlashAttention2"):
        for layer in model.model.layers:
            layer.self_attn.__class__ = modeling_llama.LlamaFlashAttention2
    got = _served(path, model, ids, real.long())[real]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@since("4.48", "attention through the interface")
def test_foreign_implementations_keep_their_own_path(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def foreign(
        module: torch.nn.Module, query: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, None]:
        calls.append(module)
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    model = build_model()
    ids, _ = batch("none")
    modeling_llama.ALL_ATTENTION_FUNCTIONS["of_somebody_else"] = foreign
    try:
        model.config._attn_implementation = "of_somebody_else"
        with (
            engage("sdpa") as handle,
            caplog.at_level(logging.WARNING, logger="padless"),
        ):
            run_logits(model, ids, None)
            report = handle.report()
    finally:
        del modeling_llama.ALL_ATTENTION_FUNCTIONS["of_somebody_else"]
    assert len(calls) == LAYERS
    assert [sum(layer.stock.values()) for layer in report.layers] == [1] * LAYERS
    assert caplog.text.count("of_somebody_else") == 1


def test_reaches_layers_that_hold_on_to_the_stock_forward() -> None:
    # As accelerate's hooks do for device_map: the method found then is kept on the instance.
    model = build_model()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention._old_forward = attention.forward
        attention.forward = types.MethodType(
            lambda self, *args, **kwargs: self._old_forward(*args, **kwargs), attention
        )
    ids, real = batch("left")
    want = run_logits(model, ids, real.long())[real]
    kept = model.model.layers[0].self_attn._old_forward
    got = _served("flash", model, ids, real.long())[real]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert model.model.layers[0].self_attn._old_forward is kept


def test_raises_and_rolls_back_when_layers_are_built_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own(modeling_llama.LlamaAttention):
        def forward(self, *args: object, **kwargs: object) -> object:
            return stock(self, *args, **kwargs)

    stock = modeling_llama.LlamaAttention.forward
    classes = getattr(modeling_llama, "LLAMA_ATTENTION_CLASSES", None)
    if classes is not None:
        monkeypatch.setitem(classes, "sdpa", Own)
    else:
        monkeypatch.setattr(modeling_llama, "LlamaAttention", Own)
        # The patch replaces the class that the module names; the layers call another's forward.
        monkeypatch.setattr("padless.llama.engage.modeling_llama", lambda: _named(stock))
    state = _class_state()
    with pytest.raises(EngagementError, match="must serve every attention layer, got 0 of 4"):
        replace_llama_attn_with_flash_attn()
    after = _class_state()
    assert all(state[key] is after[key] for key in state)


def _named(stock: object) -> types.ModuleType:
    module = types.ModuleType("transformers.models.llama.modeling_llama")
    for name in installed_era().classes:
        setattr(module, name, type(name, (torch.nn.Module,), {"forward": stock}))
    module.LlamaModel = type(
        "LlamaModel", (), {"_prepare_decoder_attention_mask": lambda self: None}
    )
    return module


def test_raises_and_rolls_back_when_the_numbers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: object, **kwargs: object) -> tuple[object, ...]:
        out, *rest = forward_2(*args, **kwargs)
        return (out * 1.01, *rest)

    monkeypatch.setattr("padless.llama.engage.forward_2", off)
    stock = modeling_llama.LlamaAttention.forward
    with pytest.raises(EngagementError, match="must compute what transformers computes"):
        replace_llama_attn_with_flash_attn()
    assert modeling_llama.LlamaAttention.forward is stock


def test_suspended_takes_the_patch_out_and_puts_it_back() -> None:
    stock = modeling_llama.LlamaAttention.forward
    with engage("flash") as handle:
        with suspended():
            assert modeling_llama.LlamaAttention.forward is stock
        assert modeling_llama.LlamaAttention.forward is forward
        assert replace_twice_is(handle)
    assert modeling_llama.LlamaAttention.forward is stock


def replace_twice_is(handle: object) -> bool:
    return engage("flash") is handle


def test_engaging_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with replace_llama_attn_with_flash_attn():
        got = torch.rand(3)
    assert torch.equal(got, want)


@until("4.48", "classes by implementation")
@since("4.36", "LlamaSdpaAttention")
def test_default_class_is_the_sdpa_one_and_is_replaced() -> None:
    model = build_model()
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaSdpaAttention"
    with patched("sdpa"):
        assert modeling_llama.LlamaSdpaAttention.forward is forward_2
        run_logits(model, *batch("none")[:1], None)
