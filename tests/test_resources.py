"""Every kernel that the launch table can choose compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
    command += ["--targets", target, "--jobs", "1", "--output", str(output)]
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


def test_a_broken_budget_is_seen():
    """The budget itself can fail: a kernel told to expect wider rows than it has breaks it."""
    from bench import resources

    case = resources.Case("forward", 50_264, "bf16", "plain")
    call = resources._call(case, 32)
    record = {"form": "streaming", "num_warps": 32, "loads_16": 1, "stores_16": 4, "narrow": 9}
    spilled = record | {"spills": 2, "stack": 8}
    assert len(resources._broken_budgets(case, call, spilled, nvidia=True)) == 2
    narrow = record | {"spills": 0, "stack": 0, "loads_16": 4, "narrow": 32}
    assert len(resources._broken_budgets(case, call, narrow, nvidia=True)) == 1
    fine = record | {"spills": 0, "stack": 0, "loads_16": 4}
    assert resources._broken_budgets(case, call, fine, nvidia=True) == []
