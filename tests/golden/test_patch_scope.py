"""A patch reaches one model and nothing else: not its copies' counts, its files, other models."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from accelerate.hooks import ModelHook, add_hook_to_module
from packaging.version import Version
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import padless
from golden.models import LAYERS, PADDINGS, VERSION, batch, build_model, run_logits
from golden.steps import labels_of, step_of, steps_equal
from padless.hf.eras import installed_era

pytestmark = pytest.mark.case("patch")


def class_state() -> dict[tuple[str, str], object]:
    """Everything that the classes of modeling_llama, and the module itself, hold."""
    state: dict[tuple[str, str], object] = {("", n): v for n, v in vars(modeling_llama).items()}
    for name, cls in vars(modeling_llama).items():
        if isinstance(cls, type) and name.startswith("Llama"):
            for attribute, value in vars(cls).items():
                if not attribute.startswith(("_abc", "__")) and "_cached_value" not in attribute:
                    state[name, attribute] = value
    return state


def module_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each module holds of its own; containers by their contents."""
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


def _same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


def test_undo_is_bit_for_bit() -> None:
    model = build_model().train()
    want = step_of(model)
    model.zero_grad()
    state, classes = module_state(model), class_state()
    handle = padless.patch(model)
    step_of(model)
    assert _same(class_state(), classes)
    assert module_state(model).keys() == state.keys()
    handle.undo()
    model.zero_grad()
    assert module_state(model) == state and _same(class_state(), classes)
    assert steps_equal(step_of(model), want)
    handle.undo()
    assert not handle.is_engaged and not handle.report().is_engaged


def test_context_manager_undoes_and_the_model_can_be_patched_again() -> None:
    model = build_model()
    stock = step_of(model)
    for _ in range(2):
        with padless.patch(model) as handle:
            step_of(model)
            assert handle.report().forwards == 1
        assert steps_equal(step_of(model), stock) and handle.report().forwards == 1
    with pytest.raises(RuntimeError, match="mine"), padless.patch(model) as handle:
        raise RuntimeError("mine")
    assert not handle.is_engaged and steps_equal(step_of(model), stock)


def test_other_models_stay_bit_for_bit() -> None:
    classes = class_state()
    model, other = build_model(), build_model(seed=5)
    want = {padding: step_of(other, padding) for padding in PADDINGS}
    with padless.patch(model) as handle:
        for padding in PADDINGS:
            step_of(model, padding)
            assert steps_equal(step_of(other, padding), want[padding])
        assert handle.report().forwards == len(PADDINGS)
        assert _same(class_state(), classes)
        with padless.patch(other) as second:
            step_of(other)
            assert (handle.report().forwards, second.report().forwards) == (len(PADDINGS), 1)


def test_deep_copy_works_and_counts_on_its_own() -> None:
    model = build_model().train()
    stock = step_of(model)
    handle = padless.patch(model)
    got = step_of(model)
    twin = copy.deepcopy(model)
    assert steps_equal(step_of(twin), got) and handle.report().forwards == 1
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(1.5)
    assert not torch.equal(step_of(twin).loss, got.loss) and steps_equal(step_of(model), got)
    handle.undo()
    assert steps_equal(step_of(model), stock)
    # The copy goes on computing real tokens only.
    flat = []
    twin.lm_head.register_forward_hook(lambda module, args, out: flat.append(out.shape[:2]))
    step_of(twin)
    assert flat == [(1, int(batch("left")[1].sum()))]


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickle_is_of_the_unpatched_model(way: str) -> None:
    model = build_model().train()
    stock = step_of(model)
    with padless.patch(model) as handle:
        if way == "pickle":
            data = pickle.dumps(model)
            again = pickle.loads(data)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            data = file.getvalue()
            file.seek(0)
            again = torch.load(file, weights_only=False)
        assert steps_equal(step_of(again), stock) and handle.report().forwards == 0
    assert b"padless." not in data
    with padless.patch(again) as second:
        step_of(again)
        assert second.report().forwards == 1


@pytest.mark.parametrize("safe", [True, False])
def test_saved_files_are_those_of_the_unpatched_model(safe: bool, tmp_path: Path) -> None:
    model = build_model()
    if safe and Version("5.0") <= VERSION:
        options = {}
    elif not safe and Version("5.0") <= VERSION:
        pytest.skip("5.0 saves safetensors only")
    else:
        options = {"safe_serialization": safe}
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path / "stock", **options)
    with padless.patch(model):
        step_of(model)
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path / "patched", **options)
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    assert "config.json" in names
    for name in names:
        stock, patched = ((tmp_path / which / name).read_bytes() for which in ("stock", "patched"))
        if name.endswith(".json") and name != "model.safetensors.index.json":
            assert json.loads(stock)
        assert stock == patched, name
    again = LlamaForCausalLM.from_pretrained(tmp_path / "patched")
    ids, real = batch("left")
    assert torch.equal(run_logits(again, ids, real.long()), run_logits(model, ids, real.long()))


@pytest.mark.parametrize("models", [1, 4])
@torch.no_grad()
def test_threads_give_what_one_thread_gives(models: int) -> None:
    # No batch travels in anything that threads share.
    ours = [build_model(seed=seed) for seed in range(models)]
    handles = [padless.patch(model) for model in ours]
    work = [(ours[i % models], *batch(PADDINGS[i % 4], seed=i, seqlen=9 + i)) for i in range(24)]

    def run(job: tuple[nn.Module, Tensor, Tensor]) -> Tensor:
        model, ids, real = job
        labels = labels_of(ids, real)
        out = model(ids, attention_mask=real.long(), labels=labels, return_dict=True)
        return torch.cat([out.logits.flatten(), out.loss[None]])

    serial = [run(job) for job in work]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(run, work))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded, strict=True))
    assert sum(handle.report().forwards for handle in handles) == 2 * len(work)
    real = sum(int(job[2].sum()) for job in work)
    assert sum(handle.report().computed_tokens for handle in handles) == 2 * real


def _wrap(module: nn.Module) -> None:
    """Wraps a forward as accelerate's mixed precision does: it keeps what it found."""
    found = module.forward
    module.forward = MethodType(lambda self, *a, **k: found(*a, **k), module)


def _hook(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


@pytest.mark.parametrize("wrap", [_wrap, _hook])
@pytest.mark.parametrize("parts", ["head", "head and body"])
def test_wrapped_forward_survives_undo_and_another_patch(wrap: Any, parts: str) -> None:
    model = build_model().train()
    stock = step_of(model)
    handle = padless.patch(model)
    for module in (model, model.model)[: 1 if parts == "head" else 2]:
        wrap(module)
    step_of(model)
    handle.undo()
    assert handle.report().forwards == 1
    assert steps_equal(step_of(model), stock)
    if installed_era().mask_made_by == "functions" and wrap is _wrap and parts != "head":
        with pytest.raises(padless.UnsupportedError, match="patch first, and wrap then"):
            padless.patch(model)
        return
    with padless.patch(model) as second:
        got = step_of(model)
        assert second.report().forwards == 1 and len(second.report().layers) == LAYERS
    torch.testing.assert_close(got.loss, stock.loss)
    assert handle.report().forwards == 1
    assert steps_equal(step_of(model), stock)


@pytest.mark.parametrize("is_undone", [True, False])
def test_patched_model_can_be_freed(is_undone: bool) -> None:
    model = build_model()
    handle = padless.patch(model)
    step_of(model)
    if is_undone:
        handle.undo()
    ghost = weakref.ref(model)
    del model, handle
    gc.collect()
    assert ghost() is None


class _Head(LlamaForCausalLM):
    """A head with a forward of its own, which reads hidden states in their padded shape."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        hidden = self.model(input_ids, attention_mask=attention_mask, return_dict=True)[0]
        assert hidden.shape[:2] == input_ids.shape
        return self.lm_head(hidden[:, -1])


def test_head_with_its_own_forward_sees_padded_rows() -> None:
    plain = build_model()
    model = _Head(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    ids, real = batch("left")
    stock = model(ids, attention_mask=real.long())
    with padless.patch(model) as handle:
        got = model(ids, attention_mask=real.long())
        assert handle.report().skipped_tokens == int((~real).sum())
    torch.testing.assert_close(got, stock, atol=1e-4, rtol=1e-4)
