"""Compile every line of the launch table for GPUs that are not here, and read the binaries.

    python -m bench resources                 # table, results file, exit code 1 if a budget breaks
    python -m bench resources --targets sm_90
    python -m bench resources --longest       # fewer: of each resident line its longest row, with
                                              # nothing on and with everything on

No GPU is needed: Triton's own launcher is asked for the kernel it would launch, for a target that
is named instead of found. Registers and stack come from `cuobjdump -res-usage`, access widths from
the disassembly, both from Triton's package; for AMD they are in the assembly itself. The budget:
no spills and no stack anywhere; on NVIDIA, where V is a multiple of 8, every access to logits and
their gradient is 16 bytes wide, and a resident row has exactly as many loads as it takes to read
it once. The file names the sources that it was made from (`fingerprint`).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

from sgp.kernels import launch, table
from sgp.kernels.launch import Options, Statistics
from sgp.kernels.layout import Matrix, matrix
from sgp.kernels.table import Row, Target

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "resources.json"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
N = 64
SCALARS = 24  # narrow accesses of a row's own numbers: target, weights, loss, statistics


class Case(NamedTuple):
    """One kernel as one line of the table launches it."""

    kernel: str  # forward | statistics | loss | backward | factor
    V: int
    dtype: str
    options: str  # plain | weighted | reported | logged | log-probs | all, or one option's name
    layout: str = "rows"  # rows | slice | strided | in place (strided, so is the gradient) | head
    # slice: logits[:, :-1], two strides between rows
    # head: a bf16 gradient in the first half of float32 rows, as the linear head has it
    form: str = "auto"  # or "streaming", forced

    @property
    def is_wide(self) -> bool:
        """Whether 16-byte accesses are promised."""
        return self.V % 8 == 0 and self.layout in ("rows", "slice", "head")

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What the gradient is stored in."""
        return torch.bfloat16 if self.layout == "head" else DTYPES[self.dtype]


class _NamedTarget:
    """A Triton driver that answers with a named target and cannot launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # keys the cache of compiled kernels

    def get_current_stream(self, _device: object) -> int:
        return 0


EVERY_KERNEL = (  # each kernel with nothing on and with everything on
    ("forward", "plain"),
    ("forward", "all"),
    ("statistics", "all"),
    ("backward", "all"),
    ("factor", "plain"),
)
DATA = (("bf16", "rows"), ("fp32", "rows"), ("fp32", "head"))
LIGHT_OPTIONS = ("plain", "logged")
HEAVY_OPTIONS = ("softcap", "class weight", "all")


ENDS = (1, 8, 16)  # clusters of 2 and 4 run the same code a thread


def target_of(name: str) -> Target:
    """A target of this list, as the launch table knows it, with the installed Triton."""
    found = TARGETS[name]
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    capability = 0 if found.backend == "hip" else int(found.arch)
    return Target(found.backend, capability, table.CLUSTER_OF_16, version)


def cases(name: str, *, longest: bool = False) -> list[Case]:
    """Every line of the table with every kernel that uses it, options off, on and one by one."""
    found = dict.fromkeys((*resident_cases(name, longest=longest), *streaming_cases()))
    if not longest:
        return list(found)
    return [case for case in found if _is_telling(case)]


def _is_telling(case: Case) -> bool:
    """Whether a case is one of those that are likely to spill, or to be the first to break."""
    if case.V in (256, 1_024, 2_048, 50_264) or case.layout == "slice":
        return False
    return case.options in ("logged", "all") or (case.options, case.dtype) == ("plain", "bf16")


def resident_cases(name: str, *, longest: bool) -> Iterator[Case]:  # noqa: C901, PLR0912  (a list)
    """Every line and count of pieces of the resident form, at the longest row that it takes."""
    for (dtype, layout), (light, wide) in itertools.product(
        DATA, ((True, True), (False, True), (True, False))
    ):
        itemsize, halving = DTYPES[dtype].itemsize, layout == "head"
        row = Row(V=0, light=light, plain=False, wide=wide, itemsize=itemsize, halving=halving)
        for V, is_longest in _longest_rows(row, target_of(name), longest=longest):
            if is_longest or not longest:
                for options in LIGHT_OPTIONS if light else HEAVY_OPTIONS:
                    yield Case("forward", V, dtype, options, layout)
            if is_longest and light:
                yield Case("forward", V, dtype, "weighted", layout)
                yield Case("forward", V, dtype, "smoothing", layout)
                yield Case("forward", V, dtype, "reported", layout)
            if is_longest and wide:
                most = "logged" if light else "all"
                yield Case("forward", V - 8, dtype, most, layout)  # no multiple of 16
                if not halving:
                    yield Case("forward", V, dtype, most, "slice")
                if not light:
                    yield Case("forward", V, dtype, "softcap reported", layout)
        if not halving:
            for V, is_longest in _longest_rows(
                row._replace(gradient=False), target_of(name), longest=longest
            ):
                if is_longest or not longest:
                    yield Case("statistics", V, dtype, "logged" if light else "all")
                if is_longest and dtype == "bf16":
                    yield Case("statistics", V, "fp16", "logged" if light else "all")
                    yield Case("loss", V, dtype, "plain" if light else "softcap")
    for line, dtype in itertools.product(table.ONE_BLOCK, ("bf16", "fp32")):
        yield Case("forward", line.BV - 1, dtype, "all")  # accesses of one element
    for dtype, layout in itertools.product(("bf16", "fp32"), ("strided", "in place")):
        yield Case("forward", 4_096, dtype, "all", layout)


def _longest_rows(row: Row, target: Target, *, longest: bool) -> Iterator[tuple[int, bool]]:
    """(the longest row of a choice, whether it is the longest of its line)."""
    shorter = 0
    for line in table.resident_lines(row, target):
        for pieces in table.PIECES:
            V = line.BV * pieces
            if line.columns >= V > shorter:
                telling = not longest or line.programs in ENDS
                yield V - (not row.wide), line.columns == V and telling
        shorter = max(shorter, line.columns)


def streaming_cases() -> Iterator[Case]:  # noqa: C901  (a list)
    """The kernels that go block by block; forward is forced, where a GPU might choose resident.

    fp16 has bf16's width and another conversion: it is compiled at the two ends. 262 144 is not
    here because Triton compiles the same kernel for it as for 151 936, both multiples of 16.
    """
    wide = ("bf16", "fp32")
    for line, dtype in itertools.product(table.ONE_BLOCK, wide):
        for kernel, options in EVERY_KERNEL:
            yield Case(kernel, line.BV, dtype, options)
    # 151 936 is a multiple of 16, 50 264 of 8 only, 50 257 (GPT-2) of nothing.
    for V, dtype in itertools.product((151_936, 50_264, 50_257), wide):
        for kernel, options in EVERY_KERNEL:
            yield Case(kernel, V, dtype, options, form="streaming")
        for options in ("weighted", "softcap", "smoothing", "class weight", "reported"):
            yield Case("forward", V, dtype, options, form="streaming")
        yield Case("statistics", V, dtype, "plain", form="streaming")
        yield Case("loss", V, dtype, "plain", form="streaming")
        yield Case("backward", V, dtype, "plain")
        yield Case("backward", V, dtype, "log-probs")
    for V, kernel, options in itertools.product(
        (151_936, 50_264, 50_257), ("forward", "backward"), ("plain", "all")
    ):
        yield Case(kernel, V, "fp32", options, "head", form="streaming")
    for line, options in itertools.product(table.ONE_BLOCK, ("plain", "all")):
        yield Case("forward", line.BV, "fp32", options, "head")
        yield Case("backward", line.BV, "fp32", options, "head")
    for V, dtype, layout in itertools.product((50_264, 50_257), wide, ("strided", "in place")):
        for kernel, options in EVERY_KERNEL:
            yield Case(kernel, V, dtype, options, layout)
        yield Case("forward", V, dtype, "weighted", layout)
    for kernel, options in itertools.product(("forward", "backward"), ("plain", "all")):
        yield Case(kernel, 50_264, "fp16", options, form="streaming")
    yield Case("forward", 131_072, "fp16", "plain")


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
    triton.runtime.driver.set_active(_NamedTarget(target))
    call = _call(case, target_of(target_name))
    kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
    found = (
        _read_nvidia(kernel, wide=case.is_wide) if target.backend == "cuda" else _read_amd(kernel)
    )
    record: dict[str, Any] = {
        "target": target_name,
        **case._asdict(),
        "form": "resident" if call.kernel is launch.row_resident else "streaming",
        "BV": call.constants["BV"],
        "pieces": call.constants.get("PIECES", 1),
        "num_ctas": call.constants.get("num_ctas", 1),
        "num_warps": call.constants["num_warps"],
        **found,
    }
    record["broken"] = _broken_budgets(case, call, record, nvidia=target.backend == "cuda")
    return record


def _call(case: Case, on: Target) -> launch.Call:
    """The launch of a case on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    V, dtype = case.V, DTYPES[case.dtype]
    logits = _matrix(case, dtype, strided=case.layout in ("strided", "in place"))
    dlogits = _matrix(case, dtype, strided=case.layout == "in place")
    if case.layout == "head":
        dlogits = _first_halves(case)
    target, row = empty(N, dtype=torch.int64), empty(N)
    everything = Options(empty(V), empty(), row, empty(), 0.1, 1e-4, 30.0, 1 / 30.0, 0.5, 0.7)
    light = Options(None, None, row, empty(), 0.1, 1e-4, logit_scale=0.5, inverse_temperature=0.7)
    if case.kernel == "backward":
        everything = everything._replace(lse_weight=row, entropy_weight=row, entropy=row)
    options = {
        "plain": Options(scale=empty()),
        "reported": Options(scale=empty()),
        "logged": light,
        "weighted": light._replace(label_smoothing=None),
        "softcap": Options(scale=empty(), softcap=30.0, inverse_softcap=1 / 30.0),
        "softcap reported": Options(scale=empty(), softcap=30.0, inverse_softcap=1 / 30.0),
        "smoothing": Options(scale=empty(), label_smoothing=0.1),
        "class weight": Options(weight=empty(V), weight_mean=empty(), scale=empty()),
        "log-probs": Options(
            row_weight=row, inverse_temperature=0.7, lse_weight=row, entropy_weight=row, entropy=row
        ),
        "all": everything,
    }[case.options]
    shared = {"V": V, "ignore_index": -100, "on": on}
    if case.kernel == "backward":
        return launch.row_gradient(logits, dlogits, target, empty(N, 3), options, **shared)
    if case.kernel == "factor":
        return launch.multiply(dlogits, target, empty(), N=N, **shared)
    with_stats = case.options in ("all", "logged", "reported", "softcap reported")
    stats = Statistics(row, row, row, empty(N, dtype=torch.bool)) if with_stats else None
    sink = dlogits if case.kernel == "forward" else None
    saved = empty(N, 3) if case.kernel == "statistics" else None
    shared["form"] = case.form
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


def _read_nvidia(kernel: Any, *, wide: bool) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name) if wide else ""
    # `STACK` counts spills and frames, `LOCAL` local arrays; LDL and STL are accesses to them.
    # Disassembling takes half of the time: only where access widths are promised.
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": kernel.metadata.shared,
        "loads_16": len(re.findall(r"\bLDG\.[\w.]*128", sass)),
        "stores_16": len(re.findall(r"\bSTG\.[\w.]*128", sass)),
        "narrow": len(re.findall(r"\b(?:LDG|STG)\.(?![\w.]*128)", sass)),
    }


def _read_amd(kernel: Any) -> dict[str, Any]:
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


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run(
        [str(NVIDIA_TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return run.stdout


def _broken_budgets(
    case: Case, call: launch.Call, record: dict[str, Any], *, nvidia: bool
) -> list[str]:
    broken = []
    if record["spills"] or record["stack"]:
        broken.append(f"{record['spills']} spills, {record['stack']} bytes of stack")
    if nvidia and case.is_wide:
        # 16-byte accesses that one pass of a thread over its block, or over its row, takes.
        threads = 32 * record["num_warps"] * record["num_ctas"]
        columns = call.constants["BV"] // threads
        in_row = columns * record["pieces"]
        one = in_row * DTYPES[case.dtype].itemsize // 16
        store = in_row * case.gradient_dtype.itemsize // 16
        passes = 2 if (case.kernel, record["form"]) == ("forward", "streaming") else 1
        stores = 1 if case.kernel in ("forward", "backward", "factor") else 0
        for kind, expected in (("loads", passes * one), ("stores", stores * store)):
            if record[f"{kind}_16"] < expected:
                broken.append(f"{record[f'{kind}_16']} {kind} of 16 bytes, expected {expected}")
        has_weights = case.options in ("class weight", "all")
        if record["form"] == "resident" and not has_weights and record["loads_16"] != one:
            broken.append(f"{record['loads_16']} loads of 16 bytes, once is {one}")
        # The target's gradient is a store of one element, in every lane, that is masked off.
        if record["narrow"] > SCALARS + columns:
            broken.append(
                f"{record['narrow']} narrow accesses, at most {SCALARS + columns} are due"
            )
    return broken


def _worker(job: tuple[Case, str]) -> dict[str, Any]:
    return compile_case(*job)


def main() -> int:
    """Compile everything, print one line a target and kernel, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m bench resources", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (JSON)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--longest", action="store_true", help="fewer: see above")
    arguments = parser.parse_args()
    if launch.runs_interpreted():
        parser.error("TRITON_INTERPRET=1 is set; unset it to compile")
    jobs = [
        (case, target)
        for target in arguments.targets
        for case in cases(target, longest=arguments.longest)
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        records = list(pool.map(_worker, jobs, chunksize=8))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "triton": triton.__version__,
        "torch": torch.__version__.split("+")[0],
        "longest": arguments.longest,
        "fingerprint": fingerprint(),
    }
    others = _records_of_other_targets(arguments.output, header, arguments.targets)
    lines = ",\n".join(json.dumps(record) for record in (*others, *records))
    arguments.output.write_text(f'{json.dumps(header)[:-1]}, "records": [\n{lines}\n]}}\n')
    _print(records)
    return 1 if any(record["broken"] for record in records) else 0


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


def _print(records: list[dict[str, Any]]) -> None:
    table = Table(title=f"{len(records)} kernels compiled with Triton {triton.__version__}")
    for name in ("target", "kernel", "form", "n", "registers", "spills", "stack", "broken"):
        table.add_column(name, justify="left" if name in ("target", "kernel", "form") else "right")
    keys = sorted({(r["target"], r["kernel"], r["form"]) for r in records})
    for key in keys:
        group = [r for r in records if (r["target"], r["kernel"], r["form"]) == key]
        registers = [r["registers"] for r in group]
        table.add_row(
            *key,
            str(len(group)),
            f"{min(registers)}-{max(registers)}",
            str(sum(r["spills"] for r in group)),
            str(sum(r["stack"] for r in group)),
            str(sum(bool(r["broken"]) for r in group)),
        )
    console = Console()
    console.print(table)
    for record in records:
        if record["broken"]:
            console.print(f"[red]{record}")


if __name__ == "__main__":
    sys.exit(main())
