"""A patched model's forward pass: what its hooks and its loss function do."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sgp.huggingface.callers import NAME, another_loss, warn_of_another_loss, warn_of_targets
from sgp.huggingface.late_logits import LateLogits
from sgp.huggingface.loss import causal_lm_loss, evaluated, next_tokens
from sgp.huggingface.selective_head import HERE, Request, SelectiveHead, reveal
from sgp.labels import IGNORE
from sgp.linear import linear_cross_entropy
from sgp.rows.watched import is_watched
from sgp.selection import Selection

OWN = {"selection", "cu_seqlens"}  # keys of `sgp.Collator` that no model knows
OF_LOSS = {"labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"}


@dataclass
class Call:
    """One forward pass of a patched model, from the hook before it to the hook after."""

    evaluating: bool
    ignore_index: int
    num_items_in_batch: Tensor | float | None
    selection: Selection | None
    memory_budget: int | None = None
    target: Any = None  # Tensor | Selection: what each position predicts, where the patch acts
    request: Request | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T): which positions carry loss."""
        if isinstance(self.target, Selection):
            return (self.target.dense_target != IGNORE).view(self.target.shape)
        mask: Tensor = self.target != self.ignore_index
        return mask

    def kept(self) -> dict[str, Any]:
        """Targets and weights of those positions, for a loss of their logits."""
        if isinstance(self.target, Selection):
            return {"shift_labels": self.target.target, "token_weight": self.target.weight}
        return {"shift_labels": self.target[self.mask], "ignore_index": self.ignore_index}

    def loss_of_hidden(
        self, denominator: Tensor | float | None, hidden: Tensor, weight: Tensor, **head: Any
    ) -> Tensor:
        """Without logits, by the linear head."""
        scored = self.target
        scored = scored if scored.device == hidden.device else scored.to(hidden.device)
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "denominator": denominator}
        options["memory_budget"] = self.memory_budget
        return linear_cross_entropy(hidden, weight, scored, **options, **head)  # type: ignore[no-any-return]


@dataclass(eq=False)
class Patch:
    """The state that hooks, loss function and head share; that of one call is in `HERE`."""

    mode: str
    selective: SelectiveHead | None = None  # in mode "rows" for evaluation alone
    always: bool = False  # acts in evaluation mode as in training: while it is verified
    apart: bool = False  # the model keeps packed sequences apart
    late: bool = False  # logits of an evaluation can wait until somebody looks at them
    looked: bool = False  # at the targets of a training call
    memory_budget: int | None = None  # of the linear head in mode "fused"

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Say which rows carry loss: to the model, or to its head."""
        if not owns_loss(model, self):
            raise RuntimeError(
                f"{NAME}: the loss function of {type(model).__name__} was replaced after it was "
                "patched; remove the patch"
            )
        selection, packed = kwargs.get("selection"), kwargs.get("cu_seqlens")
        if args or OWN & set(kwargs):
            kwargs = {**_named(model, args), **kwargs}
            kwargs = {k: v for k, v in kwargs.items() if k not in OWN}
        if packed is not None:
            kwargs |= self._kept_apart(model, packed)
        if selection is not None:
            selection = _shaped(selection, kwargs)
            if kwargs.get("labels") is None:
                kwargs["labels"] = selection.dense_target.view(selection.shape)
        call = Call(
            evaluating=not (model.training or self.always),
            ignore_index=kwargs.get("ignore_index", IGNORE),
            num_items_in_batch=kwargs.get("num_items_in_batch"),
            selection=selection,
            memory_budget=self.memory_budget,
        )
        if self._acts(model, kwargs, call):
            call.target = _target(kwargs, call.ignore_index, selection)
            self._look(kwargs, call)
            call.request = self._request(model, call)
            if call.request is None:
                kwargs = {**kwargs, "logits_to_keep": call.mask}
        HERE.calls[self] = call
        if self.selective is not None:
            self.selective.request = call.request
        return (), kwargs

    def _kept_apart(self, model: nn.Module, cu_seqlens: Tensor) -> dict[str, Any]:
        """What keeps packed sequences apart: a model with a cache sees one sequence."""
        if len(cu_seqlens) > 2 and not self.apart:
            raise ValueError(
                f"{NAME}: {type(model).__name__} does not keep the {len(cu_seqlens) - 1} sequences "
                "of a packed row apart: their tokens attend to each other, position_ids or not; "
                "use sgp.Collator(packed=False)"
            )
        return {"use_cache": False}

    def _look(self, kwargs: dict[str, Any], call: Call) -> None:
        """At the targets of the first training call: a target is the next token of the input."""
        input_ids = kwargs.get("input_ids")
        if self.looked or self.always or call.evaluating or input_ids is None:
            return
        selection = call.selection
        if selection is not None:
            name, target = "selection", selection.dense_target.view(selection.shape)
        else:
            shifted = kwargs.get("shift_labels") is not None
            name, target = "shift_labels" if shifted else "labels", call.target
        if target.device == input_ids.device and not is_watched(target, input_ids):
            self.looked = True
            warn_of_targets(name, target, call.mask, input_ids)

    def _acts(self, model: nn.Module, kwargs: dict[str, Any], call: Call) -> bool:
        """Whether this call asks for a loss, and nobody has a use for the other logits."""
        keep = kwargs.get("logits_to_keep", 0)
        if isinstance(keep, Tensor) or keep:
            return False  # the caller has chosen
        if kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            if model.training and torch.is_grad_enabled() and not hasattr(model, "sgp_trl"):
                warn_of_another_loss()
            return False
        if call.evaluating:
            return self.late and _logits_can_wait(model) and owns_head(model, self)
        other = None if torch.compiler.is_compiling() else another_loss()
        if other is None:
            return True
        if self.mode == "fused":
            raise RuntimeError(
                f"{NAME}: {other} computes the loss from all logits, and a model patched in mode "
                "'fused' makes none in training; patch it with mode='rows', which leaves such "
                "calls as they are, or remove the patch"
            )
        warn_of_another_loss()
        return False

    def _request(self, model: nn.Module, call: Call) -> Request | None:
        """What the head is asked for; None: nothing but logits of the kept rows."""
        if call.evaluating:
            return Request(None)
        if self.mode == "rows":
            return None
        if self.selective is None or not owns_head(model, self):
            raise RuntimeError(
                f"{NAME}: the head of {type(model).__name__} was replaced after it was patched; "
                "patch it again"
            )

        def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor]:
            return (call.loss_of_hidden(call.num_items_in_batch, hidden, weight, **head),)

        return Request(compute)

    def after(self, _: nn.Module, __: Any, ___: Any, out: Any) -> Any:
        """Nothing waits for the head any more, and a stand-in is no logits."""
        call: Call | None = HERE.calls.pop(self, None)
        if self.selective is not None:
            self.selective.request = None
        if call is None or call.request is None or out is None:  # None: an exception passes
            return None
        if call.request.compute is not None:
            if isinstance(out, tuple):
                return (out[0], None, *out[2:])
            return type(out)(**{k: v for k, v in out.items() if k != "logits"})
        logits = out[1] if isinstance(out, tuple) else out["logits"]
        if type(logits) is not LateLogits:  # the model has looked at them
            return None
        if isinstance(out, tuple):
            return (out[0], logits.whole(), *out[2:])
        out["logits"] = logits.whole()
        return out

    def loss(
        self, logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss function of the model."""
        call: Call | None = HERE.calls.get(self)
        if call is None:  # not within the model's forward
            return causal_lm_loss(logits, labels, *args, **_known(kwargs))
        request = call.request
        if request is not None and request.compute is not None:
            return reveal(logits, request)[0]
        kwargs = _known(kwargs) | {"evaluating": call.evaluating}
        if type(logits) is LateLogits:
            if self.mode == "fused" and self.selective is not None:
                return _evaluated(call, logits, self.selective)
            logits = logits.rows(call.mask)
            return causal_lm_loss(logits, None, **{**kwargs, **call.kept()})
        if request is None and call.target is not None:
            return causal_lm_loss(logits, None, **{**kwargs, **call.kept()})
        if call.selection is not None:
            dense, weight = call.selection.dense_target, call.selection.dense_weight
            kwargs |= {"shift_labels": dense, "token_weight": weight, "ignore_index": IGNORE}
        return causal_lm_loss(logits, labels, *args, **kwargs)


def _evaluated(call: Call, logits: LateLogits, selective: SelectiveHead) -> Tensor:
    """The loss of an evaluation in mode "fused"."""

    def compute(denominator: Tensor | float | None) -> Tensor:
        return call.loss_of_hidden(
            denominator,
            logits.hidden,
            logits.weight,
            linear_bias=logits.bias,
            softcap=selective.softcap,
            logit_scale=selective.logit_scale,
        )

    selection = call.selection
    target = call.target if selection is None else selection.dense_target
    weight = None if selection is None else selection.dense_weight
    return evaluated(compute, target, weight, call.num_items_in_batch, call.ignore_index)


def owns_loss(model: nn.Module, made: Patch) -> bool:
    """Whether nobody has replaced the model's loss function since it was patched."""
    return getattr(vars(model).get("_loss_function"), "__self__", None) is made


def owns_head(model: nn.Module, made: Patch) -> bool:
    """Whether the head that makes the loss, if one does, is still the model's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return made.selective is None or SelectiveHead.of(head) is made.selective


def _shaped(selection: Any, kwargs: dict[str, Any]) -> Selection:
    """The selection with the shape of the model's input, beside it."""
    if not isinstance(selection, Selection):
        raise TypeError(f"{NAME}: selection is a {type(selection).__name__}; expected a Selection")
    found = kwargs.get("input_ids")
    found = kwargs.get("inputs_embeds") if found is None else found
    if found is None:
        raise ValueError(f"{NAME}: a selection without input_ids or inputs_embeds")
    shape = tuple(found.shape[:2])
    if selection.num_tokens != shape[0] * shape[1]:
        raise ValueError(
            f"{NAME}: the model's input has the shape {shape}, which is not that of {selection}. "
            "Virtual tokens of PEFT need labels in place of a selection"
        )
    return replace(selection.to(found.device), shape=shape)


def _target(
    kwargs: dict[str, Any], ignore_index: int, selection: Selection | None
) -> Tensor | Selection:
    """(B, T) what each position predicts, from the best that the call says."""
    if selection is not None:
        return selection
    name = "labels" if kwargs.get("shift_labels") is None else "shift_labels"
    found: Tensor = kwargs[name]
    given = next((x for x in ("input_ids", "inputs_embeds") if kwargs.get(x) is not None), None)
    if given is not None:
        shape = kwargs[given].shape[:2]
        if found.numel() != shape.numel():
            raise ValueError(
                f"{NAME}: {name} have the shape {tuple(found.shape)} and {given} "
                f"{tuple(kwargs[given].shape)}; expected a label for each token"
                + (" (the loss shifts them)" if name == "labels" else ", shifted")
            )
        found = found.reshape(shape)
    return next_tokens(found, ignore_index) if name == "labels" else found


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What transformers' loss looks at; it ignores the rest, and so does this one."""
    return {k: v for k, v in kwargs.items() if k in OF_LOSS}


def _logits_can_wait(model: nn.Module) -> bool:
    """Whether the head's weight will be what it is now when the call is over, and no one traces."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001  (no public name)
        or not head._parameters  # noqa: SLF001  (a replica of DataParallel, or within FSDP)
        or any(  # tensor parallelism; DeepSpeed's ZeRO-3
            p is not None and (type(p) is not nn.Parameter or hasattr(p, "ds_id"))
            for p in head._parameters.values()  # noqa: SLF001
        )
    ):
        return False
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # noqa: PLC0415

    return not any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by name."""
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
