"""Each example trains a few steps, without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--steps", "3"],
        cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", done.stdout)]
    assert len(losses) >= 3
    assert all(6 < loss < 8.5 for loss in losses[:3]), "about log 2048 at first"
    assert "sgp.Collator" not in done.stderr, "no warning of ours"
