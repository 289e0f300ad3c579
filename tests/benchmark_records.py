"""Records as the benchmark scripts write them, with made-up times."""

from __future__ import annotations

from typing import Any

from benchmarks import names
from benchmarks.record import COUNTING, FORMAT
from benchmarks.timeline import Timeline

from padless.benchmark.rows import rows
from padless.benchmark.variant import Timing

GPU = {
    "kind": "cuda", "device": "NVIDIA Z999", "driver": "1.2.3", "cuda": "13.0", "cpu": "x",
    "threads": 4,
}  # fmt: skip
CPU = {"kind": "cpu", "device": "A CPU", "threads": 2}


def record(
    name: str, tables: list[dict[str, Any]], hardware: dict[str, Any] = GPU
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": name,
        "command": f"python -m benchmarks.{name}",
        "date": "2026-01-02",
        "commit": "abcdef123456",
        "smoke": False,
        "seed": 0,
        "hardware": hardware,
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "padless": "0.1.0"},
        "counting": COUNTING,
        "ceilings": {
            "matmul_tflops": 790.0, "matmul_size": 8192, "matmul_dtype": "bfloat16",
            "copy_tb_s": 3.0, "copy_bytes": 2**31,
        },
        "tables": tables,
    }  # fmt: skip


def timing(name: str, ms: float, *, gib: float = 1.0, **others_ms: float) -> Timing:
    measures = {"forward": ms / 3, "forward_backward": ms, **others_ms}
    samples = {key: [value * f for f in (0.99, 1.0, 1.02)] for key, value in measures.items()}
    return Timing(name, samples=samples, peak_bytes=int(gib * 2**30))


def table(case: str, timings: list[Timing], **facts: Any) -> dict[str, Any]:
    made = {"case": case, "tokens_real": 7700, "tokens_padded": 16384, "flops": None}
    return {**made, "forward_flops": None, "forward_bytes": None, **facts, "rows": rows(timings)}


def step_record() -> dict[str, Any]:
    liger = names.with_liger
    fixed = [
        timing(names.EAGER, 467.0, gib=66.8),
        timing(names.SDPA, 314.0, gib=29.2),
        Timing(liger(names.SDPA), reason="ModuleNotFoundError: No module named 'liger_kernel'"),
        timing(names.SDPA_NO_MASK, 286.0, gib=27.7),
        timing(names.FA4, 275.0, gib=27.5),
        timing(liger(names.FA4), 215.0, gib=16.4),
        timing(names.FA4_BY_HAND, 140.5, gib=14.6),
        timing(liger(names.FA4_BY_HAND), 113.0, gib=9.6),
        timing(names.PADLESS, 133.7, gib=14.6),
        timing(liger(names.PADLESS), 114.0, gib=9.6),
        timing(names.PADLESS_TORCH, 160.0, gib=14.6),
    ]
    new = [
        timing(names.SDPA, 912.0, again=300.0),
        timing(names.FA4_BY_HAND, 142.0, again=141.0),
        timing(names.PADLESS, 135.0, again=134.0),
        timing(liger(names.PADLESS), 121.0, again=114.0),
    ]
    fixed_facts = {"new_lengths": False, "flops": 67.6e12, "floor_ms": 85.6}
    return record(
        "step",
        [
            table("8 x 2048, 47 % real", fixed, **fixed_facts),
            table("8 x 2048, 47 % real, new lengths at every step", new, new_lengths=True),
        ],
    )


def generated(name: str, prefill_ms: float, decode_ms: float, **facts: Any) -> Timing:
    measures = {"prefill": prefill_ms, "decode": decode_ms}
    samples = {key: [value * f for f in (0.99, 1.0, 1.02)] for key, value in measures.items()}
    made = {"same_first_tokens": 0.875, "over_weights_bytes": 3 * 2**29, **facts}
    return Timing(name, samples=samples, peak_bytes=6 * 2**30, facts=made)


def generation_record() -> dict[str, Any]:
    new = [
        generated(names.SDPA, 122.0, 55.1),
        generated(names.SDPA_NO_CUDNN, 101.0, 11.9),
        generated(names.FA4, 114.0, 13.5),
        generated(names.PADLESS, 61.0, 2.44),
        generated(
            names.PADLESS_TORCH, 70.0, 9.0, left_to_transformers={"a call behind a cache": 64}
        ),
        Timing(names.CONTINUOUS, reason="RuntimeError: its thread ended"),
    ]
    fixed = [
        generated(names.SDPA, 99.0, 12.0),
        generated(names.SDPA_STATIC_COMPILED, 95.0, 3.1),
        generated(names.PADLESS, 96.0, 2.8),
    ]
    facts = {"tokens": 64, "decode_floor_ms": 1.34, "flops": None, "tokens_padded": None}
    facts |= {"cache_bytes_real": 2**28, "cache_bytes_padded": 2**29, "tokens_real": None}
    return record(
        "generation",
        [
            table("16 x 1024, 45 % real, new lengths", new, key="p7", new_lengths=True, **facts),
            table("16 x 1024, 45 % real", fixed, key="p7-fixed", new_lengths=False, **facts),
            table("64 x 128, 45 % real", fixed[:1], key="64x128", new_lengths=False, **facts),
        ],
    )


def layer_record() -> dict[str, Any]:
    cases = {
        "MHA, 8 x 2048, 47 % real": (16.8, 15.9, 5.19, 5.41),
        "MHA, 2 x 8192, 67 % real": (23.1, 21.0, 10.7, 10.7),
        "MHA, 8 x 2048, all real": (18.9, 15.9, 12.3, 11.9),
        "GQA 32/8, 8 x 2048, 47 % real": (None, None, 3.61, 3.71),
    }
    tables = []
    for case, (flash, sdpa, ours, floor) in cases.items():
        timings = [
            Timing(names.ORIGINAL_FLASH, reason="RuntimeError: stack expects equal size")
            if flash is None
            else timing(names.ORIGINAL_FLASH, flash),
            Timing(names.ORIGINAL_SDPA, reason="RuntimeError: the size of tensor a")
            if sdpa is None
            else timing(names.ORIGINAL_SDPA, sdpa),
            timing(names.PADLESS, ours),
            timing(names.FLOOR, floor),
        ]
        tables.append(table(case, timings))
    return record("layer", tables)


def lengths_record() -> dict[str, Any]:
    tables = []
    for kind in ("one sequence", "packed documents"):
        for tokens in (2048, 8192, 32768, 131072):
            timings = [
                timing(names.SDPA, tokens / 800, gib=tokens / 4096),
                timing(names.PADLESS, tokens / 1000, gib=tokens / 4096),
                timing(names.FLOOR, tokens / 1020, gib=tokens / 5000),
            ]
            facts = {"kind": kind, "tokens_real": tokens, "tokens_padded": tokens}
            tables.append(table(f"{tokens} tokens, {kind}", timings, **facts))
    return record("lengths", tables)


def kernels_record() -> dict[str, Any]:
    tables = []
    for kv_heads in (8, 32):
        for seqlen in (512, 2048, 8192, 16384):
            timings = [
                timing("padless, backend fa4", 3.0),
                timing("padless, backend torch_varlen", 5.0),
                Timing("padless, backend fa3", reason="BackendUnavailableError: not | here"),
            ]
            facts = {"flops": 1e12, "seqlen": seqlen, "num_heads": 32, "num_kv_heads": kv_heads}
            made = table(f"attention 32/{kv_heads}, sequences of {seqlen}", timings, **facts)
            for row in made["rows"]:
                if row["reason"] is None:
                    row["forward_tflops"] = 500.0 + seqlen / 1000
                    row["tflops"] = 400.0 + seqlen / 1000
            tables.append(made)
    rotary = [
        Timing("padless apply_rotary, in place", samples={"forward": [0.1]}),
        Timing("a copy of q and k", samples={"forward": [0.08]}),
    ]
    made = table("rotary embedding 32/8", rotary, forward_bytes=3e8)
    for row in made["rows"]:
        row["forward_gb_s"] = 3e8 / row["forward_ms"]["median"] / 1e6
    return record("kernels", [*tables, made])


def syncs_record() -> dict[str, Any]:
    syncs = Timing(names.PADLESS, facts={"host_syncs_a_forward": 1})
    counts = {"graph_breaks": 0, "graphs_in_warmup": 4, "recompilations_after_warmup": 2}
    return record(
        "syncs",
        [
            table("host synchronisations a forward", [syncs]),
            table(
                "torch.compile of the layers, 50 shapes",
                [Timing(names.PADLESS, facts=counts)],
                shapes=50,
            ),
        ],
    )


def cpu_step_record() -> dict[str, Any]:
    timings = [timing(names.SDPA, 3200.0), timing(names.PADLESS, 1650.0)]
    return record("cpu_step", [table("8 x 256, 50 % real", timings)], CPU)


def losscurve_record() -> dict[str, Any]:
    stock = [18.0 * 0.95**step for step in range(50)]
    patched = [loss * (1 + 2e-6 * (-1) ** step) for step, loss in enumerate(stock)]
    rows_of = [
        Timing(names.SDPA, facts={"losses": stock, "patched_on_same_weights": patched}),
        Timing(names.PADLESS, facts={"losses": patched}),
    ]
    figures = {"largest": 2e-6, "mean": 0.0, "standard_error": 3e-7}
    difference = {"runs": figures, "same_weights": figures}
    return record(
        "losscurve",
        [
            table(case, rows_of, difference=difference, steps=50, model="A small model")
            for case in ("float32", "bfloat16 autocast")
        ],
        CPU,
    )


def balance_record() -> dict[str, Any]:
    rows_of = [
        Timing(name, facts={"steps": 9, "imbalance": even, "worst": 2 * even, "planned_s": 0.25})
        for name, even in ((names.SHUFFLED, 1.4), (names.BALANCED, 1.01))
    ]
    rows_of.append(Timing(names.REBALANCED, reason="not in this transformers"))
    facts = {"ranks": 8, "samples": 99, "max_tokens": 64, "median": 5, "longest": 50}
    return record("balance", [table("lognormal", rows_of, **facts)], CPU)


def data_parallel_record() -> dict[str, Any]:
    rows_of = []
    for name, efficiency in ((names.SHUFFLED, 0.7), (names.BALANCED, 0.97)):
        alone = {"ranks": 1, "tokens_a_second": 5000.0}
        both = {"ranks": 2, "tokens_a_second": 10000.0 * efficiency, "efficiency": efficiency}
        samples = {"forward_backward": [10.0, 11.0]}
        rows_of += [
            Timing(names.on_one_rank(name), samples=samples, facts=alone),
            Timing(name, samples=samples, facts=both),
        ]
    facts = {"ranks": 2, "max_tokens": 64, "backend": "nccl"}
    return record("data_parallel", [table("lognormal", rows_of, **facts)])


def sequence_parallel_record() -> dict[str, Any]:
    def timing(name: str, ms: float, **facts: Any) -> Timing:
        return Timing(name, samples={"forward_backward": [ms]}, peak_bytes=2**30, facts=facts)

    errors = {"relative_rms": {"out": 1e-3, "dq": 3e-3}}
    timeline = Timeline([(5.0, 9.0), (12.0, 14.0)], [(4.0, 8.0), (10.0, 20.0)]).as_facts()
    rows_of = [
        timing(names.ONE_GPU, 50.0),
        timing(names.ULYSSES, 26.0, efficiency=0.96, **errors),
        timing(names.RING, 27.0, efficiency=0.93, timeline=timeline, **errors),
        Timing(names.CONTEXT_PARALLEL, reason="cannot resize variables"),
    ]
    facts = {
        "ranks": 2, "tokens_real": 32768, "tokens_padded": 32768, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    case = "32768 tokens, one sequence, 2 ranks"
    return record("sequence_parallel", [table(case, rows_of, **facts)])


def all_records() -> list[dict[str, Any]]:
    return [
        balance_record(),
        cpu_step_record(),
        data_parallel_record(),
        generation_record(),
        kernels_record(),
        layer_record(),
        lengths_record(),
        losscurve_record(),
        sequence_parallel_record(),
        step_record(),
        syncs_record(),
    ]
