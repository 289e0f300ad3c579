"""The exceptions of padless; every one is also the built-in kind that callers expect."""

from __future__ import annotations


class PadlessError(Exception):
    """Base of everything that padless raises on purpose."""


class UnsupportedError(PadlessError, ValueError):
    """The request is well formed, but padless cannot do it right, and so does not do it."""


class BackendUnavailableError(PadlessError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class EngagementError(PadlessError, RuntimeError):
    """The patch did not take effect; everything that it had changed is back as it was."""


class CheckpointError(PadlessError, RuntimeError):
    """A model folder is missing, damaged, or not a LLaMA."""
