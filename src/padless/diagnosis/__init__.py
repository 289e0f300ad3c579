"""`doctor()`: what this machine can run, why not the rest, and what to do next."""

from padless.diagnosis.report import Diagnosis
from padless.diagnosis.run import doctor

__all__ = ["Diagnosis", "doctor"]
