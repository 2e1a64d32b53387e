"""The host's time is measured without a GPU; a kept launch is the one that Triton would make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench.against import least
from bench.proof import host, standin

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: no stand-in")


def python(*arguments, **environment):
    """Run Python from the repository's root, without the interpreter."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SGP_", "TRITON_I"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.skipif(standin.compiler() is None, reason="there is no C compiler")
def test_the_command_measures_every_call(tmp_path):
    output = tmp_path / "host.json"
    run = python("-m", "bench", "host", "--quick", "--rounds", "1", "--output", str(output))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "x Least" in run.stdout
    found = json.loads(output.read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert found["sgp"]["backend"] == "triton"
    assert found["how"] == (host.GPU if torch.cuda.is_available() else host.STANDIN)
    timed = {call["call"]: call for call in found["calls"]}
    ours = {"mean", "mean, a denominator", "sum", "none", "token_log_probs"}
    ours |= {"linear_cross_entropy", "linear_token_log_probs", "linear_loss"}
    assert set(timed) == ours | {host.LEAST, "F.cross_entropy", "F, head and loss", "Liger"}
    for name, call in timed.items():
        if name == "Liger" and call["status"] == "liger-kernel is not installed":
            continue
        assert call["status"] == "ok", call
        assert 0 < call["forward_least_us"] <= call["forward_us"], call
        assert call["both_us"] > 0  # not the larger where something else took the processor
        assert call["ratio"] == pytest.approx(call["both_us"] / timed[host.LEAST]["both_us"])
    assert timed[host.LEAST]["ratio"] == 1
    budgets = {name: call["budget"] for name, call in timed.items() if call["budget"]}
    assert budgets == {
        "mean": 1.5, "mean, a denominator": 1.5, "sum": 1.25, "token_log_probs": 1.5,
        "linear_cross_entropy": 4.0,
    }  # fmt: skip


@without_gpu
def test_without_a_c_compiler_the_command_says_so():
    run = python("-m", "bench", "host", CC="no-such-compiler")
    assert run.returncode == 1
    assert "no GPU here, and no stand-in for one: a C compiler is needed" in run.stderr
    assert "Traceback" not in run.stderr


def test_kernels_that_are_interpreted_are_not_launched():
    assert "unset it" in standin.obstacle()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        standin.install()


def test_what_is_gone_from_sgp_is_named():
    with pytest.raises(RuntimeError, match=r"host\.nothing is gone: bench/proof/standin\.py"):
        standin._replace(host, "nothing", None)


def test_who_fails_is_shown_as_that(monkeypatch):
    def fail(_):
        raise ValueError("this one never works")

    def work(b):
        return b.logits.float().sum()

    chosen = [host.Call(host.LEAST, work), host.Call("a", fail, 2.0), host.Call("mean", work)]
    chosen.append(host.Call("mean, inductor", work))
    batch = host.Batch.make(CPU)
    timed = host.with_eager(host.measure(chosen, batch, rounds=3, count=2))
    assert [t.call for t in timed] == [host.LEAST, "a", "mean", "mean, inductor"]
    assert timed[1] == host.Timed("a", "fails: ValueError: this one never works", budget=2.0)
    assert timed[3].budget == timed[2].ratio, "compiled is to be no slower than eager"
    table = host.table_of(timed, "title", "how")
    assert table.row_count == 3
    assert "a: fails: ValueError: this one never works" in table.caption
    monkeypatch.setattr(host, "calls", lambda: chosen)
    monkeypatch.setattr(host, "_prepare", lambda: CPU)
    monkeypatch.setattr(sys, "argv", ["host", "--quick"])
    threads = torch.get_num_threads()
    try:
        assert host.main() == 1
    finally:
        torch.set_num_threads(threads)


# -- the unit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [37, 5_000])  # less than a block, and two blocks
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_least_is_right(V, factor):
    torch.manual_seed(0)
    logits = torch.randn(6, V, requires_grad=True)
    target = torch.tensor([3, -100, V - 1, 0, -100, 7])
    loss = least.Least.apply(logits, target)
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(factor * loss, logits)
    (truth,) = torch.autograd.grad(factor * expected, logits)
    torch.testing.assert_close(gradient, truth)


# -- kept launches ---------------------------------------------------------------------------------


@without_gpu
def test_a_kept_launch_is_tritons_own():
    """The same binary, grid, stream, metadata and arguments, whatever earlier calls have left.

    And a key that lacks something shows.
    """
    missing = ["recipe", "options", "strides", "alignment"]
    run = python("tests/kept_launches.py", "4000", "0", *missing)
    assert run.returncode == 0, run.stdout + run.stderr
    found, *lacking = [json.loads(line) for line in run.stdout.splitlines()]
    assert found["different"] == []
    assert found["launches"] > 3_000
    assert found["kept"] > 200
    assert found["hits"] > 1_500, "launches by what another call had compiled"
    assert {what: bool(f["how_many"]) for what, f in zip(missing, lacking, strict=True)} == (
        dict.fromkeys(missing, True)
    )
