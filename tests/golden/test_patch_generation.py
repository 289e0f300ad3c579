"""`generate` of a patched model: the same tokens, behind a cache that holds real tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList

import padless
from golden.models import HEADS, VERSION, batch, build_model, since
from golden.test_patch_cache import keys_and_values
from padless.generation import store as stores
from padless.unpadded.handle import PatchReport

pytestmark = pytest.mark.case("generate")

# Where keys and values of a generate call are padless's own; below, its steps are transformers'.
IS_FAST = Version("4.48") <= VERSION
REAL = {"none": 39, "left": 25}


def _generate(
    model: LlamaForCausalLM,
    padding: str = "left",
    *,
    new: int = 12,
    seqlen: int = 13,
    **options: Any,
) -> Any:
    ids, real = batch(padding, seqlen=seqlen)
    torch.manual_seed(7)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(input_ids=ids, attention_mask=real.long(), **options)


def _check_fast(report: PatchReport, *, steps: int, prompt: int, calls: int = 1) -> None:
    """Asserts that the prompts were computed without padding, and what was behind them."""
    assert report.computed_tokens == prompt
    assert report.forwards == calls
    if not IS_FAST:
        assert report.generations == 0
        assert report.stock == {"a call behind a cache": steps}
        return
    assert (report.generations, report.decoding_steps) == (calls, steps)
    assert report.stock == {} and report.generation_notes == {}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_256_tokens_are_those_of_the_unpatched_model(heads: str, padding: str) -> None:
    model = build_model(heads, max_position_embeddings=512)
    want = _generate(model, padding, new=256)
    with padless.patch(model) as handle:
        got = _generate(model, padding, new=256)
        _check_fast(handle.report(), steps=255, prompt=REAL[padding])
    assert torch.equal(got, want)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    ("options", "times"),
    [
        pytest.param({"num_beams": 3}, 3, id="beams"),
        pytest.param({"num_beams": 4, "num_return_sequences": 3}, 4, id="some-beams"),
        pytest.param({"do_sample": True, "top_k": 20}, 1, id="sampled"),
        pytest.param(
            {"do_sample": True, "top_k": 20, "num_return_sequences": 2}, 2, id="two-sequences"
        ),
        pytest.param({"do_sample": True, "num_beams": 2}, 2, id="sampled-beams"),
        pytest.param({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, 1, id="processors"),
    ],
)
def test_every_way_of_choosing_tokens(padding: str, options: dict[str, Any], times: int) -> None:
    model = build_model()
    want = _generate(model, padding, **options)
    with padless.patch(model) as handle:
        got = _generate(model, padding, **options)
        # Rows that begin alike are computed once.
        prompt = REAL[padding] if IS_FAST else times * REAL[padding]
        _check_fast(handle.report(), steps=11, prompt=prompt)
    assert torch.equal(got, want)


def test_buffers_grow_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_STEP", 4)
    model = build_model()
    want = _generate(model, new=40)
    grown = []
    grow = stores.RaggedStore._grown
    monkeypatch.setattr(
        stores.RaggedStore,
        "_grown",
        lambda self, buffer, filled: (grown.append(filled), grow(self, buffer, filled))[1],
    )
    # Nothing says how many tokens are to come, so that buffers begin small.
    stop = _StopAt(53)
    with padless.patch(model) as handle:
        got = _generate(model, new=None, max_length=10_000, stopping_criteria=[stop])
        _check_fast(handle.report(), steps=39, prompt=REAL["left"])
    assert torch.equal(got, want)
    assert not IS_FAST or len(set(grown)) > 1


class _StopAt:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Tensor, scores: Any, **unused: Any) -> Any:
        done = ids.shape[1] >= self.length
        return torch.full((ids.shape[0],), done) if Version("4.39") <= VERSION else done


class _Listener:
    """A streamer."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.is_over = False

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens.tolist())

    def end(self) -> None:
        self.is_over = True


def test_a_streamer_hears_every_token() -> None:
    model, heard = build_model(), []
    ids, _ = batch("none")
    for is_patched in (False, True):
        listener = _Listener()
        handle = padless.patch(model) if is_patched else None
        model.generate(
            input_ids=ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0, streamer=listener
        )
        assert listener.is_over
        heard.append(listener.tokens)
        if handle is not None:
            _check_fast(handle.report(), steps=5, prompt=13)
            handle.undo()
    assert heard[0] == heard[1]


def test_rows_end_early() -> None:
    model = build_model()
    plain = _generate(model, new=20)
    # Ends the second row on its third token, and others where they come to it.
    options = {"eos_token_id": int(plain[1, 15]), "new": 20}
    want = _generate(model, **options)
    assert (want[1, 16:] == 0).all() and want.shape[1] > 17
    with padless.patch(model) as handle:
        got = _generate(model, **options)
        _check_fast(handle.report(), steps=want.shape[1] - 14, prompt=REAL["left"])
    assert torch.equal(got, want)


def test_calls_of_other_shapes_follow_each_other() -> None:
    model = build_model()
    shapes = [("left", 13, 12), ("none", 5, 7), ("left", 30, 9)]
    wants = [_generate(model, padding, seqlen=n, new=new) for padding, n, new in shapes]
    with padless.patch(model) as handle:
        for (padding, n, new), want in zip(shapes, wants, strict=True):
            assert torch.equal(_generate(model, padding, seqlen=n, new=new), want)
        prompt = sum(int(batch(padding, seqlen=n)[1].sum()) for padding, n, _ in shapes)
        _check_fast(handle.report(), steps=11 + 6 + 8, prompt=prompt, calls=3)


def test_undo_in_between() -> None:
    model = build_model()
    want = _generate(model)
    own = set(vars(model))
    for _ in range(2):
        handle = padless.patch(model)
        assert torch.equal(_generate(model), want)
        handle.undo()
        assert set(vars(model)) == own
        assert torch.equal(_generate(model), want)
        _check_fast(handle.report(), steps=11, prompt=REAL["left"])


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
    want = _generate(model)
    with padless.patch(model) as handle:
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        with pytest.raises(ZeroDivisionError):
            _generate(model, logits_processor=LogitsProcessorList([_Interrupt(_fail, at)]))
        assert session._current.get() is None
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert torch.equal(_generate(model), want)
        _check_fast(handle.report(), steps=at - 1 + 11, prompt=2 * REAL["left"], calls=2)
    assert torch.equal(_generate(model), want)


def test_undo_in_the_middle_goes_on_as_transformers() -> None:
    model = build_model()
    want = _generate(model)
    handle = padless.patch(model)
    stop = _Interrupt(handle.undo, 4)
    assert torch.equal(_generate(model, logits_processor=LogitsProcessorList([stop])), want)
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

    want = _generate(model, logits_processor=LogitsProcessorList([Guided()]))
    with padless.patch(model) as handle:
        got = _generate(model, logits_processor=LogitsProcessorList([Guided()]))
        report = handle.report()
    assert torch.equal(got, want)
    assert not IS_FAST or report.decoding_steps == 11


def _check_cache(out: Any, stock: Any, real: Tensor) -> None:
    """Compares caches where tokens are; the prompt's mask is `real`."""
    caches = [keys_and_values(each.past_key_values) for each in (out, stock)]
    for a, b in zip(*caches, strict=True):
        assert a.shape == b.shape
        a, b = (x.transpose(1, 2) for x in (a, b))
        ones = real.new_ones(real.shape[0], a.shape[1] - real.shape[1])
        mask = torch.cat([real, ones], 1)
        torch.testing.assert_close(a[mask], b[mask], atol=1e-4, rtol=1e-4)
        assert a[~mask].abs().sum() == 0.0


@since("4.36", "DynamicCache")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_the_cache_that_is_handed_back(options: dict[str, Any]) -> None:
    model = build_model()
    real = batch("left")[1]
    times = options.get("num_beams", 1)

    def run() -> tuple[Any, Tensor]:
        out = _generate(model, return_dict_in_generate=True, **options)
        return out, out.sequences

    stock, want = run()
    with padless.patch(model) as handle:
        out, got = run()
        prompt = REAL["left"] if IS_FAST else times * REAL["left"]
        _check_fast(handle.report(), steps=11, prompt=prompt)
    assert torch.equal(got, want)
    assert type(out.past_key_values) is type(stock.past_key_values)
    _check_cache(out, stock, real.repeat_interleave(times, 0))


@since("4.48", "generate with a cache of the caller's, as it is now,")
def test_a_conversation_goes_on_from_it() -> None:
    model = build_model()
    real = batch("left")[1]
    more = torch.tensor([[5, 6], [7, 8], [9, 10]])

    def talk() -> Tensor:
        first = _generate(model, return_dict_in_generate=True)
        assert first.past_key_values.get_seq_length() == 13 + 11
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


@pytest.mark.skipif(not IS_FAST, reason="generate is looked into from 4.48 on")
def test_padding_on_the_right_is_left_to_transformers() -> None:
    # The first token is chosen by what the model computes at padding.
    model = build_model()
    want = _generate(model, "right")
    with padless.patch(model) as handle:
        got = _generate(model, "right")
        report = handle.report()
    assert torch.equal(got, want)
    assert report.generation_notes == {"a prompt padded on the right": 1}
    assert report.stock == {"a prompt padded on the right": 1, "a call behind a cache": 11}


def test_a_row_of_one_token_and_holes_in_the_mask() -> None:
    model = build_model()
    ids, real = batch("none")
    real[0, 4:7] = False
    real[1, :12] = False

    def run() -> Tensor:
        return model.generate(
            input_ids=ids, attention_mask=real.long(), max_new_tokens=9, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True,
        )  # fmt: skip

    want = run()
    with padless.patch(model) as handle:
        got = run()
        _check_fast(handle.report(), steps=8, prompt=int(real.sum()))
    assert torch.equal(got.sequences, want.sequences)
    if Version("4.36") <= VERSION:
        _check_cache(got, want, real)


@pytest.mark.skipif(not IS_FAST, reason="the cache of real tokens covers 4.48 and later")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_slots_without_a_token_are_never_read(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    want = _generate(model, **options)
    begin = stores.RaggedStore.begin_step

    def poisoned(self: stores.RaggedStore, *, with_mask: bool) -> None:
        slots = torch.arange(self.capacity)
        unused = slots >= self.rows.lengths[:, None]
        for buffers in self.layers:
            for buffer in buffers or ():
                buffer[unused] = float("nan")
        begin(self, with_mask=with_mask)

    monkeypatch.setattr(stores.RaggedStore, "begin_step", poisoned)
    with padless.patch(model) as handle:
        got = _generate(model, **options)
        assert handle.report().decoding_steps == 11
    assert torch.equal(got, want)


@pytest.mark.parametrize("inputs", ["embeddings", "no-mask"])
def test_other_prompts(inputs: str) -> None:
    model = build_model()
    ids, real = batch("left" if inputs == "embeddings" else "none")
    options: dict[str, Any] = {"input_ids": ids}
    if inputs == "embeddings":
        if Version("4.48") > VERSION:
            pytest.skip("left-padded embeddings to generate came later")
        embeddings = model.get_input_embeddings()(ids)
        options = {"inputs_embeds": embeddings, "attention_mask": real.long()}

    def run() -> Tensor:
        return model.generate(**options, max_new_tokens=9, do_sample=False, pad_token_id=0)

    want = run()
    with padless.patch(model) as handle:
        got = run()
        _check_fast(handle.report(), steps=8, prompt=int(real.sum()))
    assert torch.equal(got, want)


@pytest.mark.skipif(not IS_FAST, reason="the cache of real tokens covers 4.48 and later")
def test_a_patch_of_the_process_generates_so_too() -> None:
    model = build_model()
    want = _generate(model)
    with padless.patch_llama() as handle:
        got = _generate(model)
        _check_fast(handle.report(), steps=11, prompt=REAL["left"])
    assert torch.equal(got, want)
    assert "generate" not in vars(transformers.LlamaForCausalLM)
