"""How the row operators meet autograd, by when the upstream gradient is known.

`ScalarLoss` computes the gradient in forward, as one launch with the loss, and multiplies it by
the upstream factor in backward, which for a plain `loss.backward()` is 1 and costs nothing.
`RowLoss` returns one loss a row and computes the gradient in backward: for upstream gradients that
differ by row, and for float16, whose gradients must not be rounded before the loss scaler's factor
is in them. `RowStatistics` does the same for log-probability, entropy and log-sum-exp.

What closes a gradient to a second derivative, for these and for the linear head, is here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sgp.rows import operators
from sgp.rows.by_torch import Upstream, Wanted
from sgp.rows.recipe import Recipe
from sgp.rows.watched import is_watched

CROSS_ENTROPY = "sgp.cross_entropy"
LOG_PROBS = "sgp.token_log_probs"

USED_UP = (
    "{name}: backward a second time through a {what}, whose gradient was computed with "
    "the loss and has been handed over. Compute the loss again, or sum the losses before one "
    "backward; reduction='none' (summed by hand) keeps what a second backward needs"
)
NOT_TWICE = (
    "{name} has no second derivative: its gradient is no differentiable operation. For "
    "create_graph=True, gradient penalties and Hessians use torch.nn.functional or "
    "sgp.reference{function}"
)
NOT_FORWARD = (
    "{name} has no forward-mode derivative (jvp, jacfwd, hessian, dual numbers); use "
    "torch.nn.functional or sgp.reference{function}"
)


def _message(text: str, name: str) -> str:
    return text.format(name=name, function=name.removeprefix("sgp.parallel").removeprefix("sgp"))


def refuse_forward_mode(name: str, *inputs: Tensor | None) -> None:
    """Raise RuntimeError for a dual number, whose tangent would be lost."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(_message(NOT_FORWARD, name))


class Transformed(torch.autograd.Function):
    """A Function that `torch.func` transforms take, but for those of forward mode.

    Per-example gradients are `torch.func.vmap(torch.func.grad(...))`: forward and backward run
    under vmap, which calls each operator once an example.
    """

    generate_vmap_rule = True


class _Once(Transformed):
    """The identity on a gradient; differentiating it raises our message.

    The anchors are what the gradient depends on (what went in, by an output that was saved, and the
    upstream gradient), so that every way to a second derivative leads through here.
    """

    @staticmethod
    def forward(name: str, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(_message(NOT_TWICE, ctx.name))


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, of a Function whose forward has no defaults and whose first input is ours.

    PyTorch binds the arguments to the signature of forward at every call, which costs as much as
    the rest. Where nobody watches, that and what `torch.func` needs are left out.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if is_watched(arguments[0]):
        try:
            return function.apply(*arguments)
        except RuntimeError as error:
            # A `jvp` of ours that says it better would break the graph of torch.compile.
            if "implement the jvp function" in str(error):
                raise RuntimeError(_message(NOT_FORWARD, "sgp")) from error
            raise
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def mark_constant(ctx: Any, *outputs: Tensor | None, origin: Tensor) -> None:
    """Mark outputs that are not differentiable, but leave `origin`, which is saved for backward.

    It comes back from `ctx.saved_tensors` with this node as its grad_fn, so it has the place in the
    graph of everything that went in: an anchor for `once`. Nobody outside has it. Compiled, there
    are no second derivatives, and its own gradient would be made as zeros: it is marked too.
    """
    constant = (*outputs, origin) if torch.compiler.is_compiling() else outputs
    ctx.mark_non_differentiable(*(x for x in constant if x is not None))


def once(name: str, gradient: Tensor, *anchors: Tensor | None) -> Tensor:
    """The gradient, closed to a second derivative where one is being recorded."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    return _Once.apply(name, gradient, *anchors)  # type: ignore[no-any-return,no-untyped-call]


def saved_tensors(ctx: Any, name: str, what: str) -> tuple[Any, ...]:
    """The saved tensors of a backward that writes over them or hands them over; once only.

    Autograd notices a second time by their versions, but not where hooks on saved tensors have
    replaced them.
    """
    used = getattr(ctx, "used", False)
    try:
        saved = tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if used and "inplace operation" in str(error):
            raise RuntimeError(USED_UP.format(name=name, what=what)) from error
        raise
    if used:
        raise RuntimeError(USED_UP.format(name=name, what=what))
    if not torch.compiler.is_compiling():
        ctx.used = True
    return saved


class ScalarLoss(torch.autograd.Function):
    """(loss (), 5 statistics (N,), gradient) of sum over rows, times `scale`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        wanted: Wanted,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        if inplace:
            # A detached alias shares the version counter, so autograd sees the change.
            loss, _, *rest = operators.row_forward_(
                logits.detach(), target, weight, row_weight, scale, recipe, wanted
            )
        else:
            wanted = Wanted(grad=True, stats=wanted.stats, argmax=wanted.argmax)
            loss, _, *rest = operators.row_forward(
                logits, target, weight, row_weight, scale, recipe, wanted
            )
        total = loss.sum()
        return total if scale is None else total * scale, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, *_, recipe, _, inplace = inputs
        _, *stats, dlogits = output
        mark_constant(ctx, *stats, origin=dlogits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits if inplace else dlogits, target)
        ctx.ignore_index = recipe.ignore_index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        origin, target = saved_tensors(ctx, CROSS_ENTROPY, "'mean' or 'sum' loss")
        dlogits = origin.detach()
        with torch.no_grad():
            operators.multiply_rows_(dlogits, target, grads[0], ctx.ignore_index)
        return (once(CROSS_ENTROPY, dlogits, origin, grads[0]), *(None,) * 7)


class RowLoss(Transformed):
    """(losses (N,), 5 statistics (N,), saved (N, 3)), each row's loss times its weight.

    Of the statistics the log-sum-exp is differentiable where `of_lse` asks for it.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
        wanted: Wanted,
        of_lse: bool,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        wanted = Wanted(saved=True, stats=wanted.stats, argmax=wanted.argmax)
        loss, saved, *stats, _ = operators.row_forward(
            logits, target, weight, row_weight, None, recipe, wanted
        )
        return loss, *stats, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, row_weight, recipe, _, of_lse, inplace = inputs
        _, log_prob, entropy, lse, is_top1, argmax, saved = output
        constants = (log_prob, entropy, None if of_lse else lse, is_top1, argmax)
        mark_constant(ctx, *constants, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, row_weight, saved)
        ctx.recipe, ctx.of_lse, ctx.inplace = recipe, of_lse, inplace

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_lse = grads[0], grads[3] if ctx.of_lse else None  # compiled, all have one
        if of_loss is None and of_lse is None:
            return (None,) * 8
        what = "loss with inplace=True"
        logits, target, weight, row_weight, saved = (
            saved_tensors(ctx, CROSS_ENTROPY, what) if ctx.inplace else ctx.saved_tensors
        )
        with torch.no_grad():
            r = loss_upstream(of_loss, row_weight, saved)
            upstream = Upstream(contiguous(of_lse))
            arguments = (target, saved, weight, r, upstream, ctx.recipe)
            if ctx.inplace:
                dlogits = logits.detach()
                operators.row_backward_(dlogits, *arguments)
            else:
                dlogits = operators.row_backward(logits, *arguments)
        return (once(CROSS_ENTROPY, dlogits, saved, of_loss, of_lse), *(None,) * 7)


class RowStatistics(Transformed):
    """(5 statistics, saved) of every row; the first three statistics are differentiable."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, recipe: Recipe, need_argmax: bool
    ) -> tuple[Tensor, ...]:
        wanted = Wanted(saved=True, stats=True, argmax=need_argmax)
        _, saved, *stats, _ = operators.row_forward(
            logits, target, None, None, None, recipe, wanted
        )
        return *stats, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, recipe, _ = inputs
        _, entropy, _, is_top1, argmax, saved = output
        mark_constant(ctx, is_top1, argmax, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, saved, entropy)
        ctx.recipe = recipe

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[:3]
        if all(gradient is None for gradient in upstream):
            return (None,) * 4
        logits, target, saved, entropy = ctx.saved_tensors
        with torch.no_grad():
            dlogits = operators.row_backward(
                logits, target, saved, None, *row_upstream(upstream, saved, entropy), ctx.recipe
            )
        return once(LOG_PROBS, dlogits, saved, *upstream), None, None, None


def loss_upstream(of_loss: Tensor | None, row_weight: Tensor | None, saved: Tensor) -> Tensor:
    """(N,) upstream gradients of the rows' losses times the rows' weights."""
    if of_loss is None:
        return saved.new_zeros(saved.shape[0])
    return (of_loss if row_weight is None else of_loss * row_weight).contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """An upstream gradient as the kernels read it; a sum's is expanded."""
    return None if x is None else x.contiguous()


def row_upstream(
    upstream: tuple[Tensor | None, ...], saved: Tensor, entropy: Tensor
) -> tuple[Tensor, Upstream]:
    """(row_weight, the others) of the gradients of the statistics.

    A loss is -log_prob, so the row weight is the log-probability's gradient with the sign turned.
    """
    of_log_prob, of_entropy, of_lse = upstream
    r = saved.new_zeros(saved.shape[0]) if of_log_prob is None else -of_log_prob
    value = None if of_entropy is None else entropy
    return r.contiguous(), Upstream(contiguous(of_lse), contiguous(of_entropy), value)
