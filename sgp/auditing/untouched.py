"""Leave a model as it was: parameters, buffers, gradients, hooks, modes and random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CAPTURING = "_output_capturing_hooks_installed"  # transformers' mark of its recording hooks


@contextmanager
def untouched(model: nn.Module, visit: Callable[[str, nn.Parameter], None]) -> Iterator[None]:
    """Training mode and gradients on inside; afterwards everything as before.

    A model that is in training mode at its top keeps the modes of its modules. One that is patched
    (`sgp.huggingface.patch`) makes all logits in evaluation only, so that its outermost module is
    told that it evaluates; what is inside of it trains.

    `visit(name, parameter)` is called when a trainable parameter's gradient is complete; then the
    gradient is dropped, so that never more than one is held. The parameter's own hooks for that
    moment (an optimizer that steps in backward) do not run.
    """
    named = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in named.items()}
    hooks = {name: dict(p._post_accumulate_grad_hooks or {}) for name, p in named.items()}  # noqa: SLF001  (there is no public list of them)
    handles = []
    for name, p in named.items():
        p.grad = None
        _replace(p, {})
        if p.requires_grad:
            handles.append(p.register_post_accumulate_grad_hook(_drop(name, visit)))
    try:
        with as_before(model), torch.inference_mode(mode=False), torch.enable_grad():
            if not model.training:
                model.train()
            for module in filter(_is_patched, model.modules()):
                module.training = False
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in named.items():
            p.grad = gradients[name]
            _replace(p, hooks[name])


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards modes, buffers, numbers, recording hooks and random state are as they were."""
    modes = {module: module.training for module in model.modules()}
    recording = _recording(model)
    moving = (b for b in model.buffers() if b.is_floating_point() or b.numel() == 1)
    buffers = [(b, b.detach().clone()) for b in moving]  # as a batch norm's; no packed weights
    held = {module: dict(module._buffers) for module in modes if module._buffers}  # noqa: SLF001
    plain = {module: _plain(module) for module in modes}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, values in plain.items():
                now = _plain(module)
                for name in values.keys() & now.keys():
                    if now[name] is not values[name]:
                        setattr(module, name, values[name])
            for module, named in held.items():  # some replace theirs, as embeddings that grow
                module._buffers.clear()  # noqa: SLF001
                module._buffers.update(named)  # noqa: SLF001
            _restore(buffers)
            _forget_recording(model, recording)


def _is_patched(module: nn.Module) -> bool:
    """Whether the loss of this model is a patch's, which stands higher and is known by its form."""
    owner = getattr(vars(module).get("_loss_function"), "__self__", None)
    return hasattr(owner, "memory_budget") and hasattr(owner, "selective")


def _plain(module: nn.Module) -> dict[str, Any]:
    """What a module may count or keep of a batch, as the positions of a vision model."""
    kinds = (int, float, Tensor, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, kinds) and not isinstance(value, bool)
    }


@torch.no_grad()
def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        if buffer.shape == before.shape and not torch.equal(buffer, before):
            buffer.copy_(before)


def _drop(name: str, visit: Callable[[str, nn.Parameter], None]) -> Any:
    def hook(p: Tensor) -> None:
        if p.grad is not None:
            visit(name, p)  # type: ignore[arg-type]
            p.grad = None

    return hook


def _replace(p: nn.Parameter, hooks: dict[int, Any]) -> None:
    """In place: autograd holds this dict."""
    held = p._post_accumulate_grad_hooks  # noqa: SLF001
    if held is not None:
        held.clear()
        held.update(hooks)


def _recording(model: nn.Module) -> dict[nn.Module, dict[int, Any]] | None:
    """Forward hooks, if those of transformers for hidden states are not there yet."""
    if any(CAPTURING in vars(module) for module in model.modules()):
        return None
    return {module: dict(module._forward_hooks) for module in model.modules()}  # noqa: SLF001


def _forget_recording(model: nn.Module, before: dict[nn.Module, dict[int, Any]] | None) -> None:
    """Take hooks and mark away together, so that transformers installs them when next asked."""
    marked = [module for module in model.modules() if CAPTURING in vars(module)]
    if before is None or not marked:
        return
    for module in marked:
        delattr(module, CAPTURING)
    for module, hooks in before.items():
        for key in set(module._forward_hooks) - set(hooks):  # noqa: SLF001
            del module._forward_hooks[key]  # noqa: SLF001
