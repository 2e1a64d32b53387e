"""How many rows of logits a linear head holds at once, and what that costs.

The logits of M kept rows and V classes are made, used and forgotten some rows at a time. The
accumulator of the weight's gradient is read and written once a chunk, so few large chunks are
faster than many small ones; the logits are float32, `4 V` bytes a row, so large ones cost memory.

The choice is made from shapes alone, never from free memory: two ranks and two runs agree.

* On a GPU `GPU_ROWS` = 4096 rows, fewer where their logits would take more than 4 GiB (from
  V = 262 145 on). 4096 rows of V = 151 936 are 2.3 GiB.
* On a CPU what fits 256 MiB: 512 rows of V = 131 072.
* M rows in k chunks are shared out evenly, so that no chunk is a remainder of a few rows.
"""

from __future__ import annotations

import numbers

GPU_ROWS = 4096
GPU_BYTES = 4 << 30
CPU_BYTES = 256 << 20
MOST_ROWS = 1 << 40  # an operator's argument is an int64
TILE = 128  # rows of a matmul's tile: a chunk is a multiple of it where there are several


def default_chunk_rows(V: int, device_type: str) -> int:
    """The most rows of V float32 logits at once, at least 1.

    Example:
        >>> default_chunk_rows(151_936, "cuda"), default_chunk_rows(131_072, "cpu")
        (4096, 512)
    """
    if device_type == "cpu":
        return max(1, CPU_BYTES // (4 * V))
    return max(1, min(GPU_ROWS, GPU_BYTES // (4 * V)))


def check_chunk_rows(name: str, chunk_rows: object) -> None:
    """Raise ValueError or TypeError for what is neither None nor a number of rows."""
    if chunk_rows is None:
        return
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, numbers.Integral):
        raise TypeError(f"{name}: chunk_rows = {chunk_rows!r}; expected a whole number or None")
    if int(chunk_rows) < 1:
        raise ValueError(f"{name}: chunk_rows = {chunk_rows}; expected at least 1")


def split(M: int, chunk_rows: int) -> list[slice]:
    """M rows as the fewest chunks of at most `chunk_rows`, of nearly the same size.

    Example:
        >>> [(s.start, s.stop) for s in split(5000, 4096)]
        [(0, 2560), (2560, 5000)]
    """
    count = -(-M // chunk_rows)
    if count == 0:
        return []
    size = -(-M // count)
    if count > 1:
        size = min(chunk_rows, -(-size // TILE) * TILE)
    return [slice(start, min(start + size, M)) for start in range(0, M, size)]


def extra_bytes(
    M: int,
    N: int,
    V: int,
    D: int,
    *,
    chunk_rows: int,
    itemsize: int,
    weight_grad: bool = True,
    float16: bool = False,
    autocast: bool = False,
) -> int:
    """Memory of `mean` or `sum` beyond the inputs and their gradients, in bytes.

    With m rows a chunk: float32 logits `4 m V`; the gathered rows `m D itemsize` and their float32
    gradient `4 m D`; for weights of 2 bytes, where there are several chunks, the float32
    accumulator `4 V D`; and 4 bytes for each of the N losses. float16 always has the accumulator,
    and one of `4 N D` for the hidden states, because gradients wait in float32 for the loss
    scaler's factor. Autocast has a copy of the weight, `2 V D`, in the matmuls' dtype.
    On a CPU, which has no bf16 or fp16 matmul with a float32 result, two slices of at most
    `products.SLICE` float32 elements come on top.

    Args:
        M, N, V, D: kept rows, all rows, classes, width.
        chunk_rows: the most rows of logits at once.
        itemsize: bytes of an element of the weight.
        weight_grad: whether the weight requires grad.
        float16: whether the matmuls' operands are float16.
        autocast: whether the weight is converted to them.
    """
    parts = split(M, chunk_rows)
    m = max((part.stop - part.start for part in parts), default=0)
    operand = 2 if autocast else itemsize
    summed = weight_grad and itemsize < 4 and (len(parts) > 1 or float16)
    accumulator = 4 * V * D if summed else 0
    waiting = 4 * N * D if float16 and itemsize < 4 else 0
    copy = V * D * operand if autocast else 0
    return 4 * m * V + m * D * (operand + 4) + accumulator + waiting + copy + 4 * N
