"""Every attention backend's answers for usual LLaMAs, also if one of them ends its process."""

from __future__ import annotations

from typing import Any, Literal

from padless.diagnosis.child import NoAnswerError, ask
from padless.diagnosis.questions import DTYPES, USUAL_SHAPES
from padless.diagnosis.report import Backend, Choice, Package

# The distribution that an adapter imports.
NEEDS = {"fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn", "fa1": "flash-attn"}
# To compile a kernel for a measurement takes longer than an import.
_MEASURE = 5
_REQUESTS = [
    (shape, dtype, training)
    for shape in USUAL_SHAPES
    for dtype in DTYPES
    for training in (False, True)
]

Answers = dict[tuple[str, int], dict[str, Any]]


def ask_backends(
    device: str, packages: tuple[Package, ...], limit_s: float
) -> tuple[tuple[Backend, ...], tuple[Choice, ...]]:
    """Asks every backend for every usual request.

    Args:
        device: as torch names it.
        packages: that were imported by then; backends of broken ones are not asked.
        limit_s: how long an import may take, in seconds.

    Returns:
        The backends, fastest first, and what `auto` takes.

    Raises:
        NoAnswerError: the process that asks them did not come so far.
    """
    states = {package.name: package for package in packages}
    answers: Answers = {}
    names: list[str] = []
    for backend, package in NEEDS.items():
        if package in states and states[package].state == "broken":
            _answer_all(answers, backend, "broken", states[package].fault)
    while not names or len(answers) < len(names) * len(_REQUESTS):
        asking = _ask_on(device, answers, names, limit_s)
        if asking is None:
            break
        name, reason = asking
        _answer_all(answers, name, "crashed", reason)
    found = []
    for name in names:
        own = [answers[name, number] for number in range(len(_REQUESTS))]
        missing = states.get(NEEDS.get(name, ""), Package("", None, "ok")).state == "missing"
        found.append(_describe(name, own, missing))
    return tuple(found), tuple(_choices(names, answers))


def _ask_on(
    device: str, answers: Answers, names: list[str], limit_s: float
) -> tuple[str, str] | None:
    """Asks for what is not answered yet; names the backend that ended the process, and how."""
    asking = None
    argument = {"device": device, "done": list(answers)}
    try:
        for found in ask("backends", argument, limit_s=_MEASURE * limit_s):
            if "backends" in found:
                names[:] = found["backends"]
            elif "asking" in found:
                asking = found["asking"]
            else:
                name, number = found.pop("asked")
                answers[name, number] = {"status": None, **found}
    except NoAnswerError as error:
        if asking is None:
            # It did not come so far as to ask one: another process would not either.
            raise
        return asking[0], str(error)
    return None


def _answer_all(answers: Answers, name: str, status: str, reason: str) -> None:
    for number in range(len(_REQUESTS)):
        # Not from a process that died of it: what served before serves no more.
        answers[name, number] = {"status": status, "rejected": reason, "head_dim": None}


def _describe(name: str, answers: list[dict[str, Any]], missing: bool) -> Backend:
    rejected = [answer for answer in answers if answer["rejected"] is not None]
    reasons = tuple(dict.fromkeys(answer["rejected"] for answer in rejected))
    if not rejected:
        return Backend(name, "accepted")
    if len(rejected) < len(answers):
        return Backend(name, "partly", reasons)
    if answers[0]["status"]:
        return Backend(name, answers[0]["status"], reasons)
    status: Literal["missing", "wrong", "unfit"] = "missing" if missing else "unfit"
    if missing:
        # Of a GPU that it would not fit on either, the adapter says so first.
        unfit = [reason for reason in reasons if not reason.startswith("import ")]
        status = "unfit" if len(unfit) == len(reasons) else "missing"
        reasons = (f"{NEEDS[name]} is not installed",) if status == "missing" else reasons
    elif any(reason.startswith("computes wrong here") for reason in reasons):
        status = "wrong"
    return Backend(name, status, reasons)


def _choices(names: list[str], answers: Answers) -> list[Choice]:
    choices = []
    for number, (shape, dtype, training) in enumerate(_REQUESTS):
        serving = [name for name in names if answers[name, number]["rejected"] is None]
        first = serving[0] if serving else None
        padded = answers[first, number]["head_dim"] if first else None
        sizes = USUAL_SHAPES[shape]
        choices.append(Choice(shape, *sizes, dtype, training, first, padded))
    return choices
