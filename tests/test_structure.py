"""The layout: imports point down, in a row of floors and among files, and every file is short."""

import ast
import itertools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A room is a folder of sgp/ or a module in it, and may import what stands on a
# floor below it or beside it.
FLOORS = (
    ("caller", "interrupt", "tolerance", "dtensors"),
    ("labels", "selection"),
    ("rows",),
    ("head", "reference"),
    ("losses", "log_probs", "linear", "own_loss", "distilling", "linear_distilling"),
    ("parallel",),
    ("context", "data"),
    ("auditing", "huggingface", "trl"),
    ("__init__",),
    ("train",),
    ("commands",),
    ("cli", "__main__"),
)
BENCH = (
    ("files", "tables"),
    ("against",),
    ("proof",),
    ("gpu",),
    ("studies", "shown"),
    ("__main__",),
)
NAMED = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg"}
LONGEST = 450  # lines of a file in sgp/ or kernels/
MOST_MODULES = 18  # directly in sgp/


def modules(package, root=ROOT):
    """Dotted name: file, of a package; its kernels are another folder's."""
    folder = root / package
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted(folder.rglob("*.py"))
        if "kernels" not in path.relative_to(folder).parts
    }


def imported(path, known):
    """The modules among `known` that a file imports, for types or inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
                found = candidate if candidate in known else f"{candidate}.__init__"
                if found in known:
                    yield found
                    break


def edges(package, root=ROOT):
    """{module: the modules that it imports}."""
    known = modules(package, root)
    return {
        name: {found for found in imported(path, known) if found != name}
        for name, path in known.items()
    }


def room(module):
    """The folder of its package that a module is in, or its own name there."""
    return module.split(".")[1]


def circles(graph):
    """One circle of a graph, if there is any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle: {' imports '.join(error.args[1])}"


def climbs(package, floors, root=ROOT):
    """Imports of what stands higher, and circles among files and among rooms."""
    level = {name: number for number, names in enumerate(floors) for name in names}
    graph = edges(package, root)
    unknown = {room(module) for module in graph} - set(level)
    assert not unknown, f"on no floor: {unknown}"
    for module, targets in graph.items():
        for target in targets:
            if level[room(target)] > level[room(module)]:
                yield f"{module} imports {target}, which stands higher"
    rooms = {}
    for module, targets in graph.items():
        rooms.setdefault(room(module), set()).update(
            room(x) for x in targets if room(x) != room(module)
        )
    yield from itertools.chain(circles(graph), circles(rooms))


@pytest.mark.parametrize(("package", "floors"), [("sgp", FLOORS), ("bench", BENCH)])
def test_imports_point_down(package, floors):
    assert list(climbs(package, floors)) == []


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("head/algorithm", "from sgp.parallel.shard import Shard", "stands higher"),
        ("losses", "import sgp.parallel", "stands higher"),
        ("selection", "def f():\n    from sgp.rows import recipe", "stands higher"),
        ("rows/recipe", "from sgp.rows import operators", "a circle"),
        ("data/examples", "import sgp.context", "a circle"),
    ],
)
def test_an_import_that_climbs_is_found(module, line, said, tmp_path):
    for path in modules("sgp").values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    changed = tmp_path / "sgp" / f"{module}.py"
    changed.write_text(f"{changed.read_text()}\n{line}\n")
    if module == "data/examples":
        (tmp_path / "sgp" / "context.py").write_text("from sgp.data import examples\n")
    assert any(said in found for found in climbs("sgp", FLOORS, tmp_path))


def test_files_are_short_and_the_top_is_small():
    sources = [*modules("sgp").values(), *(ROOT / "kernels").glob("*.py")]
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources
        if (n := len(p.read_text().splitlines())) > LONGEST
    }
    assert long == {}
    assert len(list((ROOT / "sgp").glob("*.py"))) <= MOST_MODULES


def names_in(code):
    """Every variable, attribute, parameter and keyword."""
    for node in ast.walk(ast.parse(code)):
        for kind, field in NAMED.items():
            if isinstance(node, kind) and getattr(node, field):
                yield getattr(node, field)


def test_nothing_below_the_ranks_knows_them():
    """What is below is handed what it needs: the head does not know that a vocabulary is split."""
    below = ("rows", "head", "reference", "losses", "log_probs", "linear")
    for path in (path for name, path in modules("sgp").items() if room(name) in below):
        assert not [word for word in names_in(path.read_text()) if "shard" in word.lower()], path
    found = names_in("def f(head, shard=None):\n    head.shards.start(shard_size=Shard)")
    assert {"shard", "shards", "shard_size", "Shard"} <= set(found)
