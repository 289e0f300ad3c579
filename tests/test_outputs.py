"""Outputs in padded shapes, with logits that are padded when somebody looks."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
)

import padless
from padless.layout import VarlenLayout
from padless.unpadded import kept as kept_module
from padless.unpadded import outputs as outputs_module
from padless.unpadded.kept import KeptKeys
from padless.unpadded.outputs import pad_outputs

REAL = torch.tensor([[True, True, False, False], [False, True, True, True], [False] * 4])
LAYOUT = VarlenLayout.from_mask(REAL)
VOCAB = 3


def _flat() -> Tensor:
    return torch.arange(1.0, LAYOUT.total * VOCAB + 1).view(1, LAYOUT.total, VOCAB)


def _padded() -> Tensor:
    return LAYOUT.pad(_flat()[0])


def _outputs(*, loss: bool = True, **others: Any) -> CausalLMOutputWithPast:
    value = torch.tensor(1.5) if loss else None
    made = CausalLMOutputWithPast(loss=value, logits=_flat(), **others)
    return pad_outputs(made, LAYOUT)


@pytest.fixture
def pads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that were padded, one by one."""
    shapes: list[tuple[int, ...]] = []
    pad = outputs_module._pad

    def spy(flat: Tensor, layout: VarlenLayout) -> Tensor:
        shapes.append(tuple(flat.shape))
        return pad(flat, layout)

    monkeypatch.setattr(outputs_module, "_pad", spy)
    return shapes


READERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: out.logits,
    "getattr": lambda out: getattr(out, "logits", None),
    "key": lambda out: out["logits"],
    "index": lambda out: out[1],
    "last index": lambda out: out[-1],
    "slice": lambda out: out[1:][0],
    "get": lambda out: out.get("logits"),
    "get with a default": lambda out: out.get("logits", 1),
    "to_tuple": lambda out: out.to_tuple()[1],
    "unpacking": lambda out: dict(zip(out, out.values(), strict=True))["logits"],
    "dict": lambda out: dict(out)["logits"],
    "keywords": lambda out: dict(**out)["logits"],
    "star": lambda out: {**out}["logits"],
    "update": lambda out: _updated(out)["logits"],
    "or": lambda out: (dict(out) | {})["logits"],
    "or from the right": lambda out: ({} | out)["logits"],
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "match": lambda out: _matched(out),
    "copy": lambda out: copy.copy(out).logits,
    "copy.key": lambda out: copy.copy(out)["logits"],
    "deepcopy": lambda out: copy.deepcopy(out).logits,
    "pickle": lambda out: pickle.loads(pickle.dumps(out)).logits,
    "rebuilt from a dict": lambda out: type(out)({**out}).logits,
    "rebuilt from pairs": lambda out: type(out)((k, v) for k, v in out.items()).logits,
    "rebuilt by keywords": lambda out: type(out)(**out)["logits"],
    "dataclasses.replace": lambda out: dataclasses.replace(out, loss=None).logits,
    "dataclasses.fields": lambda out: {f.name: getattr(out, f.name) for f in _fields(out)}[
        "logits"
    ],
    "pytree": lambda out: pytree.tree_map(lambda x: x, out)["logits"],
    "pytree leaves": lambda out: pytree.tree_flatten(out)[0][1],
    "accelerate": lambda out: convert_to_fp32(out).logits,
    "vars after reading": lambda out: (out.logits, vars(out)["logits"])[1],
}


def _updated(out: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    plain.update(out)
    return plain


def _fields(out: Any) -> Any:
    return dataclasses.fields(out)


def _matched(out: Any) -> Any:
    match out:
        case {"logits": logits}:
            return logits


@pytest.mark.parametrize("reader", READERS)
def test_logits_are_padded_however_they_are_read(reader: str) -> None:
    got = READERS[reader](_outputs())
    assert torch.equal(got, _padded())
    assert got[~REAL].abs().sum() == 0.0


@pytest.mark.parametrize("index", [0, -1])
def test_first_is_the_logits_without_a_loss(index: int) -> None:
    assert torch.equal(_outputs(loss=False)[index], _padded())


def test_what_leaves_logits_alone(pads: list[tuple[int, ...]]) -> None:
    out = _outputs()
    assert out.loss == out["loss"] == out[0] == out.get("loss") == 1.5
    assert list(out.keys()) == ["loss", "logits"]
    assert "logits" in out and "nothing" not in out and len(out) == 2
    assert isinstance(out, CausalLMOutputWithPast) and isinstance(out, ModelOutput)
    assert type(out).__name__ == "CausalLMOutputWithPast" and dataclasses.is_dataclass(out)
    assert out.hidden_states is None and out.get("hidden_states", 7) == 7
    with pytest.raises(AttributeError):
        out.nothing  # noqa: B018
    with pytest.raises(KeyError):
        out["nothing"]
    assert pads == []


def test_logits_are_padded_once_and_the_object_is_an_ordinary_one_then(
    pads: list[tuple[int, ...]],
) -> None:
    out, other = _outputs(), _outputs()
    assert out.logits is out.logits is out["logits"] is out[1]
    assert pads == [(1, LAYOUT.total, VOCAB)]
    assert type(out) is CausalLMOutputWithPast
    plain = CausalLMOutputWithPast(loss=out.loss, logits=_padded())
    assert vars(out).keys() == vars(plain).keys() and out.keys() == plain.keys()
    assert type(other) is not CausalLMOutputWithPast, "settling one settled another"
    assert pads == [(1, LAYOUT.total, VOCAB)]


@pytest.mark.parametrize("write", ["attribute", "key"])
def test_what_is_written_stays(write: str) -> None:
    out, mine = _outputs(), torch.ones(2)
    if write == "attribute":
        out.logits = mine
        out.loss = None
    else:
        out["logits"] = mine
    assert out.logits is mine and out["logits"] is mine
    out = _outputs()
    out.loss = out.loss * 2
    assert out.loss == out["loss"] == 3.0 and torch.equal(out.logits, _padded())


def test_comparing_and_showing_see_padded_logits() -> None:
    assert str(tuple(_padded().shape)) in repr(
        {name: tuple(value.shape) for name, value in _outputs().items()}
    )
    assert repr(_outputs()) == repr(CausalLMOutputWithPast(torch.tensor(1.5), _padded()))
    assert list(_outputs()) == ["loss", "logits"] and list(reversed(_outputs())) == [
        "logits",
        "loss",
    ]


def test_gradients_reach_the_flat_logits() -> None:
    flat = _flat().requires_grad_()
    out = pad_outputs(CausalLMOutputWithPast(logits=flat), LAYOUT)
    weights = torch.arange(REAL.numel() * VOCAB).view(*REAL.shape, VOCAB).float()
    (out.logits * weights).sum().backward()
    assert torch.equal(flat.grad[0], weights[REAL])


def test_states_are_padded_at_once_and_other_fields_stay() -> None:
    states = (_flat(), _flat() * 2)
    cache = object()
    out = _outputs(hidden_states=states, past_key_values=cache)
    assert out.past_key_values is cache
    assert torch.equal(out.hidden_states[1], _padded() * 2) and len(out.hidden_states) == 2
    body = pad_outputs(
        BaseModelOutputWithPast(last_hidden_state=_flat(), hidden_states=states), LAYOUT
    )
    assert type(body) is BaseModelOutputWithPast
    assert torch.equal(body.last_hidden_state, _padded()) and torch.equal(body[0], _padded())
    assert torch.equal(body["hidden_states"][0], _padded())


def test_without_logits_nothing_is_lazy() -> None:
    out = pad_outputs(CausalLMOutputWithPast(loss=torch.tensor(1.5)), LAYOUT)
    assert type(out) is CausalLMOutputWithPast and out.logits is None


def test_without_padding_logits_are_a_view() -> None:
    flat = torch.randn(1, 6, VOCAB)
    out = pad_outputs(CausalLMOutputWithPast(logits=flat), VarlenLayout.from_rows(2, 3))
    assert type(out) is CausalLMOutputWithPast
    assert out.logits.shape == (2, 3, VOCAB) and out.logits.data_ptr() == flat.data_ptr()


def test_outputs_are_padded_on_the_device_that_they_are_on() -> None:
    """Where a model is spread over devices, its end need not be where its batch was made flat."""
    made = CausalLMOutputWithPast(logits=_flat().to("meta"), hidden_states=(_flat(),))
    out = pad_outputs(made, LAYOUT)
    assert out.logits.device.type == "meta" and out.logits.shape == (*REAL.shape, VOCAB)
    assert torch.equal(out.hidden_states[0], _padded())


def test_threads_that_read_at_once_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = []
    pad = outputs_module._pad

    def slowly(flat: Tensor, layout: VarlenLayout) -> Tensor:
        padded.append(flat)
        time.sleep(0.01)
        return pad(flat, layout)

    monkeypatch.setattr(outputs_module, "_pad", slowly)
    out = _outputs()
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: out.logits, range(8)))
    assert all(torch.equal(logits, _padded()) for logits in seen)
    assert len(padded) == 1 and type(out) is CausalLMOutputWithPast


def test_class_of_lazy_outputs_is_made_once() -> None:
    assert type(_outputs()) is type(_outputs())


def test_another_subclass_keeps_its_fields() -> None:
    @dataclasses.dataclass
    class Mine(CausalLMOutputWithPast):
        extra: Tensor | None = None

    out = pad_outputs(Mine(logits=_flat(), extra=torch.ones(1)), LAYOUT)
    assert out.extra == 1.0 and out["extra"] == 1.0 and isinstance(out, Mine)
    assert torch.equal(out.logits, _padded()) and type(out) is Mine


class _Cache:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int, options: dict[str, Any]) -> None:
        assert layer_idx == len(self.layers), "a cache takes its layers in order"
        assert options["cache_position"].tolist() == list(range(REAL.shape[1]))
        self.layers[layer_idx] = (k, v)


def _with_cache(*, loss: bool = True, cls: Any = CausalLMOutputWithPast) -> tuple[Any, _Cache]:
    kept, cache = KeptKeys(), _Cache()
    for layer in (1, 0):
        k = torch.full((LAYOUT.total, 2, 3), layer + 1.0)
        kept.put(layer, k, -k, LAYOUT)
    if cls is CausalLMOutputWithPast:
        value = torch.tensor(1.5) if loss else None
        made = cls(loss=value, logits=_flat(), past_key_values=cache)
    else:
        made = cls(last_hidden_state=_flat(), past_key_values=cache)
    return pad_outputs(made, LAYOUT, kept=kept), cache


CACHE_READERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: out.past_key_values,
    "key": lambda out: out["past_key_values"],
    "index": lambda out: out[2],
    "get": lambda out: out.get("past_key_values"),
    "to_tuple": lambda out: out.to_tuple()[2],
    "keywords": lambda out: dict(**out)["past_key_values"],
    "logits first": lambda out: (out.logits, out.past_key_values)[1],
}


@pytest.mark.parametrize("reader", CACHE_READERS)
def test_cache_is_filled_however_it_is_read(reader: str) -> None:
    out, cache = _with_cache()
    assert cache.layers == {}
    assert CACHE_READERS[reader](out) is cache
    assert list(cache.layers) == [0, 1]
    for layer, (k, v) in cache.layers.items():
        want = REAL[:, None, :, None].expand(3, 2, 4, 3) * (layer + 1.0)
        assert torch.equal(k, want) and torch.equal(v, -want)
    assert torch.equal(out.logits, _padded())
    assert type(out) is CausalLMOutputWithPast and out.past_key_values is cache
    assert set(vars(out)) == set(vars(CausalLMOutputWithPast(logits=_flat())))


def test_logits_and_cache_are_made_one_without_the_other(pads: list[tuple[int, ...]]) -> None:
    out, cache = _with_cache()
    assert out.loss == 1.5 and cache.layers == {} and pads == []
    assert torch.equal(out["logits"], _padded())
    assert cache.layers == {} and len(pads) == 1
    other, cache = _with_cache(loss=False)
    assert other.past_key_values is cache and len(cache.layers) == 2 and len(pads) == 1


def test_cache_of_a_model_without_a_head_waits_too() -> None:
    out, cache = _with_cache(cls=BaseModelOutputWithPast)
    assert torch.equal(out.last_hidden_state, _padded()) and cache.layers == {}
    assert out.past_key_values is cache and len(cache.layers) == 2
    assert type(out) is BaseModelOutputWithPast


def test_a_training_step_fills_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "padded_keys", lambda *_: pytest.fail("padded for nobody"))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).train()
    ids, real = torch.randint(3, 60, (3, 7)), torch.arange(7) < torch.tensor([[7], [3], [5]])
    with padless.patch(model):
        out = model(ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100))
        out.loss.backward()
        assert out.logits.shape[:2] == (3, 7)
        with pytest.raises(pytest.fail.Exception, match="for nobody"):
            out.past_key_values  # noqa: B018
