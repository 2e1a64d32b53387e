"""`sgp doctor`: versions, devices, and which backend will run, with the reason."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sgp.rows import backend

VOCABULARIES = (1_024, 32_000, 151_936, 262_144)
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "datasets", "accelerate", "peft",
    "trl", "matplotlib", "rich",
)  # fmt: skip
VARIABLES = {
    "SGP_BACKEND": "auto | triton | torch: force an implementation",
    "SGP_ROW_FORM": "auto | resident | streaming | staying | blockwise: force a row kernel",
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
    """Which form rows get on each GPU; False if SGP_ROW_FORM is none of its values."""
    from sgp.kernels import table  # noqa: PLC0415  (imports Triton)

    form = os.environ.get("SGP_ROW_FORM", "auto")
    if form not in table.FORMS:
        console.print(f"[red]SGP_ROW_FORM = {form!r}; expected one of {', '.join(table.FORMS)}")
        return False
    kinds = {
        "bf16": table.Row(0),
        "bf16, statistics": table.Row(0, quiet=False),
        "bf16, softcap": table.Row(0, light=False),
        "linear head": table.Row(0, itemsize=4, halving=True),
        "linear head, softcap": table.Row(0, light=False, itemsize=4, halving=True),
    }
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices or [torch.device("cpu")]:
        target = table.target_of(device)
        name = str(device) if devices else "the interpreter (as an H100)"
        forms = Table(
            title=f"Row kernels on {name}",
            caption="cluster: programs that share a resident row",
        )
        forms.add_column("loss")
        for V in VOCABULARIES:
            forms.add_column(f"V = {V}", justify="right")
        for words, kind in kinds.items():
            rows = [kind._replace(V=V) for V in VOCABULARIES]
            forms.add_row(words, *(_form(row, target, form) for row in rows))
        console.print(forms)
        if not target.has_clusters:
            why = "clusters need compute capability 9.x or 10.x and Triton 3.8 or newer"
            version = ".".join(map(str, target.triton))
            console.print(f"{name}: no clusters ({why}; Triton here: {version})", soft_wrap=True)
    return True


def _form(row: Any, target: Any, form: str) -> str:
    """A line of the launch table in words."""
    from sgp.kernels import table  # noqa: PLC0415  (imports Triton)

    try:
        line = table.choose(row, target, form)
    except ValueError:
        return "refused"
    if line.programs > 1:
        return f"cluster of {line.programs}"
    return "staying" if line.stays else line.form


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
