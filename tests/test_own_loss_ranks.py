"""`linear_loss` over ranks and for DTensors: the loss of one process, on every rank."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sgp
from sgp.tolerance import relative_error
from tests.ranks import caught, run_ranks

B, T, D, V = 4, 6, 10, 23
GROUPS = [0, 0, 1, 1]
BY = ("row", "sequence", "group")
LIMIT = 1e-5


def make(dtype=torch.float32):
    """Hidden states (B, T, D), a head (V, D), a bias (V,), labels with context; one without any."""
    random = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*shape, generator=random) for shape in ((B, T, D), (V, D), (V,))]
    labels = torch.randint(V, (B, T), generator=random)
    labels[:, :2] = labels[1] = -100
    return [x.to(dtype) for x in tensors], labels


def lines_of(by, factor=1.0):
    """A loss of each kind, whose rows tell the positions that they are given."""
    weight = torch.linspace(0.1, 1.0, B * T)

    def lines(tokens, rows):
        numbers = (
            -tokens.log_prob * weight[rows] - 0.1 * tokens.entropy + 0.01 * tokens.lse * factor
        )
        if by != "row":
            of = rows // T if by == "sequence" else rows // T // 2
            size = B if by == "sequence" else B // 2
            numbers = numbers.new_zeros(size).index_add(0, of, numbers).tanh()
            return numbers, {"twice": 2 * numbers}
        return numbers, {"twice": 2 * numbers, "top": tokens.is_top1}

    return lines


def result(function, leaves, *arguments, more=(), **options):
    """[loss, log-probabilities, metrics..., gradients]."""
    loss, tokens, metrics = function(*leaves[:2], *arguments, return_stats=True, **options)
    (1.5 * loss).backward()
    grads = [x.grad for x in (*leaves, *more)]
    return [loss.detach(), tokens.log_prob, *metrics.values(), *grads]


def expected(by, factor=None):
    tensors, labels = make()
    leaves = [x.requires_grad_() for x in tensors]
    more = () if factor is None else (factor,)
    lines = lines_of(by, *more)
    options = {"groups": GROUPS} if by == "group" else {}
    return result(
        sgp.reference.linear_loss, leaves, labels, lines, by=by, linear_bias=leaves[2], more=more,
        shift=True, temperature=0.8, **options,
    )  # fmt: skip


def split(rank, world, backend):
    """{by, chunk: this rank's results} with a head of uneven parts."""
    os.environ["SGP_BACKEND"] = backend
    sizes = [V // 2, *[(V - V // 2) // (world - 1)] * (world - 1)]
    sizes[-1] += V - sum(sizes)
    found = {}
    for by in BY:
        for chunk_rows in (None, 3, 7):
            (hidden, head, bias), labels = make()
            parts = [x.split(sizes)[rank].clone().requires_grad_() for x in (head, bias)]
            leaves = [hidden.requires_grad_(), *parts]
            factor = torch.tensor(1.0, requires_grad=True)
            options = {"groups": GROUPS} if by == "group" else {}
            found[by, chunk_rows] = result(
                sgp.parallel.linear_loss, leaves, labels, lines_of(by, factor), by=by,
                linear_bias=leaves[2], more=(factor,), shift=True, temperature=0.8,
                chunk_rows=chunk_rows, **options,
            )  # fmt: skip
    return found


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:sgp.parallel.linear_loss. there is no room")
@pytest.mark.parametrize(("world", "backend"), [(2, "torch"), (3, "torch"), (2, "triton")])
def test_a_split_vocabulary(world, backend, tmp_path):
    truth = {by: expected(by, torch.tensor(1.0, requires_grad=True)) for by in BY}
    results = run_ranks(split, world, tmp_path, world, backend)
    for key in results[0]:
        by, _ = key
        own = [found[key] for found in results]
        *same, of_head, of_bias, of_factor = zip(*own, strict=True)
        *true, true_head, true_bias, true_factor = truth[by]
        for values, exact in zip((*same, of_factor), (*true, true_factor), strict=True):
            assert all(torch.equal(x, values[0]) for x in values), "the same bits on every rank"
            assert relative_error(values[0], exact) <= LIMIT
        for parts, exact in ((of_head, true_head), (of_bias, true_bias)):
            assert relative_error(torch.cat(parts), exact) <= LIMIT


def disagree(rank):
    """What ranks say that were not called alike."""
    (hidden, head, _), labels = make()
    part = head.chunk(2)[rank]

    def other(tokens, rows):
        return -tokens.log_prob.new_zeros(B).index_add(0, rows // T, tokens.log_prob)

    def call(lines, **options):
        return caught(lambda: sgp.parallel.linear_loss(hidden, part, labels, lines, **options))

    return [
        call(lines_of("sequence"), by=("row", "sequence")[rank]),
        call((lines_of("sequence"), other)[rank], by="sequence"),
        call(lambda t, _: t.log_prob.mean()),
        call(3),
    ]


def test_ranks_that_disagree(tmp_path):
    for found in run_ranks(disagree, 2, tmp_path):
        assert all("sgp.parallel.linear_loss: the ranks disagree on the options" in x
                   for x in found[:2])  # fmt: skip
        assert "ValueError: sgp.parallel.linear_loss: loss_fn returned () for" in found[2]
        assert "TypeError: sgp.parallel.linear_loss: loss_fn = 3" in found[3]


def dtensors(_, world):
    """{case: whole results} of DTensors, and what is refused."""
    mesh = init_device_mesh("cpu", (world,))
    (hidden, head, bias), labels = make()
    cases = {
        "sharded head": (Replicate(), Shard(0)),
        "sequence parallel": (Shard(1), Shard(0)),
        "tokens stay, by batch": (Shard(0), Replicate()),
        "tokens stay, by time": (Shard(1), Replicate()),
    }
    found = {}
    for name, (of_input, of_head) in cases.items():
        for by in BY if of_head.is_shard() else ("row",):
            leaves = [distribute_tensor(hidden, mesh, [of_input]).requires_grad_()]
            leaves += [distribute_tensor(x, mesh, [of_head]).requires_grad_() for x in (head, bias)]
            options = {"groups": GROUPS} if by == "group" else {}
            values = result(
                sgp.linear_loss, leaves, labels, lines_of(by), by=by, linear_bias=leaves[2],
                shift=True, temperature=0.8, **options,
            )  # fmt: skip
            assert all(isinstance(x, DTensor) for x in values), name
            found[name, by] = [x.full_tensor() for x in values]
    x = distribute_tensor(hidden, mesh, [Shard(0)]).requires_grad_()
    factor = torch.tensor(1.0, requires_grad=True)
    refused = [
        caught(lambda: sgp.linear_loss(x, head, labels, lines_of("sequence"), by="sequence")),
        caught(lambda: sgp.linear_loss(x, head, labels, lines_of("row", factor))),
    ]
    weighted = sgp.Selection.from_labels(
        labels, token_weight=torch.linspace(0, 1, B * T).view(B, T)
    )
    one = sgp.linear_loss(x, head, weighted, lines_of("row"))[0].full_tensor()
    return found, refused, one


def test_dtensors(tmp_path):
    truth = {by: expected(by) for by in BY}
    (hidden, head, _), labels = make()
    weight = torch.linspace(0, 1, B * T).view(B, T)
    weighted = sgp.Selection.from_labels(labels, token_weight=weight)
    exact, _ = sgp.linear_loss(hidden, head, weighted, lines_of("row"))
    for found, refused, one in run_ranks(dtensors, 2, tmp_path, 2):
        for (name, by), values in found.items():
            for value, true in zip(values, truth[by], strict=True):
                assert relative_error(value, true) <= LIMIT, (name, by)
        assert "by = 'sequence' of tokens with placements" in refused[0]
        assert "loss_fn uses a tensor that requires grad" in refused[1]
        assert relative_error(one, exact) <= LIMIT


class Policy(nn.Module):
    """A backbone, a head, and a coefficient that the loss function learns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.coefficient = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, labels):
        numbers = lines_of("row", self.coefficient)
        loss, _ = sgp.linear_loss(self.backbone(x), self.head.weight, labels, numbers)
        return loss


def data_parallel(rank):
    """The gradients of a rank's half of the batch, averaged by DDP."""
    (hidden, *_), labels = make()
    model = nn.parallel.DistributedDataParallel(Policy())
    half = slice(2 * rank, 2 * rank + 2)
    model(hidden[half], labels[half]).backward()
    return [p.grad for p in model.module.parameters()]


def test_data_parallel(tmp_path):
    """Every parameter's gradient, also of what the loss function closes over, is reduced."""
    (hidden, *_), labels = make()
    model = Policy()
    for half in (slice(0, 2), slice(2, 4)):
        model(hidden[half], labels[half]).backward()
    for found in run_ranks(data_parallel, 2, tmp_path):
        for value, parameter in zip(found, model.parameters(), strict=True):
            assert relative_error(value, parameter.grad / 2) <= LIMIT
