"""Instructions an element of a streamed row, read from machine code, beside Liger's kernel.

    python -m bench loops                # table and results file
    python -m bench loops --target sm_100

No GPU is needed: the kernels are compiled for one that is named, and disassembled by a tool of
Triton's package. An instruction counts where it stands in a loop that goes over the row, whether
it is executed for every block or, as the comparison with the target, for one of them. The file
names the sources that it was made from, as that of `resources` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console

from bench import files, tables
from bench.proof.binary import NamedTarget, read_nvidia
from bench.proof.kernel_cases import TARGETS, Case, call_of, target_of
from bench.proof.resources import fingerprint
from sgp.kernels import launch

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
FORMS = ("streaming", "staying", "blockwise")
LIGER = "liger_kernel.ops.cross_entropy"


def ours(V: int, dtype: str, layout: str, form: str, target: str) -> dict[str, Any]:
    """Our kernel's two loops, plain loss with its gradient."""
    call = call_of(Case("forward", V, dtype, "plain", layout, form), target_of(target))
    kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
    threads = 32 * call.constants["num_warps"]
    columns = call.constants["BV"] // threads
    columns_2 = call.constants.get("BV_2", call.constants["BV"]) // threads
    name = "sgp, " + {"blockwise": "the form of before"}.get(form, form)
    found = _read(kernel, columns, columns_2)
    return {"kernel": name, "V": V, "data": layout if layout == "head" else dtype, **found}


def ligers(V: int) -> dict[str, Any]:
    """Liger's kernel on bf16 rows, in the blocks and warps that Liger launches it with."""
    from liger_kernel.ops.cross_entropy import (  # noqa: PLC0415  (optional)
        liger_cross_entropy_kernel,
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    N, block = 64, min(32_768, triton.next_power_of_2(V))
    rows, target = empty(N, V, dtype=torch.bfloat16), empty(N, dtype=torch.int64)
    arguments = (
        *(rows, V, target, 1, None, empty(N), None, 1, None, 0, None, 0, V, N, float(N), 0.0),
        *(-100, 0.0, 0.0, "mean", None, False, False, False, block, False, False, True),
    )
    kernel = liger_cross_entropy_kernel.warmup(*arguments, grid=(N,), num_warps=32)
    return {
        "kernel": "Liger",
        "V": V,
        "data": "bf16",
        **_read(kernel, block // 1024, block // 1024),
    }


def _read(kernel: Any, columns: int, columns_2: int) -> dict[str, Any]:
    found = read_nvidia(kernel, wide=True)
    return {
        "first": round(found["first_loop"] / columns, 2),
        "second": round(found["second_loop"] / columns_2, 2),
        "meetings": found["meetings"],
        **{key: found[key] for key in ("loads_16", "stores_16", "registers", "spills")},
    }


def count(target: str) -> list[dict[str, Any]]:
    """Every kernel, ours first."""
    triton.runtime.driver.set_active(NamedTarget(TARGETS[target]))
    records = [ours(V, "bf16", "rows", form, target) for form in FORMS for V in VOCABULARIES]
    records += [
        ours(V, "fp32", "head", form, target) for form in FORMS for V in VOCABULARIES if V % 8 == 0
    ]
    try:
        records += [ligers(V) for V in VOCABULARIES]
    except ImportError:
        print("Liger is not installed and left out (pip install liger-kernel)")
    return records


def main() -> int:
    """Compile, print the table, write the results file."""
    parser = argparse.ArgumentParser(
        prog="python -m bench loops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    nvidia = [name for name, target in TARGETS.items() if target.backend == "cuda"]
    parser.add_argument("--target", choices=nvidia, default="sm_90", help="of a GPU (sm_90: H100)")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    arguments = parser.parse_args()
    if launch.runs_interpreted():
        parser.error("TRITON_INTERPRET=1 is set; unset it to compile")
    name = f"loops-{arguments.target}-triton-{triton.__version__}.json"
    output = arguments.output or files.RESULTS / name
    files.must_be_writable(output)
    records = count(arguments.target)
    table = tables.make(
        f"Plain loss with its gradient, {arguments.target}, Triton {triton.__version__}: "
        "instructions an element; meetings: barriers and shuffles in the first loop",
        ["kernel", "data"],
        ["V", "first loop", "second", "meetings", "registers", "spills"],
    )
    for r in records:
        numbers = (f"{r['first']:.2f}", f"{r['second']:.2f}", str(r["meetings"]))
        table.add_row(
            r["kernel"], r["data"], str(r["V"]), *numbers, str(r["registers"]), str(r["spills"])
        )
    Console().print(table)
    header = {
        "target": arguments.target,
        "triton": triton.__version__,
        "liger": _liger_version(),
        "fingerprint": fingerprint(),
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    output.write_text(f'{json.dumps(header)[:-1]}, "records": [\n{lines}\n]}}\n')
    print(f"written: {output}")
    return 0


def _liger_version() -> str | None:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
