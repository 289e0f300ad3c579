"""Decoding by itself: backends against float64, the choice of one, and the store of real tokens."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from padless import BackendUnavailableError, VarlenLayout
from padless.backends import fa4, sdpa, torch_varlen
from padless.backends.request import AttentionRequest
from padless.backends.rows import CachedRows
from padless.generation.cache import attach_store, discard, settle, store_of
from padless.generation.decoder import Decoder, choose_decoder
from padless.generation.store import RaggedStore
from padless.qualification import decoding
from padless.qualification.decoding import decoding_fault, judge_decoding

# Grouped, equal and single KV heads; sizes of heads that kernels pad and that they do not.
HEADS = [(4, 4, 16), (4, 2, 64), (6, 1, 24)]


def _request(heads: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> AttentionRequest:
    num_heads, num_kv_heads, head_dim = heads
    return AttentionRequest(
        torch.device("cpu"), dtype, head_dim, num_heads, num_kv_heads, causal=False
    )


def _masked(q: Tensor, k: Tensor, v: Tensor, rows: CachedRows, *, softmax_scale: float) -> Tensor:
    """Decodes as on a GPU."""
    mask = torch.arange(k.shape[1]) < rows.lengths[:, None]
    masked = CachedRows(rows.lengths, rows.cu_seqlens_q, rows.cu_seqlens_k, mask)
    return sdpa.decode(q, k, v, masked, softmax_scale=softmax_scale)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decode", [sdpa.decode, _masked], ids=["by-lengths", "by-a-mask"])
def test_sdpa_decodes_right(
    decode: Callable[..., Tensor], dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    assert judge_decoding(decode, _request(heads, dtype)) is None


def _fault(name: str, sound: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decode(q: Tensor, k: Tensor, v: Tensor, rows: CachedRows, *, softmax_scale: float) -> Any:
        lengths = rows.lengths
        if name == "one key too few":
            lengths = (lengths - 1).clamp(min=1)
        elif name == "one key too many":
            lengths = (lengths + 1).clamp(max=k.shape[1])
        elif name == "heads of another group":
            k, v = k.flip(2), v.flip(2)
        elif name == "another scale":
            softmax_scale *= 1.05
        elif name == "the row above":
            lengths = lengths.roll(1)
        changed = CachedRows(lengths, rows.cu_seqlens_q, rows.cu_seqlens_k)
        out = sound(q, k, v, changed, softmax_scale=softmax_scale)
        return out.float() if name == "another dtype" else out

    return decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "one key too few",
        "one key too many",
        "heads of another group",
        "another scale",
        "the row above",
        "another dtype",
    ],
)
def test_the_probe_finds(name: str, dtype: torch.dtype) -> None:
    if name == "another dtype":
        dtype = torch.bfloat16
    assert judge_decoding(_fault(name, sdpa.decode), _request((4, 2, 64), dtype)) is not None


def test_a_backend_that_decodes_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_faults", {})
    monkeypatch.setattr(sdpa, "decode", _fault("the row above", sdpa.decode))
    with pytest.raises(BackendUnavailableError, match="sdpa: a row of 1 keys is off by"):
        choose_decoder(_request((4, 2, 16)), "auto")


def test_a_backend_that_raises_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: Any, **options: Any) -> Tensor:
        raise OSError("no such kernel\nand more")

    monkeypatch.setattr(decoding, "_faults", {})
    monkeypatch.setattr(sdpa, "decode", decode)
    assert decoding_fault(sdpa, _request((4, 2, 16))) == "raised OSError: no such kernel"


def test_the_choice_on_the_cpu() -> None:
    request = _request((4, 2, 16))
    assert choose_decoder(request, "auto").name == "sdpa"
    assert choose_decoder(request, "sdpa").name == "sdpa"
    assert torch_varlen.reject_decode(request) is not None
    assert fa4.reject_decode(request) is not None
    with pytest.raises(BackendUnavailableError, match="torch_varlen: needs CUDA, got cpu"):
        choose_decoder(request, "torch_varlen")
    with pytest.raises(BackendUnavailableError, match=r"fa3 does not decode, of .* only these do"):
        choose_decoder(request, "fa3")


def _store(lengths: list[int], seqlen: int, *, most: int | None = None) -> tuple[Any, Any, Any]:
    """Builds a store of one layer with a left-padded prompt; its k, v in padded form."""
    mask = torch.stack([torch.arange(seqlen) >= seqlen - n for n in lengths])
    layout = VarlenLayout.from_mask(mask)
    k, v = torch.randn(2, layout.total, 2, 8)
    store = RaggedStore(layout, 1, most)
    store.put_prompt(0, k, v)
    return store, layout.pad(k).transpose(1, 2), layout.pad(v).transpose(1, 2)


def _step(store: RaggedStore, k: Tensor, v: Tensor, *, with_mask: bool = False) -> None:
    store.make_room()
    store.begin_step(with_mask=with_mask)
    store.put_newest(0, k, v)
    store.count_step()


def test_a_store_gives_back_the_padded_form() -> None:
    store, k, v = _store([5, 1, 3], 5)
    for _ in range(4):
        new_k, new_v = torch.randn(2, 3, 2, 8)
        _step(store, new_k, new_v)
        k, v = (torch.cat([x, n[:, :, None]], 2) for x, n in ((k, new_k), (v, new_v)))
    assert store.rows.lengths.tolist() == [9, 5, 7]
    got = store.padded(0)
    assert torch.equal(got[0], k) and torch.equal(got[1], v)


@pytest.mark.parametrize("with_mask", [False, True], ids=["by-lengths", "by-a-mask"])
def test_a_step_attends_to_the_keys_of_its_rows_alone(with_mask: bool) -> None:
    store, k, v = _store([5, 1, 3], 5)
    real = torch.arange(5) >= 5 - store.rows.lengths[:, None]
    for buffer in store.layers[0]:
        buffer[torch.arange(store.capacity) >= store.rows.lengths[:, None]] = 7.0
    decoder = Decoder("sdpa", sdpa, with_mask)
    for _ in range(4):
        new_k, new_v = torch.randn(2, 3, 2, 8)
        _step(store, new_k, new_v, with_mask=with_mask)
        k, v = (torch.cat([x, n[:, :, None]], 2) for x, n in ((k, new_k), (v, new_v)))
        real = torch.cat([real, torch.ones(3, 1, dtype=torch.bool)], 1)
        q = torch.randn(3, 4, 8)
        want = F.scaled_dot_product_attention(
            q[:, :, None], *(x.repeat_interleave(2, 1) for x in (k, v)),
            attn_mask=real[:, None, None], scale=0.3,
        )  # fmt: skip
        torch.testing.assert_close(decoder.attend(store, 0, q, 0.3), want[:, :, 0])


@pytest.mark.parametrize("indices", [[2, 0, 0], [1, 2, 0], [0, 0, 1, 1, 2, 2], [2]], ids=str)
def test_rows_of_a_store_are_moved(indices: list[int]) -> None:
    store, k, v = _store([5, 1, 3], 5)
    rows = torch.tensor(indices)
    addresses = [buffer.data_ptr() for buffer in store.layers[0]]
    moved = store.select_rows(rows)
    assert moved == (len(indices) != 3)
    assert (addresses == [buffer.data_ptr() for buffer in store.layers[0]]) == (not moved)
    new_k, new_v = torch.randn(2, len(indices), 2, 8)
    _step(store, new_k, new_v)
    store.select_rows(torch.arange(len(indices)))
    got = store.padded(0)
    for x, old, new in ((got[0], k, new_k), (got[1], v, new_v)):
        assert torch.equal(x, torch.cat([old[rows], new[:, :, None]], 2))


def test_a_store_makes_room_for_what_is_to_come() -> None:
    # All that may be needed, where that is known and near; else half as much again.
    assert _store([5, 1], 5, most=105)[0].capacity == 128
    assert _store([5, 1], 5, most=100_000)[0].capacity == 512
    store, k, v = _store([5, 1], 5)
    assert store.capacity == 512
    store.longest = 511
    assert not store.make_room()
    store.longest = 512
    assert store.make_room() and store.capacity == 1024
    store.longest = 5
    got = store.padded(0)
    assert torch.equal(got[0], k) and torch.equal(got[1], v)


def test_a_cache_answers_for_its_store_until_it_is_looked_into() -> None:
    store, k, v = _store([5, 1, 3], 5)
    cache = DynamicCache()
    attach_store(cache, store)
    assert isinstance(cache, DynamicCache) and type(cache) is not DynamicCache
    assert type(cache).__name__ == "DynamicCache"
    assert cache.get_seq_length() == 5 and not cache.is_compileable
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert store_of(cache) is store
    layer = cache.layers[0]
    assert type(cache) is DynamicCache and store_of(cache) is None
    assert torch.equal(layer.keys, k[[1, 1, 0]]) and torch.equal(layer.values, v[[1, 1, 0]])
    assert cache.get_seq_length() == 5
    settle(cache)
    discard(cache)
    assert cache.get_seq_length() == 5


LOOKS = {
    "update": lambda cache: cache.update(*torch.zeros(2, 3, 2, 1, 8), 0),
    "len": len,
    "iter": lambda cache: list(cache),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "crop": lambda cache: cache.crop(-1),
    "repr": repr,
    "assignment": lambda cache: setattr(cache, "layers", cache.layers),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_into_a_cache_finds_an_ordinary_one(look: str) -> None:
    store, k, v = _store([5, 1, 3], 5)
    cache, plain = DynamicCache(), DynamicCache()
    attach_store(cache, store)
    plain.update(k, v, 0)
    for each in (cache, plain):
        LOOKS[look](each)
    assert type(cache) is DynamicCache
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
    assert store.layers == [None]


def test_rows_of_a_cache_are_repeated_and_selected() -> None:
    store, k, _ = _store([5, 1, 3], 5)
    cache = DynamicCache()
    attach_store(cache, store)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert store.batch == 2
    assert torch.equal(cache.layers[0].keys, k[[2, 0]])


def test_a_discarded_cache_is_an_empty_one() -> None:
    store, _, _ = _store([5, 1, 3], 5)
    cache = DynamicCache()
    attach_store(cache, store)
    discard(cache)
    assert type(cache) is DynamicCache and cache.get_seq_length() == 0
    assert store.layers == [None] and "_padless_store" not in vars(cache)


def _by_bounds(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used: Tensor, scale: float
) -> Tensor:
    """Attends as a flash kernel is asked to: rows of packed buffers, filled in front."""
    assert q.is_contiguous() and k.dim() == v.dim() == 3
    assert cu_q.dtype == cu_k.dtype == used.dtype == torch.int32
    assert cu_q.tolist() == list(range(len(used) + 1))
    out = []
    for i, n in enumerate(used.tolist()):
        begin = int(cu_k[i])
        keys = [x[None, begin : begin + n].transpose(1, 2) for x in (k, v)]
        out.append(sdpa.dense_attention(q[i, None, :, None], *keys, softmax_scale=scale)[0, :, 0])
    return torch.stack(out)


def test_the_operator_of_torch_is_asked_for_each_rows_own_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def operator(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any,
        scale: float, seqused_k: Tensor,
    ) -> Any:  # fmt: skip
        max_q, max_k, dropout, is_causal, debug = rest
        assert (max_q, dropout, is_causal, debug) == (1, 0.0, False, False)
        assert max_k >= int(seqused_k.max())
        return _by_bounds(q, k, v, cu_q, cu_k, seqused_k, scale), None, None, None, None

    monkeypatch.setattr(torch_varlen, "_operator", lambda: (operator, frozenset({"seqused_k"})))
    assert judge_decoding(torch_varlen.decode, _request((4, 2, 64), torch.bfloat16)) is None


def test_flash_attention_4_is_asked_for_each_rows_own_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Any:
        assert asked["max_seqlen_q"] == 1 and not asked["causal"]
        assert asked["max_seqlen_k"] >= int(asked["seqused_k"].max())
        bounds = (asked["cu_seqlens_q"], asked["cu_seqlens_k"], asked["seqused_k"])
        return _by_bounds(q, k, v, *bounds, asked["softmax_scale"]), None

    names = frozenset(
        {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k",
         "softmax_scale", "causal"}
    )  # fmt: skip
    monkeypatch.setattr(fa4, "_kernel", lambda: (kernel, names, ""))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    assert judge_decoding(fa4.decode, _request((4, 2, 64), torch.bfloat16)) is None


def test_versions_without_a_length_a_row_do_not_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "_operator", lambda: (lambda: None, frozenset()))
    reason = torch_varlen.reject_decode(_request((4, 2, 64)))
    assert reason is not None and "takes no length a row" in reason
    monkeypatch.setattr(fa4, "reject", lambda request: None)
    monkeypatch.setattr(fa4, "_kernel", lambda: (lambda: None, frozenset(), ""))
    reason = fa4.reject_decode(_request((4, 2, 64)))
    assert reason is not None and "takes no length a row" in reason
