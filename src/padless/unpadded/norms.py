"""The RMS norms of a `generate` call, by torch's own kernel.

transformers writes a norm as seven operations. Each is a kernel of its own, and in a step of one
token a row they take the device longer than attention does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padless.environment import autocasts, has_fused_rms_norm, is_compiling, is_tracing
from padless.generation.graph import is_compiled

_HOME = "transformers.models.llama.modeling_llama"
_CLASS = "LlamaRMSNorm"
# transformers computes norms of float64 in float32, torch in float64.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Whether this thread is in a forward whose norms are to be fused; others may share the modules.
_in_force: ContextVar[bool] = ContextVar("padless_fused_norms", default=False)
_counting = threading.Lock()


class FusedNorms:
    """The norms of one model that may run as `torch.nn.functional.rms_norm`.

    Those are transformers' own `LlamaRMSNorm`, on a device for which torch has a fused kernel.
    Norms of a subclass, with hooks, with a forward bound to the instance (Liger's, accelerate's) or
    with weights of another class are left as they are, and so are all norms of a model of which
    anything is compiled.

    Args:
        model: the language modelling head, or any module.

    Note:
        transformers computes in float32, rounds to the input's dtype and multiplies by the weight,
        which rounds again. torch's kernel multiplies in float32 and rounds once: in half precision
        it is one rounding nearer to the formula, in float32 the same up to the order of a sum.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms: list[Any] = [module for module in model.modules() if is_fusable(module)]
        if self._norms and any(is_compiled(module) for module in model.modules()):
            self._norms = []

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Fuses the norms of the forwards of this thread; no module keeps anything of it.

        Autograd, autocast and tracing find the norms as they are.
        """
        if (
            not self._norms
            or torch.is_grad_enabled()
            or is_compiling()
            or is_tracing()
            or autocasts(self._norms[0].weight)
        ):
            yield
            return
        forwards: list[FusedForward] = []
        token = _in_force.set(True)
        try:
            with _counting:
                for norm in self._norms:
                    # Another thread may have put it there; or since, somebody a forward of theirs.
                    forward = vars(norm).setdefault("forward", FusedForward(norm))
                    if isinstance(forward, FusedForward):
                        forwards.append(forward)
                        forward.users += 1
            yield
        finally:
            _in_force.reset(token)
            with _counting:
                for forward in forwards:
                    forward.users -= 1
                    if not forward.users and vars(forward.norm).get("forward") is forward:
                        del vars(forward.norm)["forward"]


class FusedForward:
    """Stands for a norm's forward while some thread wants it fused.

    Args:
        norm: the module.

    Attributes:
        norm: the module.
        users: forwards of models that are under way and want it.
    """

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.users = 0

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Normalises.

        Args:
            hidden_states: `(..., hidden_size)`.
        """
        norm = self.norm
        weight: Tensor = norm.weight
        # Asked first, so that torch.compile in another thread sees the class's forward alone.
        if is_compiling() or not _in_force.get():
            return stock(norm, hidden_states)
        # A weight of another dtype promotes the output; torch has no kernel for it either.
        if hidden_states.dtype != weight.dtype:
            return stock(norm, hidden_states)
        return F.rms_norm(hidden_states, weight.shape, weight, norm.variance_epsilon)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy made just now, by a hook or another thread, has no such attribute yet: it gets its
        # class's forward.
        return getattr, (self.norm, "forward")


def stock(norm: Any, hidden_states: Tensor) -> Tensor:
    """Normalises as the module's class does."""
    out: Tensor = type(norm).forward(norm, hidden_states)
    return out


def is_fusable(module: Any) -> bool:
    """Whether a module is a norm whose forward torch's kernel may take over.

    Args:
        module: any.
    """
    kind = type(module)
    if (kind.__module__, kind.__qualname__) != (_HOME, _CLASS):
        return False
    # The class's forward may have been replaced, for every model of the process.
    if getattr(kind.forward, "__globals__", {}).get("__name__") != _HOME:
        return False
    bound = vars(module).get("forward")
    if "_old_forward" in vars(module) or not (bound is None or isinstance(bound, FusedForward)):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    # Sharded and quantised weights are of other classes.
    return (
        type(weight) is nn.Parameter
        and weight.dtype in _DTYPES
        and has_fused_rms_norm(weight.device.type)
    )
