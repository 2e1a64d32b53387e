"""`sgp doctor`: versions, devices, and which backend will run, with the reason."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from sgp import backend

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "matplotlib", "rich")
VARIABLES = {
    "SGP_BACKEND": "auto | triton | torch: force an implementation",
    "SGP_ROW_FORM": "auto | resident | streaming: force a row kernel",
    "SGP_CHECK": "1: check targets on a GPU too, which waits for it",
    "TRITON_INTERPRET": "1: run kernels on a CPU, for checking",
}


def run() -> int:
    """Print the report; 0 if the default backend can run, 1 if a forced one cannot."""
    console = Console()
    versions = Table(title="Versions", show_header=False)
    versions.add_row("python", platform.python_version())
    versions.add_row("sgp-kernels", _version("sgp-kernels"))
    for package in PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)

    devices = Table(title="Devices", show_header=False)
    for row in _devices():
        devices.add_row(*row)
    console.print(devices)

    choices = Table(title="Backend", caption="what sgp.cross_entropy runs, and why")
    for column in ("tensor", "backend", "why"):
        choices.add_column(column)
    healthy = True
    for device in _device_types():
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            try:
                choice, why = backend.explain(device, dtype)
            except ValueError as error:
                choice, why = "error", str(error)
            healthy = healthy and (choice != "error" or dtype == torch.float64)
            colour = "red" if choice == "error" else "green"
            name = str(dtype).removeprefix("torch.")
            choices.add_row(f"{device.type} {name}", f"[{colour}]{choice}", why)
    console.print(choices)

    if backend.has_triton():
        healthy = _print_row_forms(console) and healthy

    variables = Table(title="Environment")
    for column in ("variable", "value", "meaning"):
        variables.add_column(column)
    for name, meaning in VARIABLES.items():
        variables.add_row(name, os.environ.get(name, "(not set)"), meaning)
    console.print(variables)
    return 0 if healthy else 1


def _print_row_forms(console: Console) -> bool:
    """How long a row each GPU reads once; False if SGP_ROW_FORM is none of its values."""
    from sgp.kernels import table  # noqa: PLC0415  (imports Triton)

    kinds = {
        "any but softcap and class weight": table.Row(0, plain=False),
        "any but softcap and class weight, V or a stride not a multiple of 8": table.Row(
            0, plain=False, wide=False
        ),
        "any but softcap and class weight, no gradient": table.Row(0, plain=False, gradient=False),
        "softcap or class weight": table.Row(0, plain=False, light=False),
        "softcap or class weight, float32 logits and gradient": table.Row(
            0, plain=False, light=False, itemsize=4
        ),
        "softcap or class weight, V or a stride not a multiple of 8": table.Row(
            0, plain=False, light=False, wide=False
        ),
        "vocabulary not contiguous": table.Row(0, plain=False, contiguous=False),
    }
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    names = [str(device) for device in devices] or ["interpreter (as an H100)"]
    targets = [table.target_of(device) for device in devices or [torch.device("cpu")]]
    forms = Table(title="Longest rows that are read once (columns)")
    forms.add_column("loss")
    for name in names:
        forms.add_column(name, justify="right")
    for words, kind in kinds.items():
        longest = [max(line.columns for line in table.resident_lines(kind, t)) for t in targets]
        forms.add_row(words, *(f"{columns:_}".replace("_", " ") for columns in longest))
    for name, target in zip(names, targets, strict=True):
        if target.largest_cluster == 1:
            why = "clusters need compute capability 9.x or 10.x and Triton 3.8 or newer"
            version = ".".join(map(str, target.triton))
            console.print(f"{name}: no clusters ({why}; Triton here: {version})", soft_wrap=True)
    console.print(forms)
    form = os.environ.get("SGP_ROW_FORM", "auto")
    if form not in table.FORMS:
        console.print(f"[red]SGP_ROW_FORM = {form!r}; expected one of {', '.join(table.FORMS)}")
    return form in table.FORMS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_types() -> list[torch.device]:
    types = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(name) for name in types]


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "none found: PyTorch's operators run on the CPU")]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        facts = (
            p.name,
            f"compute capability {p.major}.{p.minor}",
            f"{p.total_memory / 2**30:.0f} GiB",
            f"{p.multi_processor_count} multiprocessors",
        )
        rows.append((f"cuda:{index}", ", ".join(facts)))
    return rows
