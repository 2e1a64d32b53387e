"""Every kernel that the launch table can choose compiles for GPUs that are not here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.proof import kernel_cases, resources
from sgp.kernels import launch, table

ROOT = Path(__file__).parent.parent


RESULTS = ROOT / "bench" / "results" / "resources.json"


def test_the_results_are_of_these_sources():
    """Every line of the table and every count of pieces; run again when a kernel changes.

    The tests below compile the longest row of each line; the file has them all.
    """
    found = json.loads(RESULTS.read_text())
    assert found["fingerprint"] == resources.fingerprint(), "run `python -m bench resources`"
    assert not found["longest"]
    records = found["records"]
    assert {record["target"] for record in records} == set(kernel_cases.TARGETS)
    for record in records:
        assert record["spills"] == record["stack"] == 0, record
        assert not record["broken"], record
    assert {r["num_ctas"] for r in records if r["target"] == "sm_90"} == {1, 8}
    forms = {"resident", "streaming", "staying", "blockwise"}
    assert {r["form"] for r in records if r["target"] == "sm_80"} == forms


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
    targets = ("sm_90", "sm_100")  # whose lines differ in part
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


@pytest.mark.parametrize(
    "target",
    ["sm_80", "sm_90", "sm_100", "gfx942"],  # A100, H100 and H200, B200, MI300
)
def test_no_spills_and_16_byte_accesses_without_a_gpu(target, tmp_path):
    """The command fails when any kernel has a spill, a stack or narrow accesses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    output = tmp_path / "resources.json"
    command = [sys.executable, "-m", "bench", "resources"]
    command += ["--targets", target, "--jobs", "1", "--longest", "--output", str(output)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads(output.read_text())["records"]
    assert {r["kernel"] for r in records} == {
        "forward",
        "statistics",
        "loss",
        "backward",
        "factor",
    }
    forms = {"resident", "streaming"} | ({"staying"} if target.startswith("sm_") else set())
    assert {r["form"] for r in records} == forms
    assert {r["dtype"] for r in records} == {"bf16", "fp16", "fp32"}


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
