"""Ranks that hold different tokens: one divisor for all of them, and sequences cut in time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import sgp
from sgp.parallel import global_denominator, positions
from sgp.tolerance import relative_error
from sgp.train.model import tiny_llama
from tests.ranks import run_ranks

V, D = 13, 6
LIMIT = 1e-5


def batches():
    """Four micro-batches (B, T) of very different numbers of targets, one of none."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (4, 2, 8), generator=random)
    labels[0, :, 2:] = -100
    labels[1] = -100
    labels[2, 0] = -100
    return torch.randn(4, 2, 8, D, generator=random), labels


def head():
    """A head whose weights are the same in every process."""
    model = nn.Linear(D, V, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, V * D).view(V, D).sin())
    return model


class Loss(nn.Module):
    """A head with its loss inside, so that DistributedDataParallel sees a forward."""

    def __init__(self):
        super().__init__()
        self.head = head()

    def forward(self, hidden, selection, denominator):
        return sgp.linear_cross_entropy(
            hidden, self.head.weight, selection, denominator=denominator
        )


def steps_of_two_ranks(rank):
    """(the mean loss, the gradient) of one step: two micro-batches on each of two ranks, by DDP."""
    hidden, labels = batches()
    mine = [2 * rank, 2 * rank + 1]
    selections = {i: sgp.Selection.from_labels(labels[i], shift=True) for i in mine}
    model = DistributedDataParallel(Loss())
    denominator = global_denominator(list(selections.values()))
    total = torch.zeros(())
    with model.no_sync():
        loss = model(hidden[mine[0]], selections[mine[0]], denominator)
        loss.backward()
    total += loss.detach()
    loss = model(hidden[mine[1]], selections[mine[1]], denominator)
    loss.backward()
    total += loss.detach()
    distributed.all_reduce(total)
    return total / 2, model.module.head.weight.grad


def test_accumulation_and_data_parallelism_are_the_mean_over_all_tokens(tmp_path):
    hidden, labels = batches()
    whole = sgp.Selection.from_labels(labels.flatten(0, 1), shift=True)
    model = head()
    truth = sgp.linear_cross_entropy(hidden.flatten(0, 1), model.weight, whole)
    truth.backward()
    for loss, gradient in run_ranks(steps_of_two_ranks, 2, tmp_path):
        assert relative_error(loss, truth) <= LIMIT
        assert relative_error(gradient, model.weight.grad) <= LIMIT


def denominators(rank):
    """Of counts, weights and sums, on each rank."""
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])[rank:]
    weighted = sgp.Selection.from_labels(labels, token_weight=torch.full(labels.shape, 0.5))
    plain = sgp.Selection.from_labels(labels)
    weight = torch.arange(4.0)
    return [
        global_denominator(plain),
        global_denominator(plain, averaged=False),
        global_denominator([plain, 2, torch.tensor(3)], averaged=False),
        global_denominator(weighted, averaged=False),
        global_denominator(weighted, weight=weight, averaged=False),
    ]


def test_what_is_counted(tmp_path):
    for found in run_ranks(denominators, 2, tmp_path):
        assert [value.item() for value in found] == [2.0, 4.0, 14.0, 2.0, 4.5]
        assert all(value.dtype == torch.float64 for value in found)


@pytest.mark.core
def test_one_process_needs_no_group():
    labels = torch.tensor([[-100, 1, 2]])
    assert global_denominator(sgp.Selection.from_labels(labels)).item() == 2
    assert global_denominator([]).item() == 0


def without_a_backend(rank, address):
    """The number, in a group that was made without naming a backend."""
    distributed.destroy_process_group()
    distributed.init_process_group(init_method=address, rank=rank, world_size=1)
    labels = torch.tensor([[-100, 1, 2]])
    return global_denominator(sgp.Selection.from_labels(labels))


def test_a_group_whose_backend_was_not_named(tmp_path):
    address = (tmp_path / "store").as_uri()
    assert run_ranks(without_a_backend, 1, tmp_path, address) == [torch.tensor(2.0).double()]


def test_labels_are_no_count():
    with pytest.raises(TypeError, match=r"a tensor \(1, 3\) of torch.int64; expected Sel"):
        global_denominator([torch.tensor([[-100, 1, 2]])])
    with pytest.raises(TypeError, match="one of selections is 'all'"):
        global_denominator(["all"])
    with pytest.raises(
        TypeError, match=r"selections = a tensor \(3,\) of torch.int64; .* in a list"
    ):
        global_denominator(torch.tensor([-100, 1, 2]))  # labels, each of which would be a count


def losses_of(_, denominator):
    """Every function that takes a divisor, on two batches of logits or hidden states."""
    hidden, labels = batches()
    hidden, labels, weight = hidden[2], labels[2], head().weight.detach()
    logits, whole = hidden @ weight.T, sgp.Selection.from_labels(labels, shift=True)
    flat, target = logits.flatten(0, 1), labels.flatten()
    probabilities = torch.full_like(flat, 1 / V)
    torch.manual_seed(0)
    module = sgp.LinearCrossEntropyLoss(D, V)
    return {
        "logits": sgp.cross_entropy(flat, target, denominator=denominator),
        "selection": sgp.cross_entropy(logits, whole, denominator=denominator),
        "probabilities": sgp.cross_entropy(flat, probabilities, denominator=denominator),
        "module": sgp.CrossEntropyLoss()(flat, target, denominator=denominator),
        "head": sgp.linear_cross_entropy(hidden, weight, whole, denominator=denominator),
        "head, module": module(hidden.flatten(0, 1), target, denominator=denominator),
        "reference": sgp.reference.cross_entropy(flat, target, denominator=denominator),
        "reference, head": sgp.reference.linear_cross_entropy(
            hidden, weight, whole, denominator=denominator
        ),
        "shard": sgp.parallel.cross_entropy(flat, target, denominator=denominator),
        "shard of a head": sgp.parallel.linear_cross_entropy(
            hidden, weight, whole, denominator=denominator
        ),
        "count": global_denominator([denominator, whole]),
    }


def divisors(rank):
    """The same divisor in every form."""
    number = 7
    forms = [number, *(torch.full(shape, number) for shape in ((), (1,), (1, 1), (1, 1, 1)))]
    forms.append(torch.full((2,), number).expand(2, 2)[:1, 1:].t())
    return [losses_of(rank, form) for form in forms]


@pytest.mark.parametrize(
    ("back_ends", "device"),
    [
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("meta:any", "meta"),
        ("cuda:nccl,cpu:gloo", "cpu"),
        ("meta:any,cuda:nccl", "meta"),
    ],
)
def test_the_divisor_is_where_the_group_can_sum_it(back_ends, device, monkeypatch):
    """A group of xccl reaches XPUs alone; meta stands for them."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "get_backend_config", lambda _: back_ends)
        labels = torch.tensor([-100, 1, 2])
        assert global_denominator(sgp.Selection.from_labels(labels)).device.type == device
        assert global_denominator([2]).device.type == device
    finally:
        distributed.destroy_process_group()


def test_a_tensor_of_one_element_is_a_divisor(tmp_path):
    (found,) = run_ranks(divisors, 1, tmp_path)
    for form in found[1:]:
        for name, value in form.items():
            assert value.shape == (), name
            assert value.item() == pytest.approx(found[0][name].item(), rel=1e-6), name


def test_a_tensor_of_one_element_divides_the_loss_of_contexts():
    model, ids, lengths = tiny_llama(V, 16, seed=0), torch.tensor([[1, 2, 3, 4]]), torch.tensor([2])
    expected = sgp.context_loss(model, ids, lengths, denominator=7)
    found = sgp.context_loss(model, ids, lengths, denominator=torch.tensor([[7]]))
    assert found.shape == ()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", [sgp.cross_entropy, sgp.reference.cross_entropy])
def test_what_is_no_divisor(loss):
    arguments = torch.randn(3, V), torch.tensor([1, 2, 3])
    for bad, reason in (
        (torch.tensor([[3, 3]]), r"denominator is \(1, 2\); expected a number or a tensor of one"),
        (torch.tensor([]), r"denominator is \(0,\); expected a number or a tensor of one element"),
    ):
        with pytest.raises(ValueError, match=reason):
            loss(*arguments, denominator=bad)
    with pytest.raises(TypeError, match="denominator is 'all'; expected a number or a tensor"):
        loss(*arguments, denominator="all")


# -- time split over ranks -------------------------------------------------------------------------


@pytest.mark.core
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_cuts_hold_every_token_once(data):
    ranks = data.draw(st.integers(1, 4))
    layout = data.draw(st.sampled_from(["contiguous", "zigzag"]))
    length = 2 * ranks * data.draw(st.integers(1, 3))
    rows = data.draw(st.integers(1, 3))
    size = rows * length
    targets = st.lists(st.sampled_from([-100, 1, 2, 3]), min_size=size, max_size=size)
    labels = torch.tensor(data.draw(targets)).view(rows, length)
    ends = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    cuts = sorted({0, *(r * length for r in range(rows + 1)), *ends})
    weights = torch.rand(rows, length)
    whole = sgp.Selection.from_labels(
        labels, shift=True, token_weight=weights, cu_seqlens=torch.tensor(cuts)
    )
    logits = torch.randn(rows, length, 5)
    total, by_sequence, kept = 0.0, 0.0, 0
    for rank in range(ranks):
        places = positions(length, rank=rank, ranks=ranks, layout=layout)
        part = whole.cut(places)
        assert part.shape == (rows, len(places))
        assert part.num_sequences == whole.num_sequences
        kept += part.num_kept
        mine = logits[:, places]
        total += sgp.cross_entropy(mine, part, reduction="sum")
        by_sequence += sgp.cross_entropy(mine, part, reduction="sequence_sum")
    assert kept == whole.num_kept
    torch.testing.assert_close(total, sgp.cross_entropy(logits, whole, reduction="sum"))
    torch.testing.assert_close(
        by_sequence, sgp.cross_entropy(logits, whole, reduction="sequence_sum")
    )


def test_a_cut_without_boundaries_keeps_its_sequences():
    whole = sgp.Selection.from_labels(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), shift=True)
    part = whole.cut(positions(4, rank=1, ranks=2))
    assert part.target.tolist() == [4, 8]
    assert part.sequence.tolist() == [0, 1]


def test_the_mean_of_a_cut_sequence_is_refused():
    part = sgp.Selection.from_labels(torch.tensor([[1, 2, 3, 4]])).cut(torch.tensor([0, 1]))
    for loss in (sgp.cross_entropy, sgp.reference.cross_entropy):
        with pytest.raises(ValueError, match="'sequence_mean' of a Selection that was cut"):
            loss(torch.randn(1, 2, 5), part, reduction="sequence_mean")
    with pytest.raises(ValueError, match="'sequence_mean' of a Selection that was cut"):
        sgp.linear_cross_entropy(
            torch.randn(1, 2, 3), torch.randn(5, 3), part, reduction="sequence_mean"
        )


def test_positions_are_refused_by_name():
    with pytest.raises(ValueError, match=r"length = 10 is no multiple of 4, the pieces that a zig"):
        positions(10, rank=0, ranks=2, layout="zigzag")
    with pytest.raises(ValueError, match="rank = 2 of 2"):
        positions(4, rank=2, ranks=2)
    with pytest.raises(ValueError, match="give rank and ranks, or a group"):
        positions(4, rank=0)
    with pytest.raises(ValueError, match="layout = 'ring'"):
        positions(4, rank=0, ranks=2, layout="ring")
    whole = sgp.Selection.from_labels(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(ValueError, match=r"positions are \(2,\); expected \(n,\), ascending"):
        whole.cut(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"expected \(n,\), ascending"):
        whole.cut(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"positions go from 2 to 4; expected columns"):
        whole.cut(torch.tensor([2, 4]))
    with pytest.raises(TypeError, match=r"positions is torch\.float32"):
        whole.cut(torch.tensor([0.0, 1.0]))


def tokens_and_vocabulary(rank):
    """Four ranks: time over 2, the vocabulary over 2. Sums of losses and gradients over time."""
    hidden, labels = batches()
    hidden, labels = hidden[2], labels[2]
    labels[:, 4:] = -100  # the second half of the time keeps nothing
    groups = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]  # same time
    times = [distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]  # same columns
    time, column = rank // 2, rank % 2
    whole = sgp.Selection.from_labels(labels, shift=True)
    places = positions(8, group=times[column])
    part = whole.cut(places)
    denominator = global_denominator(part, group=times[column], averaged=False)
    sizes = [7, 6]
    own = head().weight.detach().split(sizes)[column].clone().requires_grad_()
    x = hidden[:, places].clone().requires_grad_()
    loss = sgp.parallel.linear_cross_entropy(
        x, own, part, group=groups[time], denominator=denominator
    )
    loss.backward()
    value, gradient = loss.detach(), own.grad
    for total in (value, gradient):
        distributed.all_reduce(total, group=times[column])
    return part.num_kept, value, gradient, x.grad


def test_a_rank_that_keeps_nothing_takes_part(tmp_path):
    hidden, labels = batches()
    hidden, labels = hidden[2].requires_grad_(), labels[2]
    labels[:, 4:] = -100
    model = head()
    truth = sgp.linear_cross_entropy(hidden, model.weight, labels, shift=True)
    truth.backward()
    results = run_ranks(tokens_and_vocabulary, 4, tmp_path)
    assert [kept > 0 for kept, *_ in results] == [True, True, False, False]
    for rank, (_, loss, gradient, of_hidden) in enumerate(results):
        assert relative_error(loss, truth) <= LIMIT
        own = model.weight.grad.split([7, 6])[rank % 2]
        assert (gradient - own).abs().max() <= LIMIT * model.weight.grad.abs().max()
        assert relative_error(of_hidden, hidden.grad.chunk(2, 1)[rank // 2]) <= LIMIT
