"""Every kernel that the launch table can choose compiles for GPUs that are not here."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.proof import kernel_cases, resources
from sgp.kernels import launch, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "resources.json"
FORCED = ("SGP_ROW_FORM", "SGP_BACKEND")


def test_the_results_are_of_these_sources():
    """Every case of today's kernels; none breaks its budget. With which Triton is in the file.

    A test below compiles a sample again; `python -m bench resources` compiles them all.
    """
    found = json.loads(RESULTS.read_text())
    assert found["fingerprint"] == resources.fingerprint(), "run `python -m bench resources`"
    assert f"torch=={found['torch']} " in (ROOT / ".ci" / "run").read_text(), "as above"
    assert not found["longest"]
    records = found["records"]
    for target in kernel_cases.TARGETS:
        mine = [record for record in records if record["target"] == target]
        compiled = {tuple(record[field] for field in kernel_cases.Case._fields) for record in mine}
        assert compiled == {due(case, target) for case in kernel_cases.cases(target)}, "as above"
        assert {record["dtype"] for record in mine} == {"bf16", "fp16", "fp32"}
    assert {record["target"] for record in records} == set(kernel_cases.TARGETS)
    for record in records:
        assert record["spills"] == record["stack"] == 0, record
        assert not record["broken"], record
    assert {r["num_ctas"] for r in records if r["target"] == "sm_90"} == {1, 8}
    forms = {"resident", "streaming", "staying", "blockwise"}
    assert {r["form"] for r in records if r["target"] == "sm_80"} == forms


def due(case, target):
    """A case as a record has it: with the form that the table chooses."""
    call = kernel_cases.call_of(case, kernel_cases.target_of(target))
    return tuple(case._replace(form=resources.form_of(call)))


def lines_of_the_table():
    """Every Line that a name of kernels/table.py leads to."""
    found = []

    def look(value):
        if isinstance(value, table.Line):
            found.append(value)
        elif isinstance(value, (tuple, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                look(item)

    for name, value in vars(table).items():
        if name.isupper():
            look(value)
    return list(dict.fromkeys(found))


def test_every_line_was_compiled():
    """And every count of pieces of a row that a cluster shares."""
    targets = ("sm_90", "sm_100", "gfx942")  # whose lines differ in part
    records = [r for r in json.loads(RESULTS.read_text())["records"] if r["target"] in targets]
    compiled = {
        (r["form"], r["BV"], r["BV_2"], 32 * r["num_warps"], r["num_ctas"]) for r in records
    }
    lines = lines_of_the_table()
    assert len(lines) > 20
    for line in lines:
        second = line.BV_2 or line.BV
        assert (line.form, line.BV, second, line.threads, line.programs) in compiled, line
    pieces = {r["pieces"] for r in records if r["num_ctas"] > 1}
    assert pieces == set(table.PIECES)


def test_every_line_says_whether_it_was_timed():
    """Beside it, or in the comment above its group."""
    source = (ROOT / "kernels" / "table.py").read_text()
    is_said, before, lines = False, "", 0
    for text in source.splitlines():
        is_comment = text.lstrip().startswith("#")
        if not text or (is_comment and not before.lstrip().startswith("#") and text[0] == "#"):
            is_said = False  # another group
        is_said = is_said or (is_comment and "timed" in text.lower())
        if 'Line("' in text:
            lines += 1
            assert is_said or "timed" in text.lower(), text
        before = text
    assert lines > 20


def test_the_loops_of_a_streamed_row():
    """No barrier and no shuffle in the first loop, on any NVIDIA target; few instructions."""
    records = json.loads(RESULTS.read_text())["records"]
    streamed = [
        r
        for r in records
        if r["form"] in ("streaming", "staying")
        and r["kernel"] in ("forward", "statistics", "loss")
        and r.get("first_loop")
    ]
    assert len(streamed) > 250
    assert all(r["meetings"] == 0 for r in streamed)
    plain = [
        r
        for r in streamed
        if (r["target"], r["dtype"], r["options"], r["kernel"])
        == ("sm_90", "bf16", "plain", "forward")
        and r["V"] > 4_096
    ]
    assert len(plain) > 10
    for r in plain:
        threads = 32 * r["num_warps"]
        assert r["first_loop"] <= 11 * r["BV"] // threads, r
        assert r["second_loop"] <= 7 * r["BV_2"] // threads, r


SAMPLE = """
import json, sys
from bench.proof import kernel_cases, resources
for case in json.loads(sys.argv[2]):
    print(json.dumps(resources.compile_case(kernel_cases.Case(*case), sys.argv[1])))
"""


def sample(records, fingerprint):
    """One record of each kernel and form, and of a cluster.

    A hash draws it, so that after each change of the kernels another sample is compiled.
    """

    def draw(record):
        return hashlib.sha256(f"{fingerprint} {record}".encode()).digest()

    groups = {}
    for record in sorted(records, key=draw):
        groups.setdefault((record["kernel"], record["form"], record["num_ctas"] > 1), record)
    return list(groups.values())


@pytest.mark.parametrize(
    "target",
    ["sm_80", "sm_90", "sm_100", "gfx942"],  # A100, H100 and H200, B200, MI300
)
def test_a_sample_compiled_afresh_is_as_in_the_results(target, tmp_path):
    """To the register; with another Triton than that of the results, within the budget."""
    results = json.loads(RESULTS.read_text())
    mine = [record for record in results["records"] if record["target"] == target]
    chosen = sample(mine, results["fingerprint"])
    assert {record["kernel"] for record in chosen} == {
        "forward",
        "statistics",
        "loss",
        "backward",
        "factor",
        *kernel_cases.PROBABILITIES,
        *kernel_cases.OF_TWO_ROWS,
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", *FORCED)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    cases = [[record[field] for field in kernel_cases.Case._fields] for record in chosen]
    run = subprocess.run(
        [sys.executable, "-c", SAMPLE, target, json.dumps(cases)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(chosen)
    for record, expected in zip(found, chosen, strict=True):
        assert not record["broken"], record
        assert record["spills"] == record["stack"] == 0, record
        if results["triton"] == triton.__version__:
            assert record == expected


def test_a_part_does_not_take_the_place_of_the_results(tmp_path, monkeypatch, capsys):
    """Half an hour of compiling is not overwritten by `--longest`."""
    monkeypatch.setattr(resources, "RESULTS", tmp_path / "resources.json")
    monkeypatch.setattr(resources, "cases", lambda *_, **__: [])
    monkeypatch.setattr(launch, "runs_interpreted", lambda: False)
    monkeypatch.setattr(sys, "argv", ["resources", "--longest"])
    assert resources.main() == 0
    assert not resources.RESULTS.exists()
    monkeypatch.setattr(sys, "argv", ["resources", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="Is a directory; --output names another"):
        resources.main()
    monkeypatch.setattr(sys, "argv", ["resources"])
    assert resources.main() == 0
    assert resources.RESULTS.exists()
    assert "0 kernels compiled" in capsys.readouterr().out


def test_a_broken_budget_is_seen():
    """The budget itself can fail: a kernel told to expect wider rows than it has breaks it."""
    fine = {"num_ctas": 1, "pieces": 1, "spills": 0, "stack": 0, "narrow": 9, "meetings": 0}

    def broken(case, **found):
        return len(resources._broken_budgets(case, fine | found, nvidia=True))

    case = kernel_cases.Case("forward", 50_264, "bf16", "plain", form="streaming")
    streamed = {"form": "streaming", "num_warps": 16, "BV": 16_384, "BV_2": 8_192}
    streamed |= {"loads_16": 6, "stores_16": 2, "target": "sm_90"}
    streamed |= {"first_loop": 340, "second_loop": 110}
    assert broken(case, **streamed) == 0
    assert broken(case, **streamed | {"loads_16": 1, "spills": 2, "stack": 8}) == 2
    assert broken(case, **streamed | {"narrow": 41}) == 1
    assert broken(case, **streamed | {"meetings": 1}) == 1
    assert broken(case, **streamed | {"first_loop": 353}) == 1
    assert broken(case, **streamed | {"second_loop": 113}) == 1

    case = kernel_cases.Case("forward", 151_936, "fp32", "plain", "head")
    resident = {"form": "resident", "num_warps": 8, "num_ctas": 8, "pieces": 10}
    resident |= {"BV": 16_384, "BV_2": 16_384, "loads_16": 20, "stores_16": 10}
    assert broken(case, **resident) == 0
    assert broken(case, **resident | {"loads_16": 40}) == 1, "read twice"
    assert broken(case, **resident | {"stores_16": 5}) == 1


def test_the_fingerprint_is_of_code_alone(tmp_path, monkeypatch):
    before = resources.fingerprint()
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    kernel = tmp_path / "kernels" / "factor.py"
    source = kernel.read_text()
    kernel.write_text(source + "\n# a comment\n")
    assert resources.fingerprint() == before
    kernel.write_text(source + "\nx = 1\n")
    assert resources.fingerprint() != before
