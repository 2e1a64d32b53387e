"""A GPU that is not here: sgp's kernels launched on CPU tensors, by a driver that does nothing.

What the host does for a launch is all there: the choice of the kernel, Triton's own launcher with
every argument, compiled for sm_90, down to cuLaunchKernelEx, which returns at once (standin.c).
Nothing is computed, so results are whatever was in memory. `install` changes this process for
good: it is for a benchmark or a test in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sgp.rows import backend

SOURCE = Path(__file__).with_suffix(".c")
TARGET = "sm_90"
KEPT: list[Any] = []  # operators stay for as long as their library does


def obstacle(*, launches: bool = True) -> str:
    """Why there can be no stand-in here; empty if there can.

    Args:
        launches: whether kernels are to be launched, for which a C compiler is needed.
    """
    if not backend.has_triton():
        return "Triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: unset it, kernels are compiled here"
    if launches and compiler() is None:
        return "a C compiler is needed, for a driver that does nothing: install gcc, or set CC"
    return ""


def compiler() -> str | None:
    """What Triton takes as well: CC, or gcc or clang."""
    wanted = os.environ.get("CC")
    names = [wanted] if wanted else ["gcc", "clang", "cc"]
    return next((found for name in names if (found := shutil.which(name))), None)


def install(driver: Any = None) -> None:
    """Make sgp launch kernels on CPU tensors.

    Args:
        driver: a driver for Triton instead of one that launches by its own launcher.

    Raises:
        RuntimeError: if there can be no stand-in, or sgp has changed in what is replaced here.
    """
    if reason := obstacle(launches=driver is None):
        raise RuntimeError(f"no stand-in for a GPU: {reason}")
    os.environ["SGP_BACKEND"] = "triton"
    _pretend_cuda()
    if driver is None:
        driver = _driver()
    import triton  # noqa: PLC0415  (after the library that stands in for the driver's)

    triton.runtime.driver.set_active(driver)
    _persuade()
    KEPT.append(_wide_matmuls())


# -- Triton ----------------------------------------------------------------------------------------


def _driver() -> Any:
    """Triton's driver of NVIDIA GPUs over a library whose calls do nothing."""
    _load_library()
    from triton.backends.nvidia import driver as nvidia  # noqa: PLC0415

    class Driver(Device, nvidia.CudaDriver):  # type: ignore[misc]
        """Without the questions that it asks PyTorch about the GPU."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher

    return Driver()


class Device:
    """What Triton asks of a device, answered at the price of the same question about a GPU."""

    get_current_device = staticmethod(torch.cuda.current_device)  # 0
    get_current_stream = staticmethod((0,).__getitem__)  # of device 0; a call of C, as PyTorch's is

    def get_current_target(self) -> Any:
        """What to compile for."""
        from bench.proof.kernel_cases import TARGETS  # noqa: PLC0415  (imports Triton)

        return TARGETS[TARGET]

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def _load_library() -> None:
    """Load standin.c under the name of the CUDA driver's library, compiled once, in Triton's cache.

    In one place, because Triton keeps what it links against it under the name of the folder.
    """
    import triton  # noqa: PLC0415

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = SOURCE.read_bytes() + (include / "cuda.h").read_bytes()
    name = f"sgp-standin-{hashlib.sha256(source).hexdigest()[:16]}"
    folder = Path(triton.knobs.cache.dir) / name
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            new = Path(unfinished) / library.name
            command = [str(compiler()), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
            command += [f"-I{include}", "-o", str(new), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            new.replace(library)
    if not (folder / "libcuda.so").exists():  # Triton 3.5 links by this name
        with contextlib.suppress(FileExistsError):  # two processes at once
            (folder / "libcuda.so").symlink_to(library.name)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


# -- PyTorch ---------------------------------------------------------------------------------------


class OnGPU:
    """What is asked of a tensor on a GPU to find out where a kernel has to be launched."""

    is_cuda = True
    device = torch.device("cuda:0")

    def get_device(self) -> int:
        """The GPU's number."""
        return 0


def _pretend_cuda() -> None:
    """Let PyTorch say that GPU 0 is the current one, by the steps that it takes with a GPU.

    A method of C that gives 0 is as dear as a question that the CUDA runtime has the answer to.
    `torch.cuda.is_available()` stays False: nothing else is to take this for a GPU.
    """
    torch.cuda._initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
    torch._C._cuda_getDevice = ().__len__  # type: ignore[attr-defined]  # noqa: SLF001
    torch.cuda._exchange_device = (0,).__getitem__  # noqa: SLF001
    torch.cuda._maybe_exchange_device = (0, 0).__getitem__  # noqa: SLF001  (dynamo tells them apart)


def _wide_matmuls() -> torch.library.Library:
    """The matmuls of bf16 with a float32 result, which a CPU lacks: they do nothing.

    Python is called for one, which takes about as long as a call of cuBLAS.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", lambda _a, _b, _dtype, *, out: out, "CPU")
    library.impl(
        "mm.dtype", lambda a, b, dtype: a.new_empty(len(a), b.shape[1], dtype=dtype), "CPU"
    )
    library.impl("addmm.dtype_out", lambda _x, _a, _b, _dtype, *, out, **_: out, "CPU")
    return library


# -- sgp -------------------------------------------------------------------------------------------


def _persuade() -> None:
    """Answer what sgp asks about a tensor's device as for a GPU, at the same price."""
    import sgp  # noqa: F401, PLC0415  (all that may hold a name that is replaced)
    from bench.proof.kernel_cases import target_of  # noqa: PLC0415
    from sgp.head import products  # noqa: PLC0415
    from sgp.kernels import table  # noqa: PLC0415
    from sgp.rows import by_triton, problem  # noqa: PLC0415

    place = _attribute(by_triton, "device_of")
    on_gpu = OnGPU()

    def current_device(_: torch.Tensor) -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = place(on_gpu)
        return found

    def may_wait(tensor: torch.Tensor) -> bool:
        return tensor.device.type == "none" or os.environ.get("SGP_CHECK", "0") == "1"

    the_target = target_of(TARGET)

    def has_wide(x: torch.Tensor, _: str) -> bool:
        return x.dtype not in products.EXACT

    _replace(backend, "_interpreted", lambda: True)
    _replace(backend, "interpreter_fault", str)  # ""
    _replace(products, "_has_wide", has_wide)
    _replace(by_triton, "device_of", current_device)
    _replace(table, "target_of", functools.cache(lambda _: the_target))
    for module in list(sys.modules.values()):
        named = getattr(module, "__name__", "").startswith("sgp.")
        if named and module is not problem and hasattr(module, "may_wait"):
            _replace(module, "may_wait", may_wait)
    _replace(problem, "may_wait", may_wait)


def _attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise RuntimeError(f"{module.__name__}.{name} is gone: bench/proof/standin.py replaces it")
    return getattr(module, name)


def _replace(module: ModuleType, name: str, value: Any) -> None:
    _attribute(module, name)
    setattr(module, name, value)
