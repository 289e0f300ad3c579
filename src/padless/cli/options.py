"""What several commands ask for in the same words: dtype, device; and a quiet transformers."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")


def check_device(name: str) -> None:
    """Refuses a device that torch does not know or have.

    Raises:
        ValueError: it is not there, or no name of a device.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must name a device torch knows, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device must be there, got {name} and torch sees no CUDA device")


def quiet_transformers() -> None:
    """Keeps transformers' progress bars and its advice on settings from tearing ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
