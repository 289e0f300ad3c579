"""A `TrainerCallback` that puts real tokens, skipped padding and backends into Trainer's logs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from padless.environment import import_optional
from padless.errors import EngagementError
from padless.unpadded.instance import LEDGER
from padless.unpadded.ledger import Ledger

# Every module of padless imports without transformers; nothing can be done with this one then.
_module, _ = import_optional("transformers.trainer_callback")
_TrainerCallback: Any = _module.TrainerCallback if _module is not None else object


@dataclass(frozen=True)
class _Counts:
    """What a model's ledgers count, at one time or in between two.

    Attributes:
        computed: tokens that the model computed.
        padded: the same with the padding that it did not compute.
        stock: calls left to transformers' own path, whose tokens nobody counts.
        layers: forwards of attention layers by backend.
    """

    computed: int = 0
    padded: int = 0
    stock: int = 0
    layers: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            self.computed + other.computed,
            self.padded + other.padded,
            self.stock + other.stock,
            self.layers + other.layers,
        )

    def __sub__(self, other: _Counts) -> _Counts:
        return _Counts(
            self.computed - other.computed,
            self.padded - other.padded,
            self.stock - other.stock,
            self.layers - other.layers,
        )


class TokensCallback(_TrainerCallback):
    """Adds what the patch did to the records of the loss that `Trainer` logs.

    Whatever reports them (TensorBoard, W&B, standard output, `state.log_history`) gets, in the same
    record as the loss and for the steps since the one before:

    - `real_tokens_per_second`: tokens computed over seconds of training, waiting for data included;
    - `padding_skipped`: share of the batches' slots that was padding and was not computed, 0 to 1;
    - `attention_NAME`: share of the attention layers' forwards that backend NAME served;
    - `stock_forwards`: calls left to transformers' own path. Their tokens are not counted above.

    Training steps alone count: evaluation, prediction and saving in between are left out, tokens
    and seconds; accumulated micro-batches all count. A run that is resumed counts from there on.
    Each process counts its own share of the batch, and the first one reports.

    Args:
        trainer: the Trainer that it is added to: `trainer.add_callback(TokensCallback(trainer))`.

    Raises:
        TypeError: trainer has no callbacks.
        EngagementError: at the beginning of training, if the model is not patched.

    Note:
        It takes the first place among the trainer's callbacks when training begins, since reporters
        send off what they find in the record. On a GPU it adds no synchronisation.
    """

    def __init__(self, trainer: Any) -> None:
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(
                f"trainer must be a transformers Trainer, got {type(trainer).__name__}; "
                f"call trainer.add_callback(TokensCallback(trainer))"
            )
        self._trainer = trainer
        self._forget()

    def _forget(self) -> None:
        self._ledgers: list[Ledger] = []
        self._mark: float | None = None  # the time up to which seconds are counted
        self._at_step = _Counts()
        self._steps = 0
        self._done = _Counts()
        self._seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the patch of the model, and goes in front of the reporters."""
        self._forget()
        self._ledgers = _ledgers_of(self._trainer.model)
        callbacks = self._trainer.callback_handler.callbacks
        if self in callbacks:
            # Trainer is going through this list, and those behind keep their places.
            callbacks.remove(self)
            callbacks.insert(0, self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to count tokens; and seconds, if what came before was not training."""
        if self._mark is None:
            self._mark = time.perf_counter()
        self._at_step = self._read()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a step with all its micro-batches."""
        self._done += self._read() - self._at_step
        self._steps += 1
        self._count_seconds()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Adds the numbers to a record of the training loss."""
        # Evaluation logs here too, as does the end of training; neither has a loss of that name.
        if logs is None or "loss" not in logs or not self._steps:
            return
        # The loss has been read from the device just now: what it still computed is in the seconds.
        self._count_seconds()
        made = _numbers(self._done, self._seconds)
        logs.update(made)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(made)
        self._done, self._steps, self._seconds = _Counts(), 0, 0.0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves out the seconds since the last step."""
        self._skip_seconds()

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves out the seconds since the last step."""
        self._skip_seconds()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves out the seconds since the last step."""
        self._skip_seconds()

    def _read(self) -> _Counts:
        found = _Counts()
        for ledger in self._ledgers:
            layers: Counter[str] = Counter()
            for counts in ledger.layers.values():
                layers.update(counts)
            stock = sum(ledger.stock.values())
            found += _Counts(ledger.computed_tokens, ledger.batch_tokens, stock, layers)
        return found

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        if self._mark is not None:
            self._seconds += now - self._mark
            self._mark = now

    def _skip_seconds(self) -> None:
        if self._mark is not None:
            self._mark = time.perf_counter()


def _ledgers_of(model: Any) -> list[Ledger]:
    """Finds where the patches of a model, or that of the process, count."""
    # A patch of the process stands on the class, which the instance finds too.
    found = [getattr(module, LEDGER, None) for module in model.modules()]
    ledgers = list({id(ledger): ledger for ledger in found if ledger is not None}.values())
    if not ledgers:
        raise EngagementError(
            f"model must be patched for TokensCallback to count its tokens, got a "
            f"{type(model).__name__} that is not; call padless.patch(model) before trainer.train()"
        )
    return ledgers


def _numbers(done: _Counts, seconds: float) -> dict[str, float]:
    made: dict[str, float] = {"stock_forwards": done.stock}
    if seconds > 0:
        made["real_tokens_per_second"] = done.computed / seconds
    if done.padded:
        made["padding_skipped"] = 1.0 - done.computed / done.padded
    layers = sum(done.layers.values())
    made.update({f"attention_{name}": n / layers for name, n in done.layers.items()})
    return made
