"""`padless.verify(model, batch)`: is the patched model the same model? Numbers and a verdict."""

from padless.verification.probe import ProbeResult, perturbation_probe
from padless.verification.report import Check, PathReport, StepTime, VerifyReport
from padless.verification.run import verify

__all__ = [
    "Check",
    "PathReport",
    "ProbeResult",
    "StepTime",
    "VerifyReport",
    "perturbation_probe",
    "verify",
]
