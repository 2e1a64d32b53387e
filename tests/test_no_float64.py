"""A device without float64, as Apple's MPS and some of Intel's are, emulated on a CPU.

Its tensors say that they are on "mps" and hold a CPU tensor each. Every operator that would make a
float64 there raises PyTorch's error of that device; one that mixes it with CPU tensors fails too.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import sgp
from sgp.rows import watched
from tests import families

N, V, D = 6, 11, 8
MPS = torch.device("mps")
REFUSED = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
)


class _OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        # PyTorch's engine has no such device in a CPU build: to C++ it is a meta tensor.
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta",
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    @property
    def device(self):
        return MPS

    @property
    def is_meta(self):
        return False

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"on_device({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextmanager
def no_float64():
    """Within it `on_device` tensors work, and `.to("mps")` and `device="mps"` make them."""
    with _Moves(), _Operators():
        yield


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """What asks PyTorch for the device before any operator runs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == MPS:
            return on_device(function(*args, **{**kwargs, "device": "cpu"}))
        if function is torch.Tensor.to:
            x, *where = args
            kwargs = {name: value for name, value in kwargs.items() if name != "copy"}
            if where and isinstance(where[0], torch.Tensor):
                device, dtype = where[0].device, where[0].dtype
            else:
                device, dtype, *_ = torch._C._nn._parse_to(*where, **kwargs)
            if device == MPS:
                x = x if dtype is None else function(x, dtype)
                return x if isinstance(x, _OnDevice) else on_device(x)
        return function(*args, **kwargs)


def on_device(x):
    """A copy of a CPU tensor on the device; a leaf, which requires grad where x does."""
    if x.dtype == torch.float64:
        raise TypeError(REFUSED)
    return _OnDevice(x.detach().clone()).requires_grad_(x.requires_grad)


def _run(function, args, kwargs):
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, _OnDevice)]
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    goes = bool(there) if device is None else torch.device(device).type in ("mps", "meta")
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not copies:
        strangers = [x for x in given if not isinstance(x, _OnDevice) and x.dim()]
        assert not strangers, f"{function}: tensors of two devices"
    bare = tree_map(lambda x: x.held if isinstance(x, _OnDevice) else x, (args, kwargs))
    out = function(*bare[0], **bare[1])
    if function is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], _OnDevice)
    if not goes:
        return out

    def put(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.float64:
            raise TypeError(REFUSED)
        return _OnDevice(x)

    return return_and_correct_aliasing(function, args, kwargs, tree_map(put, out))


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The device; no operators in place of their bodies because of the modes that make it."""
    monkeypatch.setattr(watched, "is_watched", lambda *_: False)
    with no_float64():
        yield


def moved(x):
    """Tensors and Selections on the device, everything else as it is."""
    if isinstance(x, sgp.Selection):
        return x.to(MPS)
    return on_device(x) if isinstance(x, torch.Tensor) else x


def test_the_device_refuses_float64():
    x = on_device(torch.ones(3))
    assert x.device == MPS
    for make in (x.double, lambda: torch.zeros(3, dtype=torch.float64, device=MPS)):
        with pytest.raises(TypeError, match="doesn't support float64"):
            make()
    with pytest.raises(AssertionError, match="tensors of two devices"):
        x + torch.ones(3)


LABELS = torch.tensor([1, 2, -100, 4, 5, 6])
TWO = LABELS.view(2, 3)
TOKENS = torch.tensor([0.5, 1.0, 1.0, 2.0, 0.25, 1.0])
CLASSES = torch.linspace(0.5, 2.0, V)
ALL = {
    "weight": CLASSES, "token_weight": TOKENS, "label_smoothing": 0.1, "softcap": 5.0,
    "logit_scale": 1.5, "lse_square_scale": 0.01,
}  # fmt: skip
CALLS = {
    "mean": {},
    "all": ALL,
    "sum": {**ALL, "reduction": "sum"},
    "none": {**ALL, "reduction": "none"},
    "sequence_mean": {**ALL, "reduction": "sequence_mean"},
    "a number divides": {"denominator": 5.0},
    "a tensor divides": {"denominator": torch.tensor(5)},
    "statistics": {"return_stats": True, "return_argmax": True},
}


def results(function, arguments, options):
    """Outputs and gradients of the floating-point arguments, on the CPU."""
    out = function(*arguments, **options)
    out = [out] if isinstance(out, torch.Tensor) else [out[0], *out[1]]
    out[0].sum().backward()
    return [x.detach().cpu() for x in out] + [
        x.grad.cpu() for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad
    ]


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_losses_of_a_device_without_float64(function, dtype, options):
    random = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(s, generator=random).to(dtype) for s in ((N, D), (V, D)))
    leaves = (hidden, head) if function.startswith("linear") else (hidden @ head.T,)
    leaves = [x.requires_grad_() for x in leaves]
    alone = results(getattr(sgp, function), (*leaves, LABELS), options)
    there = {name: moved(value) for name, value in options.items()}
    for x in leaves:
        x.grad = None
    ours = results(getattr(sgp, function), (*map(moved, leaves), moved(LABELS)), there)
    for value, truth in zip(ours, alone, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "head"])
def test_log_probabilities_and_the_reference(linear):
    hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    arguments = (hidden, head) if linear else (hidden,)
    target = LABELS.clamp(max=D - 1)
    function = "linear_token_log_probs" if linear else "token_log_probs"
    for module in (sgp, sgp.reference):
        truth = results(getattr(module, function), (*arguments, target), {})
        hidden.grad = None
        ours = results(getattr(module, function), (*map(moved, arguments), moved(target)), {})
        for value, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(value, exact)
        loss = module.cross_entropy(on_device(hidden), on_device(target), denominator=3)
        torch.testing.assert_close(loss.cpu(), F.cross_entropy(hidden, target, reduction="sum") / 3)


@pytest.mark.parametrize("weight", [None, TOKENS.view(2, 3).double()], ids=["plain", "float64"])
def test_a_selection_made_on_the_host(weight):
    """Weights that the host has in float64 (NumPy's, say) get there in float32."""
    selection = sgp.Selection.from_labels(TWO, token_weight=weight)
    x = torch.randn(2, 3, V)
    truth = sgp.cross_entropy(x, selection)
    there = selection.to("mps")
    assert there.device == MPS
    torch.testing.assert_close(sgp.cross_entropy(on_device(x), there).cpu(), truth)
    head = torch.randn(V, D)
    hidden = torch.randn(2, 3, D)
    ours = sgp.linear_cross_entropy(on_device(hidden), on_device(head), there)
    torch.testing.assert_close(ours.cpu(), sgp.linear_cross_entropy(hidden, head, selection))
    if weight is not None:
        assert selection.to("cpu").weight.dtype == torch.float64


def test_denominators_of_several_batches():
    selection = sgp.Selection.from_labels(TWO, token_weight=TOKENS.view(2, 3).double())
    plain = sgp.Selection.from_labels(TWO)
    counts = [selection, plain, 3, torch.tensor(2.5, dtype=torch.float64)]
    weight = CLASSES.double()
    truth = sgp.parallel.global_denominator(counts, weight=weight)
    assert truth.dtype == torch.float64
    for of_classes in (weight, on_device(CLASSES)):
        ours = sgp.parallel.global_denominator(list(map(there, counts)), weight=of_classes)
        assert ours.device == MPS
        torch.testing.assert_close(ours.cpu(), truth.float())
        x = torch.randn(N, V)
        loss = sgp.cross_entropy(on_device(x), on_device(LABELS), denominator=ours)
        exact = sgp.cross_entropy(x, LABELS, denominator=truth)
        torch.testing.assert_close(loss.cpu(), exact)


def there(count):
    """Selections on the device; counts where they are."""
    return moved(count) if isinstance(count, sgp.Selection) else count


def test_a_group_of_one_rank():
    """What a rank sends is made on the host, whatever the device, and goes there whole."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        hidden, head = torch.randn(N, D), torch.randn(V, D)
        ours = sgp.parallel.linear_cross_entropy(
            on_device(hidden),
            on_device(head),
            on_device(LABELS),
            **{n: moved(x) for n, x in ALL.items()},
        )
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(ours.cpu(), sgp.linear_cross_entropy(hidden, head, LABELS, **ALL))


def on_a_device(model):
    """The model with its parameters and buffers there."""
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else nn.Parameter(on_device(p))
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else on_device(b)
    return model


def test_a_patched_model():
    batch = families.make_batch()
    truth = families.make("gemma2")(**batch).loss
    model = on_a_device(families.make("gemma2"))
    sgp.huggingface.patch(model)
    loss = model(**{name: on_device(x) for name, x in batch.items()}).loss
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu(), truth.detach())


# The norm of a meta tensor, which this is to PyTorch, goes by an operator that warns.
@pytest.mark.filterwarnings("ignore:at..frobenius_norm")
def test_an_audit_and_a_loss_of_contexts():
    batch = families.make_batch()
    alone, model = families.make("llama"), on_a_device(families.make("llama"))
    truth, ours = (sgp.audit(m, batch) for m in (alone, model))
    assert ours.loss == pytest.approx(truth.loss, rel=1e-5)
    assert [f.code for f in ours.findings] == [f.code for f in truth.findings]
    ids, lengths = batch["input_ids"], torch.tensor([3, 5, 7])
    exact = sgp.context_loss(alone, ids, lengths)
    loss = sgp.context_loss(model, on_device(ids), on_device(lengths))
    torch.testing.assert_close(loss.detach().cpu(), exact.detach())
