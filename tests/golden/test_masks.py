"""Logits and gradients under every mask, padding, mode and cache setting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden import oracle
from golden.models import (
    HEAD_DIM,
    HEADS,
    PADDINGS,
    PATHS,
    batch,
    both,
    build_model,
    judge,
    oracle_logits,
    patched,
    run_logits,
    truth_logits,
)
from padless.llama import forward, forward_2

FORWARDS = {"sdpa": forward_2, "flash": forward}


@pytest.mark.case("logits")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_equal_truth(path: str, heads: str, padding: str, mode: str) -> None:
    model = build_model(heads).train(mode == "train")
    ids, real = batch(padding)
    truth = truth_logits(model, ids, real)[real]
    masks = {"int": real.long(), "bool": real}
    if padding == "none":
        masks["absent"] = None

    def run() -> dict[str, Tensor]:
        return {
            f"{kind} mask, use_cache={cache}": run_logits(model, ids, mask, use_cache=cache)[real]
            for kind, mask in masks.items()
            for cache in (False, True)
        }

    stock, got = both(path, run)
    for name in stock:
        judge(name, got[name], stock[name], truth)


@pytest.mark.case("gradients")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_equal_truth(path: str, padding: str) -> None:
    model = build_model().train()
    ids, real = batch(padding)
    labels = ids.masked_fill(~real, -100)

    def loss_of(logits: Tensor) -> Tensor:
        # Only where a real token predicts a real token: nothing depends on padding.
        use = real[:, :-1] & real[:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1][use], labels[:, 1:][use])

    weights = {
        k: w.detach().double().requires_grad_() for k, w in model.named_parameters() if w.dim()
    }
    loss_of(oracle_logits(model, weights, ids, real)).backward()

    def run() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss_of(run_logits(model, ids, real.long(), use_cache=False)).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    stock, got = both(path, run)
    for name in weights:
        judge(name, got[name], stock[name], weights[name].grad)


def _layer_masks(real: Tensor) -> dict[str, Tensor]:
    visible = oracle.causal_visible_keys(real)
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(visible.shape).masked_fill(~visible, lowest)
    # Rows of queries that see nothing are opened, as transformers does for SDPA.
    blind = ~visible.any(-1, keepdim=True)
    return {
        "2d-bool": real,
        "2d-int": real.long(),
        "4d-bool": visible,
        "4d-bool-opened": visible | blind,
        "4d-float-min": additive,
        "4d-float-inf": torch.zeros(visible.shape).masked_fill(~visible & ~blind, float("-inf")),
        "4d-float-larger": torch.nn.functional.pad(additive, (0, 3), value=lowest),
    }


@pytest.mark.case("masks")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_layer_takes_every_form_of_mask(path: str, mode: str, padding: str) -> None:
    layer = build_model().train(mode == "train").model.layers[0].self_attn
    _, real = batch(padding)
    hidden = torch.randn(3, real.shape[1], 64)
    positions = torch.arange(real.shape[1])[None].expand(3, -1)
    masks = _layer_masks(real)
    if padding == "none":
        masks["absent"] = None
    baseline, truth = oracle.layer_truth(layer, hidden, oracle.causal_visible_keys(real))
    for name, mask in masks.items():
        out, attn_weights, cache = FORWARDS[path](layer, hidden, mask, positions)
        assert attn_weights is None and cache is None
        judge(name, out[real], baseline[real], truth[real])


@pytest.mark.case("masks")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_layer_computes_masks_that_are_not_padding(path: str, mode: str) -> None:
    # A prefix that sees itself whole, documents that do not see each other, a bias that is added.
    layer = build_model().train(mode == "train").model.layers[0].self_attn
    seqlen = 9
    hidden, positions = torch.randn(2, seqlen, 64), torch.arange(seqlen)[None]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    prefix = causal | (torch.arange(seqlen) < 4)
    documents = causal & (torch.arange(seqlen)[:, None] // 5 == torch.arange(seqlen) // 5)
    for name, visible in (("prefix", prefix), ("documents", documents)):
        baseline, truth = oracle.layer_truth(layer, hidden, visible[None, None])
        additive = torch.zeros(seqlen, seqlen).masked_fill(~visible, float("-inf"))
        for kind, mask in (("bool", visible), ("float", additive)):
            for shape in ((1, 1), (2, 1), (2, 4)):
                given = mask.expand(*shape, seqlen, seqlen)
                out = FORWARDS[path](layer, hidden, given, positions)[0]
                judge(f"{name} {kind} {shape}", out, baseline, truth)


@pytest.mark.case("dtypes")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "autocast-bfloat16"])
def test_low_precision_is_as_right_as_stock(path: str, padding: str, mode: str, dtype: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)
    autocast = dtype.startswith("autocast")
    if not autocast:
        model = model.to(getattr(torch, dtype))
    truth = truth_logits(model, ids, real)[real]

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return run_logits(model, ids, real.long(), use_cache=False)[real]

    stock, got = both(path, run)
    assert got.dtype == stock.dtype
    judge(dtype, got, stock, truth)


@pytest.mark.case("poison")
@pytest.mark.parametrize("padding", PADDINGS[1:])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_flash_path_never_reads_padding(padding: str, mode: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)
    embeds = model.model.embed_tokens(ids).detach()
    poisoned = embeds.masked_fill(~real[..., None], float("nan"))
    with patched("flash"):
        clean, dirty = (
            model(inputs_embeds=x, attention_mask=real.long(), use_cache=False).logits[real]
            for x in (embeds, poisoned)
        )
    assert torch.isfinite(dirty).all()
    assert torch.equal(clean, dirty)


@pytest.mark.case("poison")
@pytest.mark.parametrize("padding", PADDINGS[1:])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_sdpa_path_never_weighs_padding(padding: str, mode: str) -> None:
    # Masked keys are weighted by zero: any finite number at padding gives the same bits.
    model = build_model().train(mode == "train")
    ids, real = batch(padding)
    embeds = model.model.embed_tokens(ids).detach()
    other = torch.where(real[..., None], embeds, 50.0 * torch.randn_like(embeds))
    with patched("sdpa"):
        clean, dirty = (
            model(inputs_embeds=x, attention_mask=real.long(), use_cache=False).logits[real]
            for x in (embeds, other)
        )
    assert torch.equal(clean, dirty)


@pytest.mark.case("masks")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_mask_probe_finds_exactly_the_visible_keys(path: str, mode: str, padding: str) -> None:
    # Without queries every visible key weighs the same, and key j's value is the j-th unit vector:
    # what is not zero in the output is what was visible. No tolerance hides a wrong pair.
    layer = build_model().train(mode == "train").model.layers[0].self_attn
    _, real = batch(padding)
    seqlen = real.shape[1]
    kv_heads = layer.v_proj.weight.shape[0] // HEAD_DIM
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        layer.v_proj.weight.copy_(torch.eye(HEAD_DIM, 64).repeat(kv_heads, 1))
        layer.o_proj.weight.copy_(torch.eye(64))
    hidden = torch.eye(seqlen, 64).expand(3, -1, -1)
    expected = oracle.causal_visible_keys(real)[:, 0]
    for name, mask in _layer_masks(real).items():
        out = FORWARDS[path](layer, hidden, mask)[0].view(3, seqlen, -1, HEAD_DIM)
        for head in range(out.shape[2]):
            seen = out[:, :, head, :seqlen] != 0
            assert torch.equal(seen[real], expected[real]), f"{name}, head {head}"


@pytest.mark.case("masks")
@pytest.mark.parametrize("path", PATHS)
def test_rows_picked_from_a_larger_mask_are_read_each_time(path: str) -> None:
    # 4.38 hands over one mask for all positions; the same object may serve calls at other rows.
    # Rows 0 and 1 are causal; rows 2 and 3 see everything and must not pass for the same.
    layer = build_model().train().model.layers[0].self_attn
    causal = torch.ones(2, 2, dtype=torch.bool).tril()
    other = torch.ones(2, 2, dtype=torch.bool)
    mask = torch.cat([causal, other])[None, None]
    hidden = torch.randn(1, 2, 64)
    for rows, visible in (([0, 1], causal), ([2, 3], other)):
        out = FORWARDS[path](layer, hidden, mask, cache_position=torch.tensor(rows))[0]
        baseline, truth = oracle.layer_truth(layer, hidden, visible[None, None])
        judge(f"rows {rows}", out, baseline, truth)
