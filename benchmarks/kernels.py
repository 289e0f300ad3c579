"""Attention kernels on packed sequences of one length, and the rotary embedding against a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import Record, parser
from padless import varlen_attention
from padless.benchmark.models import attention_flops
from padless.benchmark.timing import measure
from padless.benchmark.variant import Variant, WrongNumbersError
from padless.kernels.rotary import apply_rotary, rotary_backend
from padless.layout import VarlenLayout

_TOTAL = 16384
_SEQLENS: tuple[int, ...] = (512, 2048, 8192, 16384)
_HEADS: tuple[tuple[int, int], ...] = ((32, 8), (32, 32))
_HEAD_DIM = 128
_BACKENDS = ("fa4", "fa3", "torch_varlen", "sdpa")
# Two bfloat16 kernels differ by thousandths.
_TOLERANCE = 0.02


def main() -> None:
    """Measures every shape and writes the record."""
    arguments = parser(__doc__, seconds=40).parse_args()
    record = Record("kernels", arguments)
    total, seqlens, heads, head_dim = _TOTAL, _SEQLENS, _HEADS, _HEAD_DIM
    if record.smoke:
        total, seqlens, heads, head_dim = 64, (16, 64), ((4, 2),), 16
    dtype = torch.bfloat16 if record.clock.is_cuda else torch.float32
    facts: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "causal": True,
    }
    seconds = arguments.seconds / (len(seqlens) * len(heads) + 1)
    for num_heads, num_kv_heads in heads:
        for seqlen in seqlens:
            lengths = [seqlen] * (total // seqlen)
            layout = VarlenLayout.from_lengths(lengths, device=arguments.device)
            shape = (total, num_heads, num_kv_heads, head_dim)
            attention = _Attention(shape, layout, dtype, arguments.device)
            timings = measure(
                attention.builders(),
                record.clock,
                draw=lambda index: None,
                seconds=seconds,
                inference=True,
                seed=arguments.seed,
            )
            record.add(
                f"attention {num_heads}/{num_kv_heads}, sequences of {seqlen}",
                timings,
                flops=attention_flops(num_heads, head_dim, lengths),
                forward_flops=attention_flops(num_heads, head_dim, lengths, backward=False),
                tokens_real=total,
                tokens_padded=total,
                seqlen=seqlen,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                **facts,
            )
    num_heads, num_kv_heads = heads[0]
    rotary = _Rotary((total, num_heads, num_kv_heads, head_dim), dtype, arguments.device)
    timings = measure(
        rotary.builders(),
        record.clock,
        draw=lambda index: None,
        seconds=seconds,
        inference=True,
        seed=arguments.seed,
    )
    record.add(
        f"rotary embedding {num_heads}/{num_kv_heads}",
        timings,
        forward_bytes=rotary.moved_bytes,
        tokens_real=total,
        tokens_padded=total,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **facts,
    )


class _Attention:
    """Attention on random packed tensors by each kernel there is."""

    def __init__(
        self, shape: tuple[int, int, int, int], layout: VarlenLayout, dtype: Any, device: str
    ) -> None:
        total, num_heads, num_kv_heads, head_dim = shape
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.q = torch.randn(total, num_heads, head_dim, **options).requires_grad_()
        self.k = torch.randn(total, num_kv_heads, head_dim, **options).requires_grad_()
        self.v = torch.randn(total, num_kv_heads, head_dim, **options).requires_grad_()
        self.dout = torch.randn(total, num_heads, head_dim, **options)
        self.layout = layout
        self.device = device
        self.truth = self._truth()

    def builders(self) -> dict[str, Callable[[], Variant]]:
        made: dict[str, Callable[[], Variant]] = {
            f"padless, backend {name}": functools.partial(self._varlen, name) for name in _BACKENDS
        }
        made["torch SDPA flash, dense"] = functools.partial(self._dense, "FLASH_ATTENTION")
        made["torch SDPA cuDNN, dense"] = functools.partial(self._dense, "CUDNN_ATTENTION")
        return made

    def _varlen(self, backend: str) -> Variant:
        def forward(inputs: None) -> tuple[Tensor, Tensor]:
            out = varlen_attention(self.q, self.k, self.v, self.layout, backend=backend)
            return out, self.dout

        return self._variant(forward)

    def _dense(self, kernel: str) -> Variant:
        """Torch's attention without packing: only where all sequences are of one length."""
        batch = len(self.layout.lengths)

        def heads_first(x: Tensor) -> Tensor:
            return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)

        def forward(inputs: None) -> tuple[Tensor, Tensor]:
            with sdpa_kernel(SDPBackend.__members__[kernel]):
                out = F.scaled_dot_product_attention(
                    heads_first(self.q),
                    heads_first(self.k),
                    heads_first(self.v),
                    is_causal=True,
                    enable_gqa=self.q.shape[1] != self.k.shape[1],
                )
            return out.transpose(1, 2).reshape(self.q.shape), self.dout

        return self._variant(forward)

    def _variant(self, forward: Any) -> Variant:
        return Variant(forward, leaves=[self.q, self.k, self.v], verify=self._verify)

    def _truth(self) -> list[Tensor]:
        backend = "torch_varlen" if self.device == "cuda" else "reference"
        out = varlen_attention(self.q, self.k, self.v, self.layout, backend=backend)
        grads = torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)
        return [out.detach(), *grads]

    def _verify(self, inputs: None, out: Tensor) -> dict[str, Any]:
        grads = [x.grad for x in (self.q, self.k, self.v) if x.grad is not None]
        errors = {}
        for name, found, truth in zip(
            ("out", "dq", "dk", "dv"), [out, *grads], self.truth, strict=True
        ):
            error = torch.linalg.vector_norm((found - truth).float())
            errors[name] = float(error / torch.linalg.vector_norm(truth.float()))
        if not max(errors.values()) <= _TOLERANCE:
            worst = max(errors, key=lambda name: errors[name])
            raise WrongNumbersError(f"{worst} off by {errors[worst]:.3g}")
        return {"rms_error": errors}


class _Rotary:
    """The rotary embedding of q and k, forward, and a copy of as many bytes."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: Any, device: str) -> None:
        total, num_heads, num_kv_heads, head_dim = shape
        self.q = torch.randn(total, num_heads, head_dim, dtype=dtype, device=device)
        self.k = torch.randn(total, num_kv_heads, head_dim, dtype=dtype, device=device)
        angles = torch.outer(
            torch.arange(total, device=device), torch.rand(head_dim // 2, device=device)
        )
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        tensors = [self.q, self.k]
        rotated = 2 * sum(x.numel() * x.element_size() for x in tensors)
        self.moved_bytes = rotated + 2 * self.cos.numel() * self.cos.element_size()

    def builders(self) -> dict[str, Callable[[], Variant]]:
        return {
            "padless apply_rotary, in place": functools.partial(self._padless, True),
            "padless apply_rotary, new tensors": functools.partial(self._padless, False),
            "transformers apply_rotary_pos_emb": self._transformers,
            "Liger rotary embedding": self._liger,
            "a copy of q and k": self._copy,
        }

    def _padless(self, inplace: bool) -> Variant:
        def forward(inputs: None) -> tuple[Tensor, None]:
            return apply_rotary(self.q, self.k, self.cos, self.sin, inplace=inplace)[0], None

        return Variant(
            forward, is_differentiable=False, facts={"kernel": rotary_backend(self.q).name}
        )

    def _transformers(self) -> Variant:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        return self._heads_first(apply_rotary_pos_emb)

    def _liger(self) -> Variant:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        return self._heads_first(liger_rotary_pos_emb)

    def _heads_first(self, function: Any) -> Variant:
        q, k = (x.unsqueeze(0).transpose(1, 2) for x in (self.q, self.k))
        cos, sin = self.cos.unsqueeze(0), self.sin.unsqueeze(0)
        return Variant(lambda inputs: (function(q, k, cos, sin)[0], None), is_differentiable=False)

    def _copy(self) -> Variant:
        targets = [torch.empty_like(x) for x in (self.q, self.k)]

        def forward(inputs: None) -> tuple[Tensor, None]:
            for target, source in zip(targets, (self.q, self.k), strict=True):
                target.copy_(source)
            return targets[0], None

        return Variant(forward, is_differentiable=False)


if __name__ == "__main__":
    main()
