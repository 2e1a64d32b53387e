"""sgp in TRL's trainers: log-probabilities of the scored tokens alone, on a CPU too.

TRL's trainers call `model(..., labels=..., fused_lm_head=True)` for the log-probabilities,
entropies and metrics of each token. `add_fused_lm_head` takes the place of TRL's function of that
name in a model that a trainer has prepared; `SFTTrainer` and `GRPOTrainer` are TRL's with it.
`GRPOTrainer` also runs TRL's loss inside the head, which gives loss and gradient in one pass.

Importing this module imports TRL, which takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer as TRLSFTTrainer

from sgp.caller import warn
from sgp.head.chunks import check_sizes
from sgp.huggingface import UnsupportedModelError, probe
from sgp.huggingface.loss import next_tokens
from sgp.huggingface.patching import described, is_plain
from sgp.huggingface.selective_head import Request, SelectiveHead, reveal
from sgp.labels import IGNORE
from sgp.log_probs import linear_token_log_probs
from sgp.own_loss import linear_loss
from sgp.reference import TokenLogProbs
from sgp.rows.reduction import check_denominator

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(f"sgp.trl needs TRL 1.16 or later; this is {trl.__version__}") from error

__all__ = ["GRPOTrainer", "SFTTrainer", "add_fused_lm_head"]

TESTED = ("1.16", "1.17")  # from the first, before the second
OUTPUTS = {"log_probs", "entropy", "is_top1", "mean_logits"}
NAME = "sgp.trl.add_fused_lm_head"

LossOf = Callable[[FusedCausalLMOutput], Tensor]


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
    `("log_probs", "entropy", "mean_logits", "is_top1")` for DPO, the first three for KTO,
    `("log_probs", "entropy")` and `trainer.temperature` for RLOO. `SFTTrainer` and `GRPOTrainer`
    call it themselves.

    Example:
        >>> trainer = trl.RLOOTrainer(...)  # doctest: +SKIP
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
    def forward(
        self: nn.Module, *args: Any, fused_lm_head: bool | LossOf = False, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return fused.before(self, *args, **kwargs)
        if callable(fused_lm_head):
            return _run_loss(self, fused, fused_lm_head, args, kwargs)
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


class SFTTrainer(TRLSFTTrainer):
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


class GRPOTrainer(TRLGRPOTrainer):
    """TRL's GRPOTrainer whose loss is computed inside the head, from the scored tokens alone.

    Loss and metrics are computed by TRL's own lines, of every `loss_type` and with every option, as
    a loss of `sgp.linear_loss`: one pass over the logits, which are made some rows at a time, gives
    the policy's log-probabilities and entropies, the loss and its gradient. It costs three products
    with the head's weight if the logits of a micro-batch's scored tokens fit the budget, else four:
    6 or 8 times M V D FLOPs. The passes for old and reference log-probabilities are those of
    `add_fused_lm_head`.

    Takes what TRL's takes, and `memory_budget`, the most bytes that the head holds. Logs what TRL's
    logs. A mixture of experts whose load-balancing loss is trained too, and nn.DataParallel, go
    TRL's way, from the log-probabilities of `add_fused_lm_head`.

    Example:
        >>> trainer = sgp.trl.GRPOTrainer(  # doctest: +SKIP
        ...     model, reward_funcs=reward, args=args, train_dataset=data)
        >>> trainer.train()  # doctest: +SKIP

    Raises:
        UnsupportedModelError, RuntimeError, ValueError, TypeError: as `add_fused_lm_head`, which
            refuses `cast_lm_head_to_fp32`.
    """

    def __init__(self, *args: Any, memory_budget: int | None = None, **kwargs: Any) -> None:
        """Make TRL's trainer, then put the head into the policy and its reference."""
        _check_version()
        check_sizes("sgp.trl.GRPOTrainer", None, memory_budget)
        super().__init__(*args, **kwargs)
        config: Any = self.args
        asked = {self.model: ("log_probs", "entropy"), self.ref_model: ("log_probs",)}
        for model, outputs in asked.items():
            if model is not None:
                add_fused_lm_head(
                    self.accelerator.unwrap_model(model),
                    self.temperature,
                    config.cast_lm_head_to_fp32,
                    outputs,
                    memory_budget=memory_budget,
                )

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss of a batch.

        TRL's method runs up to where it calls the model. The model's head runs it once more, from
        there on, as the loss of its tokens; the first run ends with what came of that.
        """
        of_trl, ran = super().compute_loss, []

        def loss_of(output: FusedCausalLMOutput) -> Tensor:
            ran.append(True)
            answers = [output]

            def answer(*_: Any, **__: Any) -> FusedCausalLMOutput:
                if not answers:
                    raise RuntimeError(
                        "sgp.trl.GRPOTrainer: TRL called the model twice for one loss; expected "
                        f"once. This is TRL {trl.__version__}: use its own trainer"
                    )
                return answers.pop()

            loss: Tensor = of_trl(answer, inputs, num_items_in_batch=num_items_in_batch)
            return loss

        def call(*args: Any, **kwargs: Any) -> Any:
            late = kwargs.get("output_router_logits")  # a loss known when the head has run
            if late or isinstance(model, nn.DataParallel):  # whose replicas have a part of inputs
                return model(*args, **kwargs)
            out = model(*args, **{**kwargs, "fused_lm_head": loss_of})
            if not ran:  # TRL's own takes any true value, and has another loss
                raise RuntimeError(
                    f"{NAME}: the forward of {type(model).__name__} was replaced after it was "
                    "added; add it again"
                )
            raise _Found(out.loss)

        try:
            return of_trl(call, inputs, return_outputs, num_items_in_batch)
        except _Found as found:
            return found.loss


class _Found(Exception):  # noqa: N818  (no error)
    """A loss on its way out of TRL's method, past the lines that have run already."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__("a loss")
        self.loss = loss


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

    out, (log_probs, entropy, is_top1, means) = _forward(model, fused, compute, args, kwargs)
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


def _run_loss(
    model: nn.Module, fused: _Fused, loss_of: LossOf, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FusedCausalLMOutput:
    """The model's own forward, whose head answers with the loss that `loss_of` makes of tokens."""
    target = next_tokens(kwargs.pop("labels"))

    def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, ...]:
        scored = target.to(hidden.device)

        def numbers(tokens: TokenLogProbs, rows: Tensor) -> Tensor:
            def placed(x: Tensor) -> Tensor:  # (m,) -> (B, T - 1): the last column predicts nothing
                flat = x.new_zeros(scored.numel()).index_copy(0, rows, x)
                return flat.view(scored.shape)[:, :-1]

            output = FusedCausalLMOutput(
                log_probs=placed(tokens.log_prob),
                entropy=placed(tokens.entropy),
                label_mask=(scored != IGNORE)[:, :-1],
            )
            with torch.autocast(hidden.device.type, enabled=False):  # which is the model's alone
                return loss_of(output).view(1)

        loss = linear_loss(
            hidden, weight, scored, numbers, by="group", groups=[0] * len(scored),
            temperature=fused.temperature, memory_budget=fused.memory_budget, **head,
        )  # fmt: skip
        return (loss,)

    _, (loss,) = _forward(model, fused, compute, args, kwargs)
    return FusedCausalLMOutput(loss=loss)


def _forward(
    model: nn.Module,
    fused: _Fused,
    compute: Callable[..., tuple[Tensor, ...]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, tuple[Tensor, ...]]:
    """What the model's own forward returns, and what its head computed."""
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
        return out, reveal(out.logits, request)
    finally:
        for selective in selectives:
            selective.request = None


@torch.no_grad()
def _means(hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
    """Of each kept row's logits: h . mean_v w_v + mean b, in float32; 0 elsewhere."""
    of_weight = weight.mean(0, dtype=torch.float32)
    found = hidden[kept].float() @ of_weight
    if bias is not None:
        found = found + bias.float().mean()
    return found.new_zeros(kept.shape).masked_scatter(kept, found)
