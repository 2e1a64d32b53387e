"""The launch table: which form of the row kernel a row gets, in which pieces, on how many programs.

Every choice is made from shapes, dtypes, the options that are on and the GPU's kind; nothing here
waits for a device. `python -m bench resources` compiles every line ahead of time, without a GPU,
into bench/results/resources.json: registers, stack, access widths. No line spills there, on sm_80,
sm_90, sm_100 and gfx942 with Triton 3.9, and where rows are wide, accesses are 16 bytes. The
figures beside the lines are from that file: the most registers of any of the line's kernels on
sm_90 | sm_100. No line has been timed on a GPU yet: `python -m bench forms` does that, and prints
lines to paste.
"""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

FORMS = ("auto", "resident", "streaming")
CLUSTER_OF_16 = 132  # multiprocessors of a GPU whose clusters may have 16 programs (H100 SXM)


class Target(NamedTuple):
    """What a kernel is compiled for."""

    backend: str  # "cuda" | "hip"
    capability: int  # 90 for an H100; 0 for AMD
    multiprocessors: int
    triton: tuple[int, int]

    @property
    def largest_cluster(self) -> int:
        """The most programs that may share a row; 1 where there are no clusters.

        Triton 3.7 and older abort on `num_ctas`. Clusters above 8 need a GPU whose processing
        clusters have 16 multiprocessors: the small versions of a chip (H20, PCIe, MIG) may not, so
        it takes those of a whole one. A driver that refuses all the same says so at launch;
        SGP_ROW_FORM=streaming needs no clusters.
        """
        if self.backend != "cuda" or self.capability // 10 not in (9, 10) or self.triton < (3, 8):
            return 1
        return 16 if self.multiprocessors >= CLUSTER_OF_16 else 8


class Row(NamedTuple):
    """What the choice depends on."""

    V: int
    light: bool = True  # no softcap, no class weight
    plain: bool = True  # light, and no smoothing, statistics or upstream entropy
    wide: bool = True  # 16-byte accesses: 8 divides V and every stride between rows
    contiguous: bool = True  # the vocabulary, in logits and gradient
    itemsize: int = 2  # bytes of a logit
    halving: bool = False  # a bf16 or fp16 gradient of float32 logits
    gradient: bool = True  # False: loss and statistics only


class Line(NamedTuple):
    """One line of the table, and what `choose` makes of it for a row."""

    form: str  # "resident" | "streaming"
    BV: int  # columns in a block, or in a piece of a resident row
    threads: int  # of one program
    pieces: int = 1  # of a resident row, at most
    programs: int = 1  # that share a resident row: the size of a cluster
    per_multiprocessor: int = 1  # programs whose registers a multiprocessor is to hold

    @property
    def columns(self) -> int:
        """The longest row."""
        return self.BV * self.pieces

    @property
    def registers(self) -> int:
        """What a thread may have, of the 65 536 of a multiprocessor."""
        return min(255, 65_536 // (self.threads * self.per_multiprocessor))


PIECES = (1, 2, 3, 4, 5, 6, 8, 10)  # counts that are compiled; rows between two take the larger

# Rows of one block: 8 or 16 columns a thread, room for every option.
ONE_BLOCK = (
    Line("resident", 256, 32),  # 76 | 77
    Line("resident", 1_024, 64),  # 163 | 139
    Line("resident", 2_048, 128),  # 144 | 140
    Line("resident", 4_096, 256),  # 145 | 138
)
# Up to 64 columns a thread in 128 registers, so that a multiprocessor holds two programs: one
# loads while the other stores. Pieces of 8 columns a thread: one access of 16 bytes in bf16. (In
# one program or two, 40 columns a thread spilled 2 registers on sm_100, 64 spilled 4.)
LIGHT = (
    Line("resident", 2_048, 256, 4, 1, 2),  # 128 | 128
    Line("resident", 4_096, 256, 4, 2, 2),  # 128 | 128
    Line("resident", 8_192, 256, 8, 4, 2),  # 128 | 128
    Line("resident", 16_384, 256, 8, 8, 2),  # 128 | 128
    Line("resident", 32_768, 512, 8, 8),  # 128 | 128
)
# Without a gradient 64 columns a thread spill 2 to 8 registers with smoothing and statistics on.
LIGHT_LOSS = tuple(line._replace(pieces=min(6, line.pieces)) for line in LIGHT)
# 80 columns a thread: bf16 spills 8 registers on sm_100, a float32 gradient 2 on sm_90.
LIGHT_90 = Line("resident", 16_384, 256, 10, 8, 2)  # 128 | 128
# Softcap or class weights: up to 40 columns a thread in 255 registers. (48 spilled 4 on sm_100 with
# softcap and statistics.)
HEAVY = (
    Line("resident", 2_048, 256, 5),  # 247 | 235
    Line("resident", 4_096, 256, 5, 2),  # 248 | 238
    Line("resident", 8_192, 256, 5, 4),  # 251 | 245
    Line("resident", 16_384, 256, 5, 8),  # 255 | 241
    Line("resident", 32_768, 256, 5, 16),  # 255 | 241
)
# 32 columns a thread in 128 registers: a float32 gradient spills 2, everything on 2 on sm_100.
HEAVY_LONG_90 = Line("resident", 65_536, 512, 4, 16)  # 128 | 0
# Accesses of one element: up to 32 columns a thread (48 spilled with smoothing), and not in one
# program, where 24 did with statistics.
NARROW = (
    Line("resident", 4_096, 256, 4, 2, 2),  # 128 | 128
    Line("resident", 8_192, 256, 4, 4, 2),  # 128 | 128
    Line("resident", 16_384, 256, 4, 8, 2),  # 128 | 128
)
# Blocks of what is streamed, in forward or in backward. A row gets 1024 threads where the options
# leave room for that, so that few rows share a multiprocessor and the second loop finds the row in
# L2; with smoothing, statistics, softcap or class weights it gets 512, with twice the registers.
STREAMING_PLAIN = Line("streaming", 16_384, 1_024)  # 56 | 53
STREAMING_HALVING = Line("streaming", 8_192, 1_024)  # 39 | 39; 16 384 spilled 2 registers on sm_90
STREAMING = Line("streaming", 8_192, 512)  # 77 | 92
STREAMING_NARROW = Line("streaming", 4_096, 512)  # 72 | 78


def choose(row: Row, target: Target, form: str | None = None) -> Line:
    """The line of a row's loss, `pieces` set to what the row takes.

    Args:
        row: what is known of the row.
        target: what it is compiled for.
        form: "auto", "resident" or "streaming"; None asks SGP_ROW_FORM.

    Raises:
        ValueError: if the form is unknown, or resident for a row that cannot be.
    """
    form = form or os.environ.get("SGP_ROW_FORM", "auto")
    if form not in FORMS:
        raise ValueError(
            f"sgp: SGP_ROW_FORM = {form!r}; expected 'auto', 'resident' or 'streaming'"
        )
    if form == "streaming":
        return blocks(row, target)
    for line in resident_lines(row, target):
        if line.columns >= row.V:
            return line._replace(pieces=next(k for k in PIECES if line.BV * k >= row.V))
    if form == "resident":
        raise ValueError(f"sgp: SGP_ROW_FORM = 'resident' cannot hold {_words(row, target)}")
    return blocks(row, target)


def resident_lines(row: Row, target: Target) -> Iterator[Line]:
    """The lines that such a row may have, whatever its length, in the order of preference."""
    yield from ONE_BLOCK
    if not row.contiguous:
        return
    lines = LIGHT if row.light else HEAVY
    float32_gradient = row.itemsize == 4 and not row.halving
    if not row.wide:
        lines = NARROW if row.light else ()
    elif row.light and not row.gradient:
        lines = LIGHT_LOSS
    elif target.capability // 10 == 9 and not float32_gradient:
        lines = (*LIGHT[:-1], LIGHT_90, LIGHT[-1]) if row.light else (*HEAVY, HEAVY_LONG_90)
    old = target.triton < (3, 9)  # 3.8 fails on clusters ("PlanCTA") where a kernel has more steps
    for line in lines:
        if line.programs > target.largest_cluster:
            continue
        if line.programs > 1 and old:
            if row.plain:
                yield line._replace(pieces=min(6, line.pieces))
        else:
            yield line


def blocks(row: Row, target: Target) -> Line:
    """The line of a kernel that goes through a row block by block."""
    if not row.wide or not row.contiguous:
        line = STREAMING_NARROW
    elif not row.plain:  # masks of 16 columns a thread spilled 6 scalar registers on gfx942
        line = STREAMING_NARROW if target.backend == "hip" else STREAMING
    else:
        line = STREAMING_HALVING if row.halving else STREAMING_PLAIN
    return next((small for small in ONE_BLOCK if small.columns >= row.V), line)._replace(
        form="streaming"
    )


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device; of a CPU, under the interpreter, an H100, whose forms it runs."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    if device.type == "cpu":
        return Target("cuda", 90, CLUSTER_OF_16, (max(major, 3), 9))
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", 0, properties.multi_processor_count, (major, minor))
    capability = 10 * properties.major + properties.minor
    return Target("cuda", capability, properties.multi_processor_count, (major, minor))


def _words(row: Row, target: Target) -> str:
    """Why a row cannot be resident."""
    longest = max(line.columns for line in resident_lines(row, target))
    why = []
    if not row.contiguous:
        why.append("a vocabulary with a stride")
    elif not row.wide:
        why.append("8 does not divide V, a stride between rows or the start in memory")
    if not row.light:
        why.append("softcap or class weights")
    if not row.gradient:
        why.append("no gradient")
    if target.largest_cluster < 16:
        why.append(f"clusters of {target.largest_cluster} at most")
    reasons = f" ({'; '.join(why)})" if why else ""
    gpu = f"{target.backend} {target.capability or ''}".strip()
    version = ".".join(map(str, target.triton))
    return (
        f"rows of {row.V} columns: {longest} is the most{reasons} on {gpu} with Triton {version}; "
        "use 'auto' or 'streaming'"
    )
