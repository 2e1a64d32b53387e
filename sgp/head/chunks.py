"""The planner of a linear head: in which pieces the logits are made, for which memory and time.

M kept rows, V classes, width D. Three matmuls of `2 M V D` operations make the logits and, from
their gradient, the gradients of input and weight. Whole float32 logits take `4 M V` bytes, so they
are made in pieces. All ways sum in float32 and round once; they differ in what is held and in what
is done twice:

* **rows**: chunks of `rows` rows. The weight's gradient needs all rows: the gradient of the logits
  is kept in the matmuls' dtype, `2 M V` bytes, for one matmul at the end (`group` = M); or for
  groups of rows, whose matmuls add to a float32 sum, `4 V D` bytes that are read and written once a
  group. A group of one chunk has its gradient in the place of its logits.
* **slices**: the statistics of every row first; then the logits again, `columns` of the vocabulary
  at a time, for all rows. A slice's part of the weight's gradient is finished when it is made; the
  input's is summed, `4 M D` bytes. Four matmuls instead of three, and the least memory. Gradients
  that are asked for in backward, with a factor a row, make the logits again anyway.
* **held**: for those gradients, float32 logits wait for the backward, where a budget has room.

A loss of the caller's own stands between the statistics of a chunk and its gradient. Where it needs
more rows at once than fit a chunk, the statistics of all rows come first, and the logits again.

Everything is chosen from shapes, dtypes and a budget alone, so that two ranks and two runs agree,
and by the data sheet of a nominal GPU.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sgp.head.gpus import NOMINAL, Gpu
from sgp.head.products import FACTOR_ELEMENTS
from sgp.head.shape import Shape

CPU_BYTES = 256 << 20  # of a chunk's float32 logits
GPU_BYTES = 4 << 30  # at most, whatever the vocabulary
DEFAULT_ROWS = 4096  # of the chunk that the default budget has room for
BUSY_ROWS = 1024  # that keep the matmuls of a GPU busy where nothing is summed over chunks
LEAST_ROWS, LEAST_COLUMNS = 16, 128  # of a piece: smaller ones would save next to nothing
MOST_COLUMNS = 16_384  # of a slice: longer ones were no faster
SCALED_ELEMENTS = 1 << 23  # of an input's gradient that are multiplied at once: 32 MiB of float32
TILE = 128  # rows or columns of a matmul's tile
MOST = 1 << 40  # rows or bytes: an operator's argument is an int64
AS_FAST = 1.03  # ways within 3 % of the fastest are as fast, and the smallest of them is taken

# A matmul of n rows reaches n / (n + 80) of its full rate, one of n columns n / (n + 100): a fit.
FULL_ROWS, FULL_COLUMNS = 80, 100

UNSET = 0  # of chunk_rows and memory_budget


class Plan(NamedTuple):
    """One way, in pieces of some size, and what the whole call then takes."""

    way: str  # "rows" | "slices" | "held"
    rows: int  # of float32 logits at once
    group: int  # rows whose logits' gradient is kept for one matmul; `rows`: in their place
    columns: int  # of a slice of the vocabulary; 0: no slices
    padded: int  # M, or some more: what buffers for all rows have room for
    bytes: int = 0  # at most at once, beyond inputs, results and gradients
    flops: int = 0  # of the matmuls
    traffic: int = 0  # bytes of logits, their gradient and sums that are read and written
    busy: float = 1.0  # share of their full rate that the matmuls reach

    def keeps(self) -> bool:
        """Whether the logits' gradient has a place of its own."""
        return self.rows < self.group

    def seconds(self, gpu: Gpu = NOMINAL) -> float:
        """Of the matmuls and of the traffic, one after the other."""
        matmuls = self.flops / (gpu.flops * gpu.reached * self.busy)
        return matmuls + self.traffic / (gpu.bandwidth * gpu.copied)

    def words(self) -> str:
        """What is done, for people."""
        if self.way == "slices":
            return f"slices of {self.columns} columns, after chunks of {self.rows} rows"
        if self.way == "held":
            return "logits held for backward"
        if self.rows >= self.padded:
            return "one chunk"
        if self.group >= self.padded:
            return f"gradient kept, chunks of {self.rows} rows"
        if self.keeps():
            return f"gradient of {self.group} rows kept, chunks of {self.rows}, a float32 sum"
        return f"chunks of {self.rows} rows"


# -- what a caller asks for ------------------------------------------------------------------------


def check_sizes(name: str, chunk_rows: object, memory_budget: object) -> None:
    """Raise ValueError or TypeError for what is neither None nor a number of rows, or of bytes."""
    for label, value, what in (
        ("chunk_rows", chunk_rows, "a whole number"),
        ("memory_budget", memory_budget, "a whole number of bytes"),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}: {label} = {value!r}; expected {what} or None")
        if int(value) < 1:
            raise ValueError(f"{name}: {label} = {value}; expected at least 1")
    if chunk_rows is not None and memory_budget is not None:
        raise ValueError(
            f"{name}: chunk_rows = {chunk_rows} and memory_budget = {memory_budget}; pass one of "
            "them: the budget chooses the chunks"
        )


def even(M: int, most: int) -> int:
    """The size of the fewest pieces of at most `most`, so that none is a remainder of a few.

    Example:
        >>> even(5000, 4096), even(5000, 8192)
        (2560, 5000)
    """
    count = max(1, -(-M // most))
    size = max(1, -(-M // count))
    return size if count == 1 else min(most, -(-size // TILE) * TILE)


def parts(M: int, size: int) -> list[slice]:
    """M in pieces of this size; the last may be shorter.

    Example:
        >>> parts(5000, 2560)
        [slice(0, 2560, None), slice(2560, 5000, None)]
    """
    return [slice(start, min(start + size, M)) for start in range(0, M, size)]


def padded(M: int, N: int) -> int:
    """M rounded up to one of eight sizes an octave, so that the sizes of buffers repeat.

    At most N - 1, unless all N rows are meant.

    Example:
        >>> padded(1500, 8192), padded(8000, 8192), padded(8192, 8192)
        (1536, 8191, 8192)
    """
    step = 1 << max(0, (M - 1).bit_length() - 4)
    return M if M == N else min(-(-M // step) * step, N - 1)


# -- the plan --------------------------------------------------------------------------------------


def plan(name: str, shape: Shape, *, chunk_rows: int = UNSET, memory_budget: int = UNSET) -> Plan:
    """The way that a call takes.

    Args:
        name, shape: of the function, for messages, and of the call.
        chunk_rows: chunks of so many rows, each added to the gradients at once.
        memory_budget: bytes that the call may hold beyond inputs, results and gradients. UNSET:
            `default_budget`, beyond which more hardly helps; on a CPU 256 MiB of logits.

    Raises:
        ValueError: nothing fits the budget; the message names the least.
    """
    rounded = shape._replace(M=padded(shape.M, shape.N))
    found = _plan(rounded, chunk_rows, memory_budget)
    room = memory_budget
    if not (shape.input_grad or shape.weight_grad):  # what trains in a budget is evaluated in it
        room += shape.V * shape.D * shape.weight_bytes + shape.N * shape.D * shape.input_bytes
    if memory_budget and not chunk_rows and found.bytes > room:
        raise ValueError(
            f"{name}: memory_budget = {memory_budget}; the least that {shape.M} kept rows of "
            f"V = {shape.V} and D = {shape.D} take is {found.bytes} bytes ({found.words()})"
        )
    return found


@functools.lru_cache(maxsize=1024)
def _plan(shape: Shape, chunk_rows: int, memory_budget: int) -> Plan:
    """The plan; the smallest where nothing fits."""
    if chunk_rows or (shape.is_cpu and not memory_budget):
        rows = chunk_rows or max(1, CPU_BYTES // shape.row_bytes())
        if not chunk_rows and shape.least <= GPU_BYTES // shape.row_bytes():
            rows = max(rows, shape.least)
        return by_rows(shape, rows, rows)
    budget = memory_budget or default_budget(shape)
    found = tuple(ways(shape, budget, held=memory_budget > 0))
    fitting = [p for p in found if p.bytes <= budget]
    if not fitting:
        return min(found, key=lambda p: p.bytes)
    fastest = min(p.seconds() for p in fitting)
    as_fast = [p for p in fitting if p.seconds() <= AS_FAST * fastest]
    return min(as_fast, key=lambda p: (p.bytes, p.seconds()))


def default_budget(shape: Shape) -> int:
    """Bytes of a call with chunks of DEFAULT_ROWS and a float32 sum; without one, BUSY_ROWS."""
    busy = busy_rows(shape)
    rows = default_rows(shape) if shape.weight_grad or shape.least > busy else busy
    return by_rows(shape, rows, rows).bytes


def default_rows(shape: Shape) -> int:
    """DEFAULT_ROWS, fewer where their logits would take more than GPU_BYTES."""
    return max(1, min(DEFAULT_ROWS, GPU_BYTES // shape.row_bytes()))


def busy_rows(shape: Shape) -> int:
    """BUSY_ROWS, more where the vocabulary is short, fewer for one of millions."""
    of_bytes = CPU_BYTES // shape.row_bytes() // TILE * TILE
    return max(1, min(max(BUSY_ROWS, of_bytes), default_rows(shape)))


def ways(shape: Shape, budget: int, *, held: bool) -> Iterator[Plan]:
    """Every way in sizes worth a look; with `held`, of a caller's budget, down to the smallest."""
    M, busy = max(1, shape.M), busy_rows(shape)
    sizes = {min(k * busy, M) for k in (1, 2, 4, 8)} | {M}
    sizes |= {min(shape.least, M)} - {0}
    if held:
        sizes |= {min(busy >> k, M) for k in range(1, busy.bit_length()) if busy >> k >= LEAST_ROWS}
    for group in _groups(shape, sizes) if shape.keeps_any() else ():
        yield from (by_rows(shape, size, group) for size in sizes if size < group)
    yield from (by_rows(shape, size, size) for size in sizes)
    if shape.late and held and not shape.teachers.is_on():
        yield hold(shape, 4 * busy)
    early = (held or shape.least > busy) and not shape.is_half
    if not shape.weight_grad or not (shape.late or early) or shape.teachers.is_listed:
        return
    for rows in sorted({max(1, busy // 2), *(size for size in sizes if size <= 2 * busy)}):
        yield from (by_slices(shape, rows, columns) for columns in _columns(shape, rows, budget))


def _groups(shape: Shape, sizes: Iterable[int]) -> list[int]:
    """All rows, halves of them down to DEFAULT_ROWS, and these sizes."""
    found, group = {shape.M, *sizes}, shape.M
    while group > DEFAULT_ROWS:
        group = -(-group // (2 * TILE)) * TILE
        found.add(group)
    return sorted(found)


def _columns(shape: Shape, rows: int, budget: int) -> list[int]:
    """Widths of slices: powers of two, and the widest that the budget has room for."""
    found = [LEAST_COLUMNS << k for k in range((MOST_COLUMNS // LEAST_COLUMNS).bit_length())]
    least = by_slices(shape, rows, LEAST_COLUMNS).bytes
    room = max(0, budget - least) // (shape.sum_bytes() * max(1, shape.M) * TILE)
    found.append(min(MOST_COLUMNS, LEAST_COLUMNS + TILE * room))
    return sorted({min(columns, shape.V) for columns in found})


# -- the arithmetic --------------------------------------------------------------------------------


def by_rows(shape: Shape, rows: int, group: int) -> Plan:
    """Chunks of `rows`, the logits' gradient kept for `group` rows."""
    s, M = shape, max(1, shape.M)
    group = even(M, max(rows, group))
    chunk = even(group, rows)
    if rows >= s.least > chunk:
        chunk, group = min(s.least, M), max(group, min(s.least, M))
    groups = -(-M // group)
    # The weight's gradient in float32: a sum over groups, or one that waits for its factor.
    narrow = s.weight_grad and not s.into and s.weight_bytes < s.sum_bytes()
    summed = s.sum_bytes() * s.V * s.D if narrow and (groups > 1 or s.wide) else 0
    logits = s.sum_bytes() * chunk * s.V
    kept = group * -(-s.V // 8) * 8 * s.operand_bytes if s.weight_grad and chunk < group else 0
    rows_of_group = _gathered(s, group)
    # While a chunk is made: not yet the weight's gradient, if one matmul makes it.
    comparing = _of_teachers(s, chunk, s.V) - (_input_gradient(s) if chunk >= M else 0)
    at_once = max(_of_input(s, chunk), _converted(s, chunk), comparing)
    making = logits + kept + rows_of_group + at_once + _waiting(s)
    if narrow or groups == 1:
        making += (summed if groups > 1 else 0) - _of_weight(s)
    multiplying = (kept or logits) + rows_of_group + _waiting(s) + _converted(s, group)
    multiplying += summed - _of_weight(s) if summed else 0
    multiplying += _before_factor(s) if s.own or not summed else 0
    multiplying += group * s.D * s.operand_bytes if s.is_half else 0
    finishing = summed + _waiting(s) + (s.N * s.D * s.input_bytes if s.wide else 0)
    rest = (multiplying, finishing) if s.weight_grad else (_scaling(s),)
    most = max(making, *rest)
    # The logits, in backward, or because the caller's loss needs more rows than a chunk has.
    again = int((s.late or chunk < s.least) and (s.input_grad or s.weight_grad))
    matmuls = 1 + s.input_grad + s.weight_grad + again
    slower = (matmuls - s.weight_grad) / _busy(chunk) + s.weight_grad / _busy(group)
    of_sum = 2 * s.sum_bytes() * s.V * s.D * (groups - 1) if s.weight_grad else 0
    return Plan(
        "rows", chunk, group, 0, M,
        bytes=most + _numbers(s) + _copied_weight(s) + s.teachers.copied,
        flops=2 * M * s.V * (s.D * matmuls + s.teachers.width * (1 + again)),
        traffic=_row_traffic(s) * (1 + again) + of_sum,
        busy=matmuls / slower,
    )  # fmt: skip


def by_slices(shape: Shape, rows: int, columns: int) -> Plan:
    """Statistics in chunks of `rows`; then slices of `columns` for all rows."""
    s, M = shape, max(1, shape.M)
    chunk, columns = even(M, rows), even(s.V, columns)
    logits = s.sum_bytes() * chunk * s.V
    counting = logits + _gathered(s, chunk) + _copied_weight(s)
    counting += max(_converted(s, chunk), _of_teachers(s, chunk, s.V))
    counting -= _of_results(s)  # which are not there yet
    summed = s.sum_bytes() * M * s.D if s.input_grad else 0
    slicing = s.sum_bytes() * M * columns + _gathered(s, M) + summed
    multiplying = _converted(s, M) + _before_factor(s, columns)
    slicing += max(multiplying, _of_teachers(s, M, columns))
    slicing -= s.N * s.D * s.input_bytes if s.input_grad else 0
    if s.operand_bytes != s.weight_bytes:
        slicing += columns * s.D * s.operand_bytes
    if s.is_half and s.weight_grad:
        slicing += M * s.D * s.operand_bytes
    scattered = not _is_whole(s) and s.input_bytes < s.sum_bytes()
    finishing = summed + (M * s.D * s.input_bytes if scattered and summed else 0)
    matmuls = 2 + s.input_grad + s.weight_grad
    slower = 1 / _busy(chunk) + (matmuls - 1) / _busy(columns, FULL_COLUMNS)
    of_sum = 2 * summed * (-(-s.V // columns) - 1)
    return Plan(
        "slices", chunk, chunk, columns, M,
        bytes=max(counting, slicing, finishing) + _numbers(s) + s.teachers.copied,
        flops=2 * M * s.V * (s.D * matmuls + 2 * s.teachers.width),
        traffic=2 * _row_traffic(s) + of_sum,
        busy=matmuls / slower,
    )  # fmt: skip


def hold(shape: Shape, rows: int) -> Plan:
    """All logits, made in chunks of `rows`, until their gradient takes their place in backward."""
    s, M = shape, max(1, shape.M)
    chunk = even(M, rows)
    logits, copied = s.sum_bytes() * M * s.V, _copied_weight(s)
    making = _gathered(s, chunk) + _converted(s, chunk) + copied - _of_results(s)
    of_input = _gathered(s, M) + _of_input(s, M) + copied - _of_weight(s)
    of_weight = _gathered(s, M) + _before_factor(s) + _converted(s, M)
    of_weight += M * s.D * s.operand_bytes if s.is_half else 0
    matmuls = 1 + s.input_grad + s.weight_grad
    return Plan(
        "held", chunk, M, 0, M,
        bytes=logits + max(making, of_input, of_weight) + _numbers(s),
        flops=2 * M * s.V * s.D * matmuls,
        traffic=_row_traffic(s),
        busy=matmuls / (1 / _busy(chunk) + (matmuls - 1) / _busy(M)),
    )  # fmt: skip


def _of_weight(s: Shape) -> int:
    """The weight's gradient, where the call gives one."""
    return s.V * s.D * s.weight_bytes if s.weight_grad and not s.into else 0


def _of_results(s: Shape) -> int:
    """Both gradients."""
    return _of_weight(s) + (s.N * s.D * s.input_bytes if s.input_grad else 0)


def _is_whole(s: Shape) -> bool:
    """Whether every row is kept, so that none has to be gathered."""
    return s.M >= s.N


def _gathered(s: Shape, rows: int) -> int:
    """Some rows of the hidden states, where they are not used as they are."""
    if _is_whole(s) and s.is_contiguous and s.input_bytes == s.operand_bytes:
        return 0
    return rows * s.D * s.operand_bytes


def _converted(s: Shape, rows: int) -> int:
    """Rows in float32 on a CPU, which has no matmul of 16 bits with a float32 result."""
    return rows * s.D * s.sum_bytes() if s.is_cpu and s.is_narrow() else 0


def _of_input(s: Shape, rows: int) -> int:
    """The float32 gradient of some hidden states, and rounded to theirs before it is scattered."""
    if not s.input_grad:
        return 0
    scattered = not _is_whole(s) and s.input_bytes < s.sum_bytes() and not s.wide
    return rows * s.D * (s.sum_bytes() + s.input_bytes * scattered)


def _input_gradient(s: Shape) -> int:
    """The input's gradient, which is not there yet while the rows of an only chunk are compared."""
    return s.N * s.D * s.input_bytes + _waiting(s) if s.input_grad else 0


def _waiting(s: Shape) -> int:
    """What the input's gradient takes more in float32, while it waits for the scaler's factor."""
    if not (s.wide and s.input_grad):
        return 0
    return s.N * s.D * (s.sum_bytes() - s.input_bytes)


def _before_factor(s: Shape, columns: int = MOST) -> int:
    """float16: a part of the weight's gradient before its factor."""
    if not (s.is_half and s.weight_grad):
        return 0
    return s.sum_bytes() * min(columns * s.D, s.V * s.D, FACTOR_ELEMENTS)


def _scaling(s: Shape) -> int:
    """The input's gradient as it waits for an upstream gradient a row, and some rows times that."""
    if not s.scaled:
        return 0
    waiting = s.N * s.D * (s.sum_bytes() if s.wide else s.input_bytes)
    return waiting + s.sum_bytes() * min(s.N * s.D, SCALED_ELEMENTS)


def _of_teachers(s: Shape, rows: int, columns: int) -> int:
    """What comparing some rows and columns with a teacher takes: its logits and hidden states."""
    t = s.teachers
    wide = s.sum_bytes() if s.is_cpu and t.operand_bytes < s.sum_bytes() else 0
    hidden = rows * t.width * (t.operand_bytes + wide)
    lists = rows * t.listed * (8 + 10 * s.sum_bytes())
    return s.sum_bytes() * rows * columns * t.copies + hidden + lists


def _copied_weight(s: Shape) -> int:
    """The weight in the matmuls' dtype, under autocast."""
    return 0 if s.operand_bytes == s.weight_bytes else s.V * s.D * s.operand_bytes


def _numbers(s: Shape) -> int:
    """Losses, and what a backward needs of each row; or what the caller's loss makes of it."""
    saved = 10 if s.teachers.is_on() else 3
    return (12 if s.own else 1 + saved * s.late) * s.sum_bytes() * s.N


def _row_traffic(s: Shape) -> int:
    """Logits written and read, their gradient written and read by each matmul."""
    grads = s.input_grad + s.weight_grad
    wide = 2 + s.own + 3 * s.teachers.copies  # a teacher's are written, and read twice
    return s.M * s.V * (wide * s.sum_bytes() + s.operand_bytes * (1 + grads if grads else 0))


def _busy(size: int, full: int = FULL_ROWS) -> float:
    """The share of its full rate that a matmul of so many rows, or columns, reaches."""
    return size / (size + full)
