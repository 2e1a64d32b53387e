"""The list of changes fits the code, and its runner tells what is noticed from what is not."""

import json
import sys

import pytest

from tests import mutants
from tests.mutants import Change, chosen, faults, read


def test_every_change_stands_once_in_its_file_and_leaves_it_python():
    """Where a line has moved, rewrite its change; `python tests/mutants.py --check` says more."""
    assert list(faults(read())) == []


def test_every_test_of_the_list_is_in_a_file_that_is_there():
    named = {word for c in read() for tests in c.tests for word in tests.split()}
    files = {word.partition("::")[0] for word in named if word.startswith("tests/")}
    assert [name for name in sorted(files) if not (mutants.ROOT / name).is_file()] == []


CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
import code_of_it as code

def test_double():
    assert code.double(3) == 6

def test_that_fails_anyway():
    assert code.double(3) == 7
"""
CHANGES = {
    "noticed": ("2 * x", "3 * x", "test_it.py -k double"),
    "NOT NOTICED": ("x / 2", "x / 3", "test_it.py -k double"),
    "broken": ("2 * x", "3 * x", "test_it.py -k anyway"),
    "no tests": ("2 * x", "3 * x", "test_it.py -k gone"),
    "moved": ("4 * x", "3 * x", "test_it.py -k double"),
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half a second instead of five
    (tmp_path / "code_of_it.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


@pytest.mark.parametrize("verdict", CHANGES)
def test_what_is_said_of_a_change(verdict, repository):
    old, new, tests = CHANGES[verdict]
    change = Change("X1", "code_of_it.py", old, new, (tests,))
    result = mutants.attempt(change, root=repository, limit=600)
    assert result.verdict == verdict
    assert result.by == {
        "noticed": "test_it.py::test_double",
        "broken": "test_it.py::test_that_fails_anyway",
        "no tests": tests,
    }.get(verdict, "")
    assert (repository / "code_of_it.py").read_text() == CODE, "a copy is changed"


def test_faults_of_a_list(repository):
    def fault(**other):
        change = {"id": "X1", "file": "code_of_it.py", "old": "2 * x", "new": "3 * x"}
        return "".join(
            faults([Change(**{"tests": ("test_it.py",), **change, **other})], repository)
        )

    assert fault() == ""
    assert "not exactly once 'x'" in fault(old="x")
    assert "changes nothing" in fault(new="2 * x")
    assert "is no Python any more" in fault(new="2 *")
    assert "neither tests nor a reason" in fault(tests=())
    assert fault(tests=(), equivalent="both are 6") == ""
    assert "2 changes have this id" in "".join(faults(2 * [read()[0]]))


def test_changes_are_chosen_by_id_file_and_folder():
    changes = read()
    assert chosen(changes, []) == changes
    assert [c.id for c in chosen(changes, [changes[3].id])] == [changes[3].id]
    assert {c.file for c in chosen(changes, ["sgp/tolerance.py"])} == {"sgp/tolerance.py"}
    assert all(c.file.startswith("sgp/train/") for c in chosen(changes, ["sgp/train/"]))
    with pytest.raises(ValueError, match="no change has the id, or is in the file, Z9"):
        chosen(changes, ["Z9"])


def test_the_command_counts_and_says_whether_all_is_noticed(tmp_path, monkeypatch, capsys):
    line = {"id": "X1", "file": "a.py", "old": "", "new": "", "tests": [], "equivalent": "why"}
    monkeypatch.setattr(mutants, "read", lambda: read(tmp_path / "list.jsonl"))
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    assert mutants.main([]) == 0
    assert "X1    equivalent  a.py: " in capsys.readouterr().out
    moved = line | {"id": "X2", "old": "gone", "equivalent": ""}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(moved))
    assert mutants.main([]) == 1
    shown = capsys.readouterr().out
    assert "2 changes: 1 equivalent, 1 moved" in shown
    assert "noticed: 0 of 1 that are not equivalent (0.0%)" in shown
    assert mutants.main(["X1"]) == 0
    monkeypatch.setattr(sys, "argv", ["mutants.py", "Z9"])
    with pytest.raises(SystemExit):
        mutants.main()
    assert "Z9" in capsys.readouterr().err
