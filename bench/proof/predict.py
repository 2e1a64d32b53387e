"""Milliseconds on paper, from bytes, FLOPs and a GPU's data sheet, to hold a measurement against.

    python -m bench predict --gpu h200

The assumptions, all of them (a roofline: S. Williams et al. 2009, doi.org/10.1145/1498765.1498785):

* A kernel takes the longer of its bytes at `COPY` of the data sheet's bandwidth and its FLOPs at
  `MATMUL` of the data sheet's dense rate, and `LAUNCH_MS` to start; kernels follow one another.
* Nothing is found in the L2 cache but the second reading of a streamed row, which is: about one
  row per multiprocessor is held, 40 MB at 132 x 151 936 columns of bf16. Without it the streaming
  form takes (1 + 2 f) N V, the column "re-read".
* Logits in: the row kernel moves (1 + f) N V elements. Log-probabilities, and float16, whose
  gradient waits for the loss scaler's factor: f N V forward, then (1 + f) N V backward.
* Hidden states in: the kept rows' matmuls, 6 M V D FLOPs (8 for log-probabilities, whose logits
  are made twice); the row kernel reads 4 bytes and writes one gradient element for each of M V
  float32 logits; a weight gradient of several chunks, or of any in float16, is read and written in
  float32, 8 V D bytes a chunk.
* float32 matmuls run at the TF32 rate where PyTorch is told so; by default they do not, and are
  predicted at the rate outside the matrix units.

The last column is the measured time of sgp, where bench/results has a file of that GPU; a
prediction is not a measurement.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import NamedTuple

import torch
from rich.console import Console

from bench import files, tables
from bench.against import cases
from bench.against.cases import Case
from sgp.head import chunks
from sgp.head.shape import OfTeachers, Shape

COPY = 0.90  # of the data sheet's bandwidth
MATMUL = 0.75  # of the data sheet's dense rate
LAUNCH_MS = 0.005
KERNELS = {  # at least
    "logits": 1, "log-probs": 2, "linear": 6, "linear log-probs": 8, cases.OWN: 7, cases.KL: 7,
    cases.JSD: 7,
}  # fmt: skip
EARLY = ("linear", *cases.DIVERGENCES, cases.OWN)  # heads whose gradients are made with the loss


class Gpu(NamedTuple):
    """A data sheet: bandwidth in bytes/s, dense rates in FLOP/s, without sparsity."""

    name: str
    match: str  # a pattern of the names that its driver gives
    bandwidth: float
    half: float  # bf16 and fp16, matrix units
    single: float  # float32, outside them
    source: str


GPUS = {
    "a100": Gpu(
        "NVIDIA A100 SXM 80 GB",
        "A100-SXM4-80GB",
        2.039e12,
        312e12,
        19.5e12,
        "NVIDIA A100 data sheet, 2021",
    ),
    "h100": Gpu(
        "NVIDIA H100 SXM", "H100 80GB HBM3", 3.35e12, 989e12, 67e12, "NVIDIA H100 data sheet, 2024"
    ),
    "h200": Gpu(
        "NVIDIA H200 SXM", "NVIDIA H200$", 4.8e12, 989e12, 67e12, "NVIDIA H200 data sheet, 2024"
    ),
    "b200": Gpu(
        "NVIDIA B200 (HGX)",
        "NVIDIA B200$",
        8.0e12,
        2250e12,
        75e12,
        "NVIDIA HGX B200 data sheet, 2025",
    ),
    "mi300x": Gpu(
        "AMD Instinct MI300X", "MI300X", 5.3e12, 1307e12, 163.4e12, "AMD MI300X data sheet, 2023"
    ),
}


class Prediction(NamedTuple):
    """Milliseconds of a case."""

    bytes_ms: float
    flops_ms: float
    total_ms: float
    reread_ms: float  # the total where a streamed row's second reading misses the cache
    flops: float
    bytes: float


def predict(case: Case, gpu: Gpu) -> Prediction:
    """By the assumptions above."""
    N, M, V, D = case.N, case.M, case.model.V, case.model.D
    speed = COPY * gpu.bandwidth
    rate = MATMUL * (gpu.half if case.itemsize == 2 else gpu.single)
    late = case.form == "log-probs" or (case.form, case.dtype) == ("logits", "float16")
    launches = (KERNELS[case.form] + (late and case.form == "logits")) * LAUNCH_MS
    if not case.has_head:
        reads = 2 if late else 1
        moved = (1 + reads * case.kept) * N * V * case.itemsize
        again = 0.0 if late else case.kept * N * V * case.itemsize
        ms = 1e3 * moved / speed
        reread = ms + 1e3 * again / speed + launches
        return Prediction(ms, 0.0, ms + launches, reread, 0.0, moved)
    flops = (6.0 if case.form in EARLY else 8.0) * M * V * D
    passes = 1 if case.form == "linear" else 2  # the others read the logits twice
    if case.divergence:  # and those of a teacher, both for a mixture once more
        flops, passes = flops + 2.0 * M * V * D, 6 if case.form == cases.JSD else 4
    moved = (passes * 4.0 + case.itemsize) * M * V
    way = _plan(case)
    if way.way == "slices":  # the input's gradient is the sum
        moved += 8.0 * (-(-V // way.columns) - 1) * M * D
    elif way.group < M:
        moved += 8.0 * (-(-M // way.group) - 1) * V * D
    if case.dtype == "float16" and case.form in EARLY:  # waits for its factor in float32
        moved += 8.0 * V * D
    bytes_ms, flops_ms = 1e3 * moved / speed, 1e3 * flops / rate
    total = bytes_ms + flops_ms + launches
    again = 4.0 * M * V if case.form in EARLY else 0.0
    return Prediction(bytes_ms, flops_ms, total, total + 1e3 * again / speed, flops, moved)


def _plan(case: Case) -> chunks.Plan:
    """What the head does by default on a GPU."""
    half = case.dtype == "float16"
    late = case.form not in EARLY
    teachers = OfTeachers(1, case.model.D, case.itemsize) if case.divergence else OfTeachers()
    return chunks.plan(
        "sgp",
        Shape(
            M=case.M, N=case.N, V=case.model.V, D=case.model.D, input_bytes=case.itemsize,
            weight_bytes=case.itemsize, operand_bytes=case.itemsize, input_grad=True,
            weight_grad=True, late=late, is_half=half, wide=half and not late,
            own=case.form == cases.OWN, least=int(case.form == cases.OWN),
            teachers=teachers,
        ),
    )  # fmt: skip


def measured(gpu: Gpu) -> dict[str, tuple[float, str]]:
    """Milliseconds of sgp by case, and the file they are from: the newest of that GPU."""
    for path, content in files.newest():
        if re.search(gpu.match, content["machine"]["name"]):
            return {
                record["name"]: (rival["both_ms"], path.name)
                for record in content["cases"]
                for rival in record["rivals"]
                if rival["rival"] == "sgp" and rival["both_ms"]
            }
    return {}


def here() -> str:
    """The GPU of this machine; h200 where it has none of the list."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((key for key, gpu in GPUS.items() if re.search(gpu.match, name)), "h200")


def main() -> int:
    """Print a line for every case of the GPU list."""
    parser = argparse.ArgumentParser(
        prog="python -m bench predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpu", choices=GPUS, default=here(), help="default: this machine's, or h200"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    arguments = parser.parse_args()
    gpu = GPUS[arguments.gpu]
    chosen = [case for case in cases.gpu_cases() if arguments.only in case.name]
    if not chosen:
        parser.error(f"--only {arguments.only!r}: no case has this in its name")
    known = measured(gpu)
    files = ", ".join(sorted({name for _, name in known.values()}))
    table = tables.make(
        f"{gpu.name}, predicted milliseconds: {gpu.bandwidth / 1e12:.2f} TB/s and "
        f"{gpu.half / 1e12:.0f} TFLOP/s ({gpu.source}), of which {COPY:.0%} and {MATMUL:.0%}",
        ["form", "model"],
        ["N", "kept", "bytes", "FLOPs", "total", "re-read", "measured"],
        notes=f"measured: {files or '-, there is no results file of this GPU'}",
    )
    for case in chosen:
        p = predict(case, gpu)
        timed = known.get(case.name)
        table.add_row(
            f"{case.form}{'' if case.dtype == 'bfloat16' else ' ' + case.dtype}"
            f"{'' if case.pattern == 'prefix' else ' ' + case.pattern}",
            case.model.name,
            str(case.N),
            f"{case.kept:g}",
            f"{p.bytes_ms:.2f}",
            f"{p.flops_ms:.2f}",
            f"{p.total_ms:.2f}",
            f"{p.reread_ms:.2f}",
            f"{timed[0]:.2f}" if timed else "-",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
