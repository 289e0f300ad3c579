"""What surrounds a `generate` call: undo, exceptions, its cache, what is left to transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LogitsProcessorList

import padless
from golden.generating import IS_FAST, REAL, check_cache, check_fast, generate
from golden.models import HEADS, VERSION, batch, build_model, since, until
from golden.test_patch_cache import keys_and_values
from padless.unpadded import mlp, norms, structure

pytestmark = pytest.mark.case("generate")


def test_undo_in_between() -> None:
    model = build_model()
    want = generate(model)
    own = set(vars(model))
    for _ in range(2):
        handle = padless.patch(model)
        assert torch.equal(generate(model), want)
        handle.undo()
        assert set(vars(model)) == own
        assert torch.equal(generate(model), want)
        check_fast(handle.report(), steps=11, prompt=REAL["left"])


class _Interrupt:
    """A logits processor that does something at one step."""

    def __init__(self, act: Any, at: int) -> None:
        self.act, self.at, self.calls = act, at, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return scores


def _fail() -> None:
    raise ZeroDivisionError("in the middle")


@pytest.mark.parametrize("at", [1, 2, 5])
def test_nothing_is_left_of_a_call_that_raises(at: int) -> None:
    from padless.unpadded import session

    model = build_model()
    want = generate(model)
    with padless.patch(model) as handle:
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        with pytest.raises(ZeroDivisionError):
            generate(model, logits_processor=LogitsProcessorList([_Interrupt(_fail, at)]))
        assert session._current.get() is None
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert torch.equal(generate(model), want)
        check_fast(handle.report(), steps=at - 1 + 11, prompt=2 * REAL["left"], calls=2)
    assert torch.equal(generate(model), want)


def test_undo_in_the_middle_goes_on_as_transformers() -> None:
    model = build_model()
    want = generate(model)
    handle = padless.patch(model)
    stop = _Interrupt(handle.undo, 4)
    assert torch.equal(generate(model, logits_processor=LogitsProcessorList([stop])), want)
    assert not IS_FAST or handle.report().decoding_steps == 3


def test_a_model_called_by_a_processor_is_its_own_business() -> None:
    # As guidance does, which asks the model itself about another prompt between the steps.
    model = build_model()

    class Guided:
        def __init__(self) -> None:
            self.past: Any = None

        def __call__(self, seen: Tensor, scores: Tensor) -> Tensor:
            out = model(
                input_ids=seen[:, -1:], past_key_values=self.past, use_cache=True, return_dict=True
            )
            self.past = out.past_key_values
            return scores + out.logits[:, -1]

    want = generate(model, logits_processor=LogitsProcessorList([Guided()]))
    with padless.patch(model) as handle:
        got = generate(model, logits_processor=LogitsProcessorList([Guided()]))
        report = handle.report()
    assert torch.equal(got, want)
    assert not IS_FAST or report.decoding_steps == 11


@since("4.36", "DynamicCache")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_the_cache_that_is_handed_back(options: dict[str, Any]) -> None:
    model = build_model()
    real = batch("left")[1]
    times = options.get("num_beams", 1)

    def run() -> tuple[Any, Tensor]:
        out = generate(model, return_dict_in_generate=True, **options)
        return out, out.sequences

    stock, want = run()
    with padless.patch(model) as handle:
        out, got = run()
        prompt = REAL["left"] if IS_FAST else times * REAL["left"]
        check_fast(handle.report(), steps=11, prompt=prompt)
    assert torch.equal(got, want)
    assert type(out.past_key_values) is type(stock.past_key_values)
    check_cache(out, stock, real.repeat_interleave(times, 0))


@since("4.48", "generate with a cache of the caller's, as it is now,")
def test_a_conversation_goes_on_from_it() -> None:
    model = build_model()
    real = batch("left")[1]
    more = torch.tensor([[5, 6], [7, 8], [9, 10]])

    def talk() -> Tensor:
        first = generate(model, return_dict_in_generate=True)
        # 4.48 and 4.49 hand back tuples.
        assert keys_and_values(first.past_key_values)[0].shape[2] == 13 + 11
        said = torch.cat([first.sequences, more], 1)
        mask = torch.cat([real, torch.ones(3, said.shape[1] - 13).bool()], 1)
        return model.generate(
            input_ids=said,
            attention_mask=mask.long(),
            past_key_values=first.past_key_values,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )

    want = talk()
    with padless.patch(model) as handle:
        got = talk()
        report = handle.report()
    assert torch.equal(got, want)
    assert report.generations == 1
    assert report.generation_notes == {"a cache of the caller's": 1}


# Later ones fetch them from a hub.
_IN_TRANSFORMERS = until("4.56", "contrastive search and DoLa inside transformers")
_CHUNKS = pytest.mark.skipif(
    Version("5.0") <= VERSION < Version("5.1"), reason="5.0 refuses prompts in chunks"
)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"output_hidden_states": True}, "output_hidden_states", id="hidden-states"),
        pytest.param({"use_cache": False}, "without a cache", id="no-cache"),
        pytest.param(
            {"cache_implementation": "static"},
            "a cache of another kind, StaticCache",
            id="static",
            marks=since("4.48", "this kind of StaticCache"),
        ),
        pytest.param(
            {"prompt_lookup_num_tokens": 2, "eos_token_id": 2},
            "prompt lookup decoding",
            id="prompt-lookup",
            marks=since("4.48", "prompt lookup as it is now"),
        ),
        pytest.param(
            {"assistant_model": build_model(seed=1), "eos_token_id": 2},
            "assisted decoding",
            id="assisted",
            marks=since("4.48", "assisted decoding as it is now"),
        ),
        pytest.param(
            {"prefill_chunk_size": 5},
            "a prompt in chunks",
            id="chunks",
            marks=[since("4.51", "prefill_chunk_size"), _CHUNKS],
        ),
        pytest.param(
            {"penalty_alpha": 0.6, "top_k": 4},
            "contrastive search",
            id="contrastive",
            marks=[since("4.48", "contrastive search as it is now"), _IN_TRANSFORMERS],
        ),
        pytest.param(
            {"dola_layers": "low"},
            "DoLa decoding",
            id="dola",
            marks=[since("4.48", "DoLa as it is now"), _IN_TRANSFORMERS],
        ),
    ],
)
def test_what_is_left_to_transformers_says_why(options: dict[str, Any], reason: str) -> None:
    model = build_model()
    ids, real = batch("none")

    def run() -> Any:
        return model.generate(
            input_ids=ids[:1],
            attention_mask=real[:1].long(),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **options,
        ).sequences

    want = run()
    with padless.patch(model) as handle:
        got = run()
        report = handle.report()
    assert torch.equal(got, want)
    assert report.generations == 0
    assert report.generation_notes == ({reason: 1} if IS_FAST else {})


def _read_by_slots(*unused: Any) -> None:
    raise AssertionError("looked for padding, or for documents")


@pytest.mark.skipif(not IS_FAST, reason="generate is looked into from 4.48 on")
@pytest.mark.parametrize("given", ["mask", "no mask", "beams"])
def test_a_prompt_without_padding_is_not_looked_through(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    options: dict[str, Any] = {"num_beams": 2} if given == "beams" else {}
    if given == "no mask":
        options["attention_mask"] = None
    want = generate(model, "none", **options)
    for name in ("_real", "unpad_rows"):
        monkeypatch.setattr(structure, name, _read_by_slots)
    with padless.patch(model) as handle:
        assert torch.equal(generate(model, "none", **options), want)
        check_fast(handle.report(), steps=11, prompt=REAL["none"])


@pytest.mark.skipif(not IS_FAST, reason="generate is looked into from 4.48 on")
def test_padding_on_the_right_is_left_to_transformers() -> None:
    # The first token is chosen by what the model computes at padding.
    model = build_model()
    want = generate(model, "right")
    with padless.patch(model) as handle:
        got = generate(model, "right")
        report = handle.report()
    assert torch.equal(got, want)
    assert report.generation_notes == {"a prompt padded on the right": 1}
    assert report.stock == {"a prompt padded on the right": 1, "a call behind a cache": 11}


@pytest.mark.skipif(not IS_FAST, reason="the cache of real tokens covers 4.48 and later")
def test_a_patch_of_the_process_generates_so_too() -> None:
    model = build_model()
    want = generate(model)
    with padless.patch_llama() as handle:
        got = generate(model)
        check_fast(handle.report(), steps=11, prompt=REAL["left"])
    assert torch.equal(got, want)
    assert "generate" not in vars(transformers.LlamaForCausalLM)


@pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="torch before 2.4 has no rms_norm")
@pytest.mark.parametrize("heads", HEADS)
def test_norms_of_one_kernel(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sound = F.rms_norm
    monkeypatch.setattr(norms, "has_fused_rms_norm", lambda device_type: True)
    monkeypatch.setattr(norms.F, "rms_norm", lambda *args: (calls.append(1), sound(*args))[1])
    model = build_model(heads, max_position_embeddings=512)
    want = generate(model, new=256)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with padless.patch(model) as handle:
        assert torch.equal(generate(model, new=256), want)
        check_fast(handle.report(), steps=255, prompt=REAL["left"])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    layers = model.config.num_hidden_layers
    assert len(calls) == (256 * (2 * layers + 1) if IS_FAST else 0)


def test_mlps_with_one_kernel_between_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sound = mlp.silu_mul
    monkeypatch.setattr(mlp, "reject_silu_mul", lambda device, dtype: None)
    monkeypatch.setattr(mlp, "silu_mul", lambda *args: (calls.append(1), sound(*args))[1])
    model = build_model("gqa", max_position_embeddings=512)
    want = generate(model, new=64)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with padless.patch(model) as handle:
        assert torch.equal(generate(model, new=64), want)
        check_fast(handle.report(), steps=63, prompt=REAL["left"])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    # A prompt of few tokens waits for the host, and is left to torch's two operations.
    assert len(calls) == (63 * model.config.num_hidden_layers if IS_FAST else 0)
