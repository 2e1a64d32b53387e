"""What every test shares: the two backends, and a watch over the kernels' memory accesses."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from bench.interpreter import watch_accesses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Runs a test twice: PyTorch's operators, and the kernels (interpreted without a GPU).

    Interpreted kernels run under a bounds check: an access outside the tensors that a launch was
    given is an error.
    """
    monkeypatch.setenv("SGP_BACKEND", request.param)
    if request.param == "triton" and DEVICE == "cpu":
        with watch_accesses():
            yield request.param
    else:
        yield request.param
