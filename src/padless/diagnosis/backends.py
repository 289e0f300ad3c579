"""Every attention backend's answers for usual LLaMAs, also if one of them ends its process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from padless.diagnosis.child import NoAnswerError, ask
from padless.diagnosis.need import REQUESTS, USUAL_SHAPES, Budget
from padless.diagnosis.report import Backend, Choice, Package

# The distribution that an adapter imports.
NEEDS = {"fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn", "fa1": "flash-attn"}
# To compile a kernel for a measurement takes longer than an import.
_MEASURE = 5
_WRONG = "computes wrong here"

# Is given what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


def ask_backends(
    device: str,
    dtype: str,
    packages: tuple[Package, ...],
    limit_s: float,
    *,
    seconds: float | None = None,
    on_progress: Progress = lambda *_: None,
) -> tuple[tuple[Backend, ...], tuple[Choice, ...], bool]:
    """Asks every backend for every usual request, and measures until the budget is spent.

    Args:
        device: as torch names it.
        dtype: that LLaMAs have there.
        packages: that were imported by then; backends of broken ones are not asked.
        limit_s: how long an import may take, in seconds.
        seconds: of measuring, as `Budget` takes them.
        on_progress: called with what is asked or measured.

    Returns:
        The backends, fastest first; what `auto` takes; whether KeyboardInterrupt ended it early.

    Raises:
        NoAnswerError: the process that asks them did not come so far.
    """
    states = {package.name: package for package in packages}
    asking = _Asking(device, dtype, seconds, on_progress)
    for backend, package in NEEDS.items():
        if package in states and states[package].state == "broken":
            asking.answer_all(backend, "broken", states[package].fault)
    is_interrupted = False
    try:
        while (ended := asking.go_on(limit_s)) is not None:
            asking.answer_all(ended[0], "crashed", ended[1])
    except KeyboardInterrupt:
        is_interrupted = True
    found = []
    for name in asking.names:
        own = [asking.answers.get((name, number)) for number in range(len(REQUESTS))]
        missing = states.get(NEEDS.get(name, ""), Package("", None, "ok")).state == "missing"
        found.append(_describe(name, own, missing))
    return tuple(found), tuple(_choices(asking)), is_interrupted


class _Asking:
    """What has been answered, whichever process it was that answered."""

    def __init__(
        self, device: str, dtype: str, seconds: float | None, on_progress: Progress
    ) -> None:
        self.names: list[str] = []
        # By backend and number of the request; what is missing was not measured.
        self.answers: dict[tuple[str, int], dict[str, Any]] = {}
        self._where = {"device": device, "dtype": dtype, "seconds": seconds}
        self._budget = Budget(seconds)
        self._tell = on_progress

    def go_on(self, limit_s: float) -> tuple[str, str] | None:
        """Asks for what is not answered yet; names the backend that ended the process, and how."""
        asking = None
        argument = {
            **self._where,
            "spent": self._budget.spent,
            "done": list(self.answers),
            "accepted": [pair for pair, a in self.answers.items() if a["rejected"] is None],
        }
        if self.names and len(self.answers) == len(self.names) * len(REQUESTS):
            return None
        try:
            for found in ask("backends", argument, limit_s=_MEASURE * limit_s):
                if "backends" in found:
                    self.names[:] = found["backends"]
                elif "asked" in found:
                    self._budget.stop()
                    name, number = found.pop("asked")
                    self.answers[name, number] = {"status": None, **found}
                else:
                    asking = found.get("asking") or found["measuring"]
                    if "measuring" in found:
                        self._budget.start(found["needed"])
                    self._say("measuring" if "measuring" in found else "asking", *asking)
        except NoAnswerError as error:
            if asking is None:
                # It did not come so far as to ask one: another process would not either.
                raise
            return asking[0], str(error)
        finally:
            self._budget.stop()
        return None

    def answer_all(self, name: str, status: str, reason: str) -> None:
        """Answers for a backend that cannot be asked."""
        for number in range(len(REQUESTS)):
            # Not from a process that died of it: what served before serves no more.
            self.answers[name, number] = {"status": status, "rejected": reason, "head_dim": None}

    def _say(self, what: str, name: str, number: int) -> None:
        total = len(self.names) * len(REQUESTS)
        self._tell(f"{what} {name}: {REQUESTS[number]}", len(self.answers), total)


def _describe(name: str, answers: list[dict[str, Any] | None], missing: bool) -> Backend:
    known = [answer for answer in answers if answer is not None]
    open_ = len(answers) - len(known)
    rejected = [answer for answer in known if answer["rejected"] is not None]
    reasons = tuple(dict.fromkeys(answer["rejected"] for answer in rejected))
    if len(rejected) < len(known):
        is_all = not rejected and not open_
        return Backend(name, "accepted" if is_all else "partly", reasons, open_)
    if any(reason.startswith(_WRONG) for reason in reasons):
        return Backend(name, "wrong", reasons, open_)
    if open_:
        return Backend(name, "unmeasured", reasons, open_)
    if known[0]["status"]:
        return Backend(name, known[0]["status"], reasons)
    status: Literal["missing", "unfit"] = "unfit"
    if missing:
        # Of a GPU that it would not fit on either, the adapter says so first.
        unfit = [reason for reason in reasons if not reason.startswith("import ")]
        status = "unfit" if len(unfit) == len(reasons) else "missing"
        reasons = (f"{NEEDS[name]} is not installed",) if status == "missing" else reasons
    return Backend(name, status, reasons)


def _choices(asking: _Asking) -> list[Choice]:
    choices = []
    for number, (shape, dtype, training) in enumerate(REQUESTS):
        chosen, padded, before = None, None, []
        for name in asking.names:
            answer = asking.answers.get((name, number))
            if answer is None:
                before.append(name)
            elif answer["rejected"] is None:
                if not before:
                    # `auto` would take a faster one instead, were it measured and right.
                    chosen, padded = name, answer["head_dim"]
                break
        sizes = USUAL_SHAPES[shape]
        choices.append(Choice(shape, *sizes, dtype, training, chosen, padded, tuple(before)))
    return choices
