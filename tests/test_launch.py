"""Launches that are kept: when one is, when it is used, and what reaches the stream."""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

from types import SimpleNamespace

import pytest
import torch
import triton

from sgp.kernels import launch
from sgp.kernels.launch import Call, put
from sgp.rows import by_triton
from sgp.rows.recipe import Recipe

pytestmark = pytest.mark.core


class Compiled:
    """Stands in for Triton's CompiledKernel; records what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launched = []

    def run(self, *arguments):
        self.launched.append(("run", *arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append(("hooked", grid, *arguments))


class Kernel:
    """Stands in for a jit function of three arguments and two constexprs."""

    arg_names = ("x", "n", "V", "BV", "ALIGN")

    def __init__(self, compiled):
        self.compiled, self.launched = compiled, []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.launched.append((grid, arguments, constants))
            return self.compiled

        return run


CONSTANTS = {"ALIGN": 8, "num_warps": 4, "BV": 64}


@pytest.fixture
def kept(monkeypatch):
    """The launches that are kept, none before."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: f"stream of {device}"
    )
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "_kept", {})
    return launch._kept


def put_once(kernel, *, x=None, N=5, key="key", most_programs=None):
    """One launch; whether it was chosen anew."""
    x = torch.zeros(64) if x is None else x
    chosen = []

    def choose():
        chosen.append(True)
        programs = N if most_programs is None else min(N, most_programs)
        return Call(kernel, (programs,), (x, 7, 9), CONSTANTS, most_programs=most_programs)

    put(key, (x, None), N, (x, 7, 9), choose)
    return bool(chosen)


def test_the_second_launch_repeats_the_first(kept):
    compiled = Compiled()
    kernel, x = Kernel(compiled), torch.zeros(64)
    assert put_once(kernel)
    assert kernel.launched[0][::2] == ((5,), CONSTANTS)
    assert not put_once(kernel, x=x, N=6)
    assert len(kernel.launched) == 1, "Triton did not look at the arguments again"
    (launched,) = compiled.launched
    assert launched[:5] == ("run", 6, 1, 1, "stream of 0")
    assert launched[5:10] == ("function", "metadata", None, None, None)
    assert launched[10] is x
    assert launched[11:] == (7, 9, 64, 8), "constexprs last, in the kernel's order"


def test_another_key_is_another_launch(kept):
    kernel = Kernel(Compiled())
    assert put_once(kernel, key="one")
    assert put_once(kernel, key="two")
    assert not put_once(kernel, key="one")


def test_tensors_that_begin_elsewhere_go_triton_s_way(kept):
    kernel, off = Kernel(Compiled()), torch.zeros(65)[1:]
    assert put_once(kernel, x=off)
    assert not kept, "its binary knows less of its pointers"
    assert put_once(kernel)
    assert put_once(kernel, x=off), "and is not given one that knows more"


def test_a_hook_sees_kept_launches(kept, monkeypatch):
    compiled = Compiled()
    kernel = Kernel(compiled)
    put_once(kernel)
    hooks = SimpleNamespace(calls=[print])
    runtime = SimpleNamespace(launch_enter_hook=hooks, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(runtime=runtime))
    put_once(kernel)
    assert compiled.launched[0][:2] == ("hooked", (5, 1, 1))
    assert compiled.launched[0][3:] == (7, 9, 64, 8)


def test_triton_s_hooks_are_where_they_are_looked_for():
    """`Call.launch` looks at `.calls` of both; they are chains in every Triton from 3.5 on."""
    runtime = triton.knobs.runtime
    assert list(runtime.launch_enter_hook.calls) == list(runtime.launch_exit_hook.calls) == []


@pytest.mark.parametrize(("N", "programs"), [(3, 3), (8, 8), (50, 8)])
def test_the_grid_is_one_program_a_row_up_to_the_most(kept, N, programs):
    compiled = Compiled()
    kernel = Kernel(compiled)
    put_once(kernel, most_programs=8)
    put_once(kernel, N=N, most_programs=8)
    assert compiled.launched[0][1] == programs


def test_no_rows_are_no_launch(kept):
    compiled = Compiled()
    kernel = Kernel(compiled)
    assert put_once(kernel, N=0)
    assert not kernel.launched
    assert not kept, "nothing was compiled"
    put_once(kernel)
    put_once(kernel, N=0)
    assert not compiled.launched


def test_nothing_is_kept_on_amd(kept, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    put_once(Kernel(Compiled()))
    assert not kept


def test_nothing_is_kept_of_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "_kept", {})
    logits = torch.randn(2, 8)
    by_triton.multiply(logits, None, torch.tensor(2.0), -100)
    assert not launch._kept


def test_a_kept_launch_goes_through_call(kept, monkeypatch):
    """One place that every launch passes, for whoever has to see them all."""
    kernel = Kernel(Compiled())
    put_once(kernel)
    calls = []

    def seen(self):
        calls.append(self)

    monkeypatch.setattr(Call, "launch", seen)
    put_once(kernel)
    ((seen_kernel, grid, arguments, constants, compiled, _),) = calls
    assert (seen_kernel, grid, arguments[1:]) == (kernel, (5,), (7, 9))
    assert (constants, compiled) == (CONSTANTS, kernel.compiled)


def test_no_more_than_so_many_are_kept(kept, monkeypatch):
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    kernel = Kernel(Compiled())
    for key in range(5):
        put_once(kernel, key=key)
    assert len(kept) == 2


def test_numbers_that_were_given_as_ints_are_floats():
    """As a key 30 equals 30.0, so both must need the same binary."""
    whole = Recipe(-100, 1, 30, 2, 1, 2)
    real = Recipe(-100, 1.0, 30.0, 2.0, 1.0, 2.0)
    assert whole == real
    assert hash(whole) == hash(real)
    options = by_triton.options_of(None, None, None, whole)
    assert options == by_triton.options_of(None, None, None, real)
    assert {type(x) for x in options if x is not None} == {float}
