"""The ways of the linear head: every one is right, does what its plan says, and is chosen when."""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import sgp
from bench.studies import memory
from sgp.head import chunks, products
from sgp.head.chunks import Plan
from sgp.head.shape import Shape
from sgp.train.memory import cpu_peak
from tests import test_linear, test_log_probs
from tests.test_linear import ALL, HEAD, IGNORE, INPUT, D, N, V, cast, flops, leaves_of, ours_of

GIB = 1 << 30
ROOM = 1 << 40  # bytes that everything fits
WAYS = {
    "gradient kept": lambda M: Plan("rows", 1, max(1, M), 0, max(1, M)),
    "groups of two chunks": lambda M: Plan("rows", 1, 2, 0, max(1, M)),
    "chunks": lambda M: Plan("rows", 2, 2, 0, max(1, M)),
    "slices": lambda M: Plan("slices", 2, 2, 4, max(1, M)),
    "held": lambda M: Plan("held", 2, max(1, M), 0, max(1, M)),
}
OPTIONS = {
    "label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 1.5, "lse_square_scale": 0.01,
    "weight": torch.linspace(0.0, 2.0, V),
}  # fmt: skip
REDUCTIONS = ["mean", "none", "sequence_mean"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def weight(**options):
    return torch.randn(V, D, **options)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(29)


@pytest.fixture
def force(monkeypatch):
    """A function that makes the planner choose a way."""

    def forced(name):
        monkeypatch.setattr(chunks, "plan", lambda _, shape, **__: WAYS[name](shape.M))

    return forced


def budget_of(name):
    """What a call has to say for a way to be taken: only a budget lets logits be held."""
    return ROOM if name == "held" else None


# -- every way is right ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_with_all_options(
    name, reduction, dtype, backend, force, device, monkeypatch
):  # fmt: skip
    """Loss and gradients against float64, one row ignored, and none."""
    if dtype == torch.float64:
        monkeypatch.setenv("SGP_BACKEND", "torch")  # no kernel has it
    force(name)
    tensors = cast([torch.randn(size) for size in ((2, 4, D), (V, D), (V,))], dtype)
    target = torch.randint(V, (2, 4))
    weight = torch.rand(2, 4)
    shape = {"none": (2, 4), "sequence_mean": (2,)}.get(reduction, ())
    options = {**OPTIONS, "token_weight": weight, "reduction": reduction}
    for first in (int(target[0, 0]), IGNORE):
        target[0, 0] = first
        test_linear.check(
            tensors, target, torch.randn(shape), backend=backend, memory_budget=budget_of(name),
            roundings=2 if reduction == "mean" else 1, **options,
        )  # fmt: skip


@pytest.mark.parametrize("needs", [INPUT, HEAD, (False, True, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_with_one_side_frozen(name, reduction, needs, force):
    force(name)
    tensors = cast([torch.randn(size) for size in ((N, D), (V, D), (V,))], torch.bfloat16)
    target = torch.tensor([3, IGNORE, 10, 0, IGNORE, 3])
    upstream = torch.randn(N if reduction == "none" else ())
    test_linear.check(
        tensors, target, upstream, needs=needs, reduction=reduction,
        memory_budget=budget_of(name), roundings=2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_log_probabilities_every_way(name, dtype, backend, force):
    """Upstream gradients of log-probability, entropy and lse at once."""
    force(name)
    tensors, target = (
        {"input": torch.randn(3, 3, D), "linear_weight": torch.randn(V, D),
         "linear_bias": torch.randn(V)},
        torch.tensor([[3, IGNORE, 10], [0, 1, 2], [IGNORE, IGNORE, 9]]),
    )  # fmt: skip
    tensors = {k: x.to(dtype) for k, x in tensors.items()}
    test_log_probs.check(
        True, tensors, target, how={"memory_budget": budget_of(name)}, temperature=0.7,
        softcap=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_no_row_and_all_rows(name, force):
    force(name)
    tensors = [torch.randn(size).bfloat16() for size in ((N, D), (V, D), (V,))]
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "memory_budget": budget_of(name)}
        loss, *grads = ours_of(tensors, torch.full((N,), IGNORE), **options)
        assert not any(x.any() for x in (loss, *grads)), "nothing carries loss"
        test_linear.check(tensors, torch.arange(N), **options, roundings=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", WAYS)
def test_strided_input_and_autocast(name, reduction, force):
    """Hidden states that are cut in time are never copied whole; a float32 head under autocast."""
    force(name)
    wide = torch.randn(2, 5, D)
    head, target = torch.randn(V, D), torch.randint(V, (2, 4))
    budget = budget_of(name)
    found = []
    for hidden in (wide[:, :-1], wide[:, :-1].contiguous()):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(
                ours_of([hidden, head, None], target, reduction=reduction, memory_budget=budget)
            )
    for ours, other in zip(*found, strict=True):
        assert ours is other or torch.equal(ours, other)
    assert found[0][2].dtype == torch.float32


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bits_repeat(name, reduction, force, backend):
    force(name)
    tensors = [torch.randn(size).bfloat16() for size in ((N, D), (V, D), (V,))]
    target = torch.tensor([3, IGNORE, 10, 0, IGNORE, 3])
    options = {"reduction": reduction, "memory_budget": budget_of(name)}
    first, second = (ours_of(tensors, target, **options) for _ in range(2))
    test_linear.assert_equal(first, second)


@pytest.mark.parametrize("name", ["slices", "held"])
def test_a_second_backward_makes_the_logits_again(name, force):
    force(name)
    leaves = leaves_of([torch.randn(N, D), torch.randn(V, D), None])
    target = torch.randint(V, (N,))
    loss = sgp.linear_cross_entropy(
        *leaves[:2], target, reduction="none", memory_budget=budget_of(name)
    )
    found = [
        torch.autograd.grad(loss, leaves[:2], torch.ones(N), retain_graph=True) for _ in range(3)
    ]
    for other in found[1:]:
        test_linear.assert_same(other, found[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["none", "log-probs", "added"])
@pytest.mark.parametrize("name", ["slices", "held"])
def test_checkpoints_and_hooks_unpack_each_tensor_once(name, form, use_reentrant, force):
    force(name)
    hidden, head = torch.randn(N, D, requires_grad=True), weight(requires_grad=True)
    target, into = torch.randint(V, (N,)), torch.zeros(V, D)

    def loss(h):
        options = {"memory_budget": budget_of(name)}
        if form == "log-probs":
            return -sgp.linear_token_log_probs(h, head, target, **options).log_prob.sum()
        if form == "added":
            return sgp.linear_cross_entropy(
                h, head, target, reduction="sum", accumulate_into=into, **options
            )
        return sgp.linear_cross_entropy(h, head, target, reduction="none", **options).sum()

    checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
    truth = test_linear.truth_of([hidden, head, None], target, reduction="sum")
    assert test_linear.relative_error(hidden.grad, truth[1]) < 1e-5
    assert test_linear.relative_error(into if form == "added" else head.grad, truth[2]) < 1e-5
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: seen.append(id(x)) or x):
        found = loss(hidden)
    found.backward()
    assert len(seen) == len(set(seen)), "each tensor is unpacked once"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside PyTorch itself
@pytest.mark.parametrize("name", WAYS)
def test_what_looks_on_gets_the_same(name, force):
    """torch.func, batched gradients and torch.compile: nothing is held there, and all is right."""
    force(name)
    hidden, head = torch.randn(4, D), torch.randn(V, D, requires_grad=True)
    target, budget = torch.randint(V, (4,)), budget_of(name)

    def losses(h, w):
        return sgp.linear_cross_entropy(h, w, target, reduction="none", memory_budget=budget)

    (plain,) = torch.autograd.grad(losses(hidden, head).sum(), head)
    by_func = torch.func.grad(lambda w: losses(hidden, w).sum())(head)
    rows = torch.autograd.grad(losses(hidden, head), head, torch.eye(4), is_grads_batched=True)[0]
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    (by_compile,) = torch.autograd.grad(compiled(hidden, head).sum(), head)
    for found in (by_func, rows.sum(0), by_compile):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[2:]], ids=str)
def test_gradients_are_added_to_a_callers_tensor(name, dtype, force):
    """In float32, what was there kept; `.grad` of the weight stays None."""
    force(name)
    hidden, head = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    target = torch.tensor([3, IGNORE, 10, 0, IGNORE, 3])
    leaves = leaves_of([hidden, head, None])
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for reduction in ("mean", "none"):
        total = torch.zeros(V, D)
        upstream = torch.randn(N if reduction == "none" else ())
        truth = test_linear.truth_of([hidden, head, None], target, upstream, reduction=reduction)
        for turn in (1, 2):
            before = total.clone()
            loss = sgp.linear_cross_entropy(
                *leaves[:2], target, reduction=reduction, accumulate_into=total,
                memory_budget=budget_of(name),
            )  # fmt: skip
            assert torch.equal(total, before), "nothing is added before the backward"
            loss.backward(upstream.to(loss.dtype))
            error = test_linear.relative_error(total, turn * truth[2])
            assert error <= rounding, f"{error:.3g} in turn {turn}"
        assert leaves[1].grad is None
        assert test_linear.relative_error(leaves[0].grad, 2 * truth[1]) <= 2 * rounding
        leaves[0].grad = None


# -- what a tensor of the caller's may be ----------------------------------------------------------


HEAD_OF_ITS_OWN = weight(requires_grad=True)


def hooked(register):
    found = weight(requires_grad=True)
    getattr(found, register)(lambda *_: None)
    return found


@pytest.mark.parametrize(
    ("head", "into", "error", "words"),
    [
        (weight(requires_grad=True), torch.zeros(D, V), ValueError, r"accumulate_into is \(5, 1"),
        (weight(requires_grad=True), weight().bfloat16(), ValueError, r"torch.bfloat16 and"),
        (weight(requires_grad=True), [1.0], TypeError, "accumulate_into"),
        (weight(requires_grad=True), weight(requires_grad=True), ValueError, "requires grad"),
        (weight(requires_grad=True), torch.zeros(D, V).t(), ValueError, "not contiguous"),
        (weight(), weight(), ValueError, "does not require grad"),
        (weight(requires_grad=True) * 2, weight(), ValueError, "no leaf"),
        (HEAD_OF_ITS_OWN, HEAD_OF_ITS_OWN.detach(), ValueError, "shares memory"),
        (hooked("register_hook"), weight(), ValueError, "hooks"),
        (hooked("register_post_accumulate_grad_hook"), weight(), ValueError, "hooks"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["loss", "log-probs"])
def test_tensors_that_cannot_be_added_to(head, into, error, words, form):
    function = {"loss": sgp.linear_cross_entropy, "log-probs": sgp.linear_token_log_probs}[form]
    with pytest.raises(error, match=words):
        function(torch.randn(2, D), head, torch.tensor([1, 2]), accumulate_into=into)


def test_nothing_is_added_inside_ddp(monkeypatch):
    """Which PyTorch knows by a private name: a new one must be noticed here."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    assert hasattr(wrapper, "_active_ddp_module")
    monkeypatch.setattr(wrapper, "_active_ddp_module", wrapper)
    with pytest.raises(RuntimeError, match="not be reduced over the ranks by DistributedData"):
        sgp.linear_cross_entropy(
            torch.randn(2, D), weight(requires_grad=True), torch.tensor([1, 2]),
            accumulate_into=torch.zeros(V, D),
        )  # fmt: skip


def test_nothing_is_added_under_compile_or_a_transform():
    hidden, head, into = torch.randn(2, D), weight(requires_grad=True), torch.zeros(V, D)
    target = torch.tensor([1, 2])

    def loss(w):
        return sgp.linear_cross_entropy(hidden, w, target, accumulate_into=into)

    with pytest.raises(RuntimeError, match="accumulate_into is written to in backward"):
        torch.func.grad(loss)(head.detach())
    with pytest.raises(Exception, match="accumulate_into is written to in backward"):
        torch.compile(loss, fullgraph=True, backend="eager")(head)
    with torch.no_grad():
        assert torch.isfinite(loss(head)), "an evaluation adds nothing"
    assert not into.any()


@pytest.mark.parametrize("form", ["loss", "log-probs"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_megatrons_hooks(overlaps, form):
    """Which add `.grad` to main_grad, unless that is done; with overlap they ask for a `.grad`."""
    head, hidden = weight(requires_grad=True), torch.randn(2, D, requires_grad=True)
    target, ready = torch.tensor([1, 2]), []
    head.main_grad, head.grad_added_to_main_grad = torch.zeros(V, D), False

    def hook(*_):
        assert head.grad is not None or not overlaps
        if head.grad is not None and not head.grad_added_to_main_grad:
            head.main_grad.add_(head.grad)
        head.grad = None
        ready.append(head)

    node = head.expand_as(head).grad_fn.next_functions[0][0]
    node.register_hook(hook)
    if form == "loss":
        loss = sgp.linear_cross_entropy(hidden, head, target, accumulate_into=head.main_grad)
    else:
        found = sgp.linear_token_log_probs(hidden, head, target, accumulate_into=head.main_grad)
        loss = -found.log_prob.mean()
    loss.backward()
    assert ready == [head]
    assert head.grad_added_to_main_grad, "or the hooks read a .grad of zeros for nothing"
    truth = test_linear.truth_of([hidden, head, None], target)
    assert test_linear.relative_error(head.main_grad, truth[2]) < 1e-6
    assert head.grad is None


def test_hooks_of_the_accumulating_node_run_without_a_gradient():
    """Where nobody says Megatron."""
    head, into, seen = weight(requires_grad=True), torch.zeros(V, D), []
    node = head.expand_as(head).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: seen.append(head.grad))
    hidden = torch.randn(2, D, requires_grad=True)
    loss = sgp.linear_cross_entropy(hidden, head, torch.tensor([1, 2]), accumulate_into=into)
    loss.backward()
    assert seen == [None]
    assert into.any()


@pytest.mark.parametrize("argument", [{"memory_budget": 1 << 20}, {"accumulate_into": 1}])
def test_whole_logits_take_no_budget(argument):
    (label,) = argument
    for head, target in (
        (torch.randn(V, 3, D), torch.randint(V, (2, 3))),
        (torch.randn(V, D), torch.rand(2, V)),
    ):
        value = torch.zeros(head.shape) if label == "accumulate_into" else argument[label]
        head.requires_grad_()
        with pytest.raises(ValueError, match=f"{label} needs class indices"):
            sgp.linear_cross_entropy(torch.randn(2, D), head, target, **{label: value})


# -- what a plan promises --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        memory.Case("bf16", 1.0, "both", "mean"),
        memory.Case("bf16", 0.25, "both", "none"),
        memory.Case("fp16", 1.0, "both", "mean"),
        memory.Case("fp16", 0.25, "both", "none"),
        memory.Case("fp32", 0.25, "both", "mean"),
        memory.Case("autocast", 1.0, "both", "mean"),
        memory.Case("bf16", 0.25, "input", "mean"),
        memory.Case("bf16", 1.0, "both", "mean", into=True),
        memory.Case("bf16", 0.9, "both", "own"),
        memory.Case("fp16", 1.0, "both", "own"),
        memory.Case("fp32", 0.9, "weight", "own"),
        memory.Case("bf16", 0.5, "both", "mean", teacher="wider"),
        memory.Case("fp16", 0.5, "both", "none", teacher="wider"),
        memory.Case("autocast", 0.5, "both", "mean", teacher="wider"),
        memory.Case("fp32", 1.0, "input", "mean", teacher="narrower"),
        memory.Case("bf16", 0.5, "both", "none", teacher="several"),
        memory.Case("bf16", 0.5, "both", "mean", teacher="top 64, capped"),
        memory.Case("bf16", 1.0, "both", "mean", teacher="top 64, warm"),
    ],
    ids=str,
)
def test_peak_memory_is_the_planned(case):
    """Within 5 %, for every way; `python -m bench memory` counts many more."""
    for record in memory.study(torch.device("cpu"), (case,)):
        assert abs(record["by"] - 1) <= memory.WITHIN, record


@pytest.mark.parametrize(
    ("kept", "dtype", "needs", "reduction"),
    [(0.25, "bf16", "both", "mean"), (0.25, "bf16", "both", "none"), (0.25, "fp16", "both", "none"),
     (0.25, "bf16", "input", "none"), (511 / 512, "bf16", "both", "mean"),
     (511 / 512, "fp32", "weight", "mean")],
)  # fmt: skip
def test_peak_memory_of_wide_hidden_states(kept, dtype, needs, reduction):
    """M D is no small part of it, and one row alone is ignored."""
    case = memory.Case(dtype, kept, needs, reduction)
    for record in memory.study(torch.device("cpu"), (case,), (512, 8192, 512)):
        assert abs(record["by"] - 1) <= memory.WITHIN, record


@pytest.mark.parametrize(
    ("name", "reduction", "needs", "matmuls"),
    [("gradient kept", "mean", ALL, 3), ("groups of two chunks", "mean", ALL, 3),
     ("slices", "mean", ALL, 4), ("slices", "none", ALL, 4), ("slices", "none", HEAD, 3),
     ("held", "none", ALL, 3), ("held", "sequence_mean", ALL, 3), ("held", "none", HEAD, 2),
     ("gradient kept", "none", ALL, 4), ("gradient kept", "mean", INPUT, 2)],
)  # fmt: skip
def test_matmul_flops(name, reduction, needs, matmuls, force, monkeypatch):
    """2 M V D each."""
    monkeypatch.setattr("sgp.head.products.FEW_ROWS", 0)  # a CPU's BLAS gets more rows then
    force(name)
    tensors = [torch.randn(size) for size in ((2 * N, D), (V, D), (V,))]
    target = torch.tensor([3, IGNORE, 10, 0, IGNORE, 3]).repeat(2)
    options = {"reduction": reduction, "memory_budget": budget_of(name)}
    assert flops(lambda: ours_of(tensors, target, None, needs, **options)) == 16 * V * D * matmuls


def test_log_probabilities_take_three_matmuls_where_logits_fit():
    leaves = leaves_of([torch.randn(8, D), torch.randn(V, D), None])
    target = torch.randint(V, (8,))

    def step(budget):
        found = sgp.linear_token_log_probs(*leaves[:2], target, memory_budget=budget)
        found.log_prob.sum().backward()

    assert flops(lambda: step(None)) == 8 * 8 * V * D
    assert flops(lambda: step(ROOM)) == 6 * 8 * V * D


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", WAYS)
def test_nothing_waits_for_a_gpu(name, reduction, force, monkeypatch):
    """What a GPU would be asked, without the kernels: the number of kept rows is on the CPU."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr("sgp.rows.by_triton.launch.Call.launch", lambda _: None)
    monkeypatch.setattr("sgp.rows.problem.may_wait", lambda _: False)
    force(name)
    hidden, head = torch.randn(8, D).bfloat16(), torch.randn(V, D).bfloat16()
    target = torch.randint(V, (8,))
    target[:3] = IGNORE
    selection, into = sgp.Selection.from_labels(target), torch.zeros(V, D)
    leaves = leaves_of([hidden, head, None])[:2]
    for extra in ({}, {"accumulate_into": into}):
        with torch.profiler.profile() as profile:
            loss = sgp.linear_cross_entropy(
                *leaves, selection, reduction=reduction, memory_budget=budget_of(name), **extra
            )
            loss.backward(torch.full_like(loss, 3.0))
        names = [event.name for event in profile.events()]
        passes = 1 if reduction == "mean" and not extra else 2
        assert "aten::nonzero" not in names
        assert names.count("aten::_local_scalar_dense") == passes


def test_what_trains_in_a_budget_is_evaluated_in_it():
    """Also where a copy of the weight under autocast is larger than that, and has no gradient."""
    head = sgp.LinearCrossEntropyLoss(256, 20_000, memory_budget=4 << 20)
    hidden = torch.randn(512, 256, requires_grad=True)
    target = torch.randint(20_000, (512,))
    target[64:] = IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        trained = head(hidden, target)
        with torch.no_grad():
            torch.testing.assert_close(head(hidden, target), trained.detach())
    with torch.no_grad(), pytest.raises(ValueError, match="the least that 64 kept rows"):
        sgp.linear_cross_entropy(hidden[:, :1], head.linear.weight[:, :1], target, memory_budget=1)


def test_a_bias_is_summed_a_few_columns_at_a_time():
    g, total = torch.randn(512, 16_384).bfloat16(), torch.zeros(16_384)
    with cpu_peak() as held:
        products.add_bias_gradient(g, total)
    assert held.peak_bytes <= 1.1 * 4 * products.SLICE < 4 * g.numel()
    assert test_linear.relative_error(total, g.double().sum(0)) < 1e-6


# -- what is chosen --------------------------------------------------------------------------------


def shape(M, N=8192, **options):
    sizes = {"input_bytes": 2, "weight_bytes": 2, "operand_bytes": 2}
    return Shape(
        M, N, 128_256, 4096, **{**sizes, "input_grad": True, "weight_grad": True, **options}
    )


@pytest.mark.parametrize(
    ("M", "options", "budget", "gib", "mvd", "words"),
    [
        (8192, {}, None, 2.1, 6, "gradient kept"),
        (8192, {}, 2 * GIB + (GIB >> 3), 2.1, 6, "gradient kept"),
        (8192, {}, GIB // 2, 0.5, 8, "slices"),
        (2048, {}, None, 0.6, 6, "gradient kept"),
        (8192, {"weight_grad": False}, None, 0.51, 4, "chunks of 1024 rows"),
        (8192, {"weight_grad": False}, int(0.3 * GIB), 0.3, 4, "chunks of 512 rows"),
        (2048, {"weight_grad": False}, int(0.3 * GIB), 0.3, 4, "chunks of 512 rows"),
        (8192, {"weight_grad": False, "late": True}, None, 0.51, 6, "chunks of 1024 rows"),
        (8192, {"late": True}, None, 0.7, 8, "slices"),
        (8192, {"late": True}, 5 * GIB, 4.2, 6, "logits held"),
        (65_536, {"N": 65_536}, None, 3.0, 6, "a float32 sum"),
        (8192, {"input_grad": False, "weight_grad": False}, None, 0.51, 2, "chunks of 1024 rows"),
        # A loss of the caller's, of rows, and of sequences of that many kept tokens.
        (8192, {"own": True, "least": 1}, None, 2.1, 6, "gradient kept, chunks of 2048"),
        (8192, {"own": True, "least": 1}, GIB // 2, 0.5, 8, "slices"),
        (8192, {"own": True, "least": 3000}, None, 2.5, 6, "gradient kept, chunks of 3000"),
        (8192, {"own": True, "least": 6000}, None, 0.4, 8, "slices"),
        (8192, {"own": True, "least": 6000}, 4 * GIB, 4.0, 6, "one chunk"),
        (32_768, {"N": 32_768, "own": True, "least": 6000}, 4 * GIB, 4.0, 6, "chunks of 6000"),
        (8192, {"own": True, "least": 3000, "weight_grad": False}, None, 1.6, 4, "chunks of 3000"),
        (8192, {"own": True, "least": 6000, "weight_grad": False}, None, 2.1, 6, "chunks of"),
        (8192, {"own": True, "is_half": True, "wide": True}, None, 3.1, 6, "chunks of 4096 rows"),
    ],
)  # fmt: skip
def test_choices_at_the_shape_of_llama(M, options, budget, gib, mvd, words):
    """8192 tokens, V = 128 256, D = 4096, bf16, on a GPU."""
    found = chunks.plan("f", shape(M, **options), memory_budget=budget or chunks.UNSET)
    assert words in found.words()
    assert found.bytes <= gib * GIB
    assert found.flops == mvd * M * 128_256 * 4096
    assert budget is None or found.bytes <= budget


def test_a_kept_gradient_has_no_float32_sum():
    """Nothing is read and added to: the traffic is that of the logits and their gradient alone."""
    whole = chunks.plan("f", shape(8192))
    assert whole.traffic == 8192 * 128_256 * (2 * 4 + 3 * 2)
    groups = chunks.by_rows(shape(8192), 2048, 4096)
    assert groups.traffic == whole.traffic + 2 * 4 * 128_256 * 4096


@given(
    st.integers(1, 70_000), st.floats(0.01, 1.0), st.sampled_from([1_000, 32_000, 151_936]),
    st.sampled_from([64, 896, 4096]), st.booleans(), st.booleans(), st.integers(20, 36),
    st.sampled_from([0, 1, 700, 5000]),
)  # fmt: skip
def test_property_a_budget_is_kept_or_refused(tokens, kept, classes, width, late, needed, log, own):
    """Never more than the budget, and never refused where the default would fit."""
    M = max(1, int(tokens * kept))
    s = Shape(
        M, tokens, classes, width, 2, 2, 2, input_grad=True, weight_grad=needed,
        late=late and not own, own=own > 0, least=min(own, M),
    )  # fmt: skip
    default = chunks.plan("f", s)
    try:
        found = chunks.plan("f", s, memory_budget=1 << log)
    except ValueError as error:
        assert default.bytes > 1 << log
        least = int(str(error).split("is ")[1].split(" bytes")[0])
        assert chunks.plan("f", s, memory_budget=least).bytes == least > 1 << log
    else:
        assert found.bytes <= 1 << log
        assert found.seconds() <= 1.03 * default.seconds() or default.bytes > 1 << log


@given(
    st.integers(1, 70_000), st.floats(0.01, 1.0), st.sampled_from([32_000, 151_936]),
    st.sampled_from([896, 4096]), st.booleans(), st.integers(24, 34), st.floats(1.0, 8.0),
    st.sampled_from([0, 1, 700, 5000]),
)  # fmt: skip
def test_property_more_room_is_never_slower(tokens, kept, classes, width, late, log, more, own):
    """But for the 3 % that a smaller way may take longer."""
    M = max(1, int(tokens * kept))
    s = Shape(
        M, tokens, classes, width, 2, 2, 2, input_grad=True, weight_grad=True,
        late=late and not own, own=own > 0, least=min(own, M),
    )  # fmt: skip
    try:
        less = chunks.plan("f", s, memory_budget=1 << log)
    except ValueError:
        return
    found = chunks.plan("f", s, memory_budget=int(more * (1 << log)))
    assert found.seconds() <= 1.031 * less.seconds()


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20))
def test_property_buffers_have_few_sizes(M, more):
    """At least M rows, at most an eighth more, never more than there are."""
    rows = chunks.padded(M, M + more)
    assert M <= rows <= min(M + more - (more > 0), math.ceil(M * 1.125))


def test_eight_sizes_an_octave():
    assert len({chunks.padded(M, 1 << 20) for M in range(1025, 2049)}) == 8


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_property_pieces_cover_everything_and_are_few(M, most):
    size = chunks.even(M, most)
    pieces = chunks.parts(M, size)
    assert [i.start for i in pieces[1:]] == [i.stop for i in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, M)
    assert size <= most
    assert len(pieces) <= -(-M // most) + (size < most)


def test_chunks_of_a_cpu_and_an_override():
    cpu = chunks.plan("f", shape(8192, is_cpu=True))
    assert (cpu.rows, cpu.group) == (512, 512)  # 256 MiB are 523 rows
    given_ = chunks.plan("f", shape(8192), chunk_rows=1000)
    assert given_.way == "rows"
    assert given_.rows == given_.group <= 1000


def test_a_budget_that_nothing_fits_names_the_least():
    leaves = leaves_of([torch.randn(64, 8), torch.randn(512, 8), None])
    target = torch.randint(512, (64,))
    with pytest.raises(
        ValueError, match=r"memory_budget = 10; the least .* is (\d+) bytes"
    ) as seen:
        sgp.linear_cross_entropy(*leaves[:2], target, memory_budget=10)
    least = int(str(seen.value).split("is ")[1].split(" bytes")[0])
    loss = sgp.linear_cross_entropy(*leaves[:2], target, memory_budget=least)
    loss.backward()
    with pytest.raises(ValueError, match="the least"):
        sgp.linear_cross_entropy(*leaves[:2], target, memory_budget=least - 1)


def test_a_budget_is_kept_in_the_call(monkeypatch):
    """Counted, not planned: a quarter, a half and all of what the default takes."""
    monkeypatch.setattr("sgp.head.products.SLICE", 1 << 14)
    monkeypatch.setattr("sgp.rows.by_torch.CHUNK_ELEMENTS", 1 << 14)
    hidden, head = torch.randn(512, 64).bfloat16(), torch.randn(16_384, 64).bfloat16()
    target = torch.randint(16_384, (512,))
    for reduction, budget in itertools.product(("mean", "none"), (8 << 20, 18 << 20, 40 << 20)):
        leaves = leaves_of([hidden, head, None])[:2]
        with cpu_peak() as held:
            loss = sgp.linear_cross_entropy(
                *leaves, target, reduction=reduction, memory_budget=budget
            )
            loss.backward(torch.ones_like(loss))
        extra = held.peak_bytes - sum(leaf.grad.nbytes for leaf in leaves)
        assert extra <= 1.05 * budget, (reduction, budget)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"memory_budget": 0}, ValueError, "memory_budget = 0; expected at least 1"),
        ({"memory_budget": 1.5}, TypeError, r"memory_budget = 1\.5; expected a whole number of b"),
        ({"memory_budget": True}, TypeError, "memory_budget = True"),
        ({"memory_budget": "1GiB"}, TypeError, "memory_budget = '1GiB'"),
        ({"memory_budget": 5, "chunk_rows": 3}, ValueError, "chunk_rows = 3 and memory_budget = 5"),
    ],
)
def test_budgets_that_mean_nothing(options, error, words):
    x, w, y = torch.randn(2, D), torch.randn(V, D), torch.tensor([1, 2])
    for function in (sgp.linear_cross_entropy, sgp.linear_token_log_probs):
        with pytest.raises(error, match=words):
            function(x, w, y, **options)
    with pytest.raises(error, match=words):
        sgp.LinearCrossEntropyLoss(D, V, **options)
