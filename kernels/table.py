"""The launch table: which form of the row kernel a row gets, in which blocks, on how many programs.

Every choice is made from shapes, dtypes, the options that are on and the GPU's kind; nothing here
waits for a device. `python -m bench resources` compiles every line ahead of time, without a GPU,
into bench/results/resources.json: registers, stack, access widths, instructions an element. No line
spills there, on sm_80, sm_90, sm_100 and gfx942 with Triton 3.9, and where rows are wide, accesses
are 16 bytes.

"timed" beside a line is its share of a copy's bandwidth, the plain loss of 8192 rows (the head's:
4096), all kept, on 2026-11-27 with Triton 3.6 (bench/results/gpu-*.jsonl). On an H200 these kernels
were timed, at commit 318fc76. On an H100 those of commit bcac0b3 were, and where rows are streamed
the prototype that `row_streaming` was designed after, which has not been on an H100 itself.
`python -m bench gpu` times the lines and others beside them, and prints lines to paste.
"""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

FORMS = ("auto", "resident", "streaming", "staying", "blockwise")
MULTIPROCESSORS = 132  # of an H100 SXM and an H200
LARGE_MEMORY = 120 << 30  # bytes; an H200 has more, an H100 less


class Target(NamedTuple):
    """What a kernel is compiled for."""

    backend: str  # "cuda" | "hip"
    capability: int  # 90 for an H100; 0 for AMD
    multiprocessors: int
    triton: tuple[int, int]
    memory: int = 80 << 30  # bytes

    @property
    def has_clusters(self) -> bool:
        """Whether programs may share a row: on sm_90 and sm_100, from Triton 3.8 on."""
        return self.backend == "cuda" and self.capability // 10 in (9, 10) and self.triton >= (3, 8)

    @property
    def is_h200(self) -> bool:
        """Whether its memory is that much faster than an H100's that other lines win."""
        return self.capability == 90 and self.memory > LARGE_MEMORY


class Row(NamedTuple):
    """What the choice depends on."""

    V: int
    light: bool = True  # no softcap, no class weight
    quiet: bool = True  # no smoothing, statistics or upstream entropy
    wide: bool = True  # 16-byte accesses: 8 divides V and every stride between rows
    edges: bool = False  # wide, but for the columns before the first and after the last access
    contiguous: bool = True  # the vocabulary, in logits and gradient
    itemsize: int = 2  # bytes of a logit
    halving: bool = False  # a bf16 or fp16 gradient of float32 logits
    gradient: bool = True  # False: loss and statistics only
    argmax: bool = False  # wanted with the statistics
    align: int = 8  # the largest power of two up to 16 that divides V and every stride

    @property
    def plain(self) -> bool:
        """Whether the kernel needs few registers."""
        return self.light and self.quiet


class Line(NamedTuple):
    """One line of the table, and what `choose` makes of it for a row."""

    form: str  # "resident" | "streaming" | "blockwise"
    BV: int  # columns in a block of the first loop, or in a piece of a resident row
    threads: int  # of one program
    pieces: int = 1  # of a resident row, at most
    programs: int = 1  # that share a resident row: the size of a cluster
    per_multiprocessor: int = 1  # programs whose registers a multiprocessor is to hold
    BV_2: int = 0  # columns in a block of the second loop; 0: as in the first
    descends: bool = False  # the first loop, so that the second begins with what was read last
    stays: bool = False  # a program takes row after row

    @property
    def columns(self) -> int:
        """The longest resident row."""
        return self.BV * self.pieces

    @property
    def registers(self) -> int:
        """What a thread may have, of the 65 536 of a multiprocessor."""
        return min(255, 65_536 // (self.threads * self.per_multiprocessor))


# Rows of one block: 8 or 16 columns a thread, room for every option. Not timed.
ONE_BLOCK = (
    Line("resident", 256, 32),
    Line("resident", 1_024, 64),
    Line("resident", 2_048, 128),
    Line("resident", 4_096, 256),
)
# The head's float32 rows with a 16-bit gradient, in a cluster: up to 64 columns a thread in 128
# registers, in pieces of 8. Anything else lost to streaming: on an H100 bf16 at V = 32 000 has 45 %
# in a cluster, at 128 256 64 %. With argmax they spilled. On an H200 streaming has 69 % at 128 256
# too, and 67 at 151 936. Not timed on sm_100.
PIECES = (6, 7, 8, 10)  # counts that are compiled; rows between two take the larger
CLUSTERS = (
    Line("resident", 16_384, 256, 8, 8, 2),  # timed: H100 79 % at V = 128 256, H200 69
    Line("resident", 16_384, 256, 10, 8, 2),  # timed: H100 83 % at V = 151 936, H200 73
    Line("resident", 32_768, 512, 8, 8),  # timed: H100 68 % at V = 262 144
)
# Columns. At 32 000 a cluster has 60 %, streaming 92 (H200: 77 and 83); between there and 128 256
# streaming was not timed.
CLUSTERS_FROM = 100_000

# What is streamed, by bytes of a logit: (columns that a row must be shorter than, line).
# 64 bytes of a row a thread and block: with fewer less is on its way from memory.
STREAMING = {
    2: (
        (100_000, Line("streaming", 16_384, 512, 1, 1, 2, 8_192)),  # timed: H100 98 % at 32 000
        (200_000, Line("streaming", 32_768, 1_024)),  # timed: H100 96 % at 128 256, 87 at 151 936
        # The second reading misses L2. Timed: H100 78 % at 262 144.
        (None, Line("streaming", 32_768, 1_024, BV_2=16_384, descends=True)),
    ),
    4: (  # timed for the head's rows, with a 16-bit gradient in their place
        (100_000, Line("streaming", 16_384, 1_024, BV_2=8_192)),  # timed: H100 92 % at 32 000
        # timed: H100 74 % at 128 256, 71 at 151 936
        (None, Line("streaming", 16_384, 1_024, BV_2=8_192, descends=True)),
    ),
}
# An H200 has 63 MB of L2. These lines won where the bf16 rows that are read at a time have 27 to 40
# MB; where they have 53 MB, at 50 264, the first line has 69 %. So a line goes as far as 42 MB, the
# last one farther. Between these sizes nothing was timed.
STREAMING_H200 = {
    2: (
        (40_000, Line("streaming", 8_192, 256, 1, 1, 4, 4_096)),  # timed: 90 % at 32 000
        # timed: 81 % at 50 264, 80 at 50 257
        (80_000, Line("streaming", 16_384, 512, 1, 1, 2, 8_192)),
        # timed: 77 % at 128 256, 78 at 151 936, 74 at 262 144
        (None, Line("streaming", 32_768, 1_024, BV_2=16_384)),
    ),
    4: (
        # timed: 83 % at 32 000 for the head's rows
        (100_000, Line("streaming", 8_192, 512, 1, 1, 2, 4_096, descends=True)),
        # timed: 69 % at 128 256, 67 at 151 936 for the head's rows; 74 at 128 256 in float32
        (None, Line("streaming", 16_384, 1_024)),
    ),
}
# On sm_100 a second loop of 32 columns spilled 7 registers where rows begin between two accesses.
# Not timed there.
STREAMING_100 = {
    2: (
        STREAMING[2][0],
        (200_000, Line("streaming", 32_768, 1_024, BV_2=16_384)),
        STREAMING[2][2],
    ),
    4: STREAMING[4],
}
# For programs that stay, where those lines spill. Timed: H200 74 % at 32 000, 58 at 128 256, 56 at
# 151 936 for the head's rows, 65 at 128 256 in float32. In bf16 not timed.
ROOMY = {
    2: ((None, Line("streaming", 16_384, 512, BV_2=8_192)),),
    4: ((None, Line("streaming", 8_192, 512, BV_2=4_096)),),
}
# Without a gradient there is no second reading, and so nothing to keep in L2. Not timed.
LOSS = {
    2: ((None, Line("streaming", 16_384, 512, 1, 1, 2)),),
    4: ((None, Line("streaming", 8_192, 512, 1, 1, 2)),),
}
# Some options: 32 bytes of a row a thread and block leave them registers. Not timed.
OPTIONS = {
    2: (
        (100_000, Line("streaming", 8_192, 512, 1, 1, 2)),
        (None, Line("streaming", 16_384, 1_024)),
    ),
    4: (
        (100_000, Line("streaming", 4_096, 512, 1, 1, 2)),
        (None, Line("streaming", 8_192, 1_024)),
    ),
}
OPTIONS_LOSS = {size: ((None, lines[0][1]),) for size, lines in OPTIONS.items()}
# Softcap, class weights or argmax, and smoothing or statistics; on sm_100 the latter alone. Not
# timed.
EVERYTHING = {
    2: ((None, Line("streaming", 8_192, 512)),),
    4: ((None, Line("streaming", 4_096, 512)),),
}
STREAMING_NARROW = Line("streaming", 4_096, 512)  # accesses of one element. Not timed.
# Two rows at once: 8 columns of each a thread and block. Anything but a forward KL without options
# needs more than 64 registers. Not timed.
TWO_ROWS = {
    2: (
        (100_000, Line("streaming", 4_096, 512, 1, 1, 2)),
        (None, Line("streaming", 8_192, 1_024)),
    ),
    4: (
        (100_000, Line("streaming", 4_096, 512, 1, 1, 2)),
        (None, Line("streaming", 8_192, 1_024)),
    ),
}
TWO_ROWS_HEAVY = {size: ((None, Line("streaming", 4_096, 512)),) for size in TWO_ROWS}
TWO_ROWS_NARROW = Line("streaming", 2_048, 512)
# With more than 2 columns of each a thread, masks spilled scalar registers on gfx942. Not timed.
TWO_ROWS_HIP = (
    Line("streaming", 256, 64),
    Line("streaming", 1_024, 256),
    Line("streaming", 2_048, 512),
)
# Logits and probabilities, by the bytes of the narrower. Not timed.
PROBABILITIES = {
    2: ((None, Line("streaming", 8_192, 512)),),
    4: ((None, Line("streaming", 4_096, 512)),),
}
# Strided float32 with every option spilled with 8 columns a thread. Not timed.
PROBABILITIES_NARROW = Line("streaming", 2_048, 512)
EVERYTHING_NARROW = {2: ((None, STREAMING_NARROW),)}

# One pass over a row that is read and written once. Not timed in these kernels; a plain copy of a
# row in this geometry has 94 to 96 % on an H100.
ONE_PASS = Line("streaming", 16_384, 1_024)
ONE_PASS_HALVING = Line("streaming", 8_192, 1_024)
ONE_PASS_HEAVY = Line("streaming", 8_192, 512)

# The lines of the form of before, slower than streaming at every size.
# timed: H200 53 % at 32 000, 62 at 128 256, 59 at 151 936, 57 at 262 144; H100, with a second loop
# of its own, 66 % at 32 000, 74 at 128 256, 67 at 151 936
BLOCKWISE = Line("blockwise", 16_384, 1_024)
# timed: H200 54 % at 32 000, 51 at 128 256 and 151 936 for the head's rows
BLOCKWISE_HALVING = Line("blockwise", 8_192, 1_024)
BLOCKWISE_HEAVY = Line("blockwise", 8_192, 512)
BLOCKWISE_NARROW = Line("blockwise", 4_096, 512)  # timed: H200 42 % at 50 257


def choose(row: Row, target: Target, form: str | None = None) -> Line:
    """The line of a row's loss, `pieces` set to what the row takes.

    Args:
        row: what is known of the row.
        target: what it is compiled for.
        form: one of FORMS; None asks SGP_ROW_FORM.

    Raises:
        ValueError: if the form is unknown, or resident for a row that cannot be.
    """
    form = form or os.environ.get("SGP_ROW_FORM", "auto")
    if form not in FORMS:
        raise ValueError(
            f"sgp: SGP_ROW_FORM = {form!r}; expected one of {', '.join(map(repr, FORMS))}"
        )
    if form in ("auto", "resident"):
        for line in resident_lines(row, target):
            if line.columns >= row.V:
                pieces = (1, *PIECES) if line.programs == 1 else PIECES
                return line._replace(pieces=next(k for k in pieces if line.BV * k >= row.V))
    if form == "resident":
        raise ValueError(f"sgp: SGP_ROW_FORM = 'resident' cannot hold {_words(row, target)}")
    if form == "blockwise":
        return blockwise(row, target)
    if form == "staying":
        return staying(row, target)
    return streaming(row, target)


def resident_lines(row: Row, target: Target) -> Iterator[Line]:
    """The lines that such a row may have, whatever its length, in the order of preference."""
    yield from ONE_BLOCK
    is_head = row.halving and row.light and row.wide and row.contiguous and not row.edges
    if not is_head or row.argmax or not target.has_clusters or row.V < CLUSTERS_FROM:
        return
    if target.triton >= (3, 9):
        yield from CLUSTERS
    elif row.quiet:  # 3.8 fails on more sums, and on ten pieces ("PlanCTA")
        yield from (line for line in CLUSTERS if line.pieces <= 8)


def _small(row: Row, form: str) -> Line | None:
    """The line of a row that is no longer than a block."""
    found = next((line for line in ONE_BLOCK if line.columns >= row.V), None)
    return None if found is None else found._replace(form=form)


def streaming(row: Row, target: Target) -> Line:
    """The line of a row's loss that is streamed."""
    is_blackwell = target.capability // 10 == 10
    if not row.quiet and (not row.light or row.argmax or is_blackwell):
        # The edges of 16 columns a thread spilled 6 scalar registers on gfx942.
        is_tight = target.backend == "hip" and row.edges and row.itemsize == 2
        lines = EVERYTHING_NARROW if is_tight else EVERYTHING
    elif not row.plain:
        lines = OPTIONS if row.gradient else OPTIONS_LOSS
    elif not row.gradient:
        lines = LOSS
    elif is_blackwell:
        lines = STREAMING_100
    else:
        lines = STREAMING_H200 if target.is_h200 else STREAMING
    return _by_length(row, lines)


def two_rows(row: Row, target: Target) -> Line:
    """The line of a kernel that streams a student's row and its teacher's."""
    if target.backend == "hip" and not row.plain:
        return next((x for x in TWO_ROWS_HIP if x.BV >= row.V), TWO_ROWS_HIP[-1])
    return _by_length(row, TWO_ROWS if row.plain else TWO_ROWS_HEAVY, TWO_ROWS_NARROW)


def staying(row: Row, target: Target) -> Line:
    """The line of a row's loss by programs that take row after row.

    On an H200 the plain loss lost by it, but for bf16 at V = 128 256: 78 % with a second loop of 32
    columns. The next row's first block takes registers beside what the options take.

    Raises:
        ValueError: on AMD, where every line was seen to spill with some option.
    """
    if target.backend == "hip":
        raise ValueError("sgp: SGP_ROW_FORM = 'staying' has no lines for AMD; use 'streaming'")
    if not row.plain:
        return _by_length(row, EVERYTHING)._replace(stays=True)
    if row.itemsize == 4 or target.capability // 10 == 10:
        return _by_length(row, ROOMY)._replace(stays=True)
    return streaming(row, target)._replace(stays=True)


def _by_length(
    row: Row,
    lines: dict[int, tuple[tuple[int | None, Line], ...]],
    narrow: Line = STREAMING_NARROW,
) -> Line:
    """The line of a row among those of its kind."""
    small = _small(row, "streaming")
    if small is not None:
        return small
    if not row.wide or not row.contiguous:
        return narrow
    by_length = lines[row.itemsize]
    return next(line for longest, line in by_length if longest is None or longest > row.V)


def probabilities(row: Row) -> Line:
    """The line of a kernel that streams logits and probabilities."""
    return _by_length(row, PROBABILITIES, PROBABILITIES_NARROW)


def one_pass(row: Row, target: Target) -> Line:
    """The line of a kernel that goes through a row once, block by block."""
    small = _small(row, "streaming")
    if small is not None:
        return small
    if not row.wide or not row.contiguous:
        return STREAMING_NARROW
    if not row.plain:  # masks of 16 columns a thread spilled 6 scalar registers on gfx942
        return STREAMING_NARROW if target.backend == "hip" else ONE_PASS_HEAVY
    return ONE_PASS_HALVING if row.halving else ONE_PASS


def blockwise(row: Row, target: Target) -> Line:
    """The line of a row's loss in the form of before."""
    small = _small(row, "blockwise")
    if small is not None:
        return small
    if not row.wide or not row.contiguous or row.edges:
        return BLOCKWISE_NARROW
    if not row.plain:
        return BLOCKWISE_NARROW if target.backend == "hip" else BLOCKWISE_HEAVY
    return BLOCKWISE_HALVING if row.halving else BLOCKWISE


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device; of a CPU, under the interpreter, an H100, whose forms it runs.

    One with a single multiprocessor, so that a program that stays has more than one row to take.
    """
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    if device.type == "cpu":
        return Target("cuda", 90, 1, (max(major, 3), 9))
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Target(
        "hip" if torch.version.hip else "cuda",
        capability,
        properties.multi_processor_count,
        (major, minor),
        properties.total_memory,
    )


def _words(row: Row, target: Target) -> str:
    """Why a row cannot be resident."""
    longest = max(line.columns for line in resident_lines(row, target))
    why = []
    if not row.halving:
        why.append("no 16-bit gradient of float32 logits")
    if not row.contiguous:
        why.append("a vocabulary with a stride")
    elif not row.wide or row.edges:
        why.append("8 does not divide V, a stride between rows or the start in memory")
    if not row.light:
        why.append("softcap or class weights")
    if row.argmax:
        why.append("argmax")
    if not row.quiet and target.triton < (3, 9):
        why.append("smoothing or statistics with Triton 3.8")
    if not target.has_clusters:
        why.append("no clusters")
    if row.V < CLUSTERS_FROM:
        why.append(f"clusters from {CLUSTERS_FROM} columns on")
    reasons = f" ({'; '.join(why)})" if why else ""
    gpu = f"{target.backend} {target.capability or ''}".strip()
    version = ".".join(map(str, target.triton))
    return (
        f"rows of {row.V} columns: {longest} is the most{reasons} on {gpu} with Triton "
        f"{version}; use 'auto' or 'streaming'"
    )
