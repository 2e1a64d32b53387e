"""Each example trains a few steps, without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ALONE = sorted(
    path.name
    for path in EXAMPLES.glob("*.py")
    if path.name not in ("common.py", "tensor_parallel.py")
)


def losses_of(folder, name, *launcher):
    """What an example prints of three steps."""
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / name, "--steps", "3"],
        cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sgp.Collator" not in done.stderr, "no warning of ours"
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", done.stdout)]
    assert len(losses) >= 3
    assert all(6 < loss < 8.5 for loss in losses[:3]), "about log 2048 at first"
    return losses


@pytest.mark.parametrize("name", ALONE)
def test_example(name, tmp_path):
    losses_of(tmp_path, name)


def test_a_split_head_has_the_losses_of_a_whole_one(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    one, two = (losses_of(tmp_path, "tensor_parallel.py", *torchrun, n) for n in ("1", "2"))
    assert two == pytest.approx(one, abs=2e-5)
    assert len(set(one)) == 3, "it trains"
