"""What is shipped, what imports what, and what the project's files promise."""

import ast
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import sgp
from tests import test_structure

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
SOURCES = [*test_structure.modules("sgp").values(), *KERNELS]


def name_of(path):
    return str(path.relative_to(ROOT))


def run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SGP_", "TRITON_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=cwd, env=env | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked():
    """[(mode, path)] of the files that git knows and that exist."""
    lines = run("git", "ls-files", "--stage", "-z", cwd=ROOT).split("\0")
    entries = [(line.split()[0], line.partition("\t")[2]) for line in lines if line]
    return [(mode, path) for mode, path in entries if os.path.lexists(ROOT / path)]


# -- wheel and sdist -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tracked tree, an sdist and a wheel of it, and a wheel of the sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for _, path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path, follow_symlinks=False)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--sdist", "--wheel", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(*build, "--wheel", "--outdir", folder / "again", unpacked, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    (again,) = (folder / "again").glob("*.whl")
    return {"source": source, "sdist": sdist, "wheel": wheel, "wheel of the sdist": again}


def wheel_files(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_and_nothing_else(built):
    files = wheel_files(built["wheel"])
    info = f"sgp_kernels-{sgp.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"sgp", info}, "no top-level `kernels`"
    expected = {"sgp/py.typed"}
    for _, path in tracked():
        if re.fullmatch(r"(sgp|kernels)/.*\.py", path):
            expected.add(path if path.startswith("sgp/") else f"sgp/{path}")
    assert {name for name in files if not name.startswith(info)} == expected
    assert {f"sgp/kernels/{path.name}" for path in KERNELS} <= expected
    for name in expected:
        local = ROOT / (name.removeprefix("sgp/") if "/kernels/" in name else name)
        assert files[name] == local.read_bytes(), name


def test_wheel_metadata(built):
    files = wheel_files(built["wheel"])
    info = f"sgp_kernels-{sgp.__version__}.dist-info"
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = files[f"{info}/METADATA"].decode()
    for line in (
        "Name: sgp-kernels",
        f"Version: {sgp.__version__}",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.10",
        "Requires-Dist: torch>=2.9",
    ):
        assert line in metadata.splitlines()
    assert b"sgp = sgp.cli:main" in files[f"{info}/entry_points.txt"]
    assert files[f"{info}/top_level.txt"].split() == [b"sgp"]


def test_sdist_makes_the_same_wheel(built):
    assert wheel_files(built["wheel of the sdist"]) == wheel_files(built["wheel"])


def test_sdist_tests_are_whole_or_absent(built):
    """Test files without their conftest and oracle cannot run."""
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {name for name in names if name.startswith("tests/")}
    everything = {path for _, path in tracked() if path.startswith("tests/")}
    assert tests - {"tests/"} in (set(), everything)
    assert "LICENSE" in names


def test_installed_wheel_imports_its_kernels_and_owns_no_other_name(built, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-compile", "--target", target, built["wheel"], cwd=elsewhere)
    code = """
import importlib.util, sgp, sgp.kernels.launch
print(sgp.__file__)
print(sgp.kernels.launch.__file__)
spec = importlib.util.find_spec("kernels")
print(None if spec is None else [spec.origin, *(spec.submodule_search_locations or [])])
"""
    out = run(
        sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(target), TRITON_INTERPRET="1"
    )
    package, launch, kernels = out.splitlines()
    assert Path(package) == target / "sgp" / "__init__.py"
    assert Path(launch) == target / "sgp" / "kernels" / "launch.py"
    assert str(target) not in kernels
    assert str(ROOT) not in kernels


def test_metadata_is_what_an_index_takes(built):
    files = (built["sdist"], built["wheel"])
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=ROOT)
    assert said.count("PASSED") == len(files)


USER = """
import sgp
import sgp.kernels.launch
from torch import Tensor

def loss(logits: Tensor, target: Tensor) -> Tensor:
    return reveal_type(sgp.cross_entropy(logits, target))

reveal_type(sgp.trl.add_fused_lm_head)
sgp.cross_entrpy
"""


def test_types_of_an_editable_install(built, tmp_path):
    """What a type checker sees that runs no import hook, and what becomes importable: only sgp."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    others = sysconfig.get_path("purelib")
    (site / "others.pth").write_text(f"{others}\n")  # setuptools to build with, and torch's types
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index")
    flags = ("--no-deps", "--no-build-isolation", "--ignore-installed")
    run(*pip, *flags, "--editable", built["source"], cwd=tmp_path)
    (tmp_path / "user.py").write_text(USER)
    checked = subprocess.run(
        (sys.executable, "-m", "mypy", "--python-executable", python, "--strict", "user.py"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in checked.stdout.splitlines() if line.startswith("user.py:")]
    assert len(said) == 3, checked.stdout
    assert 'Revealed type is "torch._tensor.Tensor"' in said[0]
    assert "def (model: torch.nn.modules.module.Module, temperature: float =" in said[1]
    assert 'has no attribute "cross_entrpy"' in said[2]
    code = "import sys, sgp, sgp.kernels.launch; print(sgp.__file__); print(*sys.path, sep='\\n')"
    package, *path = run(python, "-c", code, cwd=tmp_path, TRITON_INTERPRET="1").splitlines()
    folder = Path(package).parents[1]
    assert folder.parent == built["source"]
    assert [each.name for each in folder.iterdir()] == ["sgp"]
    assert str(built["source"]) not in path


def test_kernels_is_no_package_of_its_own():
    """Hugging Face's `kernels` owns that name; a package here would break model loading."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "sgp" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")  # noqa: PTH115, PTH118  (verbatim)
    assert ("120000", "sgp/kernels") in tracked()


# -- imports ---------------------------------------------------------------------------------------


def imports(path):
    """Dotted names that a file imports, anywhere in it: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside(path, *allowed):
    """Imports of a file that are neither of the standard library nor below an allowed name."""
    return {
        name
        for name in imports(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(name == top or name.startswith(f"{top}.") for top in allowed)
    }


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_import_only_torch_triton_and_each_other(path):
    assert outside(path, "torch", "triton", "sgp.kernels") == set()


@pytest.mark.parametrize("module", ["labels", "rows/recipe"])
def test_the_bottom_imports_only_torch(module):
    assert outside(ROOT / "sgp" / f"{module}.py", "torch") == set()


def test_the_reference_does_not_import_what_it_judges():
    """Not even through another module."""
    graph, seen, pending = test_structure.edges("sgp"), set(), ["sgp.reference.__init__"]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += graph[module]
    names = ("divergence", "problem", "recipe", "reduction", "teachers", "top_k", "units")
    rows = {f"sgp.rows.{name}" for name in names}
    own = {f"sgp.reference.{name}" for name in ("__init__", "distilling", "losses", "steps")}
    assert seen == {"sgp.selection", "sgp.labels", *own, *rows}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_few_files_touch_the_kernels(path):
    names = list(imports(path))  # also asserts that no import is relative
    if name_of(path) in {
        "sgp/rows/by_triton.py",
        "sgp/rows/two_by_triton.py",
        "sgp/rows/backend.py",
        "sgp/commands/verify.py",
        "sgp/commands/doctor.py",
        "sgp/commands/verify_cases.py",
    }:
        return
    if path.parent.name != "kernels":
        assert not [name for name in names if name.startswith("sgp.kernels")]
        assert not [name for name in names if name.partition(".")[0] in ("triton", "kernels")]


def test_tests_and_benchmarks_import_absolutely():
    for folder in ("tests", "bench"):
        for path in (ROOT / folder).glob("**/*.py"):
            list(imports(path))


def test_import_is_quick_and_light(tmp_path):
    """A stated requirement: under 2 s beyond `import torch`, and no heavy package with it."""
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import sgp
from tests import test_structure
print(time.perf_counter() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    command = (sys.executable, "-c", code)
    outputs = [run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in outputs) < 2.0
    new = set(outputs[0][1].split())
    assert "sgp" in new
    heavy = {"transformers", "trl", "triton", "datasets", "tokenizers", "matplotlib", "rich"}
    assert new & heavy == set()


def test_trl_is_imported_when_it_is_used(tmp_path):
    code = """
import sys, sgp
print("trl" in sys.modules, sgp.trl.__name__, "trl" in sys.modules)
try:
    sgp.nothing
except AttributeError as error:
    print(error)
"""
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines()
    assert said == ["False sgp.trl True", "module 'sgp' has no attribute 'nothing'"]


# -- promises of the files -------------------------------------------------------------------------


def test_version_is_one():
    (version,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert version == sgp.__version__


def test_public_names_exist():
    for name in sgp.__all__:
        assert hasattr(sgp, name)
    assert len(set(sgp.__all__)) == len(sgp.__all__)


@pytest.mark.parametrize(
    "module",
    # Left out: __main__ runs the command line, and the example of cli trains a model for minutes.
    [name for name in test_structure.modules("sgp") if name not in ("sgp.__main__", "sgp.cli")],
)
def test_docstring_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    imported = importlib.import_module(module.removesuffix(".__init__"))
    results = doctest.testmod(
        imported,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        extraglobs={"torch": torch, "sgp": sgp},
    )
    assert results.failed == 0


def jit_functions():
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                yield path.name, node


def test_kernels_take_few_arguments():
    functions = list(jit_functions())
    assert {"row_streaming", "row_resident", "row_backward"} <= {node.name for _, node in functions}
    for file, node in functions:
        spec = node.args
        count = len(spec.posonlyargs) + len(spec.args) + len(spec.kwonlyargs)
        assert count <= 24, f"{file}: {node.name} takes {count} arguments"
        assert spec.vararg is None
        assert spec.kwarg is None


@pytest.mark.parametrize(
    "command", ['pip install -e ".[train]" && sgp train', 'pip install -e ".[test]" && pytest']
)
def test_readme_sets_up_in_one_line(command):
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.strip().removeprefix("$ ").startswith(command) for line in lines)


def test_ci_runs_the_readmes_test_command():
    assert ("100755", ".ci/run") in tracked(), "executable"
    script = (ROOT / ".ci" / "run").read_text()
    install = re.search(r'^pip install (-q )?-e "\.\[test\]"$', script, re.MULTILINE)
    tests = re.search(r"^pytest\b", script, re.MULTILINE)
    assert install
    assert tests
    assert install.start() < tests.start()
    assert "set -euo pipefail" in script


def test_versions_and_the_workflow_begin_with_the_oldest_that_is_declared():
    """The workflow runs on a host alone; here it is read."""
    table = json.loads(run(sys.executable, ".ci/versions.py", "--list", cwd=ROOT))
    declared = (ROOT / "pyproject.toml").read_text()
    oldest, newest = table[0], table[-1]
    assert f'"torch>={oldest["torch"].rpartition(".")[0]}"' in declared
    assert (
        f'"transformers>={oldest["transformers"].removeprefix("==").rpartition(".")[0]}"'
        in declared
    )
    assert (newest["transformers"], newest["numpy"]) == ("", ""), "the newest that there is"
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert {"lint", "wheel", "docs", "core", "python", "full"} <= set(jobs)
    matrix = jobs["python"]["strategy"]["matrix"]
    assert matrix["torch"] == [oldest["torch"], newest["torch"]]
    assert f'requires-python = ">={matrix["python"][0]}"' in declared


def test_no_file_names_a_registry_host_or_this_machines_folders():
    # Spelt in pieces: this file is one of those searched.
    hosts = [
        ".".join(parts)
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("pypi", "nvidia", "com"),
            ("anaconda", "org"),
            ("npmjs", "org"),
        )
    ]
    pattern = re.compile(
        "|".join([*map(re.escape, hosts), r"(?<![\w./~$}])/(?:work|tmp)(?:/|\b)"]), re.IGNORECASE
    )
    found = []
    for mode, path in tracked():
        if mode == "120000" or Path(path).suffix in {".png", ".gz", ".cubin"}:
            continue
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            match = pattern.search(line)
            if match:
                found.append(f"{path}:{number}: {match[0]}")
    assert found == []
