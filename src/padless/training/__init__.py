"""What goes into a training loop beside the patch: numbers for `Trainer`'s logs."""

from padless.training.tokens_callback import TokensCallback

__all__ = ["TokensCallback"]
