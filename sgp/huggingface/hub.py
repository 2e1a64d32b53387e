"""Write sgp's losses as a repository of Hugging Face's `kernels` library.

    python -m sgp.huggingface.hub FOLDER

`kernels.get_kernel` loads a folder of a repository, not an installed package: its modules import
each other by relative names, and its operators have a namespace of their own, so that it can stand
beside an installed sgp. The layout is that library's: one build for each backend, here the same
Python, with `metadata.json` beside it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
BACKENDS = ("cuda", "cpu")
EXPORTED = {  # module: what a kernel offers of it
    "losses": ("CrossEntropyLoss", "cross_entropy"),
    "linear": ("LinearCrossEntropyLoss", "linear_cross_entropy"),
    "log_probs": ("linear_token_log_probs", "token_log_probs"),
    "reference.losses": ("TokenLogProbs",),
    "selection": ("Selection",),
}
SERVED = "parallel.__init__"  # registers what takes DTensors
VERSION = 1  # of the kernel's interface


def write(folder: Path) -> Path:
    """Write the repository.

    Example:
        >>> write(Path("repository"))  # doctest: +SKIP
        >>> kernels.get_local_kernel(Path("repository")).cross_entropy  # doctest: +SKIP

    Args:
        folder: made if it is not there; its `build/torch-cuda` and `build/torch-cpu` are replaced,
            the rest is left alone.

    Returns:
        The folder.
    """
    sources = {name: _source(name) for name in _needed({*EXPORTED, SERVED})}
    text = "".join(f"{name}\n{sources[name]}" for name in sorted(sources))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        shutil.rmtree(build, ignore_errors=True)
        for name, source in sources.items():
            path = build / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_relative(source, name).replace('"sgp::', f'"sgp_{digest}::'))
        (build / "__init__.py").write_text(_exports())
        content = {
            "id": f"_sgp_{backend}_{digest}",
            "name": "sgp",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def _source(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def _needed(modules: set[str]) -> set[str]:
    """These modules of the package and all that they import of it."""
    found: set[str] = set()
    while modules - found:
        module = (modules - found).pop()
        found.add(module)
        for node in ast.walk(ast.parse(_source(module))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sgp":
                inner = (node.module or "").partition(".")[2]
                names = [f"{inner}.{alias.name}".strip(".") for alias in node.names]
                found_here = (inner, *names, *(f"{n}.__init__" for n in (inner, *names)))
                modules |= {n for n in found_here if (PACKAGE / _path(n)).is_file()}
    return found


def _path(module: str) -> str:
    return f"{module.replace('.', '/')}.py" if module else "no module"


def _relative(source: str, module: str) -> str:
    """`from sgp.x import y` as seen from this module."""
    dots = "." * (1 + module.count("."))
    source = re.sub(r"^( *)from sgp import ", rf"\1from {dots} import ", source, flags=re.MULTILINE)
    return re.sub(r"^( *)from sgp\.", rf"\1from {dots}", source, flags=re.MULTILINE)


def _exports() -> str:
    lines = [f"from .{module} import {', '.join(names)}" for module, names in EXPORTED.items()]
    names = ", ".join(f'"{name}"' for group in EXPORTED.values() for name in group)
    head = '"""sgp: cross-entropy that pays for the tokens that carry loss."""'
    lines += ["from . import parallel  # which takes DTensors"]
    return "\n".join([head, "", *lines, "", f"__all__ = [{names}]", ""])


def main() -> int:
    """Write, and say what."""
    parser = argparse.ArgumentParser(
        prog="python -m sgp.huggingface.hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        write(folder)
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        parser.error(f"folder {folder}: cannot write {where}: {why}; name another folder")
    for path in sorted(folder.glob("build/*")):
        sys.stdout.write(f"{path}: {len(list(path.rglob('*.py')))} modules\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
