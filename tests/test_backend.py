"""Which implementation runs, that it does run, and that nothing falls back without a word."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.commands import doctor, verify
from sgp.rows import backend

pytestmark = pytest.mark.core

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
interpreted_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launches are counted in the interpreter, on a CPU"
)


def batch(dtype=torch.float32, V=37):
    torch.manual_seed(0)
    logits = torch.randn(5, V).to(dtype).requires_grad_()
    return logits, torch.tensor([3, -100, V - 1, 0, -100])


# -- the kernels really run ------------------------------------------------------------------------


@interpreted_only
@pytest.mark.parametrize(
    ("choice", "dtype", "reduction", "forward", "backward"),
    [
        ("triton", torch.float32, "mean", 2, 1),  # divisor; loss and gradient; then the factor
        ("triton", torch.bfloat16, "sum", 1, 1),
        ("triton", torch.float16, "mean", 2, 1),  # divisor; loss; then the gradient
        ("triton", torch.float32, "none", 1, 1),
        ("torch", torch.float32, "mean", 0, 0),
        ("auto", torch.float32, "mean", 0, 0),  # the interpreter is for checking, not for use
        (None, torch.float32, "mean", 0, 0),
        ("torch", torch.float64, "mean", 0, 0),
        ("auto", torch.float64, "mean", 0, 0),
    ],
)
def test_launches(monkeypatch, choice, dtype, reduction, forward, backward):
    if choice is None:
        monkeypatch.delenv("SGP_BACKEND", raising=False)
    else:
        monkeypatch.setenv("SGP_BACKEND", choice)
    logits, target = batch(dtype)
    with watch_accesses() as accesses:
        loss = sgp.cross_entropy(logits, target, reduction=reduction)
        assert accesses.launches == forward
        loss.sum().backward()
        assert accesses.launches == forward + backward
    truth = F.cross_entropy(logits.detach().double(), target, reduction=reduction)
    torch.testing.assert_close(loss.detach(), truth.to(loss.dtype))


@interpreted_only
def test_the_choice_is_made_at_every_call(monkeypatch):
    logits, target = batch()
    launches = []
    for choice in ("torch", "triton", "torch"):
        monkeypatch.setenv("SGP_BACKEND", choice)
        with watch_accesses() as accesses:
            sgp.cross_entropy(logits, target, reduction="sum")
        launches.append(accesses.launches)
    assert launches == [0, 1, 0]


@interpreted_only
@pytest.mark.parametrize("form", ["resident", "streaming", "staying", "blockwise", "auto"])
def test_row_form_is_forced(monkeypatch, form):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", form)
    logits, target = batch()
    with watch_accesses() as accesses:
        loss = sgp.cross_entropy(logits, target)
    assert accesses.launches == 2, "the divisor, and loss with gradient"
    asked = accesses.of(logits.detach()).loaded
    read = 3 * logits.shape[1] * 4  # three kept rows of fp32
    times = 1 if form in ("resident", "auto") else 2  # once, or for the sums and for the gradient
    assert asked == times * read + 3 * 4, "and the target's logit of each row"
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits.detach(), target))


@interpreted_only
@pytest.mark.parametrize("form", ["nonsense", "", "Resident"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_unknown_row_form_is_an_error(monkeypatch, form, reduction):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", form)
    logits, target = batch()
    with pytest.raises(ValueError, match=rf"SGP_ROW_FORM = {form!r}; expected"):
        sgp.cross_entropy(logits, target, reduction=reduction)


@interpreted_only
def test_a_row_too_long_for_the_forced_form_is_an_error(monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", "resident")
    logits, target = batch(V=1_000_000)
    with pytest.raises(ValueError, match=r"SGP_ROW_FORM = 'resident'.*1000000"):
        sgp.cross_entropy(logits, target)


# -- a forced backend that cannot run is an error --------------------------------------------------


@pytest.mark.parametrize("choice", ["nonsense", "", "cuda", "TRITON"])
def test_unknown_backend_is_an_error(monkeypatch, choice):
    monkeypatch.setenv("SGP_BACKEND", choice)
    logits, target = batch()
    message = rf"SGP_BACKEND = '{choice}'; expected one of auto, triton, torch"
    with pytest.raises(ValueError, match=message):
        sgp.cross_entropy(logits, target)
    with pytest.raises(ValueError, match="SGP_BACKEND"):
        backend.explain(CPU, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_forced_on_float64_are_an_error(monkeypatch, reduction):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    logits, target = batch(torch.float64)
    with pytest.raises(RuntimeError, match=r"SGP_BACKEND=triton cannot run.*float64"):
        sgp.cross_entropy(logits, target, reduction=reduction)


@interpreted_only
@pytest.mark.parametrize(
    ("choice", "dtype", "reduction", "forward", "backward"),
    [
        ("triton", torch.float32, "mean", 1, 1),  # loss and gradient; then the factor
        ("triton", torch.bfloat16, "sum", 1, 1),
        ("triton", torch.float16, "mean", 1, 1),  # loss; then the gradient
        ("triton", torch.float32, "none", 1, 1),
        ("torch", torch.float32, "mean", 0, 0),
        ("auto", torch.float32, "mean", 0, 0),
        ("auto", torch.float64, "mean", 0, 0),
    ],
)
def test_launches_of_class_probabilities(monkeypatch, choice, dtype, reduction, forward, backward):
    monkeypatch.setenv("SGP_BACKEND", choice)
    logits, _ = batch(dtype)
    target = torch.randn(5, 37).softmax(1)
    with watch_accesses() as accesses:
        loss = sgp.cross_entropy(logits, target, reduction=reduction)
        assert accesses.launches == forward
        loss.sum().backward()
        assert accesses.launches == forward + backward
    truth = F.cross_entropy(logits.detach().double(), target.double(), reduction=reduction)
    torch.testing.assert_close(loss.detach(), truth.to(loss.dtype))


def test_kernels_forced_on_float64_with_class_probabilities_are_an_error(monkeypatch):
    """Running PyTorch instead would be a fallback without a word."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    logits, _ = batch(torch.float64)
    with pytest.raises(RuntimeError, match=r"SGP_BACKEND=triton cannot run.*float64"):
        sgp.cross_entropy(logits, logits.detach().softmax(-1))


def python(code, **environment):
    """Run code in a fresh Python without this session's backend variables; its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SGP_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env | environment,
        capture_output=True,
        text=True,
        check=False,
    )


LOSS = "print(sgp.cross_entropy(torch.zeros(2, 3), torch.tensor([1, 2])).item())"


def test_kernels_forced_on_a_cpu_without_the_interpreter_are_an_error():
    run = python(f"import torch, sgp\n{LOSS}", SGP_BACKEND="triton")
    assert run.returncode == 1
    assert "RuntimeError: sgp: SGP_BACKEND=triton cannot run: CPU tensors need" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr
    assert run.stdout == ""


# -- without Triton --------------------------------------------------------------------------------

NO_TRITON = {
    "absent": "import sys; sys.modules['triton'] = None",
    "blocked": """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
""",
    "broken": "",  # a package that is found and cannot be loaded
}

FORCED = """
import os
os.environ["SGP_BACKEND"] = "triton"
try:
    sgp.cross_entropy(torch.zeros(2, 3), torch.tensor([1, 2]))
except (RuntimeError, ImportError) as error:
    print("error:", error)
"""


@pytest.mark.parametrize(
    ("how", "interpret"), [("absent", "0"), ("blocked", "0"), ("broken", "0"), ("broken", "1")]
)
def test_a_cpu_needs_no_triton(how, interpret, tmp_path):
    """And where the kernels are asked for, their absence is said."""
    environment = {"TRITON_INTERPRET": interpret}
    if how == "broken":
        (tmp_path / "triton.py").write_text("raise ImportError('libfoo.so is missing')")
        environment["PYTHONPATH"] = str(tmp_path)
    run = python(f"{NO_TRITON[how]}\nimport torch, sgp\n{LOSS}\n{FORCED}", **environment)
    assert run.returncode == 0, run.stderr
    loss, error = run.stdout.splitlines()
    assert float(loss) == pytest.approx(1.0986, abs=1e-4)
    words = "Triton is not installed"
    if how == "broken":
        words = "libfoo.so is missing" if interpret == "1" else "TRITON_INTERPRET=1"
    assert error.startswith("error: ")
    assert words in error


# -- an interpreter that fails ---------------------------------------------------------------------


@pytest.fixture
def old_interpreter(monkeypatch):
    """Triton 3.6's on NumPy 2.4: no loop whose length is an argument."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def without_index(tensor, *scope):
        patch(tensor, *scope)

        def index(_):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

        tensor.__index__ = index

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", without_index)
    monkeypatch.setenv("SGP_BACKEND", "triton")
    backend.interpreter_fault.cache_clear()
    yield
    backend.interpreter_fault.cache_clear()


SAYS = r"interpreter of Triton [\d.]+ fails with NumPy [\d.]+ .*0-dim.*pip install 'numpy<2.4', or"


@interpreted_only
@pytest.mark.usefixtures("old_interpreter")
def test_an_interpreter_that_fails_says_what_to_install():
    logits, target = batch()
    with pytest.raises(RuntimeError, match=SAYS):
        sgp.cross_entropy(logits, target)
    with pytest.raises(RuntimeError, match=SAYS):
        sgp.linear_cross_entropy(logits, torch.randn(3, 37), target.clamp(max=2))


@interpreted_only
@pytest.mark.usefixtures("old_interpreter")
def test_verify_and_doctor_say_what_to_install(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert verify.run(quick=True) == 2
    assert re.search(SAYS, capsys.readouterr().out)
    assert doctor.run() == 1
    assert re.search(SAYS, capsys.readouterr().out)


@interpreted_only
@pytest.mark.usefixtures("old_interpreter")
def test_who_runs_pytorchs_operators_needs_no_interpreter(monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "auto")
    logits, target = batch()
    sgp.cross_entropy(logits, target).backward()
    assert backend.interpreter_fault.cache_info().misses == 0, "nor is it asked"


@interpreted_only
def test_the_interpreter_here_has_no_fault():
    assert backend.interpreter_fault() == ""


# -- explain() and choose() for machines that are not here -----------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without Triton and its interpreter."""

    def pretend(*, wanted, triton=True, interpreted=False):
        monkeypatch.setenv("SGP_BACKEND", wanted)
        monkeypatch.setattr(backend, "has_triton", lambda: triton)
        monkeypatch.setattr(backend, "_interpreted", lambda: interpreted)
        backend._warn_once.cache_clear()

    yield pretend
    backend._warn_once.cache_clear()


@interpreted_only
@pytest.mark.parametrize(
    ("value", "choice"),
    [*((yes, "triton") for yes in ("1", "true", "On", "YES", "y")), ("0", "error"), ("", "error")],
)
def test_the_interpreter_is_asked_for_in_tritons_words(value, choice, monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    backend._interpreted.cache_clear()
    try:
        assert backend.explain(CPU, torch.float32)[0] == choice
    finally:
        backend._interpreted.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "triton", "interpreted", "device", "dtype", "choice", "words"),
    [
        ("auto", True, False, CUDA, torch.bfloat16, "triton", "cuda tensors run the kernels"),
        ("auto", True, False, CUDA, torch.float16, "triton", "cuda"),
        ("auto", True, False, CUDA, torch.float32, "triton", "cuda"),
        ("auto", True, False, CUDA, torch.float64, "torch", "not torch.float64"),
        ("auto", False, False, CUDA, torch.float32, "torch", "Triton is not installed"),
        ("auto", True, False, CPU, torch.float32, "torch", "CPU tensors run PyTorch"),
        ("auto", True, True, CPU, torch.float32, "torch", "CPU tensors run PyTorch"),
        ("auto", True, False, torch.device("xpu"), torch.float32, "torch", "'xpu'"),
        ("torch", True, False, CUDA, torch.float32, "torch", "SGP_BACKEND=torch"),
        ("torch", False, False, CPU, torch.float64, "torch", "SGP_BACKEND=torch"),
        ("triton", True, False, CUDA, torch.float32, "triton", "SGP_BACKEND=triton"),
        ("triton", True, True, CPU, torch.float32, "triton", "SGP_BACKEND=triton"),
        ("triton", True, False, CPU, torch.float32, "error", "TRITON_INTERPRET=1"),
        ("triton", True, False, CUDA, torch.float64, "error", "float64"),
        ("triton", False, False, CUDA, torch.float32, "error", "pip install triton"),
        ("triton", True, False, torch.device("mps"), torch.float32, "error", "'mps'"),
    ],
)
def test_explain(machine, wanted, triton, interpreted, device, dtype, choice, words):
    machine(wanted=wanted, triton=triton, interpreted=interpreted)
    chosen, why = backend.explain(device, dtype)
    assert chosen == choice
    assert words in why
    if choice == "error":
        with pytest.raises(RuntimeError) as caught:
            backend.choose(device, dtype)
        assert why in str(caught.value)


def test_cuda_without_triton_says_so_once(machine):
    machine(wanted="auto", triton=False)
    with pytest.warns(UserWarning, match="Triton is not installed") as said:
        assert backend.choose(CUDA, torch.float32) == "torch"
    assert said[0].filename == __file__
    assert backend.choose(CUDA, torch.float32) == "torch"  # a second warning is an error here


@pytest.mark.parametrize(
    ("wanted", "device", "triton", "dtype"),
    [
        ("torch", CUDA, False, torch.float32),  # asked for: nothing to warn of
        ("auto", CPU, False, torch.float32),
        ("auto", CPU, True, torch.float32),
        ("torch", CUDA, True, torch.float32),
        ("auto", CUDA, True, torch.float64),  # which no kernel computes in
    ],
)
def test_what_was_asked_for_is_no_warning(machine, wanted, device, triton, dtype):
    machine(wanted=wanted, triton=triton)
    assert backend.choose(device, dtype) == "torch"
