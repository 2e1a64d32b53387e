"""The oracle (float64) and the tolerance (no worse than PyTorch in the same dtype) of all tests."""

import torch


def relative_error(value, truth):
    """|value - truth| / |truth| over all elements; NaN if any is NaN, in places that differ."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    scale = truth.norm()
    return ((value - truth).norm() / (scale if scale > 0 else 1.0)).item()


def assert_no_worse(value, plain, truth, *, interpreted=False):
    """`value` is as close to the float64 `truth` as PyTorch's `plain` in the same dtype is.

    Two units in the last place are allowed where PyTorch happens to be closer. Under the
    interpreter bf16 stores truncate, so a kernel's bf16 result may have twice PyTorch's error.
    """
    ours, theirs = relative_error(value, truth), relative_error(plain, truth)
    slack = 2.0 if interpreted and value.dtype == torch.bfloat16 else 1.0
    bound = slack * max(theirs, 2 * torch.finfo(value.dtype).eps)
    assert ours <= bound, f"relative error {ours:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"
