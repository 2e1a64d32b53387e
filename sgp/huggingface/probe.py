"""What a model does around its head, found out by running it on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EXACT = 1e-5  # relative, of float32 arithmetic on a scale or a cap
SIZES = (1e-3, 30.0, 1e4)  # where a cap is not seen, is seen, and is all that is seen
APART = {torch.float32: 1e-4, torch.float64: 1e-4}  # of what a token feels; else 1e-2
MASKED = ((1, 1, 1, 0, 0, 0, 0, 0), (1, 1, 0, 0, 0, 1, 0, 1))  # 1: no loss


class PostProcessing(NamedTuple):
    """logit -> softcap(logit_scale * logit)."""

    logit_scale: float
    softcap: float | None


class Probe(NamedTuple):
    """A loss and logits, and what the head was asked for on the way."""

    loss: Tensor
    logits: Any
    rows: int  # that the head made logits of
    tokens: int
    kept: int


def post_processing(model: nn.Module, head: nn.Module) -> PostProcessing | None:
    """Scale and softcap between the head and `out.logits`; None if it is something else.

    The head's output is replaced by known values, each column's different, forwards and backwards.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    for flip in (False, True):
        given: list[Tensor] = []

        def ramp(
            _: nn.Module, __: Any, logits: Tensor, given: list[Tensor] = given, flip: bool = flip
        ) -> Tensor:
            V = logits.shape[-1]
            line = torch.linspace(-1, 1, V, device=logits.device)
            line = line.flip(0) if flip else line
            rows = torch.stack([size * line for size in SIZES])
            given.append(rows)
            return rows.expand(*logits.shape[:-2], len(SIZES), V)

        handle = head.register_forward_hook(ramp)
        try:
            with quiet(model):
                logits = model(input_ids=_ids(model, 1, len(SIZES)), use_cache=False).logits
        finally:
            handle.remove()
        if len(given) != 1 or logits.shape[-2:] != given[0].shape:
            return None
        seen.append((given[0].cpu().double(), logits[0].cpu().double()))
    x, y = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
    scale = _short(float((x[0] * y[0]).sum() / (x[0] * x[0]).sum()))
    if _close(scale * x, y):
        return PostProcessing(scale, None)
    cap = _short(float(y.max()))
    if cap > 0 and _close(cap * torch.tanh(scale * x / cap), y):
        return PostProcessing(scale, cap)
    return None


def run(model: nn.Module, head: nn.Module) -> Probe:
    """The loss of a small batch with context, and how many rows the head made logits of."""
    rows: list[int] = []

    def count(_: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if logits.shape[-1] > 1:  # no stand-in
            rows.append(args[0].numel() // args[0].shape[-1])

    masked = torch.tensor(MASKED, dtype=torch.bool)
    ids = _ids(model, *masked.shape)
    labels = torch.where(masked.to(ids.device), -100, ids)
    handle = head.register_forward_hook(count)
    try:
        with quiet(model):
            out = model(input_ids=ids, labels=labels, use_cache=False)
    finally:
        handle.remove()
    kept = int((~masked[:, 1:]).sum())
    return Probe(out.loss.detach().float(), out.logits, sum(rows), masked.numel(), kept)


def keeps_apart(model: nn.Module) -> bool:
    """Whether position_ids that begin again keep the sequences of one row apart.

    The logits of the second sequence must not feel a change of the first, measured by what they
    feel of it where the positions go on.
    """
    half = 4
    ids = _ids(model, 1, 2 * half)
    changed = torch.cat([ids[:, half:], ids[:, half:]], 1)
    count = torch.arange(2 * half, device=ids.device)[None]
    felt = []
    try:
        for positions in (count % half, count):
            with quiet(model):
                a, b = (
                    model(input_ids=x, position_ids=positions, use_cache=False).logits[:, half:]
                    for x in (ids, changed)
                )
            felt.append(float((a.cpu().double() - b.cpu().double()).abs().max()))
    except Exception:  # noqa: BLE001  (whatever a foreign model raises: it cannot be asked)
        return False
    return felt[0] <= APART.get(a.dtype, 1e-2) * felt[1]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Without dropout, without a graph; random state and modes as before."""
    modes = {module: module.training for module in model.modules()}
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _ids(model: nn.Module, B: int, T: int) -> Tensor:
    """Tokens that differ, none of them special in a usual vocabulary."""
    config: Any = model.config
    V = config.get_text_config().vocab_size
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = next(embeddings.parameters()).device
    ids: Tensor = (torch.arange(B * T, device=device).view(B, T) * 7 + V // 2) % V
    return ids


def _short(x: float) -> float:
    """The number of a configuration that was seen through float32."""
    found = float(f"{x:.6g}")
    return found if abs(found - x) <= 1e-6 * abs(x) else x


def _close(found: Tensor, expected: Tensor) -> bool:
    largest = expected.abs().amax(-1, keepdim=True)
    return bool(((found - expected).abs() <= EXACT * largest).all())
