"""The benchmark scripts run anywhere, and count, share and compare as they say."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import names, record, step
from benchmarks.attention_layer import AttentionLayer
from benchmarks.layer_batch import LayerBatch
from benchmarks.lengths import TOKENS, share_out
from benchmarks.step_variants import TrainingStep
from torch.utils.flop_counter import FlopCounterMode

from benchmark_runs import HandClock, smoke_record
from padless.benchmark.batches import IGNORED, draw_lengths, make_batch
from padless.benchmark.clock import Clock
from padless.benchmark.models import (
    LLAMA_8B_WIDTH,
    SMOKE,
    Liger,
    Shape,
    build_llama,
    sharing_copy,
    step_flops,
)
from padless.benchmark.names import slug
from padless.benchmark.rows import rows, spread
from padless.benchmark.timing import measure
from padless.benchmark.variant import Timing, Variant, WrongNumbersError

# What a machine without a GPU has of each script's rows.
ON_CPU = {
    "layer": {
        names.ORIGINAL_FLASH, names.ORIGINAL_SDPA, names.SDPA, names.PADLESS, names.PADLESS_TORCH,
        names.FLOOR, names.FLOOR_ONE_PRODUCT,
    },
    "step": {names.EAGER, names.SDPA, names.SDPA_NO_MASK, names.PADLESS, names.PADLESS_TORCH},
    "lengths": {names.SDPA, names.PADLESS, names.FLOOR, names.FLOOR_ONE_PRODUCT},
    "kernels": {"padless, backend sdpa", "torch SDPA flash, dense"},
    "cpu_step": {names.EAGER, names.SDPA, names.PADLESS},
    "syncs": {names.SDPA, names.PADLESS, names.PADLESS_TORCH},
    "losscurve": {names.SDPA, names.PADLESS},
    "balance": {names.SHUFFLED, names.BALANCED},
}  # fmt: skip


@pytest.mark.parametrize("script", ON_CPU)
def test_script_writes_record_in_smoke(script: str) -> None:
    made = json.loads(smoke_record(script))

    assert made["name"] == script
    assert made["smoke"] is True
    assert made["commit"] == "c0ffee"
    assert made["versions"]["torch"] == torch.__version__
    assert made["hardware"]["kind"] == "cpu"
    assert made["ceilings"]["matmul_tflops"] > 0
    assert made["tables"]
    table = made["tables"][0]
    reasons = {row["name"]: row["reason"] for row in table["rows"]}
    assert {name: reasons[name] for name in ON_CPU[script]} == dict.fromkeys(ON_CPU[script])
    for row in table["rows"]:
        is_timed = row["reason"] is None and script not in ("syncs", "losscurve", "balance")
        assert ("forward_backward_ms" in row) is is_timed
        if is_timed:
            others = {name for name, reason in reasons.items() if reason is None}
            assert set(row["over"]) == others - {row["name"]}


def test_original_does_not_serve_grouped_heads() -> None:
    grouped = json.loads(smoke_record("layer"))["tables"][-1]

    reasons = {row["name"]: row["reason"] for row in grouped["rows"]}
    assert grouped["num_heads"] != grouped["num_kv_heads"]
    assert reasons[names.ORIGINAL_FLASH].startswith("RuntimeError")
    assert reasons[names.ORIGINAL_SDPA].startswith("RuntimeError")
    assert reasons[names.PADLESS] is None


def test_layer_is_checked_against_transformers() -> None:
    table = json.loads(smoke_record("layer"))["tables"][0]

    checked = {row["name"] for row in table["rows"] if "rms_error" in row}
    floors = {names.FLOOR, names.FLOOR_ONE_PRODUCT}
    assert checked == ON_CPU["layer"] - floors
    for row in table["rows"]:
        for error in row.get("rms_error", {}).values():
            assert error < 1e-5


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_floors_attend_as_the_layer_does_without_rotation(num_kv_heads: int) -> None:
    shape = Shape(64, 4, num_kv_heads, 1, 0, 0)
    batch = LayerBatch.draw((32, 9, 17, 1), 32, 64, torch.float32, "cpu")
    layer = AttentionLayer(shape, batch, torch.float32, "cpu")
    still = (torch.ones(4, 32, 16), torch.zeros(4, 32, 16))
    layer.padded_tables = still
    expected = layer._real(layer.transformers_sdpa().forward(batch)[0])

    for build in (layer.floor, layer.floor_one_product):
        out, dout = build().forward(batch)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert dout is not None
        assert out.shape == dout.shape


def test_new_lengths_are_timed_twice() -> None:
    table = json.loads(smoke_record("step"))["tables"][-1]

    assert table["new_lengths"] is True
    assert len(set(map(tuple, table["lengths_a_step"]))) == len(table["lengths_a_step"])
    assert len(set(table["seqlens"])) == len(table["seqlens"])
    rows = {row["name"]: row for row in table["rows"]}
    assert names.EAGER not in rows
    assert rows[names.PADLESS]["again_ms"]["count"] >= 1


def test_no_length_is_left_with_hardly_any_time() -> None:
    shares = share_out(28.0, TOKENS)

    assert list(shares) == list(TOKENS)
    assert sum(shares.values()) == pytest.approx(28.0)
    assert min(shares.values()) > 28.0 / len(shares) / 2
    assert shares[131072] - shares[65536] > 2 * (shares[32768] - shares[16384])


def test_syncs_counts_compilations() -> None:
    (row,) = json.loads(smoke_record("syncs"))["tables"][-1]["rows"]

    assert row["graphs_in_warmup"] >= 1
    assert row["graph_breaks"] == 0
    assert row["recompilations_after_warmup"] == 0


def test_losscurve_of_patched_model_is_the_same() -> None:
    tables = json.loads(smoke_record("losscurve"))["tables"]

    exact, rounded = (table["difference"] for table in tables)
    assert exact["runs"]["largest"] <= 1e-5
    assert exact["same_weights"]["largest"] <= 1e-5
    assert 0 < rounded["same_weights"]["largest"] <= 1e-2


# --- timing


def _quick(
    builders: dict[str, Any],
    *,
    rounds: int = 6,
    warmup: int = 2,
    draw: Any = None,
    clock: Clock | None = None,
    **options: Any,
) -> dict[str, Timing]:
    """Times a number of rounds, however long they take."""
    timings = measure(
        builders,
        clock or HandClock(),
        draw=draw or (lambda index: None),
        seconds=1e6,
        warmup=warmup,
        min_rounds=1,
        max_rounds=rounds,
        **options,
    )
    return {found.name: found for found in timings}


def _product(
    calls: list[str], name: str, ms: float = 1.0, clock: HandClock | None = None
) -> Variant:
    leaf = torch.ones(8, requires_grad=True)

    def forward(inputs: Any) -> tuple[torch.Tensor, None]:
        calls.append(name)
        if clock is not None:
            clock.now += ms
        return (leaf * 2).sum(), None

    return Variant(forward, leaves=[leaf])


def test_variants_take_turns() -> None:
    calls: list[str] = []
    builders = {name: lambda name=name: _product(calls, name) for name in "abc"}
    _quick(builders, rounds=6, warmup=1)

    warm, turns = calls[:3], calls[3:]
    assert warm == ["a", "b", "c"]
    rounds = [turns[at : at + 3] for at in range(0, len(turns), 3)]
    assert len(rounds) == 6
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(map(tuple, rounds))) > 1, "the order of turns never changes"


def test_slow_variants_sit_rounds_out() -> None:
    clock = HandClock()
    times = {"fast": 1.0, "twice": 2.0, "slow": 60.0}
    builders = {
        name: lambda name=name, ms=ms: _product([], name, ms, clock) for name, ms in times.items()
    }
    found = _quick(builders, rounds=8, clock=clock)

    counts = {name: len(each.samples["forward_backward"]) for name, each in found.items()}
    assert counts == {"fast": 8, "twice": 4, "slow": 2}
    assert {name: each.samples["forward"][0] for name, each in found.items()} == times


def test_one_round_is_made_even_without_time() -> None:
    (found,) = measure(
        {"x": lambda: _product([], "x")}, Clock("cpu"), draw=lambda index: None, seconds=0.0
    )
    assert len(found.samples["forward_backward"]) == 1


def test_failing_variants_are_rows_with_reasons() -> None:
    calls: list[str] = []

    def missing() -> Variant:
        raise ImportError("no such\n  package")

    def breaks_later() -> Variant:
        variant = _product([], "x")
        forward, count = variant.forward, iter(range(100))

        def failing(inputs: Any) -> Any:
            if next(count) == 4:
                raise RuntimeError("broke")
            return forward(inputs)

        variant.forward = failing
        return variant

    def wrong() -> Variant:
        def verify(inputs: Any, out: torch.Tensor) -> dict[str, Any]:
            raise WrongNumbersError("loss 2 instead of 1")

        variant = _product([], "x")
        variant.verify = verify
        return variant

    def too_large() -> Variant:
        raise torch.OutOfMemoryError("tried to allocate a lot")

    found = _quick(
        {
            "missing": missing,
            "breaks": breaks_later,
            "wrong": wrong,
            "too large": too_large,
            "good": lambda: _product(calls, "good"),
        }
    )

    assert found["missing"].reason == "ImportError: no such package"
    assert found["breaks"].reason == "RuntimeError: broke"
    assert found["breaks"].samples == {}
    assert found["wrong"].reason == "wrong numbers: loss 2 instead of 1"
    assert found["too large"].reason == "out of memory"
    assert found["good"].reason is None
    assert len(found["good"].samples["forward_backward"]) == 6


def test_gradients_are_there_to_verify_and_dropped_after_each_turn() -> None:
    seen: list[bool] = []
    variant = _product([], "x")
    (leaf,) = variant.leaves
    variant.verify = lambda inputs, out: seen.append(leaf.grad is not None) or {"figure": 7}
    found = _quick({"x": lambda: variant})["x"]

    assert seen == [True]
    assert found.facts == {"figure": 7}
    assert leaf.grad is None


def test_measures_by_what_was_asked() -> None:
    builders = {"x": lambda: _product([], "x")}
    assert set(_quick(builders)["x"].samples) == {"forward", "forward_backward"}
    assert set(_quick(builders, repeats=2)["x"].samples) == {
        "forward",
        "forward_backward",
        "again",
    }
    batches: list[int] = []
    builders = {"x": lambda: _noting(_product([], "x"), batches)}
    _quick(builders, rounds=3, warmup=2, draw=lambda index: index)
    assert batches == [0, 1, 2, 3, 4]


def _noting(variant: Variant, batches: list[int]) -> Variant:
    variant.prepare = lambda batch: batches.append(batch) or (batch,)
    return variant


def test_forward_is_timed_without_autograd_for_inference() -> None:
    modes: list[bool] = []
    variant = _product([], "x")
    forward = variant.forward
    variant.forward = lambda inputs: modes.append(torch.is_grad_enabled()) or forward(inputs)
    _quick({"x": lambda: variant}, rounds=1, warmup=1, inference=True)

    assert modes == [False, True, False, True]


def test_spread_takes_percentiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "count": 6}


def test_rows_compare_with_each_other() -> None:
    fast = Timing("fast", samples={"forward": [1.0], "forward_backward": [2.0]})
    slow = Timing("slow", samples={"forward": [1.0], "forward_backward": [5.0]})
    none = Timing("none", reason="not there")
    made = {row["name"]: row for row in rows([fast, slow, none])}

    assert made["slow"]["over"] == {"fast": 2.5}
    assert made["fast"]["over"] == {"slow": 0.4}
    assert "over" not in made["none"]


def test_slug_makes_file_names() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) CPU E5-2690 v3 @ 2.60GHz") == "intel-xeon-cpu-e5-2690-v3"


# --- batches


@pytest.mark.parametrize(("rows", "seqlen", "share"), [(8, 2048, 0.47), (2, 8192, 0.67)])
def test_draw_lengths_meets_the_share(rows: int, seqlen: int, share: float) -> None:
    drawn = [draw_lengths(rows, seqlen, share, random.Random(seed)) for seed in range(20)]

    assert len(set(drawn)) > 1
    for lengths in drawn:
        assert len(lengths) == rows
        assert max(lengths) == seqlen
        assert min(lengths) >= 1
        assert sum(lengths) == round(share * rows * seqlen)


def test_draw_lengths_refuses_share_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"share must leave each of 4 rows .*, got 0\.2"):
        draw_lengths(4, 64, 0.2, random.Random(0))


def _batch(widen: int = 0) -> Any:
    rng = random.Random(0)
    lengths = draw_lengths(4, 32, 0.5, rng)
    return make_batch(lengths, 32, SMOKE.vocab_size, rng, "cpu").widened(widen)


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return build_llama(SMOKE, dtype=torch.float32, device="cpu", longest=64)


def test_flattened_by_hand_trains_on_the_same_tokens(llama: Any) -> None:
    batch = _batch()
    padded = llama(**batch.padded()).loss
    arguments = batch.flattened()
    assert arguments["input_ids"].shape == (1, sum(batch.lengths))
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["cu_seq_lens_q"].diff().tolist() == list(batch.lengths)
    assert arguments["max_length_q"] == max(batch.lengths)
    assert int((arguments["labels"] == IGNORED).sum()) == len(batch.lengths)

    # Transformers' SDPA reads documents from position_ids, flash attention from the boundaries.
    flat = llama(**arguments).loss
    torch.testing.assert_close(flat, padded, rtol=1e-6, atol=1e-6)


def test_dropped_mask_trains_on_the_same_tokens_where_padding_is_right(llama: Any) -> None:
    batch = _batch()
    padded, dropped = llama(**batch.padded()).loss, llama(**batch.without_mask()).loss
    torch.testing.assert_close(dropped, padded, rtol=1e-6, atol=1e-6)


def test_widened_batch_has_the_same_real_tokens(llama: Any) -> None:
    batch, wide = _batch(), _batch(widen=3)
    assert wide.input_ids.shape[1] == batch.input_ids.shape[1] + 3
    torch.testing.assert_close(llama(**wide.padded()).loss, llama(**batch.padded()).loss)


@pytest.mark.parametrize("is_new", [False, True])
def test_batches_of_a_step_are_new_where_they_have_to_be(
    is_new: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def note(builders: dict[str, Any], clock: Clock, **options: Any) -> list[Timing]:
        draw = options["draw"]
        batches = [draw(index) for index in (0, 1, 2, 1)]
        seen.update(builders=builders, batches=batches, repeats=options["repeats"])
        return []

    monkeypatch.setattr(step, "measure", note)
    monkeypatch.setattr(sys, "argv", ["step"])
    options = record.parser(None, seconds=1)
    arguments = options.parse_args(["--smoke", "--device", "cpu", "--out", str(tmp_path)])
    training = TrainingStep(SMOKE, torch.float32, "cpu", longest=256)
    made = record.Record("step", arguments)
    step._measure_case(
        made, training, training.builders(), ("x", 4, 256, 0.47, is_new), arguments, 1.0
    )

    first, second, third, second_again = seen["batches"]
    assert second_again is second
    assert (first is second) is not is_new
    assert len({first.lengths, second.lengths, third.lengths}) == (3 if is_new else 1)
    assert seen["repeats"] == (2 if is_new else 1)
    if is_new:
        # Each variant pads the batch to a width of its own.
        builds = list(seen["builders"].values())
        stock = [build() for build in (builds[0], seen["builders"][names.SDPA_NO_MASK])]
        widths = [variant.prepare(first)["input_ids"].shape[1] for variant in stock]
        assert len(set(widths)) == 2


def test_widths_of_new_lengths_never_meet() -> None:
    # Each variant adds its own number of columns: no two may ever run the same width.
    apart = 13
    widths = step._widths(2048, apart, random.Random(0))
    every = [width + columns for width in widths for columns in range(apart)]

    assert len(widths) > 25
    assert len(set(every)) == len(every)
    assert max(every) < 2048
    assert widths != sorted(widths)


# --- models


def test_sharing_copy_shares_weights_and_nothing_else(llama: Any) -> None:
    copy = sharing_copy(llama, "eager")

    assert [id(p) for p in copy.parameters()] == [id(p) for p in llama.parameters()]
    assert copy.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "sdpa"
    assert copy.model.layers[0] is not llama.model.layers[0]
    assert copy.model.layers[0].self_attn.config is copy.config


def test_step_flops_are_those_of_the_products(llama: Any) -> None:
    lengths = (24,)
    ids = torch.randint(1, SMOKE.vocab_size, (1, 24))
    with FlopCounterMode(display=False) as counter:
        llama(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    attention = step_flops(SMOKE, lengths) - products

    # The counter takes dense attention, without its backward's recomputation.
    dense_forward = 4 * SMOKE.num_layers * SMOKE.num_heads * SMOKE.head_dim * 24**2
    assert attention == pytest.approx(3.5 * dense_forward / 2)


def test_step_flops_of_the_measured_model() -> None:
    lengths = draw_lengths(8, 2048, 0.47, random.Random(0))
    assert step_flops(LLAMA_8B_WIDTH, lengths) == pytest.approx(67.6e12, rel=0.02)


def test_liger_reaches_one_model_only(monkeypatch: pytest.MonkeyPatch, llama: Any) -> None:
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    norm = modeling_llama.LlamaRMSNorm
    patched: list[Any] = []

    def rotary(*args: Any) -> Any:
        return stock(*args)

    def apply(model: Any) -> None:
        patched.append(model)
        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaRMSNorm = None

    package = types.ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)

    liger = Liger()
    liger.apply(llama)
    assert patched == [llama]
    assert modeling_llama.apply_rotary_pos_emb is stock
    assert modeling_llama.LlamaRMSNorm is norm
    with liger.turn():
        assert modeling_llama.apply_rotary_pos_emb is rotary
    assert modeling_llama.apply_rotary_pos_emb is stock


def test_step_refuses_wrong_loss_and_wrong_gradient() -> None:
    torch.manual_seed(0)
    training = TrainingStep(SMOKE, torch.float32, "cpu", longest=64)
    batch = _batch()
    training.find_truth(batch)
    truth = training.truth
    assert truth is not None

    def reason(**wrong: float) -> str | None:
        training.truth = {**truth, **wrong}
        build = training.builders()[names.PADLESS]
        return _quick({"x": build}, rounds=1, draw=lambda index: batch)["x"].reason

    assert reason() is None
    for name in truth:
        found = reason(**{name: truth[name] * 1.2})
        assert found is not None
        assert found.startswith(f"wrong numbers: {name}")
