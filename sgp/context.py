"""The loss of a sub-sequence with a choice of what flows back through its context.

Output tokens attend to the keys and values of the context. `exact` lets the gradient flow back
through them, as it does when the whole sequence is one forward pass; `detach` holds them constant;
`replay` is exact too, and builds the context's graph only after the outputs' has been freed.

The context without its last token runs first, into a cache; the last context token, which predicts
the first output, and the outputs attend to it. This is the cache that a Hugging Face model takes
for generation, with gradients: the model itself is not touched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgp.caller import warn
from sgp.losses import cross_entropy
from sgp.rows.recipe import whole_number
from sgp.rows.reduction import check_reduction
from sgp.selection import Selection

NAME = "sgp.context_loss"
MODES = ("exact", "detach", "replay")
SHARDED = ("device_mesh", "ds_id", "_is_flat_param")  # DTensor, DeepSpeed's ZeRO 3, FSDP 1
CACHE_NAMES = ("cache", "past_key_values")
RELATIVE = ("bloom", "mpt")  # position biases are read from the attention mask, or differences
KEYS_AND_VALUES = ("full_attention", "sliding_attention", "chunked_attention")


def context_loss(
    model: torch.nn.Module,
    input_ids: Tensor,
    context_lengths: Tensor,
    *,
    lengths: Tensor | None = None,
    context_grad: str = "exact",
    num_outputs_per_context: int = 1,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The negative log-likelihood of outputs given their contexts, and a choice of its gradient.

    Example:
        >>> from sgp.train.model import tiny_llama  # doctest: +SKIP
        >>> loss = sgp.context_loss(model, input_ids, torch.tensor([6]))  # doctest: +SKIP
        >>> loss.backward()  # doctest: +SKIP

    Args:
        model: a causal language model of Hugging Face transformers whose cache holds keys and
            values. Called twice, as in generation: context, then the rest.
        input_ids: (B, T) int64, padded on the right.
        context_lengths: (B,) int64: tokens of each row before its output, counted from column 0.
        lengths: (B,) int64: tokens of each row that are not padding; None: all T.
        context_grad: "exact", the gradient of the loss. "replay", the same; the context is
            forwarded a second time in backward, after the outputs' graph has been freed, so that
            memory peaks at the larger of the two graphs and not at their sum. "detach", no
            gradient through the context's keys and values, in any layer: not the gradient of the
            loss, though the loss is the same; what can only be learned by reading the context
            differently is not learned.
        num_outputs_per_context: G: rows come in groups of G with one context each, as in sampling
            several completions of a prompt; it is computed once. B is a multiple of G.
        reduction: as in `sgp.cross_entropy`; per-sequence values are those of the rows.
        denominator: as in `sgp.cross_entropy`.

    Returns:
        The loss, float32, in nats. "none": (B, T), at the position that predicts the token.

    Raises:
        ValueError: an unknown mode; shapes or lengths that disagree; contexts of one group that
            differ; a model, by name, whose cache is not keys and values, that
            counts positions itself or that attends to later tokens; gradient checkpointing in the
            model, which turns its cache off.
        TypeError: if the model has no configuration of Hugging Face's; arguments of the wrong kind.

    The sizes of both passes are read on the host: with lengths on a GPU that waits for it.
    """
    if context_grad not in MODES:
        raise ValueError(f"{NAME}: context_grad = {context_grad!r}; expected one of {MODES}")
    G = whole_number(NAME, "num_outputs_per_context", num_outputs_per_context, 1)
    denominator = check_reduction(NAME, reduction, denominator)
    _check_model(model)
    whole = Selection.from_context_lengths(input_ids, context_lengths, lengths=lengths)
    parts = _split(input_ids, context_lengths, lengths, G)
    if context_grad == "detach":
        _warn_of_detached()
    cache = None
    if parts.context_ids.shape[1]:
        cache = _context(model, parts, context_grad, G)
    logits = _logits(model, parts, cache)
    # One row of logits a token of the rest; the rows of the whole that carry loss are among them.
    rest = Selection.from_context_lengths(
        parts.rest_ids, parts.rest_context, lengths=parts.rest_lengths
    )
    loss = cross_entropy(logits, rest, reduction=reduction, denominator=denominator)
    if reduction != "none":
        return loss
    placed = loss.new_zeros(whole.num_tokens)
    return placed.index_put((whole.rows,), loss.flatten()[rest.rows]).view(input_ids.shape)


class _Parts(NamedTuple):
    """A batch cut in two: contexts padded on the left, the rest padded on the right.

    So they meet: positions in the cache count on from the context into the rest, and a sliding
    window sees as far back as in one pass.
    """

    context_ids: Tensor  # (B / G, C)
    context_mask: Tensor  # (B / G, C) int64
    context_positions: Tensor  # (B / G, C)
    rest_ids: Tensor  # (B, R)
    rest_mask: Tensor  # (B, C + R) int64, of the cache too
    rest_positions: Tensor  # (B, R)
    rest_context: Tensor  # (B,): tokens of the rest that are context: 1, or 0 without any
    rest_lengths: Tensor  # (B,)


def _split(input_ids: Tensor, context_lengths: Tensor, lengths: Tensor | None, G: int) -> _Parts:
    B, T = input_ids.shape
    if B % G:
        raise ValueError(
            f"{NAME}: num_outputs_per_context = {G}; expected a divisor of the {B} rows of "
            f"input_ids"
        )
    device = input_ids.device
    context_lengths = context_lengths.to(device)
    lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device)
    cached = (context_lengths - 1).clamp(min=0)  # the last context token predicts the first output
    _check_groups(input_ids, context_lengths, G)
    first = cached[::G]
    C = int(cached.max()) if B else 0
    R = int((lengths - cached).max()) if B else 0
    context_at = torch.arange(C, device=device) - (C - first)[:, None]  # negative: padding
    rest_at = torch.arange(R, device=device) + cached[:, None]
    in_context, in_rest = context_at >= 0, rest_at < lengths[:, None]
    context_ids = input_ids[::G].gather(1, context_at.clamp(min=0))
    rest_ids = input_ids.gather(1, rest_at.clamp(max=max(0, T - 1)))
    mask = torch.cat([in_context.repeat_interleave(G, 0), in_rest], 1)
    return _Parts(
        context_ids,
        in_context.long(),
        context_at.clamp(min=0),
        rest_ids,
        mask.long(),
        rest_at,
        context_lengths - cached,
        lengths - cached,
    )


def _check_groups(input_ids: Tensor, context_lengths: Tensor, G: int) -> None:
    if G == 1:
        return
    B, T = input_ids.shape
    groups, lengths = input_ids.view(B // G, G, T), context_lengths.view(B // G, G)
    inside = torch.arange(T, device=input_ids.device) < lengths[:, :1, None]
    differ = ((groups != groups[:, :1]) & inside).any(2) | (lengths != lengths[:, :1])
    if differ.any():
        group, member = (int(i) for i in differ.nonzero()[0])
        row, leader = group * G + member, group * G
        raise ValueError(
            f"{NAME}: row {row} has another context than row {leader} (lengths "
            f"{int(context_lengths[row])} and {int(context_lengths[leader])}); with "
            f"num_outputs_per_context = {G} each {G} rows share one"
        )


# -- the model -------------------------------------------------------------------------------------


def _check_model(model: torch.nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"{NAME}: model is a {type(model).__name__} without a config of Hugging Face's; "
            "expected a causal language model of transformers"
        )
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{NAME}: {text.model_type} is an encoder and a decoder")
    kinds = set(getattr(text, "layer_types", None) or ())
    stateful = bool(getattr(model, "_is_stateful", False))
    if stateful or not kinds <= set(KEYS_AND_VALUES):
        found = ", ".join(sorted(kinds - set(KEYS_AND_VALUES))) or "states of its own"
        raise ValueError(
            f"{NAME}: the cache of {text.model_type} holds more than keys and values ({found}), "
            "through which no gradient flows; train it on whole sequences"
        )
    _check_positions(model, text)
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError(
            f"{NAME}: gradient checkpointing is on, which turns the cache of {text.model_type} "
            'off; switch it off, and use context_grad="replay" for memory'
        )


def _check_positions(model: torch.nn.Module, text: Any) -> None:
    """Attention that sees one side only, at positions that may be said: contexts are ragged."""
    kind = text.model_type
    name, taken = _takes_cache(model)
    if not name:
        raise ValueError(f"{NAME}: {kind} takes no cache; train it on whole sequences")
    if getattr(text, "is_decoder", True) is False and hasattr(text, "add_cross_attention"):
        raise ValueError(
            f"{NAME}: {kind} is an encoder here (config.is_decoder is False): its contexts would "
            "attend to their outputs"
        )
    offset = any(
        isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
        for path, module in model.named_modules()
        if path.endswith("position_embeddings")  # RoBERTa counts from padding_idx + 1
    )
    if offset or ("position_ids" not in taken and kind not in RELATIVE):
        raise ValueError(
            f"{NAME}: {kind} counts positions itself, which the contexts of a ragged batch would "
            "move; train it on whole sequences"
        )


def _context(model: torch.nn.Module, parts: _Parts, mode: str, G: int) -> Any:
    """The context's keys and values, in a cache for G rows each."""
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    stop = _may_stop(model)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        cache = _new_cache(layers, stop=stop)
        with contextlib.suppress(_LastLayerError):
            _call(model, ids, parts.context_mask, parts.context_positions, cache)
        return _flat(cache)

    if mode == "detach":
        with torch.no_grad():
            flat = run(parts.context_ids)
        torch.clear_autocast_cache()  # casts of weights made without a graph must not be used again
    elif mode == "replay" and torch.is_grad_enabled():
        flat = checkpoint(run, parts.context_ids, use_reentrant=False)
    else:
        flat = run(parts.context_ids)
    cache = _new_cache(layers, stop=False)
    for layer, (keys, values) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
        cache.update(keys.repeat_interleave(G, 0), values.repeat_interleave(G, 0), layer)
    return cache


def _may_stop(model: torch.nn.Module) -> bool:
    """Whether an exception may end a forward pass.

    Not where something waits for its end: accelerate moves weights back, FSDP frees them.
    """
    waits = any(hasattr(module, "_hf_hook") for module in model.modules())
    sharded = any(hasattr(p, mark) for p in model.parameters() for mark in SHARDED)
    return not waits and not sharded


def _logits(model: torch.nn.Module, parts: _Parts, cache: Any) -> Tensor:
    mask = parts.rest_mask
    logits: Tensor = _call(model, parts.rest_ids, mask, parts.rest_positions, cache).logits
    return logits


def _call(model: torch.nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
    name, _ = _takes_cache(model)
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=cache is not None,
        **{name: cache},
    )


def _takes_cache(model: torch.nn.Module) -> tuple[str, set[str]]:
    """What forward calls its cache (transformers 5.24 renamed it), and all that it takes by name.

    A wrapper's forward (PEFT's, FSDP's) names nothing; the model inside does.
    """
    for module in model.modules():
        taken = set(inspect.signature(module.forward).parameters)
        for name in CACHE_NAMES:
            if name in taken:
                return name, taken
    return "", set()


class _LastLayerError(Exception):
    """The last layer's keys and values are in the cache: nothing after them is needed."""


def _new_cache(layers: int, *, stop: bool) -> Any:
    """A cache of whole keys and values in every layer; with `stop` the last ends the forward."""
    from transformers.cache_utils import Cache, DynamicLayer  # noqa: PLC0415  (takes seconds)

    class Stopping(Cache):
        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if layer_idx == layers - 1:
                raise _LastLayerError
            return found

    kind = Stopping if stop else Cache
    return kind(layers=[DynamicLayer() for _ in range(layers)])


def _flat(cache: Any) -> tuple[Tensor, ...]:
    found = [layer for layer in cache.layers if layer.is_initialized]
    return tuple(x for layer in found for x in (layer.keys, layer.values))


@functools.cache
def _warn_of_detached() -> None:
    warn(
        f'{NAME}: context_grad="detach" is not the gradient of the loss: what the model reads in '
        "the context is not trained, and the loss curve does not show it"
    )
