"""The repository for Hugging Face's kernels library, loaded by that library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgp
from sgp.huggingface import hub

KERNEL = """
import os, sys
from pathlib import Path
from kernels import get_local_kernel
import torch
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert "sgp" not in sys.modules
torch.manual_seed(0)
logits = torch.randn(6, 40, requires_grad=True)
target = torch.tensor([3, -100, 5, -100, 39, 0])
loss = kernel.cross_entropy(logits, target)
loss.backward()
head = torch.randn(40, 8)
hidden = torch.randn(6, 8)
other = kernel.linear_cross_entropy(hidden, head, target, memory_budget=10_000)
assert "sgp" not in sys.modules, "the copy uses an installed package's code"
torch.save((loss.detach(), logits.grad, other), sys.argv[2])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return hub.write(tmp_path_factory.mktemp("repository"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_kernel_is_loaded_without_the_package(repository, backend, tmp_path):
    environment = os.environ | {"SGP_BACKEND": backend, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", KERNEL, repository, tmp_path / "out.pt"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    loss, gradient, other = torch.load(tmp_path / "out.pt")
    torch.manual_seed(0)
    logits = torch.randn(6, 40, requires_grad=True)
    target = torch.tensor([3, -100, 5, -100, 39, 0])
    expected = sgp.cross_entropy(logits, target)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)
    head = torch.randn(40, 8)
    torch.testing.assert_close(other, sgp.linear_cross_entropy(torch.randn(6, 8), head, target))


def test_it_stands_beside_the_package(repository):
    """Operators of the same names, registered twice, would raise."""
    from kernels import get_local_kernel

    kernel = get_local_kernel(Path(repository), backend="cpu")
    logits, target = torch.randn(4, 9), torch.tensor([1, -100, 3, 4])
    assert kernel.cross_entropy is not sgp.cross_entropy
    torch.testing.assert_close(
        kernel.cross_entropy(logits, target), sgp.cross_entropy(logits, target)
    )
    selection = kernel.Selection.from_labels(target)
    assert selection.num_kept == 3


def test_what_else_is_in_the_folder_stays(tmp_path):
    """It may be a checkout whose build folder is something else's."""
    other, stale = tmp_path / "build" / "lib.o", tmp_path / "build" / "torch-cpu" / "old.py"
    for path in (other, stale):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    hub.write(tmp_path)
    assert other.exists()
    assert not stale.exists()


def test_both_builds_are_whole_and_relative(repository):
    builds = sorted(repository.glob("build/*"))
    assert [path.name for path in builds] == ["torch-cpu", "torch-cuda"]
    for build in builds:
        assert (build / "kernels" / "row_resident.py").is_file()
        for path in build.rglob("*.py"):
            lines = path.read_text().splitlines()
            assert not [x for x in lines if x.strip().startswith("from sgp")], path
            assert '"sgp::' not in path.read_text()
    names = {str(p.relative_to(builds[0])) for p in builds[0].rglob("*.py")}
    assert names == {str(p.relative_to(builds[1])) for p in builds[1].rglob("*.py")}
    assert not any("huggingface" in name or "train" in name for name in names)
