"""`patch`: sgp's loss in a causal language model of Hugging Face transformers.

Three things are put on one model, none of them on its class: a hook before and one after its
forward, a loss function, and, in mode "fused", a forward of its head. Each is a copyable object
without reference to the model, so that a copy of a patched model is a patched model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sgp.head.chunks import check_sizes
from sgp.huggingface import probe
from sgp.huggingface.callers import NAME
from sgp.huggingface.patched import Patch, owns_head, owns_loss
from sgp.huggingface.selective_head import SelectiveHead

MODES = ("auto", "rows", "fused")
OTHERS = ("liger_kernel", "cut_cross_entropy", "unsloth")  # kernels that replace forward
FAILED = {
    "fused": "it makes no loss of what its head returns",
    "rows": "its forward takes no mask in logits_to_keep (transformers 5.21 and later do)",
}
AGREE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative; else 2e-2


class UnsupportedModelError(ValueError):
    """A model that cannot be patched, with the reason."""


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


def patch(model: nn.Module, *, mode: str = "auto", memory_budget: int | None = None) -> Handle:
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
            "rows"; with a budget "fused" alone.
        memory_budget: bytes, as in `sgp.linear_cross_entropy`, of which the loss of mode "fused" is
            a call; one that is too small is an error of the model's forward pass. In mode "rows"
            the model's own head makes the logits.

    Returns:
        The handle. A model that is patched already keeps its patch, or takes the mode and the
        budget that are given; one whose head was replaced since is patched anew.

    Raises:
        UnsupportedModelError: if the model cannot be patched, with the reason; it is as before.
        ValueError, TypeError: an unknown mode; a budget that is none, or in mode "rows".
    """
    mode = _checked_mode(mode, memory_budget)
    model = _unwrapped(model)
    old = _patch_of(model)
    if old is not None:
        whole = _is_whole(model, old)
        if whole and mode in ("auto", old.mode):
            old.memory_budget = old.memory_budget if memory_budget is None else memory_budget
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
            made.memory_budget = memory_budget
        except UnsupportedModelError as error:
            if made is not None:
                _uninstall(model, made)
            reasons.append(f"{each}: {error}")
        else:
            return Handle(model, made.mode)
    if old is not None:
        _install(model, old)
    if memory_budget is not None:
        reasons.append(
            f"memory_budget = {memory_budget} needs mode 'fused'; leave it out to try mode 'rows'"
        )
    raise UnsupportedModelError(f"{name}: {'; '.join(reasons)}")


# -- what can be patched ---------------------------------------------------------------------------


def _checked_mode(mode: str, memory_budget: int | None) -> str:
    """The mode; "fused" in place of "auto" where there is a budget, which no other has."""
    if mode not in MODES:
        raise ValueError(f"{NAME}: mode = {mode!r}; expected one of {MODES}")
    check_sizes(NAME, None, memory_budget)
    if memory_budget is None:
        return mode
    if mode == "rows":
        raise ValueError(
            f"{NAME}: memory_budget = {memory_budget} has no effect in mode 'rows', where the "
            "model's own head makes the logits of the tokens that carry loss; use mode='fused' or "
            "leave it out"
        )
    return "fused"


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


def _fused(model: nn.Module, head: nn.Module) -> Patch:
    selective = SelectiveHead.of(head)  # of sgp.trl
    if selective is not None:
        return Patch("fused", selective)
    if not is_plain(head):
        raise UnsupportedModelError(f"its head is {described(head)}; expected a plain nn.Linear")
    found = probe.post_processing(model, head)
    if found is None:
        raise UnsupportedModelError("its logits are more than scaled and softcapped")
    return Patch("fused", SelectiveHead(found.logit_scale, found.softcap))


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


def _rows(model: nn.Module, head: nn.Module) -> Patch:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError("its forward takes no logits_to_keep")
    try:
        return Patch("rows", _fused(model, head).selective)
    except UnsupportedModelError:  # then evaluation makes all logits
        return Patch("rows")


def _probed(model: nn.Module, head: nn.Module, failed: str) -> probe.Probe:
    try:
        return probe.run(model, head)
    except Exception as error:  # whatever a foreign model raises is the reason
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{failed}: {type(error).__name__}: {reason}") from error


def _verify(model: nn.Module, head: nn.Module, made: Patch, stock: probe.Probe) -> None:
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


def _logits_wait_well(model: nn.Module, head: nn.Module, made: Patch, stock: probe.Probe) -> bool:
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


def _install(model: nn.Module, made: Patch) -> None:
    model.register_forward_pre_hook(made.before, with_kwargs=True)
    model.register_forward_hook(made.after, with_kwargs=True, always_call=True)
    model.loss_function = made.loss  # type: ignore[assignment]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if made.selective is not None and SelectiveHead.of(head) is None:
        SelectiveHead.on(head, made.selective)


def _uninstall(model: nn.Module, made: Patch) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):  # noqa: SLF001
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is made]:
            _remove_hook(model, key)
    if owns_loss(model, made):
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


def _patch_of(model: nn.Module) -> Patch | None:
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())  # noqa: SLF001
    return next((found for found in hooks if isinstance(found, Patch)), None)


def _is_whole(model: nn.Module, made: Patch) -> bool:
    """Whether nothing of it was replaced since."""
    return owns_loss(model, made) and owns_head(model, made)
