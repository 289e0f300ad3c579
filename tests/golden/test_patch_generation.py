"""`generate` of a patched model: the same tokens, behind a cache that holds real tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import padless
from golden.generating import IS_FAST, REAL, check_cache, check_fast, generate
from golden.models import HEADS, VERSION, batch, build_model
from golden.test_patch_cache import keys_and_values
from padless.generation import store as stores
from padless.unpadded import ended, session

pytestmark = pytest.mark.case("generate")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_256_tokens_are_those_of_the_unpatched_model(heads: str, padding: str) -> None:
    model = build_model(heads, max_position_embeddings=512)
    want = generate(model, padding, new=256)
    with padless.patch(model) as handle:
        got = generate(model, padding, new=256)
        check_fast(handle.report(), steps=255, prompt=REAL[padding])
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
    want = generate(model, padding, **options)
    with padless.patch(model) as handle:
        got = generate(model, padding, **options)
        # Rows that begin alike are computed once.
        prompt = REAL[padding] if IS_FAST else times * REAL[padding]
        check_fast(handle.report(), steps=11, prompt=prompt)
    assert torch.equal(got, want)


def test_buffers_grow_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_STEP", 4)
    model = build_model()
    want = generate(model, new=40)
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
        got = generate(model, new=None, max_length=10_000, stopping_criteria=[stop])
        check_fast(handle.report(), steps=39, prompt=REAL["left"])
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
            check_fast(handle.report(), steps=5, prompt=13)
            handle.undo()
    assert heard[0] == heard[1]


def test_rows_end_early() -> None:
    model = build_model()
    plain = generate(model, new=20)
    # Ends the second row on its third token, and others where they come to it.
    options = {"eos_token_id": int(plain[1, 15]), "new": 20}
    want = generate(model, **options)
    assert (want[1, 16:] == 0).all() and want.shape[1] > 17
    with padless.patch(model) as handle:
        got = generate(model, **options)
        check_fast(handle.report(), steps=want.shape[1] - 14, prompt=REAL["left"])
    assert torch.equal(got, want)


def _ends_of_two_rows(model: Any, **options: Any) -> list[int]:
    """Finds ids that end the second and third row early, and the first not at all."""
    plain = generate(model, new=40, **options)[:, 13:].tolist()
    ends = []
    for row, earliest in ((1, 2), (2, 7)):
        ends.append(next(t for t in plain[row][earliest:30] if t not in plain[0]))
    return ends


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 20}, {"repetition_penalty": 1.3}],
    ids=["greedy", "sampled", "processors"],
)
def test_rows_that_have_ended_are_left_out(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 4)
    model = build_model()
    options = {**options, "new": 40, "eos_token_id": _ends_of_two_rows(model, **options)}
    want = generate(model, **options)
    assert want.shape[1] == 53 and (want[1:, -10:] == 0).all()
    rows = []
    with padless.patch(model) as handle:
        model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // 64))
        got = generate(model, **options)
        report = handle.report()
    assert torch.equal(got, want)
    assert report.rows_left_out == (2 if IS_FAST else 0)
    if IS_FAST:
        assert rows[0] == 3 and rows[-1] == 1
        assert "2 rows were left out of steps behind their end" in str(report)


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"logits_processor": [lambda ids, scores: scores]},
        {"num_beams": 2},
    ],
    ids=["returned", "processor", "beams"],
)
def test_rows_that_somebody_reads_behind_their_end_are_kept(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 4)
    model = build_model()
    options = {**options, "new": 40, "eos_token_id": _ends_of_two_rows(model)}
    want = generate(model, **options)
    with padless.patch(model) as handle:
        got = generate(model, **options)
        assert handle.report().rows_left_out == 0
    if "output_scores" in options:
        for a, b in zip(got.scores, want.scores, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)


def test_a_cache_looked_into_after_rows_were_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 4)
    model = build_model()
    options = {"new": 40, "eos_token_id": _ends_of_two_rows(model)}
    want = generate(model, **options)
    step = session.Session._step
    looks = []

    def look(self: Any, arguments: Any) -> Any:
        if self.steps == 30:
            looks.append(keys_and_values(arguments["past_key_values"])[0].shape[0])
        return step(self, arguments)

    monkeypatch.setattr(session.Session, "_step", look)
    with padless.patch(model) as handle:
        got = generate(model, **options)
        notes = handle.report().generation_notes
    assert torch.equal(got, want)
    if IS_FAST:
        assert looks == [3] and notes == {"the cache was looked into": 1}


def test_calls_of_other_shapes_follow_each_other() -> None:
    model = build_model()
    shapes = [("left", 13, 12), ("none", 5, 7), ("left", 30, 9)]
    wants = [generate(model, padding, seqlen=n, new=new) for padding, n, new in shapes]
    with padless.patch(model) as handle:
        for (padding, n, new), want in zip(shapes, wants, strict=True):
            assert torch.equal(generate(model, padding, seqlen=n, new=new), want)
        prompt = sum(int(batch(padding, seqlen=n)[1].sum()) for padding, n, _ in shapes)
        check_fast(handle.report(), steps=11 + 6 + 8, prompt=prompt, calls=3)


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
        check_fast(handle.report(), steps=8, prompt=int(real.sum()))
    assert torch.equal(got.sequences, want.sequences)
    if Version("4.36") <= VERSION:
        check_cache(got, want, real)


@pytest.mark.skipif(not IS_FAST, reason="the cache of real tokens covers 4.48 and later")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_slots_without_a_token_are_never_read(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    want = generate(model, **options)
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
        got = generate(model, **options)
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
        check_fast(handle.report(), steps=8, prompt=int(real.sum()))
    assert torch.equal(got, want)
