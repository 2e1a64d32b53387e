"""The head's matmuls: slices on a CPU, and the calls that a GPU gets, against float64."""

from types import SimpleNamespace

import pytest
import torch

import sgp
from sgp.head import products
from sgp.tolerance import relative_error
from sgp.train.memory import cpu_peak

m, V, D = 6, 700, 12


class CudaMatmul:
    """`torch.mm` and `torch.addmm` with CUDA's rules for `out_dtype`, on a CPU.

    The rules are those of PyTorch's `_mm_dtype_out_cuda` and `_addmm_dtype_out_cuda` (2.10).
    """

    def __init__(self, *, has_addmm=True):
        self.mm_, self.addmm_, self.has_addmm = torch.mm, torch.addmm, has_addmm
        self.calls = []

    def _check(self, a, b, out_dtype, out):
        assert a.dtype == b.dtype, "operands of one dtype"
        if out_dtype is not None:
            assert out_dtype in (a.dtype, torch.float32)
            assert out is None or out.dtype == out_dtype
        for x in (a, b, out):
            assert x is None or 1 in x.stride() or 1 in x.shape, "cuBLAS would copy first"

    def mm(self, a, b, *, out_dtype=None, out=None):
        self._check(a, b, out_dtype, out)
        self.calls.append("mm")
        result = self.mm_(a.float(), b.float()).to(out_dtype or a.dtype)
        return result if out is None else out.copy_(result)

    def addmm(self, self_, a, b, *, out_dtype, out):
        if not self.has_addmm:
            raise RuntimeError("self and mat2 must have the same dtype")
        self._check(a, b, out_dtype, out)
        assert self_.dtype == out_dtype
        self.calls.append("addmm")
        return out.copy_(self_ + self.mm_(a.float(), b.float()))


@pytest.fixture(params=["mm and addmm", "mm only"])
def cuda_rules(request, monkeypatch):
    """Makes the products take the way that they take on a GPU."""
    rules = CudaMatmul(has_addmm=request.param != "mm only")
    monkeypatch.setattr(torch, "mm", rules.mm)
    monkeypatch.setattr(torch, "addmm", rules.addmm)
    monkeypatch.setattr(products, "_has_wide", lambda _, name: rules.has_addmm or name == "mm")
    return rules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_is_asked_for_float32_results(dtype, cuda_rules):
    hidden, weight = torch.randn(m, D).to(dtype), torch.randn(V, D).to(dtype)
    g = torch.randn(m, 2 * V).to(dtype)[:, :V]  # the first halves of float32 rows
    scores = torch.empty(m, V)
    products.logits(hidden, weight, None, scores)
    assert relative_error(scores, hidden.double() @ weight.double().t()) < 1e-6
    for wanted in (dtype, torch.float32):
        d_input = products.input_gradient(g, weight, wanted)
        assert d_input.dtype == wanted
        limit = 1e-6 if wanted == torch.float32 else torch.finfo(dtype).eps
        assert relative_error(d_input, g.double() @ weight.double()) < limit
    total = torch.empty(V, D)
    for first in (True, False):
        products.add_weight_gradient(g, hidden, total, first=first)
    assert relative_error(total, 2 * (g.double().t() @ hidden.double())) < 1e-6
    once = torch.empty(V, D, dtype=dtype)
    products.add_weight_gradient(g, hidden, once, first=True)
    truth = g.double().t() @ hidden.double()
    assert relative_error(once.flatten(), truth.flatten()) < torch.finfo(dtype).eps
    assert ("addmm" in cuda_rules.calls) == cuda_rules.has_addmm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_whole_head_by_a_gpus_calls(dtype, chunk_rows, reduction, cuda_rules, monkeypatch):
    """Kernels, narrow gradients and wide matmuls together, as on a GPU."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr(products, "FEW_ROWS", 0)  # of a CPU's BLAS
    hidden = torch.randn(5, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    target = torch.tensor([3, -100, 699, 0, 5])
    leaves = (hidden, weight, bias)

    def gradients(function, leaves, **options):
        x, w, b = leaves
        loss = function(x, w, target, linear_bias=b, reduction=reduction, **options)
        return loss, torch.autograd.grad(loss.sum(), leaves)

    loss, ours = gradients(sgp.linear_cross_entropy, leaves, chunk_rows=chunk_rows)
    calls = len(cuda_rules.calls)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with monkeypatch.context() as plain:
        plain.setattr(torch, "mm", cuda_rules.mm_)
        truth, true = gradients(sgp.reference.linear_cross_entropy, doubles)
    assert relative_error(loss, truth) < 1e-6
    for mine, reference, leaf in zip(ours, true, leaves, strict=True):
        assert mine.dtype == leaf.dtype
        # The gradient of the logits is rounded (truncated, interpreted), and so is the result.
        assert relative_error(mine.flatten(), reference.flatten()) < 2 * torch.finfo(dtype).eps
    assert calls >= (3 if reduction == "mean" else 4) * (1 if chunk_rows is None else 2)


def test_a_cpu_multiplies_slices_in_float32(monkeypatch):
    monkeypatch.setattr(products, "SLICE", 64 * D)
    hidden, weight = torch.randn(m, D).bfloat16(), torch.randn(V, D).bfloat16()
    g = torch.randn(m, V)
    scores, total = torch.empty(m, V), torch.empty(V, D)
    products.logits(hidden, weight, torch.ones(V).bfloat16(), scores)
    assert relative_error(scores, hidden.double() @ weight.double().t() + 1) < 1e-6
    d_input = products.input_gradient(g, weight, torch.float32)
    assert relative_error(d_input, g.double() @ weight.double()) < 1e-6
    for first in (True, False):
        products.add_weight_gradient(g, hidden, total, first=first)
    assert relative_error(total, 2 * (g.double().t() @ hidden.double())) < 1e-6


def test_few_rows_are_as_exact_as_many():
    """A CPU's BLAS adds 32 000 products one after another where there are one to three rows."""
    weight = torch.randn(32_000, 16)
    for rows in (1, 2, 3, 8):
        g = torch.randn(rows, 32_000).softmax(-1)
        error = relative_error(
            products.input_gradient(g, weight, torch.float32), g.double() @ weight.double()
        )
        assert error < 1.5e-6, f"{rows} rows"


def test_a_matmul_without_memory_is_asked_for_again(monkeypatch):
    """That there is no memory now says nothing of the device: it is not remembered."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.bfloat16)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    products._probe.cache_clear()
    try:
        monkeypatch.setattr(torch, "mm", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            products._has_wide(x, "mm")
        monkeypatch.undo()
        monkeypatch.setattr(torch, "mm", CudaMatmul().mm)
        assert products._has_wide(x, "mm")
    finally:
        products._probe.cache_clear()


def test_slices_are_small_however_many_rows_there_are(monkeypatch):
    """What is converted of (V, D) and of (m, V) at once is SLICE elements each."""
    monkeypatch.setattr(products, "SLICE", 1 << 14)
    hidden, weight = torch.randn(256, 4).bfloat16(), torch.randn(4096, 4).bfloat16()
    g, total = torch.randn(256, 4096).bfloat16(), torch.empty(4096, 4)
    for call in (
        lambda: products.input_gradient(g, weight, torch.float32),
        lambda: products.add_weight_gradient(g, hidden, total, first=True),
    ):
        with cpu_peak() as held:
            call()
        assert held.peak_bytes <= 3 * 4 * products.SLICE, "(m, V) is 4 MiB in float32"
