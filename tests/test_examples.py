"""Each example trains a few steps, without network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
OTHERS = (
    "common.py", "distil_toy.py", "losses.py", "reinforce_toy.py", "tensor_parallel.py",
    "trl_distillation.py",
)  # fmt: skip
ALONE = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in OTHERS)


def printed_by(folder, name, *launcher, more=()):
    """What an example says of three steps."""
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / name, "--steps", "3", *more],
        cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sgp.Collator" not in done.stderr, "no warning of ours"
    return done.stdout


def losses_of(folder, name, *launcher):
    """Those of three steps."""
    printed = printed_by(folder, name, *launcher)
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", printed)]
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


def test_a_policy_has_the_rewards_of_plain_pytorch(tmp_path):
    printed = printed_by(tmp_path, "reinforce_toy.py", more=("--picture", "reward.png"))
    rewards = re.findall(r"plain PyTorch (\d\.\d+), sgp.linear_loss (\d\.\d+)", printed)
    assert len(rewards) == 3
    assert all(plain == ours for plain, ours in rewards)
    assert len(set(rewards)) == 3, "it trains"
    found = json.loads((tmp_path / "reward.json").read_text())
    assert [len(curve) for curve in found["rewards"].values()] == [3, 3]
    with Image.open(tmp_path / "reward.png") as drawn:
        assert drawn.size == (704, 396)


def test_students_are_measured_before_and_after(tmp_path):
    printed = printed_by(tmp_path, "distil_toy.py", more=("--picture", "distil.png"))
    losses = re.findall(r"(.+): held-out loss (\d\.\d+) before, (\d\.\d+) after", printed)
    names = ["labels alone", "forward KL", "JSD", "reverse KL"]
    assert [name for name, *_ in losses] == names
    assert len({before for _, before, _ in losses}) == 1, "from the same weights"
    assert all(4 < float(x) < 6 for _, *both in losses for x in both), "about log 102"
    assert len({after for *_, after in losses}) > 2, "the losses differ"
    found = json.loads((tmp_path / "distil.json").read_text())
    assert list(found["students"]) == names
    for curve in found["students"].values():
        assert [point["step"] for point in curve] == [0, 3]
        assert all(sum(point["shares"]) == pytest.approx(1) for point in curve)
    with Image.open(tmp_path / "distil.png") as drawn:
        assert drawn.size == (1265, 429)


@pytest.mark.parametrize("beta", ["0", "0.5"])
def test_a_student_of_trls_trainer_learns(beta, tmp_path):
    printed = printed_by(tmp_path, "trl_distillation.py", more=("--beta", beta))
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", printed)]
    assert len(losses) >= 3
    assert all(0 < loss < 4 for loss in losses[:3])
