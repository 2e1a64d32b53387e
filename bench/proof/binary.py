"""What a compiled kernel says of itself: registers, stack, access widths; no GPU needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NamedTarget:
    """A Triton driver that answers with a named target and cannot launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> str:
        """Whose kernels are whose."""
        return str(self.target.arch)  # keys the cache of compiled kernels

    def get_current_stream(self, _device: object) -> int:
        """None is used: nothing is launched."""
        return 0


def read_nvidia(kernel: Any, *, wide: bool) -> dict[str, Any]:
    """Of a cubin, by Triton's own tools; access widths where `wide` accesses are promised."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name) if wide else ""
    # `STACK` counts spills and frames, `LOCAL` local arrays; LDL and STL are accesses to them.
    # Disassembling takes half of the time: only where access widths are promised.
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    reading, writing = [], []
    for body in innermost_loops(sass):
        if any("LDG" in line for line in body):
            (writing if any("STG" in line for line in body) else reading).append(body)
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": kernel.metadata.shared,
        "loads_16": len(re.findall(r"\bLDG\.[\w.]*128", sass)),
        "stores_16": len(re.findall(r"\bSTG\.[\w.]*128", sass)),
        "narrow": len(re.findall(r"\b(?:LDG|STG)\.(?![\w.]*128)", sass)),
        # Of a streamed row: the loop that only reads, and the one that reads and writes.
        "first_loop": max(map(len, reading), default=0),
        "second_loop": max(map(len, writing), default=0),
        "meetings": sum(bool(re.search(r"\b(?:BAR|SHFL)\b", x)) for body in reading for x in body),
    }


def innermost_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop of a disassembly that has no loop inside."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    instructions = [(int(address, 16), text.strip()) for address, text in found]
    loops = []
    for end, text in instructions:
        target = re.search(r"\bBRA\b[^`]*?0x([0-9a-f]+)", text)
        if target and (start := int(target[1], 16)) < end:
            loops.append((start, end))
    return [
        [text for address, text in instructions if start <= address <= end]
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]


def read_amd(kernel: Any) -> dict[str, Any]:
    """Of AMD assembly, which says it in comments."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", text))

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared": kernel.metadata.shared,
        "loads_16": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "stores_16": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
    }


def tool(name: str, *arguments: str) -> str:
    """The output of a tool in Triton's package."""
    run = subprocess.run(
        [str(NVIDIA_TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return run.stdout
