"""The generation benchmark computes the same tokens in every row, and times what it says."""

from __future__ import annotations

import json
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import generation, generation_variants, names
from benchmarks.continuous import Continuous
from benchmarks.generation_timing import measure_generation
from benchmarks.generation_variants import Generating, Generation, Truth
from benchmarks.prompts import Prompts, make_prompts, new_widths

from benchmark_runs import HandClock, smoke_record
from padless.benchmark.models import SMOKE
from padless.benchmark.variant import Timing, WrongNumbersError

# What a machine without a GPU has of the rows.
ON_CPU = {
    names.SDPA, names.SDPA_NO_CUDNN, names.SDPA_STATIC, names.PADLESS, names.PADLESS_TORCH,
    names.CONTINUOUS,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Generation:
    torch.manual_seed(0)
    return Generation(SMOKE, torch.float32, "cpu", longest=64)


def _prompts() -> Prompts:
    return make_prompts((5, 12, 1), 12, SMOKE.vocab_size, random.Random(0), "cpu")


# --- the script


def test_script_writes_record_in_smoke() -> None:
    made = json.loads(smoke_record("generation"))

    assert made["name"] == "generation"
    assert made["smoke"] is True
    assert [table["key"] for table in made["tables"]] == ["p7", "p7-fixed"]
    for table in made["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert {name: rows[name]["reason"] for name in ON_CPU} == dict.fromkeys(ON_CPU)
        timed = {name for name, row in rows.items() if row["reason"] is None}
        for name in timed:
            assert rows[name]["prefill_ms"]["median"] > 0
            assert rows[name]["decode_ms"]["count"] == rows[name]["prefill_ms"]["count"] >= 1
            assert rows[name]["same_first_tokens"] == 1.0
            assert rows[name]["same_early_tokens"] == 1.0
            assert set(rows[name]["over"]) == timed - {name}
        for name in rows.keys() - timed:
            assert rows[name]["reason"]
        assert rows[names.PADLESS]["kernel"]
        assert rows[names.PADLESS]["forwards"] >= 1
        assert table["decode_floor_ms"] > 0
        assert table["cache_bytes_padded"] > table["cache_bytes_real"] > 0


def test_new_lengths_are_new_at_every_turn() -> None:
    new, fixed = json.loads(smoke_record("generation"))["tables"]

    assert new["new_lengths"] is True
    assert len(new["seqlens"]) > 1
    assert len(set(new["seqlens"])) == len(new["seqlens"])
    assert len(set(map(tuple, new["lengths_a_turn"]))) == len(new["lengths_a_turn"])
    assert fixed["new_lengths"] is False
    assert len(fixed["seqlens"]) == 1
    assert fixed["tokens_real"] == sum(fixed["lengths"])


def test_cases_are_picked_by_name() -> None:
    assert [case.key for case in generation._cases(generation.CASES, "64x8192,p7")] == [
        "p7",
        "64x8192",
    ]
    every = generation._cases(generation.CASES, None)
    assert len(every) == len(generation.CASES) - 1
    with pytest.raises(SystemExit, match="no such cases: p8"):
        generation._cases(generation.CASES, "p7,p8")


def test_rows_are_left_out_by_text(tiny: Generation) -> None:
    builders = tiny.builders(3, 12, 4, with_compile=True)
    kept = generation._without(builders, "continuous,static")
    assert set(builders) - set(kept) == {
        names.SDPA_STATIC, names.SDPA_STATIC_COMPILED, names.CONTINUOUS, names.CONTINUOUS_FA4,
    }  # fmt: skip
    assert generation._without(builders, None) == builders
    assert set(builders) - {names.PADLESS, names.PADLESS_TORCH} == set(names.GENERATION_PEERS)


# --- prompts


def test_prompts_are_padded_on_the_left() -> None:
    prompts = _prompts()

    assert prompts.attention_mask.sum(1).tolist() == [5, 12, 1]
    assert prompts.attention_mask[:, -1].tolist() == [1, 1, 1]
    assert bool((prompts.input_ids[prompts.attention_mask == 0] == 0).all())
    assert [len(row) for row in prompts.listed()] == [5, 12, 1]
    assert prompts.listed()[0] == prompts.input_ids[0, -5:].tolist()
    assert prompts.widened(3).listed() == prompts.listed()
    assert prompts.widened(3).attention_mask.shape == (3, 15)
    narrow = prompts.narrowed()
    assert narrow.lengths == (5, 11, 1)
    assert narrow.listed() == [row[-11:] for row in prompts.listed()]


@pytest.mark.parametrize(("seqlen", "tokens", "variants"), [(1024, 64, 9), (128, 4, 8)])
def test_lengths_of_keys_never_meet(seqlen: int, tokens: int, variants: int) -> None:
    widths = new_widths(seqlen, tokens, variants, random.Random(0))
    assert len(widths) >= 3
    assert widths[0] == max(widths)
    seen: set[int] = set()
    for width in widths:
        met = {width - 1 + 2 * v + n for v in range(variants) for n in range(tokens + 2)}
        assert not met & seen
        seen |= met
        assert width + 2 * (variants - 1) <= seqlen


def test_turns_have_prompts_of_their_own_or_one_shape(tiny: Generation) -> None:
    new = generation.Turns(generation.Case("x", 4, 128, True), 4, 8, tiny, 0)
    first, second = new.draw(0), new.draw(1)
    assert new.draw(0) is first
    widths = [prompts.seqlen for turn in (first, second) for prompts in turn]
    assert len(set(widths)) == 4
    assert first[0].seqlen == first[1].seqlen - 1
    assert new.warmup + new.max_rounds == len(new.widths)

    fixed = generation.Turns(generation.Case("x", 4, 128, False), 4, 8, tiny, 0)
    assert fixed.draw(0) is fixed.draw(5)
    assert fixed.draw(0)[0] is fixed.draw(0)[1]
    whole = generation.Turns(generation.Case("x", 1, 128, False), 4, 8, tiny, 0)
    assert whole.draw(0)[1].lengths == (128,)


# --- variants


def test_rows_run_to_the_end_whatever_token_comes(tiny: Generation) -> None:
    prompts = _prompts()
    truth = tiny.find_truth(prompts, 8)
    assert truth is not None
    assert truth.tokens.shape == (3, 8)
    # In float32 nothing ties with the best but itself.
    assert truth.ties.shape == (3, SMOKE.vocab_size)
    assert torch.equal(truth.ties.nonzero()[:, 1], truth.tokens[:, 0])
    assert tiny.model.generation_config.eos_token_id is None
    assert tiny.model.config.eos_token_id is None


def test_new_columns_change_no_token(tiny: Generation) -> None:
    prompts = _prompts()
    truth = tiny.find_truth(prompts, 6)
    assert truth is not None
    for build in (lambda: tiny.stock("sdpa"), lambda: tiny.padless("sdpa")):
        variant = build()
        found = variant.generate(variant.prepare(prompts.widened(5)), 6)
        torch.testing.assert_close(found, truth.tokens)
        variant.close()


def test_tokens_that_do_not_fit_are_not_compared(
    tiny: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(self: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate a lot")

    monkeypatch.setattr(type(tiny.model), "generate", generate)
    assert tiny.find_truth(_prompts(), 4) is None


def test_cudnn_is_off_in_its_row_alone(tiny: Generation) -> None:
    builders = tiny.builders(3, 12, 4)
    seen = {}
    for name in (names.SDPA, names.SDPA_NO_CUDNN):
        with builders[name]().context():
            seen[name] = torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == {names.SDPA: True, names.SDPA_NO_CUDNN: False}


def test_static_cache_is_asked_for_without_compilation(
    tiny: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    prompts = _prompts()

    def generate(self: Any, **options: Any) -> torch.Tensor:
        asked.append({k: v for k, v in options.items() if k not in prompts.padded()})
        return options["input_ids"]

    monkeypatch.setattr(type(tiny.model), "generate", generate)
    variant = tiny.builders(3, 12, 4)[names.SDPA_STATIC]()
    variant.generate(prompts.padded(), 4)
    monkeypatch.setattr(tiny, "device", "cuda")
    tiny.compiled().generate(prompts.padded(), 4)
    shared = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    assert asked == [{**shared, "disable_compile": True}, shared]


def test_floor_reads_all_weights_but_the_embedding(tiny: Generation) -> None:
    table = SMOKE.vocab_size * SMOKE.hidden_size * 4
    assert tiny.weight_bytes - tiny.read_bytes == table
    assert tiny.cache_bytes(10) == 10 * SMOKE.num_layers * 2 * SMOKE.num_kv_heads * 16 * 4


class _Manager:
    """A manager that gives results as it is told."""

    def __init__(self, results: list[Any]) -> None:
        self.results = results

    def add_requests(self, inputs: list[list[int]], max_new_tokens: int) -> list[str]:
        return [str(index) for index in range(len(inputs))]

    def get_result(self, timeout: float) -> Any:
        return self.results.pop(0) if self.results else None

    def is_running(self) -> bool:
        return bool(self.results)


def _result(name: str, tokens: list[int], error: str | None = None) -> Any:
    return SimpleNamespace(
        request_id=name, generated_tokens=tokens, error=error, is_finished=lambda: True
    )


def test_continuous_batching_answers_in_order_or_says_why_not() -> None:
    made = object.__new__(Continuous)
    made.device = torch.device("cpu")
    made._manager = _Manager([_result("1", [3, 4]), None, _result("0", [1, 2])])
    assert made.generate([[7], [8, 9]], 2).tolist() == [[1, 2], [3, 4]]
    made._manager = _Manager([_result("1", [3, 4])])
    with pytest.raises(RuntimeError, match="its thread ended"):
        made.generate([[7], [8, 9]], 2)
    made._manager = _Manager([_result("1", [], "no pages left")])
    with pytest.raises(RuntimeError, match="no pages left"):
        made.generate([[7], [8, 9]], 2)


# --- the check


@pytest.mark.parametrize("at_least", [0.5, 1.0])
def test_other_tokens_are_wrong_numbers(at_least: float) -> None:
    truth = torch.arange(12).reshape(4, 3)
    ties = torch.zeros(4, 20, dtype=torch.bool)
    check = generation.make_check(Truth(truth, ties), (4, 3), at_least=at_least)
    assert check(truth) == {"same_first_tokens": 1.0, "same_early_tokens": 1.0}

    first, last = truth.clone(), truth.clone()
    first[:3, 0] += 1
    last[3, 2] += 1
    with pytest.raises(WrongNumbersError, match="25 % of first tokens"):
        check(first)
    if at_least == 1.0:
        with pytest.raises(WrongNumbersError, match="1 of 12 tokens"):
            check(last)
    else:
        assert check(last)["same_early_tokens"] == pytest.approx(11 / 12)
    with pytest.raises(WrongNumbersError, match=r"\(4, 2\) tokens instead of \(4, 3\)"):
        check(truth[:, :2])
    assert generation.make_check(None, (4, 3), at_least=1.0)(first) == {}
    # One that scores as high is no wrong first token.
    ties[torch.arange(3), first[:3, 0]] = True
    if at_least < 1.0:
        assert check(first)["same_first_tokens"] == 1.0


def test_scores_within_some_roundings_tie(
    tiny: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    eps = torch.finfo(tiny.model.dtype).eps
    scores = torch.tensor([[1.0, 1 - 3 * eps, 1 - 6 * eps, -1.0]])
    found = SimpleNamespace(logits=(scores,))
    monkeypatch.setattr(type(tiny.model), "generate", lambda self, **options: found)
    assert generation_variants._equally_good(tiny.model, {}).tolist() == [
        [True, True, False, False]
    ]


# --- timing


def _measure(builders: dict[str, Any], clock: HandClock, **options: Any) -> dict[str, Timing]:
    prompts = _prompts()
    defaults: dict[str, Any] = {
        "draw": lambda index: (prompts, prompts), "check": lambda found: {}, "max_rounds": 4,
    }  # fmt: skip
    made = measure_generation(
        builders, clock, tokens=10, seconds=1e6, **{**defaults, **options}
    )  # fmt: skip
    return {found.name: found for found in made}


def _taking(clock: HandClock, first_ms: float, ms: float, **parts: Any) -> Generating:
    def generate(inputs: Any, count: int) -> torch.Tensor:
        clock.now += first_ms + (count - 1) * ms
        return torch.zeros(3, count, dtype=torch.long)

    return Generating(generate, **parts)


def test_decoded_tokens_are_timed_apart_from_the_first() -> None:
    clock = HandClock()
    builders = {
        "fast": lambda: _taking(clock, 20.0, 2.0, facts=lambda: {"kernel": "x"}),
        "slow": lambda: _taking(clock, 100.0, 50.0),
    }
    found = _measure(builders, clock)

    assert found["fast"].samples == {"prefill": [20.0] * 4, "decode": [2.0] * 4}
    assert found["slow"].samples == {"prefill": [100.0] * 4, "decode": [50.0] * 4}
    assert found["fast"].facts == {"kernel": "x"}
    assert found["fast"].peak_bytes is None


def test_first_token_has_prompts_of_its_own_and_each_row_its_columns() -> None:
    clock = HandClock()
    prompts = _prompts()
    widths: dict[str, list[int]] = {"a": [], "b": []}

    def noting(name: str) -> Generating:
        made = _taking(clock, 1.0, 1.0)
        made.prepare = lambda given: widths[name].append(given.seqlen)
        return made

    builders = {name: lambda name=name: noting(name) for name in widths}
    turn = (prompts.narrowed(), prompts)
    _measure(builders, clock, draw=lambda index: turn, own_columns=True, max_rounds=1)
    assert widths == {"a": [11, 12] * 2, "b": [13, 14] * 2}


def test_each_variant_has_a_thread_of_its_own() -> None:
    clock = HandClock()
    threads: dict[str, set[int]] = {"a": set(), "b": set(), "main": set()}

    def noting(name: str) -> Generating:
        made = _taking(clock, 1.0, 1.0, has_thread=name != "main")
        generate = made.generate

        def noted(inputs: Any, count: int) -> torch.Tensor:
            threads[name].add(threading.get_ident())
            return generate(inputs, count)

        made.generate = noted
        return made

    _measure({name: lambda name=name: noting(name) for name in threads}, clock)
    assert [len(found) for found in threads.values()] == [1, 1, 1]
    assert threads["a"] != threads["b"]
    assert threads["main"] == {threading.get_ident()}


def test_failing_variants_are_rows_with_reasons_and_all_are_closed() -> None:
    clock = HandClock()
    closed: list[str] = []

    def missing() -> Generating:
        raise ImportError("no such package")

    def breaking() -> Generating:
        made = _taking(clock, 1.0, 1.0, close=lambda: closed.append("breaks"))
        generate, count = made.generate, iter(range(100))

        def broken(inputs: Any, tokens: int) -> torch.Tensor:
            if next(count) == 5:
                raise torch.OutOfMemoryError("tried to allocate a lot")
            return generate(inputs, tokens)

        made.generate = broken
        return made

    def check(found: torch.Tensor) -> dict[str, Any]:
        if bool(found.any()):
            raise WrongNumbersError("other tokens")
        return {"same_first_tokens": 1.0}

    wrong = Generating(
        lambda inputs, count: torch.ones(3, count), close=lambda: closed.append("wrong")
    )
    good = _taking(clock, 1.0, 1.0, close=lambda: closed.append("good"))
    found = _measure(
        {"missing": missing, "breaks": breaking, "wrong": lambda: wrong, "good": lambda: good},
        clock,
        check=check,
    )

    assert found["missing"].reason == "ImportError: no such package"
    assert found["breaks"].reason == "out of memory"
    assert found["wrong"].reason == "wrong numbers: other tokens"
    assert found["good"].reason is None
    assert found["good"].facts == {"same_first_tokens": 1.0}
    assert len(found["good"].samples["decode"]) == 4
    assert found["breaks"].samples == {}
    assert closed == ["wrong", "breaks", "good"]


def test_memory_of_a_row_is_its_own() -> None:
    class Counting(HandClock):
        held = 100
        peak = 0

        def held_bytes(self) -> int:
            return self.held

        def forget_peak(self) -> None:
            self.peak = self.held

        def peak_bytes(self) -> int:
            return self.peak

    clock = Counting()

    def keeping() -> Generating:
        clock.held += 1000  # such as a cache of its own, for as long as it lives
        return passing(7)

    def passing(most: int) -> Generating:
        def generate(inputs: Any, count: int) -> torch.Tensor:
            clock.peak = max(clock.peak, clock.held + most)
            return torch.zeros(3, count)

        return Generating(generate)

    found = _measure({"keeps": keeping, "passes": lambda: passing(30)}, clock, weight_bytes=90)
    assert found["keeps"].facts["over_weights_bytes"] == 1007
    assert found["passes"].facts["over_weights_bytes"] == 30
    assert found["passes"].peak_bytes == 120
