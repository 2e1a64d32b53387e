"""Who may be watching a call, and operators that are left out where nobody is.

torch.compile, dispatch modes, tensor subclasses and profilers see what the package does as
`torch.library` operators. A call of one costs as much as the launch inside it, and an eager
training loop needs none of that: there the operator's plain body runs. Both compute the same and
raise the same errors.

The operators have no kernel for autograd, which would be asked at every call: they are called
where nothing is recorded (autograd.py), and what they write to is counted here. That is why they
are defined by a Library and not by `custom_op`, whose wrappers do both once more.
"""

# ruff: noqa: SLF001  (what PyTorch knows of watchers has no public names)

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast, get_args, get_type_hints

import torch
from torch import _C, Tensor, nn
from torch.autograd import profiler

Function = TypeVar("Function", bound=Callable[..., Any])

PLAIN = (Tensor, nn.Parameter)
PLAIN_KINDS = (Tensor, Tensor | None)
NAMESPACE = "sgp::".removesuffix("::")  # a copy of the package gets another (huggingface/hub.py)
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether more than autograd looks at what happens to these tensors: a tracer or a profiler."""
    return bool(profiler._is_profiler_enabled) or is_traced(*tensors)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether what happens to these tensors is recorded, changed or done to others.

    That is torch.compile and torch.export, dispatch modes (fake tensors, make_fx, selective
    checkpointing) and function modes, `torch.func` transforms, `torch.jit.trace`, tensor
    subclasses, and tensors without memory: those on the meta device, those that a transform has
    left behind, and the batches of `torch.autograd.grad(is_grads_batched=True)`.
    """
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._is_tracing()
    ):
        return True
    functorch = _C._functorch
    for x in tensors:
        if x is not None and (
            type(x) not in PLAIN
            or x.is_meta
            or functorch.is_functorch_wrapped_tensor(x)
            or functorch.is_legacy_batchedtensor(x)
        ):
            return True
    return False


def not_compiled(function: Function) -> Function:
    """The function, at which torch.compile breaks its graph: what it does cannot be traced."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # else the compiler is not imported
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast("Function", call)


class Operator:
    """A `torch.library` operator, and the plain `body` that runs in its place where nobody watches.

    A NamedTuple is one argument here and of the body. The operator `op`, whose schema has no such
    type, takes its fields, each as an argument named `parameter_field`. The body may return None in
    place of a tensor that was not asked for; the operator returns an empty one.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        *,
        mutates_args: tuple[str, ...] = (),
        tags: Sequence[torch.Tag] = (),
    ) -> None:
        """Define sgp::name of the body's name.

        Args:
            body: what it computes; its annotations become the schema.
            mutates_args: the parameters that are written to.
            tags: for torch.compile.
        """
        self.body = body
        functools.update_wrapper(self, body)
        name = body.__name__
        parameters = inspect.signature(body, eval_str=True).parameters
        self.types = tuple(parameter.annotation for parameter in parameters.values())
        self.kernel = self._filling(body)
        self.kernel.__signature__ = _signature(body)  # type: ignore[attr-defined]
        schema = torch.library.infer_schema(self.kernel, mutates_args=mutates_args)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        LIBRARY.impl(name, self.kernel, "CompositeExplicitAutograd")
        if not mutates_args:
            torch.library.register_vmap(f"{NAMESPACE}::{name}", self._each_example, lib=LIBRARY)
        self.op = getattr(getattr(torch.ops, NAMESPACE), name).default
        # Tensors come first. Anyone of them may be watched: autograd batches upstream gradients
        # alone, and labels may be gathered asynchronously.
        self.tensors = sum(_is_of_tensors(kind) for kind in self.types)
        self.nested = any(kind not in PLAIN_KINDS for kind in self.types[: self.tensors])
        self.written = [list(parameters).index(argument) for argument in mutates_args]

    def __call__(self, *arguments: Any) -> Any:
        """What the body returns, and None or an empty tensor for what was not asked for."""
        if torch.compiler.is_compiling():  # the schema says what is written to
            return self.op(*flat(arguments))
        tensors = arguments[: self.tensors]
        watched = is_watched(*(flat(tensors, lists=True) if self.nested else tensors))
        out = self.op(*flat(arguments)) if watched else self.body(*arguments)
        for place in self.written:  # or autograd would not notice a second backward
            torch.autograd.graph.increment_version(arguments[place])
        return out

    def _each_example(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        """What `torch.func.vmap` does with it: one call an example, as `register_vmap` asks."""
        if not info.batch_size:
            raise ValueError(f"{NAMESPACE}.{self.body.__name__}: vmap over no examples")
        pairs = list(zip(arguments, in_dims, strict=True))

        def example(x: Any, dim: Any, i: int) -> Any:
            if isinstance(x, list):
                dims = dim if isinstance(dim, list) else [dim] * len(x)
                return [example(part, d, i) for part, d in zip(x, dims, strict=True)]
            return x if dim is None else x.select(dim, i)

        results = [
            self.op(*(example(x, dim, i) for x, dim in pairs)) for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Give the operator its fake, which like the body may return None for a tensor."""
        torch.library.register_fake(
            f"{NAMESPACE}::{self.body.__name__}", self._filling(fake), lib=LIBRARY
        )
        return fake

    def _filling(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body for flat arguments, with empty tensors instead of None."""

        def filled(*arguments: Any) -> Any:
            values = iter(arguments)
            out = body(*(_built(kind, values) for kind in self.types))
            if not isinstance(out, tuple):
                return out
            return tuple(arguments[0].new_empty(0) if x is None else x for x in out)

        return filled


def operator(**options: Any) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an Operator, whose options these are."""
    return lambda body: Operator(body, **options)


def flat(values: Iterable[Any], *, lists: bool = False) -> list[Any]:
    """Arguments with the fields of each NamedTuple, and the entries of `lists`, in its place."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, tuple) or (lists and isinstance(value, list)):
            found.extend(flat(value, lists=lists))
        else:
            found.append(value)
    return found


def _is_record(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _is_of_tensors(kind: Any) -> bool:
    """Whether a parameter is a tensor, one that may be None, a list, or a NamedTuple of these."""
    kinds = _fields(kind).values() if _is_record(kind) else [kind]
    return all(part in (*PLAIN_KINDS, list[Tensor]) for part in kinds)


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    """The types of a NamedTuple's fields; asked at every call of an operator."""
    return get_type_hints(kind)


def _built(kind: Any, values: Iterator[Any]) -> Any:
    """The value of a parameter, from the flat arguments that are left."""
    if not _is_record(kind):
        return next(values)
    return kind(*(_built(part, values) for part in _fields(kind).values()))


def _flat_parameters(name: str, kind: Any) -> Iterator[inspect.Parameter]:
    """Those of an operator for one of its body."""
    if not _is_record(kind):
        yield inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        return
    for field, part in _fields(kind).items():
        yield from _flat_parameters(f"{name}_{field}", part)


def _signature(body: Callable[..., Any]) -> inspect.Signature:
    """The operator's: flat, and a tensor for everything that the body may return None for."""
    signature = inspect.signature(body, eval_str=True)
    flattened = [
        found
        for name, parameter in signature.parameters.items()
        for found in _flat_parameters(name, parameter.annotation)
    ]
    returned = signature.return_annotation
    if returned not in (None, Tensor):
        number = len(getattr(returned, "_fields", get_args(returned)))  # of a tuple, maybe named
        returned = tuple[(Tensor,) * number]  # type: ignore[misc]
    return signature.replace(parameters=flattened, return_annotation=returned)
