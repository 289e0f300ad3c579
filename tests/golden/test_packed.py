"""Documents packed into a row stay apart wherever the call says that they are packed."""

from __future__ import annotations

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import Tensor

from golden import oracle
from golden.models import PATHS, VOCAB, batch, build_model, judge, patched, run_logits, since
from padless.llama import forward, forward_2
from padless.verification import perturbation_probe

pytestmark = pytest.mark.case("packed")

FORWARDS = {"sdpa": forward_2, "flash": forward}
LENGTHS = (5, 1, 7)


def _positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def _documents() -> Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]


def _visible() -> Tensor:
    documents = _documents()
    seqlen = documents.shape[1]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    return (causal & (documents.unsqueeze(-1) == documents.unsqueeze(-2)))[:, None]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_cu_seqlens_keep_documents_apart(path: str, mode: str, cu_dtype: torch.dtype) -> None:
    layer = build_model().train(mode == "train").model.layers[0].self_attn
    hidden = torch.randn(1, sum(LENGTHS), 64)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=cu_dtype)
    # Positions that go on: boundaries alone say where documents end.
    out = FORWARDS[path](layer, hidden, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)[0]
    baseline, truth = oracle.layer_truth(layer, hidden, _visible())
    judge("cu_seq_lens", out, baseline, truth)


@pytest.mark.parametrize("path", PATHS)
def test_cu_seqlens_that_miss_tokens_are_refused(path: str) -> None:
    layer = build_model().model.layers[0].self_attn
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="must end at the 13 tokens of the batch, got 9"):
        FORWARDS[path](layer, torch.randn(1, 13, 64), cu_seq_lens_q=bounds)


@since("4.47", "cu_seq_lens through the model")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_model_with_cu_seqlens_leaks_nothing(path: str, mode: str, use_cache: bool) -> None:
    model = build_model().train(mode == "train")
    ids, _ = batch("none")
    ids = ids[:1, : sum(LENGTHS)]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    options = {
        "position_ids": _positions(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "use_cache": use_cache,
    }
    with patched(path):
        result = perturbation_probe(
            lambda changed: run_logits(model, changed, None, **options),
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            vocab_size=VOCAB,
            documents=_documents(),
        )
        got = run_logits(model, ids, None, **options)
    assert result.passed, str(result)
    alone = [run_logits(model, piece, None) for piece in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


@since("4.44", "packing by position_ids")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_flash_attention_2_reads_positions_that_restart(path: str, mode: str) -> None:
    # What the implementation of that name does by itself: patched, it must not begin to leak.
    model = build_model().train(mode == "train")
    ids, _ = batch("none")
    ids = ids[:1, : sum(LENGTHS)]
    alone = [run_logits(model, piece, None) for piece in ids.split(LENGTHS, dim=1)]
    model.config._attn_implementation = "flash_attention_2"
    if hasattr(modeling_llama, "LlamaFlashAttention2"):
        for layer in model.model.layers:
            layer.self_attn.__class__ = modeling_llama.LlamaFlashAttention2
    with patched(path):
        got = run_logits(model, ids, None, position_ids=_positions())
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_documents_across_rows_are_refused(path: str, mode: str) -> None:
    # As many documents as rows, but not the rows: neither path may take them for plain rows.
    layer = build_model().train(mode == "train").model.layers[0].self_attn
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="must have a boundary at the end of each row of 5"):
        FORWARDS[path](layer, torch.randn(2, 5, 64), cu_seq_lens_q=bounds)
