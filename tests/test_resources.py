"""Every kernel that the launch table can choose compiles for GPUs that are not here."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import kernel_cases, resources
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
    clusters = {r["num_ctas"] for r in records if r["target"] == "sm_90"}
    assert clusters == {1, 2, 4, 8, 16}


HEAVY_OPTIONS = ("softcap", "softcap reported", "class weight", "all")
GROUPS = {  # which rows a group of lines is for
    "ONE_BLOCK": lambda r: r["V"] <= 4_096,
    "LIGHT": lambda r: r["V"] > 4_096 and r["V"] % 8 == 0 and r["options"] not in HEAVY_OPTIONS,
    "HEAVY": lambda r: r["V"] > 4_096 and r["V"] % 8 == 0 and r["options"] in HEAVY_OPTIONS,
    "NARROW": lambda r: r["V"] > 4_096 and r["V"] % 8 != 0,
    "STREAMING": lambda r: r["V"] > 4_096,
}


def test_the_table_says_what_was_compiled():
    """The comment of each line has the most registers of any kernel that it was compiled for."""
    source = (ROOT / "kernels" / "table.py").read_text()
    records = json.loads(RESULTS.read_text())["records"]
    group, seen = "", 0
    for text in source.splitlines():
        if begins := re.match(r"(ONE_BLOCK|LIGHT|HEAVY|NARROW|STREAMING)\w* = ", text):
            group = begins[1]
        if not (found := re.search(r"(Line\(\"[^)]+\)),?  # (\d+) \| (\d+)", text)):
            continue
        line = eval(found[1], {"Line": table.Line})  # noqa: S307
        for name, shown in zip(("sm_90", "sm_100"), found.groups()[1:], strict=True):
            registers = [
                r["registers"]
                for r in records
                if (r["target"], r["form"], r["BV"]) == (name, line.form, line.BV)
                and (32 * r["num_warps"], r["num_ctas"]) == (line.threads, line.programs)
                and GROUPS[group](r)
            ]
            assert int(shown) == max(registers, default=0), (text, name)
        seen += 1
    assert seen == source.count('Line("'), "a line without figures"


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_read_once(target, dtype):
    """No spill, 16 bytes at a time: light rows up to 262 144 columns, all options to 151 936.

    A row of V columns takes the kernel that was compiled for the longest row of its line: all
    are multiples of 16. (What is a multiple of 8 alone is compiled at the longest of each line.)
    """
    records = json.loads(RESULTS.read_text())["records"]
    on = kernel_cases.target_of(target)
    for V, options in itertools.product(
        (32_896, 128_256, 131_072, 151_936, 248_320, 262_144), ("plain", "logged", "all")
    ):
        if options == "all" and V > 151_936:
            continue
        light, plain = options != "all", options == "plain"
        row = table.Row(V, light=light, plain=plain, itemsize=kernel_cases.DTYPES[dtype].itemsize)
        line = table.choose(row, on, "auto")
        assert line.form == "resident"
        assert any(
            (r["target"], r["kernel"], r["dtype"], r["options"], r["layout"])
            == (target, "forward", dtype, options, "rows")
            and (r["BV"], r["pieces"], r["num_ctas"]) == (line.BV, line.pieces, line.programs)
            for r in records
        ), (V, options, line)


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
    assert {r["form"] for r in records} == {"resident", "streaming"}
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
    on = kernel_cases.target_of("sm_90")

    def broken(case, **found):
        fine = {"num_ctas": 1, "pieces": 1, "spills": 0, "stack": 0, "narrow": 9} | found
        return len(
            resources._broken_budgets(case, kernel_cases.call_of(case, on), fine, nvidia=True)
        )

    case = kernel_cases.Case("forward", 50_264, "bf16", "plain", form="streaming")
    fine = {"form": "streaming", "num_warps": 32, "loads_16": 4, "stores_16": 4}
    assert broken(case, **fine) == 0
    assert broken(case, **fine | {"loads_16": 1, "spills": 2, "stack": 8}) == 2
    assert broken(case, **fine | {"narrow": 41}) == 1

    case = kernel_cases.Case("forward", 151_936, "bf16", "plain")
    fine = {"form": "resident", "num_warps": 8, "num_ctas": 8, "pieces": 10}
    fine |= {"loads_16": 10, "stores_16": 10}
    assert broken(case, **fine) == 0
    assert broken(case, **fine | {"loads_16": 20}) == 1, "read twice"
    assert broken(case, **fine | {"stores_16": 5}) == 1


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
