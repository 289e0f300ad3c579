"""`verify`: runs the unpatched, the patched and the truth model on the same batches."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from padless.environment import package_version
from padless.llama.engage import suspended
from padless.unpadded.engagement import set_aside
from padless.verification import measure
from padless.verification.batch import PackedRow, PaddedBatch, pad_rows, read_rows
from padless.verification.paths import PATHS, Served, VerifiedPath, check_layers, engaged
from padless.verification.probe import perturbation_probe
from padless.verification.report import Check, PathReport, StepTime, VerifyReport
from padless.workload import as_if_much_work

Progress = Callable[[str, int, int], None]

_PROBE_TOKENS = 24
_TIMED_ROUNDS = 3
# A mask of all pairs of them is made.
_PACKED_TOKENS = 8192


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    paths: Sequence[VerifiedPath] = PATHS,
    new_tokens: int = 64,
    name: str | None = None,
    on_progress: Progress | None = None,
) -> VerifyReport:
    """Checks on the caller's model and batch that the patch changes nothing but speed.

    Logits and gradients of the patched model are compared with a float64 copy (float32 for half
    precision), beside the unpatched model's own error in the same dtype; greedy tokens with the
    unpatched model's; and a perturbation probe sees which outputs depend on which tokens. Every
    check runs on the batch padded on the right and on the left; on the left, numbers are those of
    the backend that a large batch would take, if it is another.

    Args:
        model: a `LlamaForCausalLM`, or a model around one (PEFT); given back as it was, patched
            or not.
        batch: `input_ids` int64 `(batch, seqlen)` and `attention_mask`, nonzero = real.
        paths: what to verify: "patch" is `padless.patch(model)`, "sdpa" and "flash" are the two
            forwards of `replace_llama_attn_with_flash_attn`.
        new_tokens: greedy steps.
        name: what to call the model in the report; default its class.
        on_progress: called with (stage, done, total).

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        TypeError: the batch is not a mapping of integer tensors.
        ValueError: the batch's shapes or ids are wrong, or a row is all padding.
        UnsupportedError: the model holds no LLaMA attention, or its weights are not floating.
        EngagementError: the patch does not take effect on this transformers.
    """
    started = time.perf_counter()
    layers = measure.attention_layers(model)
    vocab_size = measure.vocab_size(model)
    measure.attention_weights(model)
    weight = next(model.parameters())
    rows = [row.to(weight.device) for row in read_rows(batch, vocab_size)]
    run = _Run(model, rows, new_tokens, paths, on_progress or (lambda *_: None))
    with suspended(), set_aside(model), measure.undisturbed(model):
        run.stock_and_truth()
        reports = tuple(run.patched(path, len(layers)) for path in paths)
    padded = run.batches[0]
    return VerifyReport(
        model=name or type(model).__name__,
        dtype=str(weight.dtype).removeprefix("torch."),
        truth_dtype=str(run.truth_dtype).removeprefix("torch."),
        device=measure.device_name(weight.device),
        versions={
            "padless": str(package_version("padless") or "source"),
            "torch": torch.__version__,
            "transformers": str(package_version("transformers")),
            "python": platform.python_version(),
        },
        batch=padded.ids.shape[0],
        seqlen=padded.ids.shape[1],
        real_tokens=int(padded.real.sum()),
        num_layers=len(layers),
        paths=reports,
        seconds=time.perf_counter() - started,
    )


class _Run:
    """The state of one verification: what the unpatched and the truth model gave."""

    def __init__(
        self,
        model: nn.Module,
        rows: list[Tensor],
        new_tokens: int,
        paths: Sequence[VerifiedPath],
        on_progress: Progress,
    ) -> None:
        self.model = model
        self.new_tokens = new_tokens
        self.batches = [pad_rows(rows, side) for side in ("right", "left")]
        self.short = [pad_rows([r[:_PROBE_TOKENS] for r in rows], s) for s in ("right", "left")]
        self.logits: dict[str, tuple[Tensor, Tensor]] = {}
        self.gradients: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self.truth_dtype = torch.float64
        self._on_progress = on_progress
        self._done, self._total = 0, 2 + 5 * len(paths)

    def _stage(self, text: str) -> None:
        self._on_progress(text, self._done, self._total)
        self._done += 1

    def stock_and_truth(self) -> None:
        """Runs the model unpatched and a copy of it in higher precision."""
        self._stage("unpatched and truth: logits and gradients")
        truth, self.truth_dtype = measure.truth_copy(self.model)
        for batch in self.batches:
            logits = measure.real_logits(self.model, batch)
            gradients = measure.training_step(self.model, batch)
            with measure.as_truth(self.truth_dtype):
                self.logits[batch.side] = (logits, measure.real_logits(truth, batch))
                self.gradients[batch.side] = (gradients, measure.training_step(truth, batch))
        self.logits_error = measure.Baseline.of(self.logits.values())
        runs = [*self.gradients.values()]
        if packed := self._packed_gradients():
            runs.append((packed, runs[0][1]))
        self.gradient_errors = {
            name: measure.Baseline.of((stock[name], truth[name]) for stock, truth in runs)
            for name in runs[0][1]
        }
        self._stage("unpatched: greedy tokens")
        self.tokens = self._greedy()
        with measure.as_truth(self.truth_dtype):
            self.margins = self._margins(truth)

    def _packed_gradients(self) -> dict[str, Tensor]:
        """Computes the unpatched model's gradients in a row without padding; none if it cannot.

        What a product adds up in which order depends on how many rows it has: on an H100 the
        gradient of SmolLM2's head, 49152 products a number, is twice as far off in 863 rows as in
        2076, and with it all gradients behind it.
        """
        padded = self.batches[0]
        attention = getattr(self.model.config, "_attn_implementation", "eager")
        if int(padded.real.sum()) > _PACKED_TOKENS or attention not in ("eager", "sdpa"):
            return {}
        row = PackedRow.of(padded)
        truth = self.logits[padded.side][1]
        try:
            logits = measure.real_logits(self.model, row)
            gradients = measure.training_step(self.model, row)
        except (ValueError, RuntimeError, IndexError):
            # Versions before 4.38 take no such mask.
            return {}
        judged = measure.judge("", {"logits": (logits, truth, self.logits_error)})
        return gradients if judged.passed else {}

    def patched(self, path: VerifiedPath, num_layers: int) -> PathReport:
        """Runs every check under one path."""
        checks = []
        with engaged(self.model, path) as served:
            self._stage(f"{path} path: logits")
            for batch in self.batches:
                _, truth = self.logits[batch.side]
                with _backends_for(batch):
                    got = measure.real_logits(self.model, batch)
                judged = {"logits": (got, truth, self.logits_error)}
                checks.append(measure.judge(f"logits, {batch.side} pad", judged))
            self._stage(f"{path} path: gradients")
            for batch in self.batches:
                _, truths = self.gradients[batch.side]
                with _backends_for(batch):
                    grads = measure.training_step(self.model, batch)
                judged = {n: (grads[n], truths[n], self.gradient_errors[n]) for n in truths}
                checks.append(measure.judge(f"gradients, {batch.side} pad", judged))
            self._stage(f"{path} path: {self.new_tokens} greedy tokens")
            checks.append(self._check_greedy())
            self._stage(f"{path} path: perturbation probe")
            checks.extend(self._check_probe(batch) for batch in self.short)
            report = served()
            checks.append(check_layers(report, num_layers))
        self._stage(f"{path} path: time of a step")
        step, step_report = self._time_step(path)
        return PathReport(
            path=path,
            checks=tuple(checks),
            layers=report.layers,
            computed_tokens=step_report.computed_tokens,
            batch_tokens=step_report.batch_tokens,
            step=step,
        )

    @torch.no_grad()
    def _greedy(self) -> Tensor:
        """Generates on the left-padded batch; returns `(batch, new_tokens)`."""
        batch = self.batches[1]
        generated: Tensor = self.model.eval().generate(  # type: ignore[operator]
            input_ids=batch.ids,
            attention_mask=batch.real.long(),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            pad_token_id=int(batch.ids[0, 0]) if batch.real.all() else 0,
        )
        return generated[:, batch.ids.shape[1] :]

    def _margins(self, truth: nn.Module) -> Tensor:
        """Computes the truth's logits along the unpatched model's tokens, for near ties."""
        batch = self.batches[1]
        ids = torch.cat([batch.ids, self.tokens], dim=1)
        real = torch.cat([batch.real, torch.ones_like(self.tokens, dtype=torch.bool)], dim=1)
        along = PaddedBatch("left", ids, real)
        with torch.no_grad():
            logits: Tensor = measure.forward(truth.eval(), along).logits
        return logits[:, batch.ids.shape[1] - 1 : -1]

    def _check_greedy(self) -> Check:
        got = self._greedy()
        differ = got != self.tokens
        total = got.numel()
        if not differ.any():
            return Check("greedy tokens", True, f"all {total} equal over {got.shape[1]} steps")
        # A near tie may fall either way by rounding; what follows it is another text.
        stock, truth = self.logits["left"]
        # Six sigma of what rounding does to one logit of the unpatched model.
        rounding = 6.0 * float((stock.double() - truth.double()).pow(2).mean().sqrt())
        worst = 0.0
        for row in differ.any(1).nonzero().flatten().tolist():
            step = int(differ[row].nonzero()[0])
            at = self.margins[row, step]
            worst = max(worst, float(at[self.tokens[row, step]] - at[got[row, step]]))
        rows = int(differ.any(1).sum())
        return Check(
            "greedy tokens",
            worst <= rounding,
            f"{rows} of {got.shape[0]} rows differ; the truth's logits were {worst:.2e} apart "
            f"where they parted (rounding allows {rounding:.2e})",
        )

    def _check_probe(self, batch: PaddedBatch) -> Check:
        self.model.eval()

        def run(ids: Tensor) -> Tensor:
            changed = PaddedBatch(batch.side, ids, batch.real)
            logits: Tensor = measure.forward(self.model, changed).logits
            return logits

        # One token in the middle of each row: earlier ones must not change, later ones must.
        middle = tuple(
            (row, int(real.nonzero().flatten()[int(real.sum()) // 2]))
            for row, real in enumerate(batch.real)
        )
        result = perturbation_probe(
            run, batch.ids, batch.real, vocab_size=measure.vocab_size(self.model), tokens=middle
        )
        return Check(f"probe, {batch.side} pad", result.passed, str(result))

    def _time_step(self, path: VerifiedPath) -> tuple[StepTime, Served]:
        """Times training steps, unpatched and patched by turns; reports the last patched one."""
        device = next(self.model.parameters()).device

        def step() -> None:
            measure.training_step(self.model, self.batches[0])

        stock, patched = [], []
        for _ in range(_TIMED_ROUNDS):
            stock.append(measure.time_ms(step, device))
            with engaged(self.model, path) as served:
                patched.append(measure.time_ms(step, device))
                report = served()
        return StepTime(statistics.median(stock), statistics.median(patched)), report


def _backends_for(batch: PaddedBatch) -> AbstractContextManager[None]:
    """Verifies what serves this batch, and on the other side of padding what serves a large one."""
    return as_if_much_work() if batch.side == "left" else nullcontext()
