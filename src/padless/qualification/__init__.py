"""A backend proves by numbers, on this machine, that it computes right before `auto` uses it."""

from padless.qualification.verdict import (
    Verdict,
    expected_ms,
    forget_verdicts,
    known_verdict,
    qualify,
)

__all__ = ["Verdict", "expected_ms", "forget_verdicts", "known_verdict", "qualify"]
