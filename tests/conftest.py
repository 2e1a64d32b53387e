"""What every test shares: the two backends, and a watch over the kernels' memory accesses.

Tests run the kernels in Triton's interpreter, on any machine: there every access can be checked.
`sgp verify` is the check of the compiled kernels on a GPU.
"""

import os
import signal

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
# Tensors are small: a second thread waits, which takes a core. A process a core does more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background; inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, by the first profiler in a process

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from packaging.version import Version

from bench.proof.interpreter import watch_accesses
from sgp.head import chunks
from tests.quick_interpreter import patch_once

patch_once()


@pytest.fixture(scope="session")
def device():
    """Where tests put their tensors."""
    return "cpu"


@pytest.fixture
def two_threads():
    """PyTorch's operators in two threads, as tests of equal bits need them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Runs a test twice: PyTorch's operators, and the kernels, interpreted.

    Kernels run under a bounds check: an access outside the tensors that a launch was given is an
    error.
    """
    monkeypatch.setenv("SGP_BACKEND", request.param)
    if request.param == "triton":
        with watch_accesses():
            yield request.param
    else:
        yield request.param


@pytest.fixture
def budgets(monkeypatch):
    """The memory budgets that linear heads plan by in a test, one for each plan."""
    seen, inner = [], chunks.plan

    def spy(*arguments, **asked):
        seen.append(asked["memory_budget"])
        return inner(*arguments, **asked)

    monkeypatch.setattr(chunks, "plan", spy)
    return seen


def pytest_collection_modifyitems(items):
    """Before transformers 5.21 `patch` has no mode "rows", and says so."""
    try:
        known = Version(version("transformers")) >= Version("5.21")
    except PackageNotFoundError:
        return
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if not known and values.get("mode") == "rows":
            item.add_marker(pytest.mark.skip(reason='mode "rows" needs transformers 5.21'))
