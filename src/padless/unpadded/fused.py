"""Modules of a `generate` call that compute by fewer kernels than transformers writes them in.

Each kernel of a step of one token a row takes the device a few microseconds, however little it
does. Which modules, and what they compute then, is `norms`' and `mlp`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from padless.environment import autocasts, is_compiling, is_tracing
from padless.generation.graph import is_compiled

_HOME = "transformers.models.llama.modeling_llama"

# Whether this thread is in a forward whose modules are to be fused; others may share the modules.
_in_force: ContextVar[bool] = ContextVar("padless_fused", default=False)
_counting = threading.Lock()


class Fusion(NamedTuple):
    """A kind of module that may be computed otherwise.

    Attributes:
        serves: whether a module is of the kind, unchanged, and on a device that has the kernel.
        compute: takes the module and its input, `(..., hidden_size)`, and returns its output; None
            for an input that is left to the class's own forward.
    """

    serves: Callable[[Any], bool]
    compute: Callable[[Any, Tensor], Tensor | None]


class FusedModules:
    """The modules of one model that may be fused; none if anything of it is compiled.

    Args:
        modules: of the model, all of them.
        fusions: the kinds to look for.
    """

    def __init__(self, modules: Iterable[nn.Module], fusions: Sequence[Fusion]) -> None:
        modules = list(modules)
        self._modules: list[tuple[nn.Module, Fusion]] = [
            (module, fusion)
            for module in modules
            # Most are of torch: asked first, as a call of few tokens waits for this.
            if type(module).__module__ == _HOME
            for fusion in fusions
            if fusion.serves(module)
        ]
        if self._modules and any(is_compiled(module) for module in modules):
            self._modules = []

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Fuses the forwards of this thread; no module keeps anything of it.

        Autograd, autocast and tracing find the modules as they are.
        """
        if (
            not self._modules
            or torch.is_grad_enabled()
            or is_compiling()
            or is_tracing()
            or autocasts(next(self._modules[0][0].parameters()))
        ):
            yield
            return
        forwards: list[FusedForward] = []
        token = _in_force.set(True)
        try:
            with _counting:
                for module, fusion in self._modules:
                    # Another thread may have put it there; or since, somebody a forward of theirs.
                    forward = vars(module).setdefault("forward", FusedForward(module, fusion))
                    if isinstance(forward, FusedForward):
                        forwards.append(forward)
                        forward.users += 1
            yield
        finally:
            _in_force.reset(token)
            with _counting:
                for forward in forwards:
                    forward.users -= 1
                    if not forward.users and vars(forward.module).get("forward") is forward:
                        del vars(forward.module)["forward"]


class FusedForward:
    """Stands for a module's forward while some thread wants it fused.

    Args:
        module: of a kind that the fusion serves.
        fusion: computes it.

    Attributes:
        module: the module.
        users: forwards of models that are under way and want it.
    """

    def __init__(self, module: Any, fusion: Fusion) -> None:
        self.module = module
        self.users = 0
        self._fusion = fusion

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the module, as its class does or by fewer kernels."""
        # Asked first, so that torch.compile in another thread sees the class's forward alone.
        if not is_compiling() and _in_force.get() and len(args) == 1 and not kwargs:
            found = self._fusion.compute(self.module, args[0])
            if found is not None:
                return found
        out: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return out

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy made just now, by a hook or another thread, has no such attribute yet: it gets its
        # class's forward.
        return getattr, (self.module, "forward")


def is_stock(module: Any, name: str) -> bool:
    """Whether a module is transformers' own of a LLaMA, and nobody has changed what it computes.

    Args:
        module: any.
        name: of its class.

    Note:
        One of a subclass, with hooks, or with a forward bound to the instance (Liger's,
        accelerate's) is not.
    """
    kind = type(module)
    if (kind.__module__, kind.__qualname__) != (_HOME, name):
        return False
    # The class's forward may have been replaced, for every model of the process.
    if getattr(kind.forward, "__globals__", {}).get("__name__") != _HOME:
        return False
    bound = vars(module).get("forward")
    if "_old_forward" in vars(module) or not (bound is None or isinstance(bound, FusedForward)):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)
