"""Which kernels are compiled without a GPU: every line of the launch table, at its longest row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from sgp.kernels import launch, table
from sgp.kernels.launch import Options, Pair, Statistics
from sgp.kernels.layout import Matrix, matrix
from sgp.kernels.table import Row, Target

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
N = 64


class Case(NamedTuple):
    """One kernel as one line of the table launches it."""

    kernel: str  # forward | statistics | loss | backward | factor | of PROBABILITIES
    # of two rows: two rows (with the gradient) | two losses | two backward | two terms
    V: int
    dtype: str
    options: str  # plain | weighted | reported | logged | predicted | log-probs | all, or an option
    # logged: with statistics; predicted: with their argmax too, as is all
    # of two rows: a divergence; with ", all" everything else
    layout: str = "rows"  # rows | slice | strided | in place (strided, so is the gradient) | head
    # slice: logits[:, :-1], two strides between rows
    # head: a bf16 gradient in the first half of float32 rows, as the linear head has it
    # mixed: probabilities in float32 of 16-bit logits, or bf16 of float32 ones
    form: str = "auto"  # or another, forced
    gpu: str = ""  # "H200": with that one's lines

    @property
    def is_wide(self) -> bool:
        """Whether 16-byte accesses are promised."""
        edges = table.ONE_BLOCK[-1].columns < self.V and self.form != "blockwise"
        return (self.V % 8 == 0 and self.layout in ("rows", "slice", "head", "mixed")) or (
            edges and self.layout in ("rows", "mixed")
        )

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What the gradient is stored in."""
        return torch.bfloat16 if self.layout == "head" else DTYPES[self.dtype]

    @property
    def probability_dtype(self) -> torch.dtype:
        """What the probabilities of PROBABILITIES are stored in."""
        if self.layout == "mixed":
            return torch.bfloat16 if self.dtype == "fp32" else torch.float32
        return DTYPES[self.dtype]


# Loss and the logits' gradient; loss alone, saving; both gradients from what was saved.
PROBABILITIES = ("probabilities", "probabilities, loss", "probabilities, backward")


EVERY_KERNEL = (  # each kernel with nothing on and with everything on
    ("forward", "plain"),
    ("forward", "all"),
    ("statistics", "all"),
    ("backward", "all"),
    ("factor", "plain"),
)
DATA = (("bf16", "rows"), ("fp32", "rows"), ("fp32", "head"))
WIDE = ("bf16", "fp32")  # fp16 has bf16's width and another conversion
# Rows of a multiple of 16, and rows that begin and end between two accesses, by each line.
LENGTHS = (32_000, 50_257, 151_936, 151_937, 262_144)
H200_LENGTHS = (32_000, 32_001, 151_936, 151_937)  # of the lines that are its own
OPTIONS = (
    "weighted",
    "softcap",
    "smoothing",
    "class weight",
    "reported",
    "logged",
    "predicted",
    "all",
)
TWO_ROWS = ("forward_kl", "reverse_kl", "jsd")
OF_TWO_ROWS = ("two rows", "two losses", "two backward", "two terms")  # kernels
TWO_ROWS_ALL = tuple(f"{kind}, all" for kind in TWO_ROWS)


def target_of(name: str) -> Target:
    """A target of this list, as the launch table knows it, with the installed Triton."""
    found = TARGETS[name]
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    capability = 0 if found.backend == "hip" else int(found.arch)
    return Target(found.backend, capability, table.MULTIPROCESSORS, version)


def cases(name: str, *, longest: bool = False) -> list[Case]:
    """Every line of the table with every kernel that uses it, options off, on and one by one.

    sm_80 and gfx942 have no lines of their own, and only those cases that are likely to spill.
    """
    found = dict.fromkeys(
        (
            *(*one_block_cases(), *cluster_cases(name)),
            *(*streaming_cases(), *head_cases(), *one_pass_cases()),
            *(*two_rows_cases(), *probability_cases()),
        )
    )
    if TARGETS[name].backend == "hip":  # which has no lines for them
        found = [case for case in found if case.form != "staying"]
    if not longest and name in ("sm_90", "sm_100"):
        return list(found)
    telling = [case for case in found if _is_telling(case)]
    return [case for case in telling if _is_longest(case)] if longest else telling


def _is_telling(case: Case) -> bool:
    """Whether a case is one of those that are likely to spill, or to be the first to break."""
    of_two = case.kernel.startswith("two ")  # AMD has lines of its own for these
    if (case.V in (256, 1_024, 2_048, 50_264) and not of_two) or case.gpu:
        return False
    if (case.options, case.dtype) == ("plain", "bf16"):
        return True
    return case.options in ("logged", "predicted", "all", "part, all", "forward_kl", *TWO_ROWS_ALL)


def _is_longest(case: Case) -> bool:
    """A part of those that is compiled in minutes: long rows, everything on or nothing."""
    if case.form == "blockwise" or (case.form == "staying" and case.options != "plain"):
        return False
    if case.layout in ("strided", "in place") and case.dtype == "fp32":
        return False
    if case.options == "logged" and case.layout == "rows":
        return False
    return case.V in (4_096, 50_257, 151_936, 163_840, 262_144) or case.dtype == "fp16"


def one_block_cases() -> Iterator[Case]:
    """Rows that one block holds; streaming is forced too, where a GPU would choose resident."""
    for line, dtype in itertools.product(table.ONE_BLOCK, WIDE):
        yield Case("forward", line.BV, dtype, "plain")
        yield Case("forward", line.BV, dtype, "all")
        yield Case("forward", line.BV - 1, dtype, "all")  # accesses of one element
        yield Case("backward", line.BV, dtype, "all")
    V = table.ONE_BLOCK[-1].BV
    for dtype in WIDE:
        yield Case("statistics", V, dtype, "all")
        yield Case("factor", V, dtype, "plain")
        yield Case("forward", V, dtype, "all", form="streaming")
        for layout in ("strided", "in place"):
            yield Case("forward", V, dtype, "all", layout)
    for line, options in itertools.product(table.ONE_BLOCK, ("plain", "all")):
        yield Case("forward", line.BV, "fp32", options, "head")
    yield Case("backward", V, "fp32", "all", "head")


def cluster_cases(name: str) -> Iterator[Case]:
    """Every count of pieces of the lines whose programs share a row, at the longest row."""
    shorter = 0
    row = Row(V=table.CLUSTERS_FROM, itemsize=4, halving=True)
    for line in table.resident_lines(row, target_of(name)):
        for pieces in table.PIECES if line.programs > 1 else ():
            V = line.BV * pieces
            if line.columns >= V > max(shorter, table.CLUSTERS_FROM):
                yield Case("forward", V, "fp32", "plain", "head")
                yield Case("forward", V, "fp32", "logged", "head")
                if line.columns == V:
                    for options in ("weighted", "smoothing", "reported"):
                        yield Case("forward", V, "fp32", options, "head")
                    yield Case("forward", V - 8, "fp32", "logged", "head")  # no multiple of 16
        shorter = max(shorter, line.columns)


def streaming_cases() -> Iterator[Case]:
    """The row's loss block by block: every line, then every option."""
    for V, dtype, form in itertools.product(LENGTHS, WIDE, ("streaming", "staying")):
        yield Case("forward", V, dtype, "plain", form=form)
    for V, dtype, form in itertools.product(H200_LENGTHS, WIDE, ("streaming", "staying")):
        yield Case("forward", V, dtype, "plain", form=form, gpu="H200")
    for V, dtype in itertools.product((50_257, 151_936), WIDE):
        for options in OPTIONS:
            yield Case("forward", V, dtype, options, form="streaming")
        for options, form in itertools.product(
            ("logged", "predicted", "all"), ("staying", "blockwise")
        ):
            yield Case("forward", V, dtype, options, form=form)
        yield Case("forward", V, dtype, "plain", form="blockwise")
        for kernel, options in itertools.product(
            ("statistics", "loss"), ("plain", "logged", "predicted", "all")
        ):
            yield Case(kernel, V, dtype, options, form="streaming")
    for dtype, options in itertools.product(WIDE, ("plain", "logged", "all")):
        yield Case("forward", 50_264, dtype, options, form="streaming")  # a multiple of 8 alone
    yield Case("forward", 50_264, "bf16", "logged", "slice", form="streaming")
    yield Case("forward", 151_936, "fp16", "all", form="streaming")
    yield Case("forward", 151_936, "fp16", "plain")


def head_cases() -> Iterator[Case]:
    """Float32 rows whose gradient is bf16, in their place."""
    for V, form, options in itertools.product(
        (32_000, 50_257, 151_936), ("streaming", "staying"), ("plain", "logged", "predicted", "all")
    ):
        yield Case("forward", V, "fp32", options, "head", form=form)
    for V in (32_000, 151_936):
        yield Case("forward", V, "fp32", "plain", "head", form="streaming", gpu="H200")
        yield Case("forward", V, "fp32", "plain", "head", form="blockwise")
    for V, options in itertools.product((50_264, 50_257), ("plain", "all")):
        yield Case("backward", V, "fp32", options, "head")
    for V, options in itertools.product((4_096, 8_064, 16_128), ("part", "part, all")):
        yield Case("backward", V, "fp32", options, "head")  # a slice of the vocabulary


def one_pass_cases() -> Iterator[Case]:
    """The backward and the factor, and what goes element by element."""
    for V, dtype in itertools.product((50_257, 151_936), WIDE):
        for options in ("plain", "log-probs", "all", "part, all"):
            yield Case("backward", V, dtype, options)
        yield Case("factor", V, dtype, "plain")
    for dtype in (*WIDE, "fp16"):
        yield Case("backward", 50_264, dtype, "all")
    for dtype, layout in itertools.product(WIDE, ("strided", "in place")):
        for kernel, options in EVERY_KERNEL:
            yield Case(kernel, 50_257, dtype, options, layout)
        yield Case("forward", 50_257, dtype, "plain", layout, form="blockwise")


def two_rows_cases() -> Iterator[Case]:
    """A student's row and a teacher's: every line with each divergence, in the head and outside."""
    for V, (dtype, layout) in itertools.product((32_000, 50_257, 151_936), DATA):
        for options in (*TWO_ROWS, *TWO_ROWS_ALL):
            yield Case("two rows", V, dtype, options, layout)
    for line, options in itertools.product(table.ONE_BLOCK, TWO_ROWS_ALL):
        yield Case("two rows", line.BV, "bf16", options)
        yield Case("two rows", line.BV, "fp32", options, "head")
    for dtype, options in itertools.product(WIDE, ("forward_kl, all", "jsd, all")):
        yield Case("two losses", 151_936, dtype, options)
        yield Case("two backward", 151_936, dtype, options)
        yield Case("two rows", 50_257, dtype, options, "strided")
    for dtype in WIDE:
        yield Case("two terms", 151_936, dtype, "jsd, all")
    for options in ("forward_kl", "jsd, all"):
        yield Case("two backward", 16_128, "fp32", options, "head")


def _two_rows(case: Case, on: Target, logits: Matrix, dlogits: Matrix) -> launch.Call:
    """The launch of a case of two rows."""
    row = torch.empty(N, device="meta")
    target = torch.empty(N, dtype=torch.int64, device="meta")
    kind, _, everything = case.options.partition(", ")
    pair = Pair(beta=0.5 if kind == "jsd" else None)
    opt, theirs, stats = Options(scale=torch.empty((), device="meta")), Options(), None
    if everything:
        opt = Options(
            row_weight=row, scale=opt.scale, softcap=30.0, inverse_softcap=1 / 30.0, logit_scale=0.5
        )
        theirs = Options(softcap=30.0, inverse_softcap=1 / 30.0, logit_scale=0.5)
        pair = pair._replace(inverse_temperature=0.7, cross_entropy=0.1)
        stats = Statistics(row, row, row, torch.empty(N, dtype=torch.bool, device="meta"))
    opts, saved = (opt, theirs, pair), torch.empty(N, 10, device="meta")
    shared = {"V": case.V, "ignore_index": -100, "on": on}
    if case.kernel == "two terms":
        terms = torch.empty(N, 2, device="meta")
        return launch.two_rows_terms(logits, logits, target, saved, terms, opts, **shared)
    shared["kind"] = kind
    if case.kernel == "two backward":
        rows = (logits, logits, dlogits, target, None, saved)
        return launch.two_rows_gradient(*rows, opts, **shared)
    sink = dlogits if case.kernel == "two rows" else None
    saved = None if case.kernel == "two rows" else saved
    rows = (logits, logits, sink, target, None, row, saved, stats)
    return launch.two_rows_loss(*rows, opts, **shared)


def probability_cases() -> Iterator[Case]:
    """Rows whose target is a distribution."""
    for kernel, V, dtype in itertools.product(PROBABILITIES, (50_257, 151_936), WIDE):
        for options, layout in itertools.product(("plain", "all"), ("rows", "mixed")):
            yield Case(kernel, V, dtype, options, layout)
    for kernel, dtype in itertools.product(PROBABILITIES, WIDE):
        yield Case(kernel, table.ONE_BLOCK[-1].BV, dtype, "all")
        yield Case(kernel, 50_257, dtype, "all", "strided")
    yield Case(PROBABILITIES[0], 151_936, "fp16", "all")


def call_of(case: Case, on: Target) -> launch.Call:
    """The launch of a case on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    V, dtype = case.V, DTYPES[case.dtype]
    if case.gpu == "H200":
        on = on._replace(memory=table.LARGE_MEMORY + 1)
    logits = _matrix(case, dtype, strided=case.layout in ("strided", "in place"))
    dlogits = _matrix(case, dtype, strided=case.layout == "in place")
    if case.layout == "head":
        dlogits = _first_halves(case)
    if case.kernel.startswith("two "):
        return _two_rows(case, on, logits, dlogits)
    target, row = empty(N, dtype=torch.int64), empty(N)
    everything = Options(empty(V), empty(), row, empty(), 0.1, 1e-4, 30.0, 1 / 30.0, 0.5, 0.7)
    light = Options(None, None, row, empty(), 0.1, 1e-4, logit_scale=0.5, inverse_temperature=0.7)
    if case.kernel == "backward":
        everything = everything._replace(lse_weight=row, entropy_weight=row, entropy=row)
    part = {"first": 16_128, "vocabulary": 1 << 18}
    options = {
        "part": Options(row_weight=row, **part),
        "part, all": everything._replace(**part),
        "plain": Options(scale=empty()),
        "reported": Options(scale=empty()),
        "logged": light,
        "predicted": light,
        "weighted": light._replace(label_smoothing=None),
        "softcap": Options(scale=empty(), softcap=30.0, inverse_softcap=1 / 30.0),
        "smoothing": Options(scale=empty(), label_smoothing=0.1),
        "class weight": Options(weight=empty(V), weight_mean=empty(), scale=empty()),
        "log-probs": Options(
            row_weight=row, inverse_temperature=0.7, lse_weight=row, entropy_weight=row, entropy=row
        ),
        "all": everything,
    }[case.options]
    if case.kernel in PROBABILITIES:
        spread = _matrix(case, case.probability_dtype, strided=case.layout == "strided")
        rows = _matrix(case._replace(layout="rows"), case.probability_dtype, strided=False)
        _, loss, backward = (case.kernel == name for name in PROBABILITIES)
        return launch.probability_rows(
            logits, spread, None if loss else dlogits, rows if backward else None,
            None if backward else row, empty(N, 4) if loss or backward else None,
            options._replace(weight_mean=None, inverse_temperature=None), N=N, V=V, on=on,
        )  # fmt: skip
    shared = {"V": V, "ignore_index": -100, "on": on}
    if case.kernel == "backward":
        return launch.row_gradient(logits, dlogits, target, empty(N, 3), options, **shared)
    if case.kernel == "factor":
        return launch.multiply(dlogits, target, empty(), N=N, **shared)
    with_argmax = case.options in ("all", "predicted")
    with_stats = with_argmax or case.options in ("logged", "reported")
    stats = Statistics(row, row, row, empty(N, dtype=torch.bool)) if with_stats else None
    sink = dlogits if case.kernel == "forward" else None
    saved = empty(N, 3) if case.kernel == "statistics" else None
    shared["form"] = case.form
    shared["argmax"] = empty(N, dtype=torch.int64) if with_argmax else None
    return launch.row_forward(logits, sink, target, row, saved, stats, options, **shared)


def _matrix(case: Case, dtype: torch.dtype, *, strided: bool) -> Matrix:
    if strided:  # (B, V, T) moved to (B, T, V)
        x = torch.empty(4, case.V, N // 4, dtype=dtype, device="meta").movedim(1, -1)
    elif case.layout == "slice":
        x = torch.empty(4, N // 4 + 1, case.V, dtype=dtype, device="meta")[:, :-1]
    else:
        x = torch.empty(N, case.V, dtype=dtype, device="meta")
    found = matrix(x)
    assert found is not None, f"{case.layout}: has more than two levels of rows"  # noqa: S101
    return found


def _first_halves(case: Case) -> Matrix:
    rows = torch.empty(N, 2 * case.V, dtype=case.gradient_dtype, device="meta")
    found = matrix(rows[:, : case.V])
    assert found is not None, "one stride between rows"  # noqa: S101
    return found
