"""Watch what kernels ask of memory, under Triton's interpreter: bounds, bytes, distinct bytes.

Without a GPU this is exact: the interpreter executes every load and store of a kernel with real
addresses. `watch_accesses` raises on an access outside the tensors that the launch was given, and
counts the rest by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch


class OutOfBoundsError(AssertionError):
    """A kernel touched memory outside the tensors that it was given."""


@dataclass
class Region:
    """The bytes from the first to the last element of one tensor argument, and their traffic."""

    name: str
    start: int
    stop: int
    loaded: int = 0  # bytes asked for by loads
    stored: int = 0  # bytes asked for by stores
    touched_load: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(0, bool))
    touched_store: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(0, bool))


@dataclass
class Accesses:
    """All traffic of the launches inside one `watch_accesses`, by tensor."""

    launches: int = 0
    regions: dict[tuple[int, int], Region] = field(default_factory=dict)

    def of(self, tensor: torch.Tensor) -> Region:
        """The traffic of one tensor; zeros if no kernel was given it."""
        start, stop = _extent(tensor)
        return self.regions.get((start, stop), Region("unused", start, stop))

    def rows_loaded(self, tensor: torch.Tensor) -> list[int]:
        """The rows of a contiguous (N, V) tensor of which any byte was loaded."""
        touched = self.of(tensor).touched_load
        if not touched.size:
            return []
        return np.flatnonzero(touched.reshape(tensor.shape[0], -1).any(1)).tolist()

    def distinct(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(bytes of a tensor that were loaded, bytes that were stored), each counted once."""
        region = self.of(tensor)
        return int(region.touched_load.sum()), int(region.touched_store.sum())


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        labels = getattr(value, "_fields", range(len(value)))
        for label, item in zip(labels, value, strict=True):
            yield from _tensors(item, f"{name}.{label}")


@contextmanager
def watch_accesses(  # noqa: C901  (three closures over one state)
    *, distinct: bool = False
) -> Iterator[Accesses]:
    """Check and count every access of the kernels launched inside; `distinct` marks each byte.

    Raises:
        OutOfBoundsError: from the launch, naming the address and the nearest tensor.
    """
    from triton.runtime import interpreter  # noqa: PLC0415  (after TRITON_INTERPRET is set)

    from sgp.rows import backend  # noqa: PLC0415

    backend.interpreter_fault()  # asked now, so that the launch that it takes is not counted
    accesses = Accesses()
    active: list[Region] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def record(pointers: object, mask: object, kind: str) -> None:
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)]  # type: ignore[attr-defined]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # type: ignore[attr-defined]
        first, last = int(addresses.min()), int(addresses.max())
        region = next((r for r in active if r.start <= first and last + size <= r.stop), None)
        if region is None:
            nearest = min(active, key=lambda r: abs(first - r.start), default=None)
            raise OutOfBoundsError(f"{kind} of bytes {first}..{last + size} is outside {nearest}")
        if kind == "load":
            region.loaded += addresses.size * size
        else:
            region.stored += addresses.size * size
        if distinct:
            touched = region.touched_load if kind == "load" else region.touched_store
            for byte in range(size):
                touched[addresses.astype(np.int64) - region.start + byte] = True

    def checked_load(self: object, ptrs: object, mask: object, *rest: object) -> object:
        record(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def checked_store(
        self: object, ptrs: object, value: object, mask: object, *rest: object
    ) -> object:
        record(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    def checked_call(self: object, *args: object, **kwargs: object) -> object:
        accesses.launches += 1
        active.clear()
        named = (*enumerate(args), *kwargs.items())
        for name, tensor in (pair for key, v in named for pair in _tensors(v, str(key))):
            start, stop = _extent(tensor)
            region = accesses.regions.setdefault((start, stop), Region(name, start, stop))
            if distinct and not region.touched_load.size:
                region.touched_load = np.zeros(stop - start, bool)
                region.touched_store = np.zeros(stop - start, bool)
            active.append(region)
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor.__call__ = checked_call
    try:
        yield accesses
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = call
