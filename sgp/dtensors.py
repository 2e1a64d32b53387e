"""DTensors, recognised here for the functions of one device, which `sgp.parallel` serves them for.

`sgp.parallel` stands on these functions, so it is not imported: it registers what serves DTensors
when it is imported itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Server(Protocol):
    """What computes a function of one device for arguments of which some are DTensors."""

    def of_logits(self, single: Callable[..., Any], input: Any, target: Any, **options: Any) -> Any:  # noqa: A002
        """`single(input, target, **options)`, the input being logits."""

    def of_head(
        self,
        single: Callable[..., Any],
        input: Any,  # noqa: A002
        linear_weight: Any,
        target: Any,
        linear_bias: Any = None,
        **options: Any,
    ) -> Any:
        """`single(input, linear_weight, target, ...)` of a linear head."""


_load: Callable[[], Server] | None = None


def is_dtensor(*values: Any) -> bool:
    """Whether one of them is a DTensor, whose module is not imported to find out."""
    return any(hasattr(value, "device_mesh") for value in values)


def serve(load: Callable[[], Server]) -> None:
    """Register what `server` returns; `load` is called at first use."""
    global _load  # noqa: PLW0603
    _load = load


def server() -> Server:
    """What takes DTensors.

    Raises:
        TypeError: where `sgp.parallel` was not imported.
    """
    if _load is None:
        raise TypeError("sgp: got a DTensor, which needs sgp.parallel; pass its .to_local()")
    return _load()
