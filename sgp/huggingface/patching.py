"""`patch`: sgp's loss in a causal language model of Hugging Face transformers.

Three things are put on one model, none of them on its class: a hook before and one after its
forward, a loss function, and, in mode "fused", a forward of its head. Each is a copyable object
without reference to the model, so that a copy of a patched model is a patched model.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sgp.huggingface import probe
from sgp.huggingface.late_logits import LateLogits
from sgp.huggingface.loss import causal_lm_loss, evaluated, next_tokens
from sgp.huggingface.selective_head import HERE, Request, SelectiveHead, reveal
from sgp.linear import linear_cross_entropy
from sgp.selection import IGNORE, Selection

NAME = "sgp.huggingface.patch"
MODES = ("auto", "rows", "fused")
OTHERS = ("liger_kernel", "cut_cross_entropy", "unsloth")  # kernels that replace forward
OWN = {"selection", "cu_seqlens"}  # keys of `sgp.Collator` that no model knows
FAILED = {
    "fused": "it makes no loss of what its head returns",
    "rows": "its forward takes no mask in logits_to_keep (transformers 5.21 and later do)",
}
OF_LOSS = {"labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"}
AGREE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative; else 2e-2


class UnsupportedModelError(ValueError):
    """A model that cannot be patched, with the reason."""


@dataclass
class _Call:
    """One forward pass of a patched model, from the hook before it to the hook after."""

    evaluating: bool
    ignore_index: int
    num_items_in_batch: Tensor | float | None
    selection: Selection | None
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
        return linear_cross_entropy(hidden, weight, scored, **options, **head)  # type: ignore[no-any-return]


@dataclass(eq=False)
class _Patch:
    """The state that hooks, loss function and head share; that of one call is in `HERE`."""

    mode: str
    selective: SelectiveHead | None = None  # in mode "rows" for evaluation alone
    always: bool = False  # acts in evaluation mode as in training: while it is verified
    apart: bool = False  # the model keeps packed sequences apart
    late: bool = False  # logits of an evaluation can wait until somebody looks at them

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Say which rows carry loss: to the model, or to its head."""
        if not _owns_loss(model, self):
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
        call = _Call(
            evaluating=not (model.training or self.always),
            ignore_index=kwargs.get("ignore_index", IGNORE),
            num_items_in_batch=kwargs.get("num_items_in_batch"),
            selection=selection,
        )
        if self._acts(model, kwargs, call):
            call.target = _target(kwargs, call.ignore_index, selection)
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

    def _acts(self, model: nn.Module, kwargs: dict[str, Any], call: _Call) -> bool:
        """Whether this call asks for a loss, and nobody has a use for the other logits."""
        keep = kwargs.get("logits_to_keep", 0)
        if isinstance(keep, Tensor) or keep:
            return False  # the caller has chosen
        if kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            if model.training and torch.is_grad_enabled() and not hasattr(model, "sgp_trl"):
                _warn_of_another_loss()
            return False
        if call.evaluating:
            return self.late and _logits_can_wait(model) and _owns_head(model, self)
        other = None if torch.compiler.is_compiling() else _another_loss()
        if other is None:
            return True
        if self.mode == "fused":
            raise RuntimeError(
                f"{NAME}: {other} computes the loss from all logits, and a model patched in mode "
                "'fused' makes none in training; patch it with mode='rows', which leaves such "
                "calls as they are, or remove the patch"
            )
        _warn_of_another_loss()
        return False

    def _request(self, model: nn.Module, call: _Call) -> Request | None:
        """What the head is asked for; None: nothing but logits of the kept rows."""
        if call.evaluating:
            return Request(None)
        if self.mode == "rows":
            return None
        if self.selective is None or not _owns_head(model, self):
            raise RuntimeError(
                f"{NAME}: the head of {type(model).__name__} was replaced after it was patched; "
                "patch it again"
            )

        def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor]:
            return (call.loss_of_hidden(call.num_items_in_batch, hidden, weight, **head),)

        return Request(compute)

    def after(self, _: nn.Module, __: Any, ___: Any, out: Any) -> Any:
        """Nothing waits for the head any more, and a stand-in is no logits."""
        call: _Call | None = HERE.calls.pop(self, None)
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
        call: _Call | None = HERE.calls.get(self)
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


def _evaluated(call: _Call, logits: LateLogits, selective: SelectiveHead) -> Tensor:
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


@dataclass(frozen=True)
class Handle:
    """A patched model; `remove` takes the patch away."""

    model: nn.Module
    mode: str  # "rows" | "fused"

    def remove(self) -> None:
        """The model as it was; a second time does nothing."""
        found = _patch_of(self.model)
        if found is not None:
            _uninstall(self.model, found)

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, mode={self.mode!r})"


def patch(model: nn.Module, *, mode: str = "auto") -> Handle:
    """Put `sgp`'s loss into a causal language model, so that its head runs on kept rows only.

    Acts in training mode on calls with `labels`, or with the `selection` of an `sgp.Collator`,
    whose weights then count. In evaluation mode the loss is transformers', NaN of no target
    included, and under `torch.no_grad` the logits are computed when `out.logits` is first used: an
    evaluation for the loss alone makes none but those that carry loss. `generate`, calls without
    labels, saving and copying are as before. The model is run on a few tokens first, and must have
    the loss it had.

    Example:
        >>> handle = sgp.huggingface.patch(model)  # doctest: +SKIP
        >>> loss = model(input_ids=ids, labels=labels).loss  # doctest: +SKIP
        >>> handle.remove()  # doctest: +SKIP

    Args:
        model: of transformers, or what PEFT, `torch.compile` and DistributedDataParallel put around
            one. Its loss is transformers' `ForCausalLMLoss`.
        mode: "rows": the head makes logits of the tokens that carry loss; `out.logits` is (M, V),
            row by row; needs a forward that takes a mask in `logits_to_keep` (transformers 5.21).
            One wait for a GPU, which counts them. "fused": no logits at all, `sgp`'s linear head
            inside the head's forward; `out.logits` is None; the head must be a plain `nn.Linear`,
            and what follows it a scale and a softcap at most. "auto": "fused" if that can be, else
            "rows".

    Returns:
        The handle. A model that is patched already keeps its patch, or changes its mode; one whose
        head was replaced since is patched anew.

    Raises:
        UnsupportedModelError: if the model cannot be patched, with the reason; it is as before.
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"{NAME}: mode = {mode!r}; expected one of {MODES}")
    model = _unwrapped(model)
    old = _patch_of(model)
    if old is not None:
        whole = _is_whole(model, old)
        if whole and mode in ("auto", old.mode):
            return Handle(model, old.mode)
        _uninstall(model, old)
        old = old if whole else None
    head = _checked_head(model)
    name = f"{NAME}: {type(model).__name__}"
    stock = _probed(model, head, f"{name} cannot be run on input_ids and labels alone")
    apart = probe.keeps_apart(model)
    wanted = ("fused", "rows") if mode == "auto" else (mode,)
    reasons = []
    for each in wanted:
        made = None
        try:
            made = _fused(model, head) if each == "fused" else _rows(model, head)
            made.apart = apart
            _install(model, made)
            _verify(model, head, made, stock)
            made.late = _logits_wait_well(model, head, made, stock)
        except UnsupportedModelError as error:
            if made is not None:
                _uninstall(model, made)
            reasons.append(f"{each}: {error}")
        else:
            return Handle(model, made.mode)
    if old is not None:
        _install(model, old)
    raise UnsupportedModelError(f"{name}: {'; '.join(reasons)}")


# -- what can be patched ---------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    """Out of DistributedDataParallel, torch.compile and PEFT."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # noqa: SLF001  (torch.compile's wrapper)
            model = model.get_submodule("_orig_mod")
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def _checked_head(model: nn.Module) -> nn.Module:
    name = f"{NAME}: {type(model).__name__}"
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(f"{name} is no model of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder and a decoder; its labels are not moved")
    if "_loss_function" in vars(model):
        raise UnsupportedModelError(f"{name} has a loss function of its own; take it away first")
    for other in OTHERS:
        if other in inspect.unwrap(model.forward).__module__:
            raise UnsupportedModelError(f"{name}.forward is {other}'s; use one or the other")
    loss = getattr(getattr(model, "loss_function", None), "__name__", None)
    if loss != "ForCausalLMLoss":
        raise UnsupportedModelError(f"{name} has the loss {loss}; expected ForCausalLMLoss")
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UnsupportedModelError(f"{name} has no output embeddings")
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(f"{name} is on the meta device, where it cannot be verified")
    return head


def _fused(model: nn.Module, head: nn.Module) -> _Patch:
    selective = SelectiveHead.of(head)  # of sgp.trl
    if selective is not None:
        return _Patch("fused", selective)
    if not is_plain(head):
        raise UnsupportedModelError(f"its head is {described(head)}; expected a plain nn.Linear")
    found = probe.post_processing(model, head)
    if found is None:
        raise UnsupportedModelError("its logits are more than scaled and softcapped")
    return _Patch("fused", SelectiveHead(found.logit_scale, found.softcap))


def is_plain(head: nn.Module) -> bool:
    """FSDP makes a class of each that it shards, with the same forward."""
    return (
        isinstance(head, nn.Linear)
        and "forward" not in vars(head)
        and type(head).forward is nn.Linear.forward
    )


def described(head: nn.Module) -> str:
    """The class of a head that is not plain, and what else is odd about it."""
    name = f"{type(head).__module__}.{type(head).__name__}"
    return f"{name} with a forward of its own" if "forward" in vars(head) else name


def _rows(model: nn.Module, head: nn.Module) -> _Patch:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError("its forward takes no logits_to_keep")
    try:
        return _Patch("rows", _fused(model, head).selective)
    except UnsupportedModelError:  # then evaluation makes all logits
        return _Patch("rows")


def _probed(model: nn.Module, head: nn.Module, failed: str) -> probe.Probe:
    try:
        return probe.run(model, head)
    except Exception as error:  # whatever a foreign model raises is the reason
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{failed}: {type(error).__name__}: {reason}") from error


def _verify(model: nn.Module, head: nn.Module, made: _Patch, stock: probe.Probe) -> None:
    """The same loss as before, and the head on kept rows only, or not at all."""
    made.always = True
    try:
        found = _probed(model, head, FAILED[made.mode])
    finally:
        made.always = False
    if not _agree(head, found.loss, stock.loss):
        raise UnsupportedModelError(
            f"the loss of a probe is {float(found.loss):.6f}, without the patch "
            f"{float(stock.loss):.6f}"
        )
    wanted = found.kept if made.mode == "rows" else 0
    if found.rows != wanted:
        raise UnsupportedModelError(
            f"the head made logits of {found.rows} rows of a probe, of which {found.kept} carry "
            f"loss; expected {wanted}"
        )


def _logits_wait_well(model: nn.Module, head: nn.Module, made: _Patch, stock: probe.Probe) -> bool:
    """Whether an evaluation whose logits wait has the loss and the logits that it had."""
    made.late = made.selective is not None
    try:
        found = probe.run(model, head)
        same = _agree(head, found.loss, stock.loss) and _agree(head, found.logits, stock.logits)
    except Exception:  # noqa: BLE001  (whatever a foreign model raises: its logits do not wait)
        return False
    finally:
        made.late = False
    return same and found.logits.shape == stock.logits.shape


def _agree(head: nn.Module, found: Any, stock: Any) -> bool:
    allowed = AGREE.get(next(head.parameters()).dtype, 2e-2)
    return bool((found - stock).abs().max() <= allowed * stock.abs().max())


# -- what is put on a model ------------------------------------------------------------------------


def _install(model: nn.Module, made: _Patch) -> None:
    model.register_forward_pre_hook(made.before, with_kwargs=True)
    model.register_forward_hook(made.after, with_kwargs=True, always_call=True)
    model.loss_function = made.loss  # type: ignore[assignment]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if made.selective is not None and SelectiveHead.of(head) is None:
        SelectiveHead.on(head, made.selective)


def _uninstall(model: nn.Module, made: _Patch) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):  # noqa: SLF001
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is made]:
            _remove_hook(model, key)
    if _owns_loss(model, made):
        del model._loss_function  # noqa: SLF001  (transformers has no public way back)
    if made.selective is None or hasattr(model, "sgp_trl"):  # which goes on using the head
        return
    for module in model.modules():  # an adapter may stand around the head by now
        if SelectiveHead.of(module) is made.selective:
            SelectiveHead.off(module)


def _remove_hook(model: nn.Module, key: int) -> None:
    for name in (
        "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
        "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    ):  # fmt: skip
        getattr(model, name).pop(key, None)


def _patch_of(model: nn.Module) -> _Patch | None:
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())  # noqa: SLF001
    return next((found for found in hooks if isinstance(found, _Patch)), None)


def _owns_loss(model: nn.Module, made: _Patch) -> bool:
    return getattr(vars(model).get("_loss_function"), "__self__", None) is made


def _owns_head(model: nn.Module, made: _Patch) -> bool:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return made.selective is None or SelectiveHead.of(head) is made.selective


def _is_whole(model: nn.Module, made: _Patch) -> bool:
    """Whether nothing of it was replaced since."""
    return _owns_loss(model, made) and _owns_head(model, made)


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


def _another_loss() -> str | None:
    """Who of the callers will compute a loss of its own from all logits, if one is known to."""
    compute_loss = _code("transformers.trainer", "Trainer", "compute_loss")
    of_cpt = _code("peft.peft_model", "PeftModelForCausalLM", "_cpt_forward")
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  (the model is not told who calls it)
    while frame is not None:
        if frame.f_code is compute_loss:
            trainer, labels = frame.f_locals["self"], frame.f_locals.get("labels")
            if trainer.compute_loss_func is not None:
                return "Trainer's compute_loss_func"
            if labels is not None:  # taken out of the batch
                return "Trainer's label_smoothing_factor"
        elif frame.f_code is of_cpt:
            return "PEFT's CPT"
        frame = frame.f_back
    return None


def _code(module: str, name: str, method: str) -> CodeType | object:
    """That of a method, if its module is imported."""
    function = getattr(getattr(sys.modules.get(module), name, None), method, None)
    return getattr(inspect.unwrap(function), "__code__", None) if function else object()


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by name."""
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False))


_warned = False


def _warn_of_another_loss() -> None:
    global _warned  # noqa: PLW0603  (once in a process)
    if not _warned:
        _warned = True
        warnings.warn(
            f"{NAME}: a patched model is trained without labels, or with TRL's own head: its "
            "caller computes the loss (Trainer with label_smoothing_factor or compute_loss_func; "
            "PEFT's CPT; for TRL there is sgp.trl), and the patch does nothing",
            stacklevel=3,
        )
