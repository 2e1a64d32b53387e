"""The same cases and rivals under pytest-benchmark, to compare commits on one machine.

    pytest bench                                    # a table a case
    pytest bench --benchmark-autosave               # keep it ...
    pytest bench --benchmark-compare                # ... and hold the next commit against it
    pytest bench -k "linear and sgp" --benchmark-json=out.json

Rivals that cannot run here are skipped with the reason; one that is wrong fails. `python -m bench
compare` measures memory and bounds too, and lets rivals take turns.
"""

import functools
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.against import cases, measure, rivals
from bench.against.cases import Case, Problem
from bench.against.measure import Measured
from bench.against.rivals import Rival

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOW_SECONDS = 1.0  # of a step: then two rounds are enough
CASES = cases.gpu_cases() if DEVICE.type == "cuda" else cases.cpu_cases()


@functools.lru_cache(maxsize=1)
def checked(case: Case) -> dict[str, Measured]:
    """Who is right on a case; tests of one case follow one another."""
    return measure.check(case, rivals.rivals_of(case.form), DEVICE)


@functools.lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    """Its tensors."""
    return cases.make(case, DEVICE)


@pytest.mark.filterwarnings("ignore")  # a library's warnings are its own
@pytest.mark.parametrize(
    ("case", "rival"),
    [
        pytest.param(case, rival, id=f"{case.name}-{rival.name}".replace("=", ""))
        for case in CASES
        for rival in rivals.rivals_of(case.form)
    ],
)
def test_forward_and_backward(case: Case, rival: Rival, benchmark: BenchmarkFixture) -> None:
    """Loss and gradients from the leaves; on a GPU until it has finished."""
    if reason := rival.missing(DEVICE):
        pytest.skip(f"{rival.name}: {reason}")
    found = checked(case)[rival.name]
    if found.status != "ok":
        pytest.fail(f"not timed: {found.status}")
    problem = problem_of(case)
    benchmark.group = case.name
    benchmark.extra_info |= {"case": case.name, "rival": rival.name}

    def step() -> None:
        measure.run(rival, problem)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    slow = time.perf_counter() - start > SLOW_SECONDS
    benchmark.pedantic(step, rounds=2 if slow else 5, warmup_rounds=0 if slow else 1)
