"""Whether a backend's answers to the probes are right: budgets against float64, and the mask.

The rule of the numbers: the root mean square error of each head may reach twice that of eager
maths in the same dtype, the largest error of a tensor three times its largest. The rule of the
mask: no pair of query and key too many or too few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.qualification.probe import (
    CODE_OF_DOUT,
    Probe,
    draw_codes,
    draw_gaussian,
    draw_outliers,
    probed_window,
    visible_counts,
    visible_pairs,
)
from padless.reference import reference_attention

Attend = Callable[..., Tensor]

# One wrong key moves a row of codes by 0.7 at least (root mean square over head_dim), the rounding
# of bfloat16 by 0.2 at most.
_ONE_WRONG_KEY = 0.4


@dataclass(frozen=True)
class Judgement:
    """What a probe found.

    Attributes:
        reason: what is wrong, empty if nothing is.
        error: error over the size of what it is the error of, where it was worst.
        ratio: that error over its budget, at most 1 if nothing is wrong.
    """

    reason: str
    error: float
    ratio: float


def judge(attend: Attend, request: AttentionRequest, *, seed: int = 0) -> Judgement:
    """Asks a backend every probe of a request's family and stops at the first that it fails.

    Args:
        attend: the `varlen` of a backend's adapter.
        request: the family.
        seed: of the inputs.

    Returns:
        The failed judgement, or the one that came nearest to its budget.
    """
    worst = Judgement("", 0.0, 0.0)
    for judgement in _judgements(attend, request, seed):
        if judgement.reason:
            return judgement
        worst = max(worst, judgement, key=lambda j: j.ratio)
    return worst


def _judgements(attend: Attend, request: AttentionRequest, seed: int) -> Iterator[Judgement]:
    gaussian = draw_gaussian(request, seed)
    got = _answer(gaussian, request, attend)
    yield _judge_numbers(gaussian, request, got)
    if request.deterministic:
        again = _answer(gaussian, request, attend)
        if not all(torch.equal(got[name], again[name]) for name in got):
            yield Judgement("a second run gives other numbers", math.inf, math.inf)
    outliers = draw_outliers(request, seed)
    yield _judge_numbers(outliers, request, _answer(outliers, request, attend))
    codes = draw_codes(request, seed)
    yield _judge_mask(codes, request, _answer(codes, request, attend))
    if not request.needs_grad:
        decoding = draw_gaussian(request, seed, decoding=True)
        yield _judge_numbers(decoding, request, _answer(decoding, request, attend))


def _answer(probe: Probe, request: AttentionRequest, attend: Attend) -> dict[str, Tensor]:
    """Runs a backend on a probe."""
    return _with_gradients(
        lambda q, k, v: attend(
            q,
            k,
            v,
            probe.layout_q,
            probe.layout_k,
            causal=request.causal,
            softmax_scale=request.head_dim**-0.5,
            window_size=probed_window(request),
            deterministic=request.deterministic,
        ),
        (probe.q, probe.k, probe.v, probe.dout),
        needs_grad=request.needs_grad,
    )


def _judge_numbers(probe: Probe, request: AttentionRequest, got: dict[str, Tensor]) -> Judgement:
    """Holds an answer against float64, within budgets that eager maths in the dtype sets."""
    truth = _by_definition(probe, request, _reference, torch.float64)
    half = torch.finfo(request.dtype).bits < 32
    # Two orders of the same maths, since one of them may round luckily where few numbers count.
    orders = (_eager, _reference) if half else (_eager,)
    eager = [_by_definition(probe, request, order, request.dtype) for order in orders]
    statistics = []
    for name, right in truth.items():
        if got[name].shape != right.shape or got[name].dtype != request.dtype:
            came = f"has shape {tuple(got[name].shape)} and dtype {got[name].dtype}"
            return Judgement(f"{name} {came} on {probe.name}", math.inf, math.inf)
        for x in (right, *(answer[name].to(right) - right for answer in (got, *eager))):
            # Root mean squares by head, then the largest number of all.
            statistics.append(x.square().mean((0, 2)).sqrt())
            statistics.append(x.abs().amax().reshape(1))
    # One read for all of them: the only wait for the device in a probe.
    numbers = iter(torch.cat(statistics).tolist())

    eps = torch.finfo(request.dtype).eps
    # Floors are for what eager maths happens to hit. Fused kernels sum float32 in other orders, on
    # the CPU with four times the error of eager maths, on GPUs of three TF32 products; and where
    # large terms of dq cancel, single numbers are further off. All of it is far below any fault.
    floor_rms, floor_largest = (eps / 4, eps) if half else (1024 * eps, 8192 * eps)
    factors = dict.fromkeys(truth, 1.0 if half else 4.0)
    # Kernels add up the gradients of a group's heads one by one, and may round each sum.
    groups = probe.q.shape[1] // probe.k.shape[1]
    for name in factors.keys() & {"dk", "dv"}:
        factors[name] *= max(1.0, (groups / 8) ** 0.5)
    findings = []
    for name, right in truth.items():
        heads, factor = right.shape[1], factors[name]
        size, found, *each = (
            [next(numbers) for _ in range(heads + 1)] for _ in range(2 + len(eager))
        )
        allowed = [max(errors) for errors in zip(*each, strict=True)]
        for head in range(heads):
            budget = 2 * factor * allowed[head] + floor_rms * max(size[head], 0.01)
            what = f"{name} of head {head}"
            findings.append(_finding(probe, what, found[head], budget, size[head]))
        budget = 3 * factor * allowed[-1] + floor_largest * max(size[-1], 0.01)
        findings.append(_finding(probe, f"the largest {name}", found[-1], budget, size[-1]))
    return max(findings, key=lambda j: j.ratio)


def _finding(probe: Probe, what: str, error: float, budget: float, size: float) -> Judgement:
    size = max(size, 0.01)
    if not math.isfinite(error):
        return Judgement(f"{what} is not finite on {probe.name}", math.inf, math.inf)
    reason = ""
    if error > budget:
        reason = (
            f"{what} is off by {100 * error / size:.3g} % on {probe.name}, "
            f"{error / budget:.3g} times its budget"
        )
    return Judgement(reason, error / size, error / budget)


def _judge_mask(probe: Probe, request: AttentionRequest, got: dict[str, Tensor]) -> Judgement:
    """Compares sums of codes with those of the keys that each query should see."""
    groups = probe.q.shape[1] // probe.k.shape[1]
    # Where no key is visible, out is to be zero itself.
    counts = visible_counts(request, probe.layout_q, probe.layout_k, probe.q.device).clamp(min=1)
    codes = probe.dout.float() / counts
    seen, seen_by = [], []
    for v_i, codes_i in zip(
        probe.layout_k.split(probe.v.float()), probe.layout_q.split(codes), strict=True
    ):
        pairs = visible_pairs(request, codes_i.shape[0], v_i.shape[0], v_i.device).float()
        v_i = v_i.repeat_interleave(groups, dim=1)
        seen.append(torch.einsum("st,thd->shd", pairs, v_i))
        by_head = torch.einsum("st,shd->thd", pairs, codes_i)
        seen_by.append(by_head.unflatten(1, (-1, groups)).sum(2))
    moved = {"out": got["out"].float() * counts - torch.cat(seen)}
    if request.needs_grad:
        moved["dv"] = (got["dv"].float() - torch.cat(seen_by)) / CODE_OF_DOUT
    statistics = [x.square().mean(-1).amax().sqrt() for x in moved.values()]
    statistics += [x.float().abs().amax() for x in got.values()]
    numbers = torch.stack(statistics).tolist()
    if not all(math.isfinite(number) for number in numbers):
        return Judgement(f"numbers are not finite on {probe.name}", math.inf, math.inf)
    for name, number in zip(moved, numbers, strict=False):
        if number > _ONE_WRONG_KEY:
            reason = f"{name} is not of exactly the visible keys ({probe.name})"
            return Judgement(reason, number, number / _ONE_WRONG_KEY)
    worst = max(numbers[: len(moved)])
    return Judgement("", worst, worst / _ONE_WRONG_KEY)


def _by_definition(
    probe: Probe,
    request: AttentionRequest,
    one_sequence: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Runs a function of one sequence over a probe, in a dtype."""
    # Apple's GPUs have no float64.
    to = "cpu" if request.device.type == "mps" and dtype == torch.float64 else request.device

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for q_i, k_i, v_i in zip(
            probe.layout_q.split(q), probe.layout_k.split(k), probe.layout_k.split(v), strict=True
        ):
            if q_i.shape[0] == 0 or k_i.shape[0] == 0:
                pieces.append(torch.zeros_like(q_i))
                continue
            pairs = visible_pairs(request, q_i.shape[0], k_i.shape[0], q.device)
            pieces.append(one_sequence(q_i, k_i, v_i, pairs, request.head_dim**-0.5))
        return torch.cat(pieces)

    inputs = tuple(x.to(device=to, dtype=dtype) for x in (probe.q, probe.k, probe.v, probe.dout))
    answer = _with_gradients(packed, inputs, needs_grad=request.needs_grad)
    return {name: x.to(request.device) if to == request.device else x for name, x in answer.items()}


def _with_gradients(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, ...],
    *,
    needs_grad: bool,
) -> dict[str, Tensor]:
    """Runs a function of q, k and v forward, and backward from dout if that is needed."""
    *qkv, dout = inputs
    with torch.set_grad_enabled(needs_grad):
        leaves = [x.detach().requires_grad_(needs_grad) for x in qkv]
        out = function(*leaves)
        # Of a scalar: for a dout that is handed over, torch imports its symbolic shapes (0.5 s).
        grads = torch.autograd.grad((out * dout).sum(), leaves) if needs_grad else ()
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=False))


def _reference(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, softmax_scale: float) -> Tensor:
    return reference_attention(
        q[None], k[None], v[None], visible=pairs, softmax_scale=softmax_scale
    )[0]


def _eager(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, softmax_scale: float) -> Tensor:
    """Computes the reference in another order: scale on q, groups aside, normalised last."""
    seqlen_q, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rows = (q * softmax_scale).reshape(seqlen_q, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = rows @ k.permute(1, 2, 0).unsqueeze(1)  # (hkv, groups, s, t)
    scores = scores.masked_fill(~pairs, torch.finfo(q.dtype).min)
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() * pairs
    sums = weights.sum(-1, keepdim=True)
    out = (weights @ v.transpose(0, 1).unsqueeze(1)) / torch.where(sums == 0, 1, sums)
    return out.permute(2, 0, 1, 3).reshape(seqlen_q, num_heads, head_dim)
