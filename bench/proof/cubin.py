"""Kernels compiled by one Triton and launched beside another, through the CUDA driver.

Clusters need Triton 3.8; a machine may have PyTorch with an older one. The compiled kernel carries
its cluster size (`.reqnctapercluster` in the PTX), so the driver alone can launch it: the grid is
rows times programs. A cubin runs on the architecture that it was made for.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgp.kernels.launch import Call

C_TYPES = {
    "i1": ctypes.c_int8,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}
SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "u8": 1, "b8": 1}
CLUSTER_ABOVE_8 = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Cubin(NamedTuple):
    """A compiled kernel and what launching it takes."""

    binary: bytes
    name: str
    types: list[str]  # of the leaves of its arguments, in order; "constexpr" is compiled in
    scratch: int  # pointers that Triton adds at the end; null, as these kernels use none
    shared: int  # bytes
    threads: int  # of one program
    programs: int  # of a cluster

    def save(self, path: Path) -> None:
        """As path (the binary) and path with .json (the rest)."""
        path.write_bytes(self.binary)
        rest = {key: value for key, value in self._asdict().items() if key != "binary"}
        path.with_suffix(".json").write_text(json.dumps(rest, indent=1))

    @classmethod
    def load(cls, path: Path) -> Cubin:
        """What `save` wrote."""
        return cls(binary=path.read_bytes(), **json.loads(path.with_suffix(".json").read_text()))


def build(call: Call) -> Cubin:
    """Compile a call for the target of Triton's active driver.

    Raises:
        ValueError: if the arguments that the binary takes are not those that it would be given.
    """
    kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
    types = list(_leaves(tuple(kernel.src.signature.values())))
    head = re.search(r"\.entry [^(]*\((.*?)\)", kernel.asm["ptx"], re.DOTALL)
    assert head is not None, "PTX has an entry"  # noqa: S101
    sizes = [SIZES[kind] for kind in re.findall(r"\.param \.(\w+)", head[1])]
    given = [8 if t[0] == "*" else ctypes.sizeof(C_TYPES[t]) for t in types if t != "constexpr"]
    scratch = len(sizes) - len(given)
    if sizes != [*given, *([8] * scratch)] or scratch < 0:
        raise ValueError(f"sgp: the binary takes {sizes} bytes, the arguments are {given}")
    meta = kernel.metadata
    return Cubin(
        binary=kernel.asm["cubin"],
        name=meta.name,
        types=types,
        scratch=scratch,
        shared=meta.shared,
        threads=32 * meta.num_warps,
        programs=meta.num_ctas,
    )


def _leaves(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _leaves(value)
        else:
            yield value


def pack(cubin: Cubin, call: Call) -> list[Any]:
    """The call's arguments as ctypes values, in the order in which the binary takes them."""
    values = list(_leaves(call.arguments))
    types = cubin.types[: len(values)]  # what follows was given by name, and is compiled in
    packed = []
    for kind, value in zip(types, values, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            packed.append(ctypes.c_void_p(value.data_ptr()))
        else:
            packed.append(C_TYPES[kind](value))
    return packed + [ctypes.c_void_p(None)] * cubin.scratch


class Launcher:
    """A cubin in the current CUDA context, ready to launch."""

    def __init__(self, cubin: Cubin) -> None:
        self.cubin = cubin
        self.driver = ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream()  # PyTorch's context is the current one
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin.binary)
        self._call("cuModuleGetFunction", ctypes.byref(self.function), module, cubin.name.encode())
        if cubin.programs > 8:
            self._call("cuFuncSetAttribute", self.function, CLUSTER_ABOVE_8, 1)
        if cubin.shared > 48 * 1024:
            self._call("cuFuncSetAttribute", self.function, DYNAMIC_SHARED, cubin.shared)

    def __call__(self, call: Call) -> None:
        """Launch on the current stream."""
        arguments = pack(self.cubin, call)
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(argument) for argument in arguments)
        )
        self._call(
            "cuLaunchKernel",
            self.function,
            *(call.grid[0] * self.cubin.programs, 1, 1),
            *(self.cubin.threads, 1, 1),
            self.cubin.shared,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            pointers,
            None,
        )

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise RuntimeError(f"sgp: {name} of {self.cubin.name} failed with CUDA error {code}")
