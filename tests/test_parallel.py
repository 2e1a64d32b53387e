"""A vocabulary split over 1 to 4 processes: the losses and gradients of one process."""

import math
import os

import pytest
import torch
from torch import distributed

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.tolerance import bound, relative_error
from tests.oracle import rows_of_infinities
from tests.ranks import caught, run_ranks
from tests.split_cases import ALL, Case, D, Part, V, cases, even, flat, make, own_part, run, uneven

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-13}
SPLITS = {"even": even, "uneven": uneven}


def compare(case, made, part, limit):
    """What of a rank's part of a case is not the single process's, with the error; its outputs."""
    with pytest.MonkeyPatch.context() as patch:  # a process by itself, and the quicker way
        patch.setenv("SGP_BACKEND", "torch")
        alone, expected = run(sgp, case, made)
    ours, gradients = run(sgp.parallel, case, made, part)
    wrong = []
    for i, (value, truth) in enumerate(zip(ours, alone, strict=True)):
        error = relative_error(value, truth)
        wrong += [(f"output {i}", error)] if not error <= limit else []
    for name, gradient in gradients.items():
        truth = own_part(name, expected[name], part)
        assert (gradient is None) == (truth is None), (case, name)
        if gradient is None:
            continue
        last = part.rank == len(part.sizes) - 1
        dim = gradient.dim() - 1 if name == "logits" else 0
        if case.padding and last and name != "hidden":
            size = gradient.shape[dim] - case.padding
            assert not gradient.narrow(dim, size, case.padding).any(), "padding has a gradient"
            gradient = gradient.narrow(dim, 0, size)  # noqa: PLW2901
        assert gradient.shape == truth.shape, (case, name)
        scale = expected[name].norm(dim=-1).max()  # the whole row's: a part of it may be all small
        error = (gradient - truth).abs().max() if truth.numel() else 0.0
        error = error / scale if scale else error  # nothing kept: exactly zero
        wrong += [(name, float(error))] if not error <= limit else []
    return wrong, ours


def every_case(rank, world, backend, splits, dtype=torch.float32):
    """({case: what is wrong}, {case: outputs}) of this rank."""
    os.environ["SGP_BACKEND"] = backend
    made = make(dtype=dtype)
    wrong, outputs = {}, {}
    for split in splits:
        sizes = SPLITS[split]
        for case in cases():
            if backend == "triton" and case.options.get("reduction") == "sum":
                continue  # the interpreter takes its time, and a sum is a mean without a divisor
            key = f"{split}: {case}"
            found, outputs[key] = compare(case, made, Part(sizes(world), rank), LIMITS[dtype])
            if found:
                wrong[key] = found
    return wrong, outputs


@pytest.mark.core
@pytest.mark.parametrize(
    ("backend", "world", "splits"),
    [
        *(("torch", world, ("even", "uneven")) for world in (1, 2, 3, 4)),
        # Each number of ranks once in the interpreter.
        ("triton", 1, ("even",)),
        ("triton", 2, ("even",)),
        ("triton", 3, ("uneven",)),
        ("triton", 4, ("uneven",)),
    ],
)
def test_every_option(world, backend, splits, tmp_path):
    results = run_ranks(every_case, world, tmp_path, world, backend, splits)
    for rank, (wrong, outputs) in enumerate(results):
        assert wrong == {}, f"rank {rank}"
        for case, values in outputs.items():
            for mine, first in zip(values, results[0][1][case], strict=True):
                assert torch.equal(mine, first), f"rank {rank} has other bits: {case}"


def test_float64(tmp_path):
    for wrong, _ in run_ranks(
        every_case, 2, tmp_path, 2, "torch", ("even", "uneven"), torch.float64
    ):
        assert wrong == {}


# -- arithmetic ------------------------------------------------------------------------------------


def hard_rows():
    """Logits (N, V) where the usual arithmetic breaks, and their targets."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, V, generator=random)
    y = torch.randint(V, (8,), generator=random)
    rows = torch.arange(8)
    x[0] += 1000.0
    x[rows[1:4], y[1:4]] = torch.tensor([14.0, 17.0, 20.0])  # p near 1
    x[4, :40] = -torch.inf  # whole shards of nothing
    x[5] = -torch.inf
    x[5, y[5]] = 0.0  # nothing but the target
    x[6, y[6]] = -torch.inf  # the target is impossible
    y[4] = 45
    return x, y


def hard(rank, backend):
    """[(dtype, what, row, error, bound)] of this rank's results on hard rows that are too far off.

    What belongs to a part of a row is measured against the whole row.
    """
    os.environ["SGP_BACKEND"] = backend
    x, y = hard_rows()
    part = Part(uneven(3), rank)
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = x.to(dtype)  # the truth is that of the rounded numbers
        truth = results_of(sgp.reference, stored.double(), y)
        plain = results_of(sgp.reference, stored, y)
        ours = results_of(sgp.parallel, stored.split(part.sizes, 1)[rank], y)
        for name, value in ours.items():
            for row in range(len(y)):
                t, p, o = truth[name][row], plain[name][row], value[row]
                if name == "gradient":
                    whole = t.clone()
                    whole.split(part.sizes)[rank].copy_(o)
                    o = whole
                limit = bound(relative_error(p, t), dtype, interpreted=backend == "triton")
                error = relative_error(o, t)
                wrong += [(dtype, name, row, error, limit)] if not error <= limit else []
    return [(str(dtype), *rest) for dtype, *rest in wrong]


def results_of(module, x, y):
    """Loss, gradient and statistics of every row."""
    leaf = x.clone().requires_grad_()
    loss = module.cross_entropy(leaf, y, reduction="none")
    loss.backward(torch.linspace(0.5, 2.0, len(y), dtype=loss.dtype))
    found = module.token_log_probs(leaf.detach(), y, return_argmax=True)._asdict()
    return {"loss": loss.detach(), "gradient": leaf.grad, **found}


def infinite(rank, backend):
    """Statistics of rows with infinities, NaN and ties; the second of three ranks has nothing."""
    os.environ["SGP_BACKEND"] = backend
    x, y = rows_of_infinities(11)
    part = x.split([4, 0, 7], 1)[rank]
    return list(sgp.parallel.token_log_probs(part, y, return_argmax=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_of_infinities_and_nan(backend, tmp_path):
    """A NaN on any rank is seen by all; of ties the lowest class of the whole vocabulary wins."""
    x, y = rows_of_infinities(11)
    truth = sgp.reference.token_log_probs(x.double(), y, return_argmax=True)
    for found in run_ranks(infinite, 3, tmp_path, backend):
        for field, value, exact in zip(truth._fields, found, truth, strict=True):
            torch.testing.assert_close(
                value, exact.to(value.dtype), rtol=2e-6, atol=1e-6, equal_nan=True, msg=field
            )


def smoothed(rank, backend):
    """Gradients under smoothing where the target, on the last rank, is nearly certain."""
    os.environ["SGP_BACKEND"] = backend
    x = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    x[:, V - 1] = torch.tensor([9.0, 20.0])
    leaf = x.split(uneven(2), 1)[rank].clone().requires_grad_()
    y = torch.full((2,), V - 1)
    sgp.parallel.cross_entropy(leaf, y, label_smoothing=0.1, reduction="sum").backward()
    return leaf.grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_smoothing_beside_a_nearly_certain_target_of_another_rank(backend, tmp_path):
    """The column that stands in for it on the other rank has a gradient like its neighbours."""
    parts = run_ranks(smoothed, 2, tmp_path, backend)
    x = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).double()
    x[:, V - 1] = torch.tensor([9.0, 20.0])
    leaf = x.requires_grad_()
    y = torch.full((2,), V - 1)
    sgp.reference.cross_entropy(leaf, y, label_smoothing=0.1, reduction="sum").backward()
    torch.testing.assert_close(torch.cat(parts, 1), leaf.grad.float(), rtol=2e-6, atol=1e-9)


def capped(backend, module, x, y):
    """Gradient of the statistics' sum under softcap and a low temperature, whose scores are large.

    Two ways to tanh are then 1e-4 apart in the exponent.
    """
    os.environ["SGP_BACKEND"] = backend
    leaf = x.clone().requires_grad_()
    found = module.token_log_probs(leaf, y, softcap=30.0, temperature=0.01)
    (found.log_prob + 2 * found.entropy + 3 * found.lse).sum().backward()
    return leaf.grad


def capped_rows():
    """Rows (16, 6) in which one class is nearly certain, in every place of both ranks' halves."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    certain = torch.arange(16) % 6
    x[torch.arange(16), certain] = torch.linspace(6.0, 40.0, 16)
    return x, torch.where(torch.arange(16) < 6, certain, 5 - certain)  # the target, and another


def capped_half(rank, backend):
    """One of two ranks' part of it."""
    x, y = capped_rows()
    return capped(backend, sgp.parallel, x.split(3, 1)[rank], y)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nearly_certain_class_of_large_scores(backend, tmp_path):
    """Its probability is 1 to a rounding, as alone: who has its score recomputes it alike."""
    parts = run_ranks(capped_half, 2, tmp_path, backend)
    x, y = capped_rows()
    truth = capped("torch", sgp.reference, x.double(), y)
    plain = capped("torch", sgp.reference, x, y)
    error = relative_error(torch.cat(parts, 1), truth)
    assert error <= bound(relative_error(plain, truth), torch.float32)


def one_class(rank, backend):
    """The gradient of a vocabulary of one class, which the first rank has."""
    os.environ["SGP_BACKEND"] = backend
    leaf = torch.tensor([[0.7], [-1.3]])[:, rank:].requires_grad_()
    y = torch.zeros(2, dtype=torch.int64)
    loss = sgp.parallel.cross_entropy(leaf, y, label_smoothing=0.1, lse_square_scale=1e-3)
    loss.backward()
    return leaf.grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_smoothing_over_one_class_leaves_the_z_loss_alone(backend, tmp_path):
    first, second = run_ranks(one_class, 2, tmp_path, backend)
    assert second.numel() == 0
    torch.testing.assert_close(first, 1e-3 * torch.tensor([[0.7], [-1.3]]), rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_worse_than_pytorch_where_arithmetic_is_hard(backend, tmp_path):
    for errors in run_ranks(hard, 3, tmp_path, backend):
        assert errors == []


def narrow(rank, backend):
    """[(case, what, error, bound)] of heads in bf16 and fp16 that are worse than one process's."""
    os.environ["SGP_BACKEND"] = backend
    part = Part(uneven(3), rank)
    wrong = []
    for dtype in (torch.bfloat16, torch.float16):
        made = make(dtype=dtype)
        exact = {k: v.double() if v.is_floating_point() else v for k, v in made.items()}
        for options in ({"reduction": "none"}, {"chunk_rows": 2, **ALL}):
            case = Case("linear_cross_entropy", options)
            defined = Case(case.function, without_chunks(options))
            loss, truth = run(sgp.reference, defined, exact)
            loss_plain, plain = run(sgp, case, made)
            out, ours = run(sgp.parallel, case, made, part)
            pairs = {"loss": (out[0], loss[0], loss_plain[0])}
            for name, gradient in ours.items():
                of_part = (own_part(name, x[name], part) for x in (truth, plain))
                pairs[name] = (gradient, *of_part)
            for name, (value, t, p) in pairs.items():
                limit = bound(relative_error(p, t), value.dtype, interpreted=backend == "triton")
                error = relative_error(value, t)
                wrong += [(f"{dtype} {options}", name, error, limit)] if not error <= limit else []
    return wrong


def without_chunks(options):
    """What the reference takes."""
    return {k: v for k, v in options.items() if k != "chunk_rows"}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_narrow_heads_are_no_worse_than_in_one_process(backend, tmp_path):
    for wrong in run_ranks(narrow, 3, tmp_path, backend):
        assert wrong == []


def near_one(rank, backend):
    """(losses, truth) where the target's probability is near 1 and other ranks have the rest."""
    os.environ["SGP_BACKEND"] = backend
    x = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([2, 30, 47, 20])
    x[torch.arange(4), y] = torch.tensor([16.0, 18.0, 20.0, 30.0])
    x[3] += 1000.0
    others = x.double().scatter(1, y[:, None], -torch.inf) - x.gather(1, y[:, None])
    truth = others.exp().sum(1).log1p()  # what 1 - p loses even in float64
    part = x.split(uneven(3), 1)[rank]
    tokens = sgp.parallel.token_log_probs(part, y)
    loss = sgp.parallel.cross_entropy(part, y, reduction="none")
    return loss, -tokens.log_prob, truth


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_losses_near_zero_keep_their_digits(backend, tmp_path):
    for *found, truth in run_ranks(near_one, 3, tmp_path, backend):
        for loss in found:
            assert ((loss - truth).abs() / truth).max() <= LIMITS[torch.float32]


def forbidden(rank, backend):
    """{what: (result, truth)} where -inf is the target's logit, a rank's first, all of a rank."""
    os.environ["SGP_BACKEND"] = backend
    x = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([2, 30, 47, 20])
    sizes = uneven(3)
    first = [sum(sizes[:i]) for i in range(3)]
    at_first = x.clone()
    at_first[:, first] = -torch.inf  # the columns that stand in for a target of another rank
    at_target = x.scatter(1, y[:, None], -torch.inf)
    a_rank = x.clone()
    a_rank[:, sizes[0] : sizes[0] + sizes[1]] = -torch.inf
    without = torch.ones(V)
    without[first] = 0
    options = {"label_smoothing": 0.3, "reduction": "none"}
    found = {}
    for what, logits, weight in (
        ("first, of weight 0", at_first, without),
        ("first", at_first, None),
        ("target", at_target, None),
        ("a rank", a_rank, None),
        ("a rank, weighted", a_rank, without),
    ):
        part = logits.split(sizes, 1)[rank]
        truth = sgp.reference.cross_entropy(logits.double(), y, weight, **options)
        found[what] = sgp.parallel.cross_entropy(part, y, weight, **options), truth.float()
    whole, mine = at_target.double(), at_target.split(sizes, 1)[rank].clone()
    for module, leaf in ((sgp.reference, whole), (sgp.parallel, mine)):
        module.token_log_probs(leaf.requires_grad_(), y).entropy.sum().backward()
    found["the entropy's gradient"] = mine.grad, whole.grad.float().split(sizes, 1)[rank]
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forbidden_classes(backend, tmp_path):
    """A -inf that is smoothed over costs +inf, in a class of weight 0 nothing; never NaN."""
    for found in run_ranks(forbidden, 3, tmp_path, backend):
        for what, (value, truth) in found.items():
            assert not truth.isnan().any()
            torch.testing.assert_close(value, truth, msg=lambda text, what=what: f"{what}: {text}")


def poisoned(rank, backend):
    """Gradients and losses beside NaN in ignored rows."""
    os.environ["SGP_BACKEND"] = backend
    made = make()
    made["logits"][made["labels"] == -100] = torch.nan
    made["hidden"][made["labels"] == -100] = torch.inf
    found = []
    for case in (Case("cross_entropy", {}, second=True), Case("linear_cross_entropy", {})):
        outputs, gradients = run(sgp.parallel, case, made, Part([20, 28], rank))
        found += [outputs[0], *gradients.values()]
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ignored_rows_are_not_read(backend, tmp_path):
    for found in run_ranks(poisoned, 2, tmp_path, backend):
        assert all(x.isfinite().all() for x in found)


def again(rank):
    """Gradients of a first and a second backward; the error of a second one in place."""
    x = make()["logits"].flatten(0, 1).split([20, 28], 1)[rank].requires_grad_()
    y = make()["labels"].flatten()
    loss = sgp.parallel.cross_entropy(x, y)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    message = ""
    loss = sgp.parallel.cross_entropy(x * 1.0, y, inplace=True)
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        message = str(error)
    twice = ""
    (g,) = torch.autograd.grad(sgp.parallel.cross_entropy(x, y), x, create_graph=True)
    try:
        g.sum().backward()
    except RuntimeError as error:
        twice = str(error)
    return torch.equal(first, second), message, twice


def test_a_second_backward_is_right_or_refused(tmp_path):
    for same, message, twice in run_ranks(again, 2, tmp_path):
        assert same
        assert "backward a second time" in message
        assert "sgp.parallel.cross_entropy has no second derivative" in twice
        assert "sgp.reference.cross_entropy" in twice


# -- what is exchanged -----------------------------------------------------------------------------


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes that this rank sends to each other rank, by collective."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            gather = "allgather" in str(function)
            x = args[1] if gather else args[0][0]
            self.sent.append(("gather" if gather else "sum", x.numel() * x.element_size()))
        return function(*args, **(kwargs or {}))


def exchanged(rank, columns):
    """{what: [(collective, bytes)]} for a vocabulary of 2 x columns and 6 kept rows of 10."""
    torch.manual_seed(rank)
    hidden = torch.randn(10, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = torch.randn(columns, D, requires_grad=True)
    y = torch.full((10,), -100)
    y[2:8] = torch.arange(6)
    means = {"reduction": "sequence_mean", "weight": torch.ones(2 * columns)}
    z = {"lse_square_scale": 0.1}
    calls = {
        "logits": lambda: sgp.parallel.cross_entropy(hidden @ head.T, y),
        "smoothed": lambda: sgp.parallel.cross_entropy(hidden @ head.T, y, label_smoothing=0.1),
        "head": lambda: sgp.parallel.linear_cross_entropy(hidden, head, y),
        "chunks": lambda: sgp.parallel.linear_cross_entropy(hidden, head, y, chunk_rows=2),
        "tokens": lambda: sgp.parallel.linear_token_log_probs(hidden, head, y),
        "argmax": lambda: sgp.parallel.linear_token_log_probs(hidden, head, y, return_argmax=True),
        "unsummed": lambda: sgp.parallel.linear_cross_entropy(
            hidden, head, y, sum_input_grad=False
        ),
        "means": lambda: sgp.parallel.cross_entropy(hidden @ head.T, y, **means),
        "means and z-loss": lambda: sgp.parallel.cross_entropy(hidden @ head.T, y, **means, **z),
        "means, z-loss, statistics": lambda: sgp.parallel.cross_entropy(
            hidden @ head.T, y, **means, **z, return_stats=True
        )[0],
        "head, means and z-loss": lambda: sgp.parallel.linear_cross_entropy(
            hidden, head, y, **means, **z
        ),
    }
    found = {}
    for name, call in calls.items():
        with Counted() as counted:
            flat(call())[0].sum().backward()
        found[name] = counted.sent
    return found


def test_bytes_exchanged_are_counted_and_independent_of_the_vocabulary(tmp_path):
    header, row, width = ("gather", 96), 16, 4 * D
    expected = {
        "logits": [header, ("gather", 6 * row)],
        "smoothed": [header, ("gather", 6 * (row + 4))],
        "head": [header, ("gather", 6 * row), ("sum", 6 * width)],
        "chunks": [header, *3 * [("gather", 2 * row), ("sum", 2 * width)]],
        "tokens": [header, ("gather", 6 * (row + 8)), ("sum", 6 * width)],
        "argmax": [header, ("gather", 6 * (row + 12)), ("sum", 6 * width)],
        "unsummed": [header, ("gather", 6 * row)],
        "means": [header, ("gather", 6 * row)],
        "means and z-loss": [header, ("gather", 6 * (row + 8))],
        "means, z-loss, statistics": [header, ("gather", 6 * (row + 8))],
        "head, means and z-loss": [header, ("gather", 6 * (row + 8)), ("sum", 6 * width)],
    }
    for columns in (16, 4096):
        folder = tmp_path / str(columns)
        folder.mkdir()
        for found in run_ranks(exchanged, 2, folder, columns):
            assert found == expected


def accessed(rank):
    """Elements that kernels ask for of 4 x 512 local logits, 2 rows kept, and their gradient."""
    os.environ["SGP_BACKEND"] = "triton"
    torch.manual_seed(rank)
    x = torch.randn(4, 512, requires_grad=True)
    with watch_accesses() as seen:
        sgp.parallel.cross_entropy(x, torch.tensor([-100, 3, 600, -100])).backward()
    logits, gradient = seen.of(x), seen.of(x.grad)
    assert logits.stored == 0, rank
    return logits.loaded // 4, gradient.stored // 4


def test_kept_logits_are_read_twice_and_gradients_written_once(tmp_path):
    for loaded, stored in run_ranks(accessed, 2, tmp_path):
        # The first launch also reads each target's logit, or the one that stands in for it; the
        # second that of the target which the rank has, whose gradient is written over its column.
        assert loaded == 2 * 2 * 512 + 2 + 1, "each kept row in two launches"
        assert stored == 4 * 512 + 1, "each row"


class Order(torch.utils._python_dispatch.TorchDispatchMode):
    """The matmuls and collectives in the order in which they begin."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if function.namespace == "c10d" or name in ("mm", "addmm", "addmm_"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def order(rank):
    """What a head with one chunk does."""
    torch.manual_seed(rank)
    hidden = torch.randn(6, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = torch.randn(8, D, requires_grad=True)
    with Order() as seen:
        sgp.parallel.linear_cross_entropy(hidden, head, torch.arange(6))
    return seen.names


def test_the_gradient_of_the_hidden_states_is_summed_beside_the_next_matmul(tmp_path):
    for names in run_ranks(order, 2, tmp_path):
        header, logits, statistics, of_hidden, summing, of_head = names
        assert (logits, of_hidden, of_head) == ("mm", "mm", "mm")
        assert "gather" in header
        assert "gather" in statistics
        assert "allreduce" in summing


def compiled(rank):
    """The loss and gradient of a compiled step, and of the same step as it is."""

    def step(x, y):
        return sgp.parallel.cross_entropy(2 * x, y) * 3

    x = make()["logits"].flatten(0, 1).split([20, 28], 1)[rank]
    found = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, make()["labels"].flatten())
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    return found


def test_compiled_code_breaks_its_graph_and_is_right(tmp_path):
    for plain, graphs in run_ranks(compiled, 2, tmp_path):
        for value, truth in zip(graphs, plain, strict=True):
            torch.testing.assert_close(value, truth)


# -- when ranks disagree or die --------------------------------------------------------------------


def disagree(rank):
    """{what differs between the ranks: the error of this one}."""
    torch.manual_seed(rank)
    x, y = torch.randn(6 + rank, 8), torch.zeros(6 + rank, dtype=torch.int64)
    hidden, head = torch.randn(6, 4), torch.randn(8, 4, requires_grad=rank == 0)
    same = (torch.randn(6, 8), torch.arange(6))
    kept = torch.tensor([0, 1, 2, -100 + 103 * rank, 4, 5])
    square = (torch.randn(16, 8), torch.arange(16))  # as many tokens as classes
    weights = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    parallel = sgp.parallel
    return {
        "tokens": caught(lambda: parallel.cross_entropy(x, y)),
        "kept": caught(lambda: parallel.cross_entropy(same[0], kept)),
        "targets": caught(lambda: parallel.cross_entropy(same[0], same[1] + rank)),
        "order": caught(lambda: parallel.cross_entropy(same[0], same[1].roll(rank))),
        "swapped weights": caught(
            lambda: parallel.cross_entropy(
                *square, weights[rank], token_weight=weights[1 - rank], denominator=1.0
            )
        ),
        "options": caught(lambda: parallel.cross_entropy(*same, label_smoothing=0.1 * rank)),
        "dtype": caught(
            lambda: parallel.cross_entropy(same[0].to((torch.float32, torch.float64)[rank]), y[:6])
        ),
        "grad": caught(lambda: parallel.linear_cross_entropy(hidden, head, same[1])),
        "width": caught(
            lambda: parallel.linear_cross_entropy(
                hidden[:, rank:], head[:, rank:].detach(), same[1]
            )
        ),
        "denominator": caught(lambda: parallel.cross_entropy(*same, denominator=1.0 + rank)),
        "class weights": caught(
            lambda: parallel.cross_entropy(*same, torch.full((16,), 1.0 + rank))
        ),
        "length of weight": caught(lambda: parallel.cross_entropy(*same, torch.ones(8))),
        "vocab_size": caught(lambda: parallel.cross_entropy(*same, vocab_size=17)),
        "the whole head": caught(
            lambda: parallel.linear_cross_entropy(hidden, head.detach(), same[1], vocab_size=8)
        ),
        "a target": caught(lambda: parallel.cross_entropy(same[0], same[1] + 12)),
        "a padded target": caught(
            lambda: parallel.cross_entropy(same[0], same[1] + 8, vocab_size=13)
        ),
        "probabilities": caught(lambda: parallel.cross_entropy(same[0], same[0].softmax(1))),
        "autocast": caught(lambda: under_autocast(rank, hidden, head.detach(), same[1])),
        "functions": caught(
            lambda: (parallel.cross_entropy if rank else parallel.token_log_probs)(*same)
        ).replace("token_log_probs", "cross_entropy"),
        "afterwards": caught(lambda: parallel.cross_entropy(*same)),
    }


def under_autocast(rank, *arguments):
    """A loss under autocast on rank 1 only."""
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
        return sgp.parallel.linear_cross_entropy(*arguments)


def test_ranks_that_disagree_all_raise_the_same_error(tmp_path):
    first, second = run_ranks(disagree, 2, tmp_path)
    assert first == second
    for what, text in {
        "tokens": "ranks disagree on the number of tokens: by rank [6, 7]",
        "kept": "ranks disagree on the number of tokens that carry loss: by rank [5, 6]",
        "targets": "ranks disagree on the targets",
        "order": "ranks disagree on the targets",
        "swapped weights": "ranks disagree on token weights, class weights or the divisor",
        "options": "ranks disagree on the options (reduction, smoothing",
        "dtype": "ranks disagree on the dtypes",
        "grad": "ranks disagree on which tensors require grad",
        "width": "ranks disagree on the width of the hidden states: by rank [4, 3]",
        "denominator": "ranks disagree on token weights, class weights or the divisor",
        "class weights": "ranks disagree on token weights, class weights or the divisor",
        "length of weight": "weight is (8,); expected (16,)",
        "vocab_size": "vocab_size = 17, but the ranks hold 16 columns, by rank [8, 8]",
        "the whole head": "vocab_size = 8 leaves rank 1 nothing but padding",
        "a target": "target[4] = 16 is outside [0, 16)",
        "a padded target": "target[5] = 13 is outside [0, 13)",
        "probabilities": "class probabilities over a split vocabulary are not supported",
        "autocast": "ranks disagree on the dtypes (autocast's, too)",
        "functions": "ranks disagree on the function;",
        "afterwards": "nothing was raised",
    }.items():
        assert text in first[what], what


COPIES = "ranks 0 and 1 hold the same 8 columns of the vocabulary"


def copies(rank):
    """{what: the error, or the loss, of shards that two ranks of three have alike}."""
    random = torch.Generator().manual_seed(0)
    x, hidden, head = (torch.randn(s, generator=random) for s in ((6, 8), (6, 4), (8, 4)))
    other = torch.randn(6, 8)
    y = torch.arange(6) * 4
    context = torch.tensor([-100, 4, -100, 12, 16, -100])
    parallel = sgp.parallel

    def loss(function, *arguments, **options):
        result = function(*arguments, **options)
        return result if isinstance(result, torch.Tensor) else -result.log_prob.mean()

    def tried(*arguments, **options):
        found = []
        text = caught(lambda: found.append(loss(*arguments, **options)))
        return found[0].detach() if found else text

    poisoned = x.clone()
    poisoned[context == -100] = torch.nan
    mine = other if rank == 2 else x
    return {
        "logits": tried(parallel.cross_entropy, x, y),
        "two of three": tried(parallel.cross_entropy, mine, y),
        "head": tried(parallel.linear_cross_entropy, hidden, head, y),
        "bf16": tried(parallel.cross_entropy, x.bfloat16(), y),
        "tokens": tried(parallel.token_log_probs, x, y),
        "head's tokens": tried(parallel.linear_token_log_probs, hidden, head, y),
        "3-d": tried(parallel.cross_entropy, x.view(2, 3, 8).movedim(2, 1), y.view(2, 3)),
        "context": tried(parallel.cross_entropy, poisoned, context),
        "given": tried(parallel.cross_entropy, x, y, vocab_size=24),
        "head, given": tried(parallel.linear_cross_entropy, hidden, head, y, vocab_size=24),
        "of zeros": tried(parallel.cross_entropy, x * 0, y),
        "head of zeros": tried(parallel.linear_cross_entropy, hidden, head * 0, y),
        "of nothing": tried(parallel.cross_entropy, x, torch.full((6,), -100)),
        "diverged": tried(parallel.cross_entropy, x * torch.nan, y),
        "others": tried(parallel.cross_entropy, x + rank, y),
        "one column differs": tried(parallel.cross_entropy, x + rank * (torch.arange(8) == 3), y),
    }


def test_the_same_part_on_two_ranks_is_refused(tmp_path):
    """Each rank was given the whole vocabulary, as after a gather, and counts it once more."""
    random = torch.Generator().manual_seed(0)
    x, hidden, head = (torch.randn(s, generator=random) for s in ((6, 8), (6, 4), (8, 4)))
    y = torch.arange(6) * 4
    log3 = torch.tensor(3.0).log()
    for found in run_ranks(copies, 3, tmp_path):
        refused = ("logits", "two of three", "bf16", "3-d", "context", "tokens")
        for what in (*refused, "head", "head's tokens"):
            assert COPIES in found[what], what
            assert "the whole head or logits" in found[what], what
            assert "vocab_size=24" in found[what], what
        assert "or call sgp.linear_cross_entropy instead" in found["head"]
        whole = {"given": x, "head, given": hidden @ head.T}
        for what, logits in whole.items():
            truth = sgp.cross_entropy(logits.repeat(1, 3), y)
            torch.testing.assert_close(found[what], truth)
        for what in ("of zeros", "head of zeros"):
            torch.testing.assert_close(found[what], log3 + math.log(8))
        assert found["of nothing"] == 0
        assert found["diverged"].isnan()
        assert isinstance(found["others"], torch.Tensor)
        assert isinstance(found["one column differs"], torch.Tensor)


def on_a_device_too(rank):
    """As on a GPU: a head of zeros first, then its copies; then parts of one's own, twice."""
    from sgp.parallel import shard

    shard.may_wait = lambda _: False
    x, y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    first = sgp.parallel.cross_entropy(x * 0, y)
    text = caught(lambda: sgp.parallel.cross_entropy(x, y))
    own = [sgp.parallel.cross_entropy(x + rank * torch.arange(8), y) for _ in range(2)]
    return first, text, own


def test_the_same_part_is_refused_on_a_device(tmp_path):
    """Where later calls do not wait: the first that is not zero tells."""
    for first, text, own in run_ranks(on_a_device_too, 2, tmp_path):
        torch.testing.assert_close(first, torch.tensor(16.0).log())
        assert COPIES in text
        assert own[0] == own[1]


def die(rank, how):
    """Rank 1 leaves or does not come; the error of the others."""
    distributed.barrier()  # all are connected: a rank that dies earlier fails the others' start
    if rank == 1:
        if how == "dies":
            os._exit(1)
        return ""
    return caught(lambda: sgp.parallel.cross_entropy(torch.randn(4, 8), torch.arange(4)))


@pytest.mark.parametrize("how", ["dies", "does not come"])
def test_a_rank_that_is_missing_is_an_error_within_the_time_out(how, tmp_path):
    results = run_ranks(die, 3, tmp_path, how, seconds=5)
    for rank in (0, 2):
        assert "RuntimeError: sgp.parallel.cross_entropy: the comparison of" in results[rank]
        assert "a rank died, did not make this call, or raised an error" in results[rank]


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        sgp.parallel.cross_entropy(torch.randn(4, 8), torch.arange(4))


def outside(rank):
    """The error of the rank that is not in the group it passed."""
    group = distributed.new_group([0])
    call = caught(
        lambda: sgp.parallel.cross_entropy(torch.ones(2, 3), torch.ones(2).long(), group=group)
    )
    return call if rank else "in it"


def test_a_rank_outside_the_group(tmp_path):
    assert "rank 1 is not in the group" in run_ranks(outside, 2, tmp_path)[1]


def on_a_device(rank):
    """As on a GPU, where headers are compared on the device: losses before and after a mistake."""
    from sgp.parallel import shard

    shard.may_wait = lambda _: False
    torch.manual_seed(rank)
    x, y = torch.randn(6, 8, requires_grad=True), torch.arange(6)
    nothing = torch.full((6,), -100)
    losses = [float(sgp.parallel.cross_entropy(x, y)) for _ in range(2)]
    wrong = sgp.parallel.cross_entropy(x, y + rank)
    wrong.backward()
    of_nothing = sgp.parallel.cross_entropy(x, nothing, denominator=1.0 + rank)
    # 8 and 8 columns, then 8 and 7: rank 0 has as many as before.
    odd = x[:, : 8 - rank]
    other = [float(sgp.parallel.cross_entropy(odd, y, vocab_size=15)) for _ in range(2)]
    return losses, (float(wrong), float(of_nothing)), bool(x.grad.isnan().all()), other


def test_a_disagreement_on_a_device_is_nan(tmp_path):
    results = run_ranks(on_a_device, 2, tmp_path)
    for losses, wrong, all_nan, other in results:
        assert losses[0] == losses[1]
        assert all(math.isnan(value) for value in wrong), "a silent number"
        assert all_nan
        assert other[0] == other[1] == results[0][3][0], "another vocabulary in the same group"
