"""Real data that every machine already has: the functions of the Python standard library."""

import ast
import gc
import os
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sgp.train.data import Pair

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

# Tests, demonstrations, generated tables of text, and packages that are not the standard library.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def source_files(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield `(relative path, text)` of the standard library's Python files, in a fixed order.

    Files that cannot be read or decoded are left out. `root` replaces the standard library's own
    folder.

    Example:
        >>> next(iter(source_files()))[0]
        '__future__.py'
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = Path(folder, name)
            try:
                with tokenize.open(path) as file:  # reads the encoding from the file's own cookie
                    text = file.read()
            except (OSError, SyntaxError, ValueError):
                continue
            yield path.relative_to(root).as_posix(), text


def function_pairs(text: str, source: str) -> list[Pair]:
    r"""Return one pair for each documented function of a module.

    The prompt is the source of the signature and the docstring, the completion is the source of
    the body after it, both without the function's own indentation. Functions inside functions are
    not taken: they are already part of another completion, so that no text is context in one
    split and output in the other.

    Args:
        text: The source of a module; one that does not parse has no pairs.
        source: Where the text comes from; each pair's source is this and its line.

    Example:
        >>> pair, = function_pairs('def f(x):\n    "Double x."\n    return 2 * x\n', "m.py")
        >>> pair.prompt, pair.completion
        ('def f(x):\n    "Double x."\n', '    return 2 * x\n')
    """
    try:
        with warnings.catch_warnings():
            # Old escapes in someone else's source are not ours to report.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = text.split("\n")  # not splitlines(): ast counts "\n" only
    pairs = []
    for node in _outer_functions(tree):
        docstring_end = _docstring_end(node)
        if docstring_end is None:
            continue
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        own = textwrap.dedent("\n".join(lines[first:last])).split("\n")
        cut = docstring_end - first
        prompt = "\n".join(own[:cut]) + "\n"
        completion = "\n".join(own[cut:]) + "\n"
        pairs.append(Pair(prompt, completion, f"{source}:{node.lineno}"))
    return pairs


def stdlib_pairs(files: Iterable[tuple[str, str]] | None = None) -> list[Pair]:
    r"""Return the pairs of the whole standard library, in a fixed order: about 6000.

    Args:
        files: `(path, text)` of modules to read in its place.

    Example:
        >>> text = 'def f(x):\n    "Double x."\n    return 2 * x\n'
        >>> [pair.source for pair in stdlib_pairs([("a.py", text), ("b.py", "x = 1")])]
        ['a.py:1']
    """
    files = source_files() if files is None else files
    with _no_garbage_collection():
        return [pair for path, text in files for pair in function_pairs(text, path)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the collector: it takes as long as all the parsing, and syntax trees have no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _outer_functions(tree: ast.AST) -> Iterator[_FunctionNode]:
    """Yield the functions that are not inside another one, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _FunctionNode):
            yield node
        else:
            yield from _outer_functions(node)


def _docstring_end(node: _FunctionNode) -> int | None:
    """Return the docstring's last line, or None without one or without a body on later lines."""
    first = node.body[0]
    is_docstring = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    if not is_docstring or len(node.body) < 2 or first.end_lineno is None:
        return None
    return first.end_lineno if node.body[1].lineno > first.end_lineno else None
