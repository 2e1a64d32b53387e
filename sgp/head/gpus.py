"""Data sheets of GPUs, by which the planner and its pictures tell time."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A data sheet, and how much of it large matmuls and plain copies reach."""

    name: str
    flops: float  # dense bf16 operations a second
    bandwidth: float  # bytes a second
    reached: float = 0.77  # of `flops`, by a large matmul: 730 TFLOP/s on an H100, 790 on an H200
    copied: float = 0.9  # of `bandwidth`


GPUS = {
    "a100": Gpu("A100 80GB SXM", 312e12, 2.04e12),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12),
    "h200": Gpu("H200 SXM", 989e12, 4.8e12),
    "b200": Gpu("B200 SXM", 2250e12, 8.0e12),
    "l40s": Gpu("L40S", 362e12, 0.864e12),
    "4090": Gpu("GeForce RTX 4090", 165e12, 1.01e12),
}
NOMINAL = GPUS["h100"]
