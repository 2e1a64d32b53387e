"""Compile every line of the launch table for GPUs that are not here, and read the binaries.

    python -m bench resources                 # table, results file, exit code 1 if a budget breaks
    python -m bench resources --targets sm_90
    python -m bench resources --longest       # fewer: of each resident line its longest row, with
                                              # nothing on and with everything on; the tables
                                              # alone, unless --output names a file

No GPU is needed: Triton's own launcher is asked for the kernel it would launch, for a target that
is named instead of found. Registers and stack come from `cuobjdump -res-usage`, access widths from
the disassembly, both from Triton's package; for AMD they are in the assembly itself. The budget:
no spills and no stack anywhere; on NVIDIA, where rows are wide, every access to logits and their
gradient is 16 bytes wide; a resident row has exactly as many loads as it takes to read it once; a
streamed row's first loop has no barrier and no shuffle, and a plain bf16 one takes at most 11
instructions an element there and 7 in the second loop (sm_90). The file names the sources that it
was made from (`fingerprint`).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console

from bench import files, tables
from bench.proof.binary import NamedTarget, read_amd, read_nvidia
from bench.proof.kernel_cases import (
    DTYPES,
    PROBABILITIES,
    TARGETS,
    Case,
    call_of,
    cases,
    target_of,
)
from sgp.kernels import launch, table

ROOT = files.ROOT
RESULTS = files.RESULTS / "resources.json"
LOOPS = {"first": 11.0, "second": 7.0}  # instructions an element, sm_90, plain bf16
SCALARS = 24  # narrow accesses of a row's own numbers: target, weights, loss, statistics


def fingerprint() -> str:
    """Of the kernels' sources, comments and docstrings aside."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    node.body[0] = ast.Pass()
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


def compile_case(case: Case, target_name: str) -> dict[str, Any]:
    """Compile one case for one target; what the binary says, and which budget it breaks."""
    target = TARGETS[target_name]
    triton.runtime.driver.set_active(NamedTarget(target))
    call = call_of(case, target_of(target_name))
    kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
    found = read_nvidia(kernel, wide=case.is_wide) if target.backend == "cuda" else read_amd(kernel)
    record: dict[str, Any] = {
        "target": target_name,
        **case._asdict(),
        "form": form_of(call),
        "BV": call.constants["BV"],
        "BV_2": call.constants.get("BV_2", call.constants["BV"]),
        "pieces": call.constants.get("PIECES", 1),
        "num_ctas": call.constants.get("num_ctas", 1),
        "num_warps": call.constants["num_warps"],
        **found,
    }
    record["broken"] = _broken_budgets(case, record, nvidia=target.backend == "cuda")
    return record


def form_of(call: launch.Call) -> str:
    """The form of the row kernel; of other kernels, that they go block by block."""
    if call.constants.get("STAYS"):
        return "staying"
    forms = {launch.row_resident: "resident", launch.row_blockwise: "blockwise"}
    return forms.get(call.kernel, "streaming")


def _broken_budgets(case: Case, record: dict[str, Any], *, nvidia: bool) -> list[str]:
    broken = []
    if record["spills"] or record["stack"]:
        broken.append(f"{record['spills']} spills, {record['stack']} bytes of stack")
    if nvidia and case.is_wide:
        broken += [*_broken_accesses(case, record), *_broken_loops(case, record)]
    return broken


def _columns(record: dict[str, Any]) -> tuple[int, int]:
    """Columns a thread of a block, or a piece, in the first loop and in the second."""
    threads = 32 * record["num_warps"] * record["num_ctas"]
    return record["BV"] // threads, record["BV_2"] // threads


def _accesses(case: Case, record: dict[str, Any]) -> tuple[int, int]:
    """Loads and stores of 16 bytes that one pass of a thread over its block, or its row, takes."""
    first, second = _columns(record)
    logit, gradient = DTYPES[case.dtype].itemsize, case.gradient_dtype.itemsize
    stores = second * record["pieces"] * gradient // 16
    if case.kernel in PROBABILITIES:
        both = logit + case.probability_dtype.itemsize
        _, loss, backward = (case.kernel == name for name in PROBABILITIES)
        loads = (0 if backward else first) * both // 16 + (0 if loss else second) * both // 16
        return loads, 0 if loss else second * (both if backward else gradient) // 16
    loads = first * record["pieces"] * logit // 16
    if case.kernel.startswith("two "):  # loops over both rows: sums, the terms of a jsd, gradient
        of_jsd = case.options.startswith("jsd")
        loops = {"two rows": 2 + of_jsd, "two losses": 1 + of_jsd}.get(case.kernel, 1)
        return 2 * loops * loads, stores if case.kernel in ("two rows", "two backward") else 0
    if case.kernel == "forward" and record["form"] != "resident":
        loads += second * logit // 16
    return loads, stores if case.kernel in ("forward", "backward", "factor") else 0


def _broken_accesses(case: Case, record: dict[str, Any]) -> list[str]:
    """Accesses that are narrower than they could be, or more than are due."""
    broken = []
    first, second = _columns(record)
    is_resident = record["form"] == "resident" and case.kernel == "forward"
    loads, stores = _accesses(case, record)
    for kind, expected in (("loads", loads), ("stores", stores)):
        if record[f"{kind}_16"] < expected:
            broken.append(f"{record[f'{kind}_16']} {kind} of 16 bytes, expected {expected}")
    has_weights = case.options in ("class weight", "all", "part, all")
    if is_resident and not has_weights and record["loads_16"] != loads:
        broken.append(f"{record['loads_16']} loads of 16 bytes, once is {loads}")
    # The target's gradient of a resident row is a store of one element in every lane, masked off.
    due = SCALARS + (first if is_resident else 0)
    if case.kernel == "two losses":  # what is saved, of kept and of ignored rows
        due += 20
    if has_weights and case.V % 8:  # class weights do not begin at 16 bytes in such a row
        due += 2 * (first + second)
    if record["narrow"] > due:
        broken.append(f"{record['narrow']} narrow accesses, at most {due} are due")
    return broken


def _broken_loops(case: Case, record: dict[str, Any]) -> list[str]:
    """Of a streamed row: what the threads of a program exchange, and how much they compute."""
    broken = []
    no_sums = case.kernel in ("backward", "factor", PROBABILITIES[-1])
    if record["form"] not in ("streaming", "staying") or no_sums:
        return broken
    if record["meetings"]:
        broken.append(f"{record['meetings']} barriers and shuffles in the first loop")
    is_counted = (record["target"], case.dtype, case.options) == ("sm_90", "bf16", "plain")
    if is_counted and case.kernel not in PROBABILITIES and table.ONE_BLOCK[-1].columns < case.V:
        for name, columns in zip(LOOPS, _columns(record), strict=True):
            each = record[f"{name}_loop"] / columns
            if each > LOOPS[name]:
                broken.append(f"{each:.2f} instructions an element in the {name} loop")
    return broken


def _worker(job: tuple[Case, str]) -> dict[str, Any]:
    return compile_case(*job)


def main() -> int:
    """Compile everything, print one line a target and kernel, write the results file."""
    parser = argparse.ArgumentParser(
        prog="python -m bench resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--targets", nargs="+", metavar="TARGET", choices=TARGETS, default=list(TARGETS),
        help=f"of {', '.join(TARGETS)} (all)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    parser.add_argument("--no-output", action="store_true", help="write no results file")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--longest", action="store_true", help="fewer: see above")
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.longest:
        arguments.output = RESULTS
    if arguments.no_output:
        arguments.output = None
    if arguments.output is not None:
        files.must_be_writable(arguments.output)
    if launch.runs_interpreted():
        parser.error("TRITON_INTERPRET=1 is set; unset it to compile")
    jobs = [
        (case, target)
        for target in arguments.targets
        for case in cases(target, longest=arguments.longest)
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        records = list(pool.map(_worker, jobs, chunksize=8))
    if arguments.output is not None:
        _write(records, arguments)
    _print(records)
    return 1 if any(record["broken"] for record in records) else 0


def _write(records: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    header = {
        "triton": triton.__version__,
        "torch": torch.__version__.split("+")[0],
        "longest": arguments.longest,
        "fingerprint": fingerprint(),
    }
    others = _records_of_other_targets(arguments.output, header, arguments.targets)
    lines = ",\n".join(json.dumps(record) for record in (*others, *records))
    arguments.output.write_text(f'{json.dumps(header)[:-1]}, "records": [\n{lines}\n]}}\n')


def _records_of_other_targets(
    path: Path, header: dict[str, Any], targets: list[str]
) -> list[dict[str, Any]]:
    """What the file says of the targets that were not run, if it is of the same sources."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if any(found.get(key) != value for key, value in header.items()):
        return []
    return [record for record in found["records"] if record["target"] not in targets]


def occupancy(record: dict[str, Any]) -> float:
    """The share of a multiprocessor's warps that fits its registers; NVIDIA: and its shared memory.

    NVIDIA (Programming Guide, "Technical Specifications per Compute Capability"): 65 536 registers,
    given to a warp in units of 256; 64 warps; 164 KiB of shared memory on 8.0, 228 KiB on 9.0 and
    10.0, of which a program takes 1 KiB more than it asks for. AMD (CDNA 3 ISA, section 3.6): 512
    vector registers a lane, in units of 8, for each of 4 SIMDs of 8 waves.
    """
    warps = int(record["num_warps"])
    if record["target"].startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-record["registers"] // 8) * 8))
        return float(waves // warps * warps / 32)
    a_warp = -(-32 * record["registers"] // 256) * 256
    shared = (164 if record["target"] == "sm_80" else 228) << 10
    programs = min(65_536 // a_warp // warps, 64 // warps, shared // (record["shared"] + 1024), 32)
    return float(programs * warps / 64)


def _print(records: list[dict[str, Any]]) -> None:
    table = tables.make(
        f"{len(records)} kernels compiled with Triton {triton.__version__}; occupancy: of a "
        "multiprocessor's warps, by registers and shared memory; widest load 16 bytes: in how many "
        "of the kernels whose rows are multiples of 8 (in others it is not read)",
        ["target", "kernel", "form"],
        ["n", "registers", "spills", "stack", "shared\nbytes", "widest\nload 16", "occupancy"],
    )
    keys = sorted({(r["target"], r["kernel"], r["form"]) for r in records})
    for key in keys:
        group = [r for r in records if (r["target"], r["kernel"], r["form"]) == key]
        registers = [r["registers"] for r in group]
        occupied = [occupancy(r) for r in group]
        wide = [r for r in group if Case(**{k: r[k] for k in Case._fields}).is_wide]
        table.add_row(
            *key,
            str(len(group)),
            f"{min(registers)}-{max(registers)}",
            str(sum(r["spills"] for r in group)),
            str(sum(r["stack"] for r in group)),
            str(max(r["shared"] for r in group)),
            f"{sum(r['loads_16'] > 0 for r in wide)}/{len(wide)}",
            f"{100 * min(occupied):.0f}-{100 * max(occupied):.0f} %",
        )
    console = Console()
    console.print(table)
    for record in records:
        if record["broken"]:
            console.print(f"[red]{record}")


if __name__ == "__main__":
    sys.exit(main())
