"""What is in force during one `generate` call: its store, its step, its graph.

Inside `generate` it is known what plain calls behind a cache do not tell: that the mask of a step
is the prompt's with ones behind it. Outside of it nothing here is ever asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from padless.errors import BackendUnavailableError
from padless.generation.cache import attach_store, discard, settle, store_of
from padless.generation.decoder import decoder_of
from padless.generation.graph import uncapturable_reason
from padless.generation.runner import StepRunner, without_graph
from padless.generation.store import RaggedStore
from padless.hf.eras import Era
from padless.unpadded.batch import FlatBatch
from padless.unpadded.call import flatten_prompt
from padless.unpadded.ended import EndedRows
from padless.unpadded.fused import FusedModules
from padless.unpadded.ledger import Ledger
from padless.unpadded.mlp import MLP
from padless.unpadded.norms import NORM
from padless.unpadded.prompts import RIGHT_PADDING, prompt_reason, read_prompt, step_reason
from padless.workload import is_little_layer

_current: ContextVar[Session | None] = ContextVar("padless_generate", default=None)


def current_session(head: Any) -> Session | None:
    """Finds the `generate` call of a language model that this thread is in; None if in none."""
    session = _current.get()
    return session if session is not None and session.head is head else None


class Session:
    """One `generate` call of a patched model.

    Args:
        head: the `LlamaForCausalLM`.
        era: of the installed transformers.
        most: tokens that a row may come to have at most; None if not known.
        refusal: why the call is to be left to transformers from the start; None if it is not.
        copies: rows that `generate` makes of each prompt.
        end_tokens: ids after which nobody is given what is computed of a row; none if not known.
    """

    def __init__(
        self,
        head: Any,
        era: Era,
        most: int | None,
        refusal: str | None,
        copies: int,
        end_tokens: tuple[int, ...] = (),
    ) -> None:
        self.head = head
        self.cache: Any = None
        self.steps = 0
        self._era = era
        self._most = most
        self._refusal = refusal
        self._copies = copies
        self._end_tokens = end_tokens
        self._ended: EndedRows | None = None
        self._rows = 0
        self._ledger: Ledger | None = None
        self._fused: FusedModules | None = None
        self._modules: list[nn.Module] = []
        self._is_open = True
        self._is_stock_prompt = False
        self._has_mask = False
        self._batch: FlatBatch | None = None
        self._decoder = ""
        self._runner: StepRunner | None = None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes this the session of the thread; lets go of everything it holds at the end."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._let_go()

    def finish(self, result: Any) -> None:
        """Hands the cache back in transformers' own form, if it is part of the result.

        Args:
            result: of `generate`; None if it has raised.
        """
        if self.cache is not None:
            if getattr(result, "past_key_values", None) is self.cache:
                settle(self.cache)
            else:
                discard(self.cache)
        if self._ledger is not None and self.cache is not None:
            kept = None if self._ended is None else self._ended.kept
            left_out = 0 if kept is None else self._rows - kept.shape[0]
            replays = 0 if self._runner is None else self._runner.replays
            self._ledger.count_generation(
                self._decoder, steps=self.steps, replays=replays, left_out=left_out
            )

    def serve(self, arguments: dict[str, Any], ledger: Ledger) -> Any:
        """Serves a forward of the language model, if it is this call's prompt or next step.

        Args:
            arguments: of the forward, by name; left as they are.
            ledger: where to count.

        Returns:
            Its output; None if the forward is to go on as it would without a session.
        """
        if not self._is_open:
            return None
        if self.cache is None:
            self._ledger = ledger
            refused = None, self._refusal
            outputs, reason = refused if self._refusal else self._prompt(arguments, ledger)
        elif arguments.get("past_key_values") is not self.cache:
            # Of somebody inside generate, with a cache of its own or none.
            return None
        else:
            outputs, reason = self._step(arguments)
        if reason is not None:
            self._close(reason)
        return outputs

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next step may be launched before it is known that there is to be one."""
        if not self._is_open or self._batch is None:
            return False
        store = store_of(self.cache)
        # Buffers that grow would be more than a step too many.
        if store is None or store.longest >= store.capacity:
            return False
        # With the newest token, which no step has seen yet.
        is_last = self._most is not None and store.columns + 1 >= self._most
        return not is_last and not self._runner_of(self._batch).is_eager

    def takes_stock_prompt(self) -> bool:
        """Whether the forward that was not served has to compute its padding; asked once."""
        taken, self._is_stock_prompt = self._is_stock_prompt, False
        return taken

    def _close(self, reason: str) -> None:
        """Leaves what is to come to transformers."""
        self._is_open = False
        if self._ledger is not None:
            self._ledger.note_generation(reason)
        self._let_go()
        if self.cache is not None:
            settle(self.cache)

    def _let_go(self) -> None:
        if self._runner is not None:
            self._runner.release()
        self._batch = None

    # The prompt

    def _prompt(self, arguments: dict[str, Any], ledger: Ledger) -> tuple[Any, str | None]:
        # Once, for all that look at them: a call of few tokens waits for this.
        self._modules = list(self.head.modules())
        reason = prompt_reason(self._modules, arguments)
        if reason is not None:
            return None, reason
        prompt = read_prompt(arguments, self._copies)
        if not prompt.ends_real:
            self._is_stock_prompt = True
            return None, RIGHT_PADDING
        flat = {k: v for k, v in arguments.items() if k not in ("past_key_values", "use_cache")}
        if (copies := prompt.copies) > 1:
            # Beams and return sequences begin alike: each prompt is computed once.
            for name in ("input_ids", "attention_mask", "position_ids"):
                flat[name] = None if flat.get(name) is None else flat[name][::copies]
        batch = flatten_prompt(self.head.model, flat, ledger.backend, self._era, prompt)
        if batch is None:
            return None, "a prompt that cannot be flattened to one sequence a row"
        layers = self.head.model.layers
        batch.store = RaggedStore(batch.layout, len(layers), self._most)
        hidden = self._hidden(batch, flat)[0]
        logits = self.head.lm_head(hidden[(batch.layout.cu_seqlens[1:] - 1).long()])
        ledger.count(batch)
        if copies > 1:
            logits = logits.repeat_interleave(copies, 0)
            batch.store.copy_rows(copies)
        self._attach(arguments, batch.store)
        try:
            groups = layers[0].self_attn.num_key_value_groups
            decoder = decoder_of(batch.store, groups, ledger.backend)
        except BackendUnavailableError as error:
            return self._outputs(logits.unsqueeze(1)), f"no backend decodes: {error}"
        self._batch = FlatBatch.of_step(batch.store, decoder)
        self._rows = batch.store.batch
        if self._end_tokens:
            end_tokens = torch.tensor(self._end_tokens, device=logits.device)
            self._ended = EndedRows(end_tokens, self._rows)
        self._decoder = decoder.name
        return self._outputs(logits.unsqueeze(1)), None

    def _attach(self, arguments: dict[str, Any], store: RaggedStore) -> None:
        self.cache = arguments.get("past_key_values")
        if self.cache is None:
            from transformers import DynamicCache

            self.cache = DynamicCache()
        self._has_mask = arguments.get("attention_mask") is not None
        attach_store(self.cache, store)

    def _hidden(self, batch: FlatBatch, arguments: dict[str, Any]) -> Tensor:
        """Runs the model's body on a flat batch; `(1, total, hidden_size)`."""
        names = ("input_ids", "inputs_embeds", "position_ids")
        given = {name: x for name in names if (x := arguments.get(name)) is not None}
        with self._fused_for(batch).in_force():
            outputs = self.head.model(
                **given, attention_mask=batch, use_cache=False, return_dict=True
            )
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def _fused_for(self, batch: FlatBatch) -> FusedModules:
        width = int(self.head.config.hidden_size)
        if batch.decoder is None and is_little_layer(batch.layout.total, width, trains=False):
            # The host launches a kernel of Triton's more slowly than torch's two.
            return FusedModules(self._modules, (NORM,))
        if self._fused is None:
            self._fused = FusedModules(self._modules, (NORM, MLP))
        return self._fused

    def _outputs(self, logits: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)

    # A step

    def _step(self, arguments: dict[str, Any]) -> tuple[Any, str | None]:
        store = store_of(self.cache)
        if store is None:
            return None, "the cache was looked into"
        # Beams may come to be more or fewer rows, which are never left out.
        rows = store.batch if store.is_whole else self._rows
        reason = step_reason(arguments, store, rows=rows, has_mask=self._has_mask)
        if reason is not None:
            return None, reason
        ids, ended = arguments["input_ids"], self._ended
        if ended is not None:
            ended.see(ids)
            ended.leave_out(store)
        batch = self._batch
        assert batch is not None
        runner = self._runner_of(batch)
        if batch.layout.batch != store.batch:
            assert batch.decoder is not None
            self._batch = FlatBatch.of_step(store, batch.decoder)
            runner.begin_anew()
        if store.make_room():
            runner.begin_anew()
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, store.columns)
        if positions.shape[0] != rows:
            positions = positions.expand(rows, 1)
        if ended is not None:
            ids, positions = ended.pick(ids), ended.pick(positions)
        logits = runner.run(self._compute, ids, positions)
        store.count_step()
        self.steps += 1
        return self._outputs(logits if ended is None else ended.spread(logits)), None

    def _runner_of(self, batch: FlatBatch) -> StepRunner:
        """Makes what runs the steps, once: behind the first token, which need not wait for that."""
        if self._runner is None:
            assert self._ledger is not None
            eager = uncapturable_reason(self.head)
            self._runner = StepRunner(eager, self._ledger.note_generation)
            if eager is not None and batch.layout.cu_seqlens.is_cuda:
                self._ledger.note_generation(without_graph(eager))
        return self._runner

    def _compute(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The step itself, of `(batch, 1)`; what it needs of the host is known before it begins."""
        batch = self._batch
        assert batch is not None and batch.store is not None and batch.decoder is not None
        batch.store.begin_step(with_mask=batch.decoder.with_mask)
        # Views are made here, in the capture, and not once a token.
        flat = {"input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
        logits: Tensor = self.head.lm_head(self._hidden(batch, flat))
        return logits.transpose(0, 1)
