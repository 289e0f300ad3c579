"""What the original does wrong, restated here, fails the checks that the patched model passes.

`original_forward` keeps what could be observed of the original: no cache, as many KV heads as
heads, no unknown argument, no mask in training, three values returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from packaging.version import Version
from torch import Tensor

from golden.models import HAS_GQA, PATHS, VERSION, batch, build_model, patched, run_logits

pytestmark = pytest.mark.case("original")


def original_forward(
    self: torch.nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: object = None,
    output_attentions: bool = False,
    use_cache: bool = False,
) -> tuple[Tensor, None, None]:
    batch_size, seqlen, _ = hidden_states.shape
    q, k, v = (
        proj(hidden_states).view(batch_size, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos, sin = self.rotary_emb(v, seq_len=seqlen)
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, position_ids)
    assert past_key_value is None and not use_cache and not output_attentions
    if self.training:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim) + attention_mask
        out = scores.softmax(-1) @ v
    return self.o_proj(out.transpose(1, 2).reshape(batch_size, seqlen, -1)), None, None


@contextmanager
def _as_the_original() -> Iterator[None]:
    stock = modeling_llama.LlamaAttention.forward
    calls = []

    def counted(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        calls.append(self)
        return original_forward(self, *args, **kwargs)

    modeling_llama.LlamaAttention.forward = counted
    try:
        yield
        assert calls, "called 0 times, without a word"
    finally:
        modeling_llama.LlamaAttention.forward = stock


def _left_padded_training(model: torch.nn.Module) -> Tensor:
    ids, real = batch("left")
    return run_logits(model.train(), ids, real.long(), use_cache=False)[real]


def _evaluation(model: torch.nn.Module) -> Tensor:
    ids, real = batch("right")
    return run_logits(model.eval(), ids, real.long(), use_cache=False)[real]


def _default_cache(model: torch.nn.Module) -> Tensor:
    ids, real = batch("right")
    return run_logits(model.eval(), ids, real.long())[real]


def _generate(model: torch.nn.Module) -> Tensor:
    ids, real = batch("left")
    return model.eval().generate(
        input_ids=ids, attention_mask=real.long(), max_new_tokens=4, do_sample=False, pad_token_id=0
    )


# (what is run, heads, on which versions the original gets it wrong)
FAULTS: dict[str, tuple[Callable[[torch.nn.Module], Tensor], str, bool]] = {
    "left-padded training ignores the mask": (_left_padded_training, "mha", True),
    "default use_cache": (_default_cache, "mha", True),
    "plain generate": (_generate, "mha", True),
    "grouped KV heads": (_evaluation, "gqa", True),
    "newer versions": (
        _evaluation,
        "mha",
        Version("4.34") <= VERSION and not Version("4.35") <= VERSION < Version("4.36"),
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_original_is_mended(fault: str, path: str) -> None:
    run, heads, goes_wrong = FAULTS[fault]
    if heads == "gqa" and not HAS_GQA:
        pytest.skip("grouped KV heads came with 4.31")
    model = build_model(heads)
    want = run(model)
    if goes_wrong:
        with pytest.raises((AssertionError, AttributeError, KeyError, RuntimeError, TypeError)):
            with _as_the_original():
                got = run(model)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with patched(path):
        got = run(model)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.skipif(
    not (Version("4.34") > VERSION or Version("4.35") <= VERSION < Version("4.36")),
    reason="the original runs at all on 4.28 to 4.33 and 4.35 only",
)
def test_right_results_of_the_original_are_kept(padding: str) -> None:
    model = build_model("mha")
    ids, real = batch(padding)
    for training in (False, True):
        model.train(training)
        with _as_the_original():
            want = run_logits(model, ids, real.long(), use_cache=False)[real]
        for path in PATHS:
            with patched(path):
                got = run_logits(model, ids, real.long(), use_cache=False)[real]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
