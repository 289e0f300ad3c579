"""`patch(model, sequence_mesh=...)` trains as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import padless
from golden.models import batch as draw
from golden.models import build_model
from golden.steps import labels_of
from sequence.model_jobs import model_of, own_loss, step_of
from sequence.pool import pool

ALGORITHMS = ["ulysses", "ring"]
JOBS = "sequence.model_jobs:"


def _padded(padding: str) -> dict[str, Tensor]:
    ids, real = draw(padding)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels_of(ids, real)}


def _packed(*lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 96, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}


BATCHES = {
    "no padding": _padded("none"),
    "right": _padded("right"),
    "left": _padded("left"),
    "mixed": _padded("mixed"),
    "packed": _packed(5, 17, 1, 11),
    "long and short": _packed(60, 1, 2, 1),
    "ones": _packed(2, 1, 1, 1, 2),
    "one long": _packed(48),
    "many short": _packed(8, 6, 8, 7, 8, 5, 8, 8, 6, 8, 7, 5),
}


def _one_process(batch: dict[str, Tensor], heads: tuple[int, int] = (4, 2)) -> dict[str, Any]:
    model = model_of(heads)
    with padless.patch(model):
        return step_of(model, batch, reads_logits=True)


def _assert_same(found: dict[str, Any], expected: dict[str, Any], exact: float = 1e-6) -> None:
    """Compares in float64, but for what passes through the loss: transformers' is in float32."""
    for name, tolerance in (("loss", exact), ("logits", 1e-10)):
        if name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)
    gradients = expected["gradients"]
    assert found["gradients"].keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found["gradients"][name],
            gradient,
            rtol=0.0,
            atol=exact * float(gradient.abs().max()),
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_step_is_that_of_one_process(size: int, algorithm: str, batch: dict[str, Tensor]) -> None:
    expected = _one_process(batch)
    found = pool(size).run(JOBS + "step", algorithm, batch)
    for each in found:
        _assert_same(each, expected)
        assert not each["stock"] and not each["whole"]
        assert each["shared"] == f"{algorithm} over {size} ranks"
        assert each["taken"] == {algorithm: 1}
        assert f"shared out by {each['shared']}: 1 forwards by {algorithm}" in each["said"]
        assert each["skipped"] == batch["input_ids"].numel() - _real(batch)
        # The formula, whose memory is the square of the lengths, is not needed for either.
        assert [set(layer) for layer in each["backends"]] == [{"sdpa"}] * 2
    # Every rank has the same share of the tokens, and all shares are the batch.
    computed = [each["computed"] for each in found]
    assert max(computed) - min(computed) <= 1 and sum(computed) == max(_real(batch), size)


def _real(batch: dict[str, Tensor]) -> int:
    return int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)], ids=str)
def test_heads(algorithm: str, heads: tuple[int, int]) -> None:
    batch = BATCHES["packed"]
    for each in pool(4).run(JOBS + "step", algorithm, batch, heads):
        _assert_same(each, _one_process(batch, heads))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fewer_tokens_than_ranks(algorithm: str) -> None:
    batch = _packed(2, 1)
    for each in pool(4).run(JOBS + "step", algorithm, batch):
        _assert_same(each, _one_process(batch))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(algorithm: str, reentrant: bool) -> None:
    batch = BATCHES["left"]
    for each in pool(2).run(JOBS + "step", algorithm, batch, (4, 2), False, reentrant):
        _assert_same(each, _one_process(batch))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("count", [50, torch.tensor(50)], ids=["int", "tensor"])
def test_num_items_in_batch(algorithm: str, count: Any) -> None:
    batch = {**BATCHES["right"], "num_items_in_batch": count}
    expected = _one_process(batch)
    assert (expected["loss"] - _one_process(BATCHES["right"])["loss"]).abs() > 0.1
    for each in pool(2).run(JOBS + "step", algorithm, batch):
        _assert_same(each, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shift_labels_of_the_caller(algorithm: str) -> None:
    batch = dict(BATCHES["packed"])
    batch["shift_labels"] = batch["input_ids"] * 7 % 96
    for each in pool(2).run(JOBS + "step", algorithm, batch):
        _assert_same(each, _one_process(batch))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_of_the_callers_own(algorithm: str) -> None:
    batch = _padded("left")
    del batch["labels"]
    model = model_of()
    own_loss(model(**batch).logits, batch).backward()
    expected = {"gradients": {n: p.grad for n, p in model.named_parameters()}}
    for each in pool(2).run(JOBS + "mean_of_logits", algorithm, batch):
        _assert_same(each, expected, 1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hidden_states_are_whole(algorithm: str) -> None:
    batch = _padded("left")
    del batch["labels"]
    model = model_of()
    with torch.no_grad(), padless.patch(model):
        out = model.model(**batch, output_hidden_states=True, return_dict=True)
    for each in pool(2).run(JOBS + "hidden_states", algorithm, batch):
        for got, want in zip(each, [out.last_hidden_state, *out.hidden_states], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_changes_what_follows_it_in_its_document_alone(size: int, algorithm: str) -> None:
    lengths = (6, 21, 1, 9)
    batch = _packed(*lengths)
    del batch["labels"]
    at = [0, 5, 6, 16, 25, 26, 27, 28, 33]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    places = torch.arange(sum(lengths))
    for each in pool(size).run(JOBS + "changed_logits", algorithm, batch, at):
        for place, changed in zip(at, each, strict=True):
            expected = (documents == documents[place]) & (places >= place)
            assert torch.equal(changed[0], expected), f"token {place}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp before", "fsdp after"])
def test_gradients_that_wrappers_average_over_data_and_sequence(
    algorithm: str, wrapper: str
) -> None:
    batches = [BATCHES["left"], BATCHES["packed"]]
    steps = [_one_process(batch)["gradients"] for batch in batches]
    expected = {name: (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    for each in pool(4).run(JOBS + "wrapped_step", algorithm, batches, wrapper):
        _assert_same({"gradients": each}, {"gradients": expected})


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generate_runs_whole_and_says_so(options: dict[str, Any]) -> None:
    batch = _padded("left")
    del batch["labels"]
    for before, after, whole, generations in pool(2).run(
        JOBS + "generated", "ring", batch, options
    ):
        assert torch.equal(before, after)
        assert whole or generations, "nothing says that it ran whole"


def test_cache_runs_whole_and_says_so() -> None:
    batch = _padded("left")
    del batch["labels"]
    for kept, silent, whole in pool(2).run(JOBS + "cached", "ulysses", batch):
        assert kept and silent and whole == {"use_cache=True": 1}


def test_copy_and_undo() -> None:
    assert pool(2).run(JOBS + "copied_and_undone", BATCHES["left"]) == [(True, True)] * 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("two dimensions", "ValueError: sequence_mesh must have one dimension, got 2"),
        ("no mesh", "TypeError: sequence_mesh must be a torch DeviceMesh, got int"),
        ("heads", "UnsupportedError: Ulysses needs a number of heads that the 4 ranks"),
        ("algorithm", "ValueError: sequence_parallel must be 'auto' or one of ulysses, ring"),
        ("rope", "UnsupportedError: sequence_mesh needs a rope that depends on no other"),
        ("other batch", "ValueError: every rank of sequence_mesh must be given the same batch"),
    ],
)
def test_mistakes_are_told_in_one_sentence(kind: str, said: str) -> None:
    for message in pool(4).run(JOBS + "message", kind, _padded("left")):
        assert message.startswith(said) and "\n" not in message


@pytest.mark.parametrize(("size", "heads"), [(2, (4, 4)), (4, (4, 2))], ids=str)
def test_auto_alternates_between_the_batches_of_one_model(
    size: int, heads: tuple[int, int]
) -> None:
    batches = [BATCHES[n] for n in ("one long", "many short", "one long", "many short")]
    expected = [_one_process(batch, heads) for batch in batches]
    for found, taken, said in pool(size).run(JOBS + "alternating", batches, heads, "auto"):
        assert taken == ["ulysses", "ring"] * 2
        assert f"auto over {size} ranks: 2 forwards by ring, 2 forwards by ulysses" in said
        for step, want in zip(found, expected, strict=True):
            _assert_same(step, want)


def test_auto_leaves_the_ring_where_only_the_formula_would_compute_it() -> None:
    batches = [BATCHES["many short"]]
    for found, taken, _ in pool(2).run(JOBS + "alternating", batches, (4, 2), "reference"):
        assert taken == ["ulysses"]
        _assert_same(found[0], _one_process(batches[0]))


def test_auto_takes_the_ring_where_heads_do_not_divide() -> None:
    batch = BATCHES["one long"]
    for heads, want in (((4, 2), "ulysses"), ((2, 1), "ring")):
        for each in pool(4).run(JOBS + "step", "auto", batch, heads):
            assert each["taken"] == {want: 1}
            _assert_same(each, _one_process(batch, heads))


def test_ranks_that_have_a_kernel_for_the_ring_and_ranks_that_have_none_go_one_way() -> None:
    job = ("sequence.faults:under", "no ring on the last rank", JOBS + "step")
    batch = BATCHES["many short"]
    for each in pool(2).run(*job, "auto", batch):
        assert each["taken"] == {"ulysses": 1}
        _assert_same(each, _one_process(batch))


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed to be initialised"):
        padless.patch(build_model(), sequence_mesh=object())
