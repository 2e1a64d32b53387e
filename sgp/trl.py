"""sgp in TRL's trainers: log-probabilities of the scored tokens alone, on a CPU too.

TRL's trainers call `model(..., labels=..., fused_lm_head=True)` for the log-probabilities,
entropies and metrics of each token. `add_fused_lm_head` takes the place of TRL's function of that
name in a model that a trainer has prepared; `SFTTrainer` is TRL's with it.

Importing this module imports TRL, which takes seconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer as TRLTrainer

from sgp.caller import warn
from sgp.head.chunks import check_sizes
from sgp.huggingface import UnsupportedModelError, probe
from sgp.huggingface.loss import next_tokens
from sgp.huggingface.patching import described, is_plain
from sgp.huggingface.selective_head import Request, SelectiveHead, reveal
from sgp.labels import IGNORE
from sgp.log_probs import linear_token_log_probs
from sgp.rows.reduction import check_denominator

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(f"sgp.trl needs TRL 1.16 or later; this is {trl.__version__}") from error

__all__ = ["SFTTrainer", "add_fused_lm_head"]

TESTED = ("1.16", "1.17")  # from the first, before the second
OUTPUTS = {"log_probs", "entropy", "is_top1", "mean_logits"}
NAME = "sgp.trl.add_fused_lm_head"


@dataclass(eq=False)
class _Fused:
    """What the forward of one model needs to know."""

    before: Any  # what forward was, unbound: it serves copies of the model too
    temperature: float
    outputs: frozenset[str]
    memory_budget: int | None


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    memory_budget: int | None = None,
) -> None:
    """Give a model TRL's `fused_lm_head=True`, computed by `sgp`.

    Call it after the trainer is made, which adds its own, with what that trainer asks for:
    `("log_probs", "entropy")` and `trainer.temperature` for GRPO and RLOO,
    `("log_probs", "entropy", "mean_logits", "is_top1")` for DPO, the first three for KTO.

    Example:
        >>> trainer = trl.GRPOTrainer(...)  # doctest: +SKIP
        >>> sgp.trl.add_fused_lm_head(  # doctest: +SKIP
        ...     trainer.model, trainer.temperature, outputs=("log_probs", "entropy"))

    Args:
        model: a causal language model of transformers with a plain `nn.Linear` head; PEFT's around
            one is looked into, and a head among its `modules_to_save` is taken.
        temperature: the logits are divided by it.
        cast_lm_head_to_fp32: not supported: `sgp`'s logits are float32 anyway, from operands in
            the head's dtype.
        outputs: of "log_probs", "entropy", "is_top1" and "mean_logits"; the last, the mean of a
            row's logits, is a product with the mean row of the weight, and there is none for a
            softcapped model.
        memory_budget: bytes, as in `sgp.linear_token_log_probs`, which computes all but
            "mean_logits"; one that is too small is an error of the model's forward pass.

    Raises:
        UnsupportedModelError: a head that is not a plain `nn.Linear`, or logits that are more than
            scaled and softcapped.
        ValueError: an option or an output that is not supported; TRL's function has it.
        ValueError, TypeError: a budget that is no whole number of bytes.
        RuntimeError: a TRL older than 1.16. One newer than is tested gives a warning.
    """
    _check_version()
    if cast_lm_head_to_fp32 or not set(outputs) <= OUTPUTS:
        raise ValueError(
            f"{NAME}: cast_lm_head_to_fp32 = {cast_lm_head_to_fp32}, outputs = {outputs}; expected "
            f"False and some of {sorted(OUTPUTS)}. TRL's own function has the others"
        )
    check_sizes(NAME, None, memory_budget)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    selectives = _selectives(head) or _add_to(model, head)
    softcap = selectives[0].softcap
    if "mean_logits" in outputs and softcap is not None:
        raise UnsupportedModelError(
            f"{NAME}: {type(model).__name__} has a softcap of {softcap}: the mean of its logits "
            "needs all of them"
        )
    fused = _Fused(_inner(model), temperature, frozenset(outputs), memory_budget)

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused.before(self, *args, **kwargs)
        return _run(self, fused, args, kwargs)

    model.forward = MethodType(forward, model)
    vars(model)["sgp_trl"] = True


def _layers(head: nn.Module) -> list[nn.Module]:
    """The linear layers of a head, of which one runs: `modules_to_save` of PEFT makes several."""
    copies = getattr(head, "modules_to_save", None)  # one of each adapter
    if isinstance(copies, nn.ModuleDict):
        return [head.original_module, *copies.values()]  # type: ignore[list-item]
    return [head]


def _selectives(head: nn.Module) -> list[SelectiveHead]:
    """One of each layer, or none if a layer has none."""
    found = [SelectiveHead.of(layer) for layer in _layers(head)]
    return [each for each in found if each] if all(found) else []


def _add_to(model: nn.Module, head: nn.Module) -> list[SelectiveHead]:
    for layer in _layers(head):
        if not is_plain(layer) and SelectiveHead.of(layer) is None:
            raise UnsupportedModelError(
                f"{NAME}: the head of {type(model).__name__} is {described(layer)}; expected a "
                "plain nn.Linear"
            )
    found = probe.post_processing(model, head)
    if found is None:
        raise UnsupportedModelError(
            f"{NAME}: the logits of {type(model).__name__} are more than scaled and softcapped"
        )
    selective = SelectiveHead(found.logit_scale, found.softcap)
    for layer in _layers(head):
        SelectiveHead.on(layer, selective)
    return [selective]


class SFTTrainer(TRLTrainer):
    """TRL's SFTTrainer with `sgp`'s head: the loss, and its metrics, of the scored tokens alone.

    Takes what TRL's takes, and the `memory_budget` of `add_fused_lm_head`. Logs what TRL's logs.

    Example:
        >>> trainer = sgp.trl.SFTTrainer(model, args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Raises:
        UnsupportedModelError, RuntimeError, ValueError, TypeError: as `add_fused_lm_head`.
    """

    def __init__(self, *args: Any, memory_budget: int | None = None, **kwargs: Any) -> None:
        """Make TRL's trainer, then put the head in."""
        _check_version()
        check_sizes("sgp.trl.SFTTrainer", None, memory_budget)
        super().__init__(*args, **kwargs)
        model: Any = self.model
        asked = ("log_probs", "entropy", "is_top1")
        add_fused_lm_head(model, outputs=asked, memory_budget=memory_budget)


def _inner(model: nn.Module) -> Any:
    """The forward of a model without TRL's fused head, unbound; with what accelerate put around."""
    forward = model.forward
    if not hasattr(forward, "__func__"):
        return lambda _, *args, **kwargs: forward(*args, **kwargs)
    function = forward.__func__
    code = getattr(function, "__code__", None)
    return type(model).forward if code and code.co_name == "_fused_forward" else function


def _check_version() -> None:
    found, (first, end) = Version(trl.__version__), TESTED
    if found < Version(first):
        raise RuntimeError(f"sgp.trl needs TRL {first} or later; this is {found}")
    if found >= Version(end):
        warn(
            f"sgp.trl is tested with TRL from {first} to before {end}; this is {found}. Compare "
            "a few losses with TRL's own trainer"
        )


def _run(
    model: nn.Module, fused: _Fused, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FusedCausalLMOutput:
    """The model's own forward, whose head answers with log-probabilities."""
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    divisor = kwargs.pop("num_items_in_batch", None)
    if divisor is not None:
        divisor = check_denominator(f"{NAME}: num_items_in_batch", divisor)
    target = next_tokens(labels) if shifted is None else shifted
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if getattr(text, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)

    def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, ...]:
        scored = target.to(hidden.device)
        found = linear_token_log_probs(
            hidden, weight, scored, temperature=fused.temperature,
            memory_budget=fused.memory_budget, **head,
        )  # fmt: skip
        means = found.log_prob.new_zeros(())
        if "mean_logits" in fused.outputs:
            factor = head["logit_scale"] / fused.temperature
            means = _means(hidden, weight, head["linear_bias"], scored != IGNORE) * factor
        return found.log_prob, found.entropy, found.is_top1, means

    selectives = _selectives(model.get_output_embeddings())  # type: ignore[operator]
    if not selectives:
        raise RuntimeError(
            f"{NAME}: the head of {type(model).__name__} was replaced after it was added; add it "
            "again"
        )
    request = Request(compute)
    try:
        for selective in selectives:
            selective.request = request
        out = fused.before(model, *args, **{**kwargs, "use_cache": False})
        log_probs, entropy, is_top1, means = reveal(out.logits, request)
    finally:
        for selective in selectives:
            selective.request = None
    mask = target != IGNORE
    if shifted is None:  # the last column predicts nothing
        log_probs, entropy, is_top1, mask = (x[:, :-1] for x in (log_probs, entropy, is_top1, mask))
        means = means[:, :-1] if means.dim() else means
    mask = mask.to(log_probs.device)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if divisor is None else divisor)
    auxiliary = getattr(out, "aux_loss", None)
    if auxiliary is not None:
        loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * auxiliary
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy if "entropy" in fused.outputs else None,
        is_top1=is_top1 if "is_top1" in fused.outputs else None,
        mean_logits=means.detach() if "mean_logits" in fused.outputs else None,
        label_mask=mask,
        aux_loss=auxiliary,
    )


@torch.no_grad()
def _means(hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
    """Of each kept row's logits: h . mean_v w_v + mean b, in float32; 0 elsewhere."""
    of_weight = weight.mean(0, dtype=torch.float32)
    found = hidden[kept].float() @ of_weight
    if bias is not None:
        found = found + bias.float().mean()
    return found.new_zeros(kept.shape).masked_scatter(kept, found)
