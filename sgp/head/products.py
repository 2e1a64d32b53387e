"""The matmuls of a linear head: bf16 or fp16 in, float32 out, on every device.

Float32 logits from bf16 inputs need a matmul with a wider result. CUDA has one
(`torch.mm(..., out_dtype=)`), and so has ROCm from torch 2.9 or 2.10 on; a probe of 16 x 16 asks.
Elsewhere, on a CPU above all, slices of the vocabulary are converted to float32 and multiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp.rows.recipe import accumulation_dtype

SLICE = 1 << 21  # elements converted at once: 8 MiB of float32
LEAST_SLICE = 64  # columns
FACTOR_ELEMENTS = 1 << 24  # of a weight's gradient before its factor: 64 MiB
# With as many columns a GPU's matmul for the weight's gradient is fastest: what it reads again is
# still in L2.
FAST_COLUMNS = 16_384
EXACT = (torch.float32, torch.float64)
# With fewer rows a CPU's BLAS (seen with MKL) adds up V products one after another, for ten times
# the error at V = 32 000.
FEW_ROWS = 4


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Out (m, V) = hidden (m, D) @ weight (V, D)^T + bias (V,)."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif _has_wide(hidden, "mm"):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for part in _slices(weight, hidden):
            torch.mm(wide, weight[part].to(out.dtype).t(), out=out[:, part])
    if bias is not None:
        out.add_(bias)


def input_gradient(g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Product (m, D) = g (m, V) @ weight (V, D), accumulated in float32, in `dtype`."""
    m = g.shape[0]
    if not g.shape[1]:  # F.pad refuses a matrix without columns before PyTorch 2.13
        return g.new_zeros(m, weight.shape[1], dtype=dtype)
    if m < FEW_ROWS and not g.is_cuda:
        padded = F.pad(g, (0, 0, 0, FEW_ROWS - m))
        return input_gradient(padded, weight, dtype)[:m]
    if g.dtype == weight.dtype and _has_wide(g, "mm"):
        # With a bf16 result cuBLAS may add up parts of the long sum in bf16.
        return torch.mm(g, weight, out_dtype=torch.float32).to(dtype)
    if g.dtype == weight.dtype == dtype and dtype in EXACT:
        return torch.mm(g, weight)
    total = g.new_zeros(g.shape[0], weight.shape[1], dtype=torch.float32)
    for part in _slices(weight, g):
        total.addmm_(g[:, part].float(), weight[part].float())
    return total.to(dtype)


def add_input_gradient(g: Tensor, weight: Tensor, out: Tensor) -> None:
    """Out (m, D) += g (m, v) @ weight (v, D), of some columns; in float32 or float64."""
    if not g.shape[1]:
        return
    if g.shape[0] < FEW_ROWS and not g.is_cuda:
        out += input_gradient(g, weight, out.dtype)
    elif g.dtype == weight.dtype == out.dtype:
        out.addmm_(g, weight)
    elif g.dtype == weight.dtype and _has_wide(g, "addmm"):
        torch.addmm(out, g, weight, out_dtype=out.dtype, out=out)
    elif g.dtype == weight.dtype and _has_wide(g, "mm"):
        out += torch.mm(g, weight, out_dtype=out.dtype)
    else:
        for part in _slices(weight, g):
            out.addmm_(g[:, part].float(), weight[part].float())


def add_weight_gradient(
    g: Tensor, hidden: Tensor, out: Tensor, *, first: bool, factor: Tensor | None = None
) -> None:
    """Out (V, D) = or += g (m, V)^T @ hidden (m, D) * factor (), accumulated in float32.

    Several groups of rows need a float32 `out`; one may write bf16 or fp16, rounded once.
    """
    if factor is not None:
        for part in _ranges(out.shape[0], FACTOR_ELEMENTS // max(1, out.shape[1])):
            some = out.new_empty(out[part].shape, dtype=accumulation_dtype(out.dtype))
            add_weight_gradient(g[:, part], hidden, some, first=True)
            some.mul_(factor)
            out[part] = some if first else some.add_(out[part])
        return
    has_wide = g.dtype == hidden.dtype and _has_wide(g, "mm")
    # A CPU's matmul of 16 bits need not add up in float32.
    is_exact = g.dtype == hidden.dtype == out.dtype and (has_wide or out.dtype in EXACT)
    if not (is_exact or has_wide):
        _add_converted(g, hidden, out, first=first)
        return
    for part in _ranges(out.shape[0], FAST_COLUMNS if g.is_cuda else out.shape[0]):
        if not is_exact:
            _add_wide(g[:, part], hidden, out[part], first=first)
        elif first:
            torch.mm(g[:, part].t(), hidden, out=out[part])
        else:
            out[part].addmm_(g[:, part].t(), hidden)


def add_bias_gradient(g: Tensor, out: Tensor) -> None:
    """Out (V,) += the sum of g (m, V) over its rows, in out's dtype."""
    if g.is_cuda or g.dtype == out.dtype:
        out += g.sum(0, dtype=out.dtype)
        return
    for part in _ranges(g.shape[1], SLICE // max(1, g.shape[0])):  # a CPU converts what it sums
        out[part] += g[:, part].sum(0, dtype=out.dtype)


def _add_converted(g: Tensor, hidden: Tensor, out: Tensor, *, first: bool) -> None:
    wide = hidden.float()
    for part in _slices(out, g):
        if out.dtype != torch.float32:
            out[part] = torch.mm(g[:, part].float().t(), wide)
        elif first:
            torch.mm(g[:, part].float().t(), wide, out=out[part])
        else:
            out[part].addmm_(g[:, part].float().t(), wide)


def _add_wide(g: Tensor, hidden: Tensor, out: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(g.t(), hidden, out_dtype=out.dtype, out=out)
    elif _has_wide(g, "addmm"):
        torch.addmm(out, g.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        for part in _slices(out, g):
            out[part] += torch.mm(g[:, part].t(), hidden, out_dtype=out.dtype)


def _slices(weight: Tensor, rows: Tensor) -> Iterator[slice]:
    """Ranges of the vocabulary whose part of (V, D), and of (m, V), is at most SLICE elements."""
    V, D = weight.shape
    return _ranges(V, SLICE // max(1, D, rows.shape[0]))


def _ranges(V: int, step: int) -> Iterator[slice]:
    """V columns, at least LEAST_SLICE at a time."""
    step = max(LEAST_SLICE, step)
    for start in range(0, V, step):
        yield slice(start, min(start + step, V))


def _has_wide(x: Tensor, name: str) -> bool:
    """Whether a float32 result of bf16 or fp16 operands exists on x's device."""
    return x.is_cuda and x.dtype not in EXACT and _probe(x.device, x.dtype, name)


@functools.cache
def _probe(device: torch.device, dtype: torch.dtype, name: str) -> bool:
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    wide = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        if name == "mm":
            torch.mm(a, a, out_dtype=torch.float32, out=wide)
        else:
            torch.addmm(wide, a, a, out_dtype=torch.float32, out=wide)
    except (NotImplementedError, TypeError):
        return False
    except RuntimeError as error:
        if "dtype" in str(error) or "not supported" in str(error):
            return False
        raise  # out of memory, say: not for the cache to remember
    return True
