"""The patched model on a CUDA device: the same model, on torch's varlen kernel where it fits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from padless.llama.engage import engage
from padless.verification import verify

pytestmark = pytest.mark.gpu

VOCAB, LAYERS = 512, 3
# What may serve half precision on a GPU.
KERNELS = {"fa4", "fa3", "fa2", "torch_varlen"}


def _model(dtype: torch.dtype, *, num_kv_heads: int = 2, head_dim: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8 * 64,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda", dtype)


def _batch(lengths: tuple[int, ...] = (200, 131, 64, 1)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), device="cuda")
    mask = torch.arange(max(lengths), device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize(
    ("dtype", "num_kv_heads", "head_dim"),
    [
        (torch.float32, 2, 64),
        (torch.bfloat16, 2, 64),
        (torch.bfloat16, 8, 80),
        (torch.float16, 8, 128),
    ],
)
def test_patched_model_is_the_same_model(
    dtype: torch.dtype, num_kv_heads: int, head_dim: int
) -> None:
    model = _model(dtype, num_kv_heads=num_kv_heads, head_dim=head_dim)
    report = verify(model, _batch(), new_tokens=4)
    failed = [
        f"{path.path}: {check.name}: {check.detail}"
        for path in report.paths
        for check in path.checks
        if not check.passed
    ]
    assert report.passed, failed
    for path in report.paths[::2]:
        assert path.path in ("patch", "flash")
        assert path.computed_tokens == report.real_tokens
        assert (
            path.backends == ("sdpa",) if dtype is torch.float32 else set(path.backends) <= KERNELS
        )


def test_autocast_reaches_the_varlen_kernel() -> None:
    # Rotary tables in float32 promote q and k under autocast: they must not cost the kernel.
    model, batch = _model(torch.float32).train(), _batch()
    real = batch["attention_mask"].bool()

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(**batch, use_cache=False).logits[real]
        logits.float().pow(2).mean().backward()
        return logits.float(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    stock = run()
    with engage("flash") as handle:
        got = run()
        backends = {name for layer in handle.report().layers for name in layer.backends}
    assert backends <= KERNELS
    for a, b in zip(got, stock, strict=True):
        assert (a - b).pow(2).mean().sqrt() < 0.02 * b.pow(2).mean().sqrt()


def test_new_lengths_build_no_cudnn_plan() -> None:
    # A plan costs tens of milliseconds at each new length: SDPA is called without cuDNN.
    model = _model(torch.float32).train()
    with torch.profiler.profile() as profile, engage("sdpa"):
        for seqlen in (97, 98, 99):
            model(torch.ones(2, seqlen, dtype=torch.long, device="cuda"), use_cache=False)
    names = {event.key for event in profile.key_averages()}
    assert any("scaled_dot_product" in name for name in names)
    assert not any("cudnn" in name and "attention" in name for name in names), names
