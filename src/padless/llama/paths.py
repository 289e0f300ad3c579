"""The original's three functions: `forward`, `forward_2` and `_prepare_decoder_attention_mask`.

Signatures are the original's; what newer transformers versions add comes in by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from padless.errors import UnsupportedError
from padless.hf.attention import finish, project
from padless.hf.call import LayerCall, read_call, stock_reason
from padless.llama.attend import Attended, attend_2, attend_flash
from padless.llama.ledger import ledger
from padless.llama.stock import stock_forward


def forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Attends over real tokens only: the FlashAttention path.

    Padding is removed, the kernel runs on what is left, and the output is padded back with zeros.
    An installed flash-attn serves by its packed contract what it can (as many KV heads as heads,
    no cache); `padless.varlen_attention` serves the rest.

    Args:
        self: a `LlamaAttention`.
        hidden_states: `(batch, seqlen, hidden_size)`, floating.
        attention_mask: None (all real), bool or integer `(batch, keys)`, nonzero = real, or 4D
            bool (True = attend) or additive float `(batch, 1, seqlen, keys)`.
        position_ids: int `(batch, seqlen)`; default: counting on from the cache.
        past_key_value: None, a `(k, v)` tuple, or a transformers Cache.
        output_attentions: return the attention weights, which takes the explicit computation.
        use_cache: return keys and values.
        **kwargs: what the installed transformers' decoder layer adds; unknown names are ignored.

    Returns:
        `(attn_output, attn_weights or None, past_key_value or None)`; without the last when called
        by a decoder layer that unpacks two (transformers 4.48 and later).

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes.
        UnsupportedError: the call belongs to an implementation that padless does not replace.
    """
    return _serve(
        attend_flash, self, hidden_states, attention_mask, position_ids, past_key_value,
        output_attentions, use_cache, kwargs,
    )  # fmt: skip


def forward_2(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Attends on the padded batch: the SDPA path.

    In training one SDPA call, causal without a mask unless there is padding in front of a real
    token. In evaluation the explicit computation: scores by a matrix product, the mask added,
    softmax in float32, cast back.

    Args, returns and raises are those of `forward`.
    """
    return _serve(
        attend_2, self, hidden_states, attention_mask, position_ids, past_key_value,
        output_attentions, use_cache, kwargs,
    )  # fmt: skip


def _prepare_decoder_attention_mask(
    self: nn.Module,
    attention_mask: Tensor | None,
    input_shape: tuple[int, int],
    inputs_embeds: Tensor,
    past_key_values_length: int,
) -> Tensor | None:
    """Hands the raw mask through untouched, for `forward` to unpad by.

    Replaces a method of `LlamaModel` where transformers has it (4.28 to 4.34).
    """
    return attention_mask


def _serve(
    attend: Callable[[nn.Module, LayerCall, Any], Attended],
    module: nn.Module,
    hidden_states: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_value: Any,
    output_attentions: bool,
    use_cache: bool,
    extra: dict[str, Any],
) -> tuple[Any, ...]:
    """Runs one call through `attend`, or through the stock forward where it is not ours."""
    reason = stock_reason(module, attention_mask)
    if reason is None:
        call = read_call(
            module, hidden_states, attention_mask, position_ids, past_key_value,
            output_attentions, use_cache, extra,
        )  # fmt: skip
        p = project(module, call)
        done = attend(module, call, p)
        ledger.count(
            module,
            done.backend,
            computed_tokens=done.computed_tokens,
            batch_tokens=hidden_states.shape[0] * hidden_states.shape[1],
        )
        return finish(module, call, done.out, done.weights, p.present)
    stock = stock_forward(type(module))
    if stock is None:
        raise UnsupportedError(
            f"{reason} is not served by this forward, and no stock forward of "
            f"{type(module).__name__} is known; install it with "
            f"replace_llama_attn_with_flash_attn()"
        )
    ledger.count_stock(module, reason)
    if "past_key_values" not in extra:
        extra = {**extra, "past_key_value": past_key_value}
    result: tuple[Any, ...] = stock(
        module,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        output_attentions=output_attentions,
        use_cache=use_cache,
        **extra,
    )
    return result
