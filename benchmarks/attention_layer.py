"""One attention layer in all its variants, on one set of weights and one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import padless
from benchmarks import names, peers
from benchmarks.layer_batch import LayerBatch
from padless.benchmark.models import (
    Shape,
    attention_flops,
    build_llama,
    sharing_copy,
    trusted_sdpa,
)
from padless.benchmark.variant import Variant, WrongNumbersError
from padless.unpadded.batch import ARGUMENT, FlatBatch

# Root mean square of the difference from transformers' SDPA, over that of its result: bfloat16
# rounding gives thousandths, a wrong mask or head tenths.
_TOLERANCE = 0.03


class AttentionLayer:
    """Variants of one attention layer.

    Args:
        shape: of the model; one layer of it is built.
        batch: what they all compute.
        dtype: of the weights.
        device: "cuda" or "cpu".
    """

    def __init__(self, shape: Shape, batch: LayerBatch, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        self.batch = batch
        self.device = device
        longest = batch.hidden.shape[1]
        # The MLP and the head take no part.
        thin = Shape(shape.hidden_size, shape.num_heads, shape.num_kv_heads, 1, 64, 64)
        self.model = build_llama(thin, dtype=dtype, device=device, longest=longest)
        columns = torch.arange(longest, device=device).unsqueeze(0)
        with torch.no_grad():
            rotary = self.model.model.rotary_emb
            tables = rotary(batch.hidden, columns)
            cos, sin = (t.expand(batch.hidden.shape[0], -1, -1) for t in tables)
            self.padded_tables = (cos, sin)
            self.flat_tables = rotary(batch.flat_hidden, batch.position_ids)
        self.truth: tuple[Tensor, Tensor] | None = None

    @property
    def flops(self) -> float:
        """Work of forward and backward on real tokens, by the counting rule of `record`."""
        shape, lengths = self.shape, self.batch.layout.lengths
        weights = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        attention = attention_flops(shape.num_heads, shape.head_dim, lengths)
        return 6.0 * sum(lengths) * weights + attention

    def builders(self) -> dict[str, Callable[[], Variant]]:
        """Returns what makes each variant, the one that the others are checked against first."""
        made: dict[str, Callable[[], Variant]] = {names.SDPA: self.transformers_sdpa}
        if self.batch.layout.indices is not None or len(self.batch.layout.lengths) > 1:
            made[names.FA4_BY_HAND] = self.transformers_fa4_by_hand
        else:
            made[names.FA4] = self.transformers_fa4_by_hand
        return {
            names.ORIGINAL_FLASH: self.original_flash,
            names.ORIGINAL_SDPA: self.original_sdpa,
            **made,
            names.PADLESS: lambda: self.padless("auto"),
            names.PADLESS_TORCH: lambda: self.padless(_torch_backend(self.device)),
            names.FLOOR: self.floor,
            names.FLOOR_ONE_PRODUCT: self.floor_one_product,
        }

    def original_flash(self) -> Variant:
        """The original's FlashAttention path."""
        attention = sharing_copy(self.model).model.layers[0].self_attn
        return self._variant(
            lambda b: peers.original_flash(attention, b.hidden, *self.padded_tables, b.mask),
            attention,
        )

    def original_sdpa(self) -> Variant:
        """The original's SDPA path, as it trains."""
        attention = sharing_copy(self.model).model.layers[0].self_attn
        return self._variant(
            lambda b: peers.original_sdpa(attention, b.hidden, *self.padded_tables), attention
        )

    def transformers_sdpa(self) -> Variant:
        """What transformers runs by default, with the mask that it makes."""
        attention = sharing_copy(self.model).model.layers[0].self_attn
        mask = self._dense_mask()
        return self._variant(
            lambda b: attention(
                b.hidden, position_embeddings=self.padded_tables, attention_mask=mask
            )[0],
            attention,
        )

    def transformers_fa4_by_hand(self) -> Variant:
        """Transformers' FlashAttention-4 on real tokens, with boundaries that the user made."""
        model = sharing_copy(self.model, "flash_attention_4")
        attention = model.model.layers[0].self_attn
        layout = self.batch.layout
        boundaries = {
            "cu_seq_lens_q": layout.cu_seqlens,
            "cu_seq_lens_k": layout.cu_seqlens,
            "max_length_q": layout.max_seqlen,
            "max_length_k": layout.max_seqlen,
        }
        return self._flat_variant(
            lambda b: attention(
                b.flat_hidden,
                position_embeddings=self.flat_tables,
                attention_mask=None,
                **boundaries,
            )[0],
            attention,
        )

    def padless(self, backend: str) -> Variant:
        """A layer of a patched model, as the model behind the door runs it."""
        model = sharing_copy(self.model)
        padless.patch(model, backend=backend)
        attention = model.model.layers[0].self_attn
        flat = FlatBatch(self.batch.layout, self.batch.position_ids, backend)
        variant = self._flat_variant(
            lambda b: attention(
                b.flat_hidden,
                position_embeddings=self.flat_tables,
                attention_mask=None,
                **{ARGUMENT: flat},
            )[0],
            attention,
        )
        checked = variant.verify
        assert checked is not None

        def verify(inputs: LayerBatch, out: Tensor) -> dict[str, Any]:
            served = {found.selection.name for found in flat.served.values()}
            return {"kernel": ", ".join(sorted(served)), **checked(inputs, out)}

        variant.verify = verify
        return variant

    def floor(self) -> Variant:
        """The products and the kernel alone."""
        attention = self.model.model.layers[0].self_attn
        kernel_name, kernel = peers.fastest_kernel(self.device)
        layout = self.batch.layout

        def forward(b: LayerBatch) -> tuple[Tensor, Tensor]:
            return peers.floor(attention, b.flat_hidden[0], layout, kernel), b.flat_dout[0]

        return Variant(forward, leaves=self._leaves(attention), facts={"kernel": kernel_name})

    def floor_one_product(self) -> Variant:
        """The same with q, k and v as one product."""
        attention = self.model.model.layers[0].self_attn
        kernel_name, kernel = peers.fastest_kernel(self.device)
        layout = self.batch.layout
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = torch.cat([p.weight.detach() for p in projections]).requires_grad_()

        def forward(b: LayerBatch) -> tuple[Tensor, Tensor]:
            hidden = b.flat_hidden[0]
            out = peers.floor_one_product(weight, attention, hidden, layout, kernel)
            return out, b.flat_dout[0]

        leaves = [*self._leaves(attention), weight]
        return Variant(forward, leaves=leaves, facts={"kernel": kernel_name})

    def find_truth(self) -> None:
        """Computes what the variants have to compute, by transformers' default."""
        variant = self.transformers_sdpa()
        with trusted_sdpa():
            out, dout = variant.forward(self.batch)
            out.backward(dout)
        self.truth = self._real(out.detach()), self._real_gradient()
        for leaf in variant.leaves:
            leaf.grad = None

    def _variant(self, run: Callable[[LayerBatch], Tensor], attention: Any) -> Variant:
        return Variant(
            lambda b: (run(b), b.dout), leaves=self._leaves(attention), verify=self._verify
        )

    def _flat_variant(self, run: Callable[[LayerBatch], Tensor], attention: Any) -> Variant:
        return Variant(
            lambda b: (run(b), b.flat_dout), leaves=self._leaves(attention), verify=self._verify
        )

    def _leaves(self, attention: Any) -> list[Tensor]:
        return [*attention.parameters(), self.batch.hidden, self.batch.flat_hidden]

    def _verify(self, inputs: LayerBatch, out: Tensor) -> dict[str, Any]:
        if self.truth is None:
            return {}
        found = (self._real(out), self._real_gradient())
        errors = [_relative_rms(f, t) for f, t in zip(found, self.truth, strict=True)]
        if not max(errors) <= _TOLERANCE:
            raise WrongNumbersError(
                f"output off by {errors[0]:.3g}, gradient of the input by {errors[1]:.3g}"
            )
        return {"rms_error": {"output": errors[0], "input_gradient": errors[1]}}

    def _real(self, out: Tensor) -> Tensor:
        """Takes the real tokens of an output, padded or flat: `(total, hidden_size)`."""
        layout = self.batch.layout
        is_flat = out.shape[:2] == (1, layout.total)
        return out[0] if is_flat else layout.unpad(out)

    def _real_gradient(self) -> Tensor:
        grad = self.batch.hidden.grad
        if grad is None:
            grad = self.batch.flat_hidden.grad
        assert grad is not None
        return self._real(grad)

    def _dense_mask(self) -> Tensor | None:
        """Makes the mask that transformers makes for SDPA: bool `(batch, 1, seqlen, seqlen)`."""
        layout, device = self.batch.layout, self.batch.hidden.device
        if self.batch.mask is None and layout.batch == len(layout.lengths):
            return None
        seqlen = self.batch.hidden.shape[1]
        causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).tril()
        if self.batch.mask is not None:
            return causal & self.batch.mask[:, None, None, :]
        counts = torch.tensor(layout.lengths, device=device)
        document = torch.arange(len(counts), device=device).repeat_interleave(counts)
        return (causal & (document[:, None] == document))[None, None]


def _torch_backend(device: str) -> str:
    return "torch_varlen" if device == "cuda" else "sdpa"


def _relative_rms(found: Tensor, truth: Tensor) -> float:
    # In float32, and not in float64: the tensors can have billions of numbers.
    error = torch.linalg.vector_norm((found - truth).float())
    return float(error / torch.linalg.vector_norm(truth.float()))
