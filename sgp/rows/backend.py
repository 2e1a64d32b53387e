"""Which implementation runs: the Triton kernels or PyTorch's operators, and why."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from sgp.caller import warn

CHOICES = ("auto", "triton", "torch")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; looks without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # blocked by an import hook, or by None in sys.modules
        return False


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """'triton' or 'torch' for a tensor of this device and dtype.

    `SGP_BACKEND=auto` (the default) runs the kernels on CUDA and ROCm tensors in bf16, fp16 and
    fp32, and PyTorch for the rest: CPU tensors, float64, and CUDA where Triton is missing (said
    once, as a warning). `SGP_BACKEND=torch` and `triton` force one; `triton` on CPU tensors needs
    `TRITON_INTERPRET=1` set before the process starts.

    Raises:
        RuntimeError: if a forced backend cannot run; there is no silent fallback.
        ValueError: if SGP_BACKEND is none of the three.
    """
    backend, why = explain(device, dtype)
    if backend == "triton":
        return backend
    if backend == "error":
        raise RuntimeError(f"sgp: SGP_BACKEND=triton cannot run: {why}")
    wanted = os.environ.get("SGP_BACKEND", "auto")
    if wanted == "auto" and device.type == "cuda" and not has_triton():
        _warn_once(why)
    return backend


def explain(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The choice ('triton', 'torch' or 'error') and its reason in words, for `sgp doctor`."""
    wanted = os.environ.get("SGP_BACKEND", "auto")
    if wanted not in CHOICES:
        raise ValueError(f"sgp: SGP_BACKEND = {wanted!r}; expected one of {', '.join(CHOICES)}")
    if wanted == "torch":
        return "torch", "SGP_BACKEND=torch"
    if wanted == "auto" and device.type == "cpu":
        return "torch", "CPU tensors run PyTorch's operators"
    obstacle = _obstacle(device, dtype)
    if wanted == "triton":
        return ("error", obstacle) if obstacle else ("triton", "SGP_BACKEND=triton")
    return ("torch", obstacle) if obstacle else ("triton", f"{device.type} tensors run the kernels")


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot run on such a tensor; empty if they can."""
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32 and take bf16, fp16 and fp32, not {dtype}"
    if device.type == "cuda":
        return ""
    if device.type != "cpu":
        return f"the kernels run on CUDA and ROCm devices, not on {device.type!r}"
    if not _interpreted():
        return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
    return interpreter_fault()


@functools.cache
def _interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on", "yes", "y"):
        return False
    from sgp.kernels.launch import runs_interpreted  # noqa: PLC0415  (imports Triton)

    return bool(runs_interpreted())


@functools.cache
def interpreter_fault() -> str:
    """Why Triton's interpreter cannot run the kernels, and what to install; empty if it can.

    One small launch, the first time: with NumPy 2.4 the interpreters of Triton 3.5 and 3.6 fail at
    every loop whose length is an argument.
    """
    import numpy as np  # noqa: PLC0415  (of use to the interpreter alone)
    import triton  # noqa: PLC0415
    from triton.runtime.errors import InterpreterError  # noqa: PLC0415

    from sgp.kernels import launch, layout  # noqa: PLC0415  (imports Triton)

    row, factor = torch.ones(1, 3, device="cpu"), torch.full((), 2.0, device="cpu")
    call = launch.multiply(layout.matrix(row), None, factor, N=1, V=3, ignore_index=-100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy 1.25 to 2.3, which made an error of it later
            call.kernel[call.grid](*call.arguments, **call.constants)
    except InterpreterError as error:
        why = error.__cause__ or error
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__} "
            f"({type(why).__name__}: {why}): pip install 'numpy<2.4', or Triton 3.7 or newer"
        )
    return ""


@functools.cache
def _warn_once(why: str) -> None:
    warn(f"sgp: CUDA tensors run PyTorch's operators: {why}")
