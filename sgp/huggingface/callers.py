"""Who calls a patched model, and what is said to them: each warning once in a process."""

from __future__ import annotations

import inspect
import sys
from types import CodeType, FrameType

from torch import Tensor

from sgp.caller import warn

NAME = "sgp.huggingface.patch"
SAID: set[str] = set()
"""The warnings that have been given."""


def another_loss() -> str | None:
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


def warn_of_another_loss() -> None:
    """A patched model is trained, and the loss is computed elsewhere."""
    _warn_once(
        "a patched model is trained without labels, or with TRL's own head: its caller computes "
        "the loss (Trainer with label_smoothing_factor or compute_loss_func; PEFT's CPT; for TRL "
        "there is sgp.trl), and the patch does nothing"
    )


def warn_of_targets(name: str, target: Tensor, mask: Tensor, input_ids: Tensor) -> None:
    """If each target is its own token, or the one after the next.

    Waits for a GPU.

    Args:
        name: what the targets were given as.
        target: (B, T) the token that each position predicts.
        mask: (B, T) bool: where it carries loss.
        input_ids: (B, T).
    """
    if _is_ahead(target, mask, input_ids, 1):  # also where one token is repeated
        return
    if _is_ahead(target, mask, input_ids, 0):
        _warn_once(
            f"each position is trained to predict its own token: {name} must be shifted, the "
            "target of a position being the next token. Make a Selection of labels with "
            "shift=True, or pass labels, which are shifted here"
        )
    elif _is_ahead(target, mask, input_ids, 2):
        _warn_once(
            f"each position is trained to predict the token after the next: {name} were shifted "
            "twice. "
            + (
                "Pass labels that are not shifted, or pass these as shift_labels"
                if name == "labels"
                else "Shift them once"
            )
        )


def _is_ahead(target: Tensor, mask: Tensor, input_ids: Tensor, k: int) -> bool:
    """Whether each of these targets, and there is one, is the token k after its position."""
    stop = target.shape[-1] - k
    mask = mask[:, :stop]
    same = target[:, :stop] == input_ids[:, k:]
    return bool(((same | ~mask).all() & mask.any()).item())


def _warn_once(message: str) -> None:
    if message not in SAID:
        SAID.add(message)
        warn(f"{NAME}: {message}")
