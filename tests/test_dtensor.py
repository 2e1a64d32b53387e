"""DTensors: a head under `parallelize_module`, as users of PyTorch's `loss_parallel` have it."""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

import sgp
from sgp.tolerance import relative_error
from tests.ranks import caught, run_ranks

B, T, D, V = 2, 6, 8, 11  # 11 classes on 2 ranks: 6 and 5; on 4 with chunks of 3: 3, 3, 3, 2
LIMIT = 1e-5


def make():
    """Hidden states (B, T, D), a head (V, D), labels with context."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=random)
    head = torch.randn(V, D, generator=random)
    labels = torch.randint(V, (B, T), generator=random)
    labels[:, :2] = -100
    return hidden, head, labels


def expected(**options):
    """(loss, gradients of the hidden states and the head) of one process."""
    hidden, head, labels = make()
    hidden.requires_grad_()
    head.requires_grad_()
    loss = sgp.linear_cross_entropy(hidden, head, labels, **options)
    loss.sum().backward()
    return loss.detach(), hidden.grad, head.grad


def model_and_mesh(world):
    """A model whose head is split by columns, its logits left as a DTensor."""
    mesh = init_device_mesh("cpu", (world,))
    _, head, _ = make()
    model = nn.Sequential(nn.Identity(), nn.Linear(D, V, bias=False))
    model[1].weight = nn.Parameter(head.clone())
    layout = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return parallelize_module(model, mesh, {"1": layout}), mesh


def as_loss_parallel(_, world):
    """(loss, gradients) by sgp and by PyTorch's loss_parallel, on the same model."""
    hidden, _, labels = make()
    found = {}
    for way in ("pytorch", "sgp"):
        model, _ = model_and_mesh(world)
        x = hidden.clone().requires_grad_()
        logits = model(x)
        assert logits.placements == (Shard(2),)
        if way == "sgp":
            loss = sgp.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
        else:
            with loss_parallel():
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
                loss.backward()
        assert isinstance(loss, DTensor)
        assert loss.placements == (Replicate(),)
        grad = model[1].weight.grad
        assert grad.placements == (Shard(0),)
        found[way] = (loss.full_tensor().detach(), x.grad, grad.full_tensor())
    return found


def test_as_loss_parallel(tmp_path):
    truth = expected()
    for world in (2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        for found in run_ranks(as_loss_parallel, world, folder, world):
            for way, values in found.items():
                for value, exact in zip(values, truth, strict=True):
                    assert relative_error(value, exact) <= LIMIT, way


def forms(_, world):
    """What each form of the loss returns on DTensors."""
    hidden, head, labels = make()
    mesh = init_device_mesh("cpu", (world,))
    selection = sgp.Selection.from_labels(labels)
    weight = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
    whole = distribute_tensor(hidden, mesh, [Replicate()])
    scattered = distribute_tensor(hidden, mesh, [Shard(1)])
    found = {}

    def record(name, call, x):
        x = x.detach().clone().requires_grad_()
        w = weight.detach().clone().requires_grad_()
        out = call(x, w)
        loss = out[0] if isinstance(out, tuple) else out
        assert isinstance(loss, DTensor) == isinstance(x, DTensor), name
        loss.sum().backward()
        if isinstance(x, DTensor):
            if "logits" not in name:  # there the matmul is PyTorch's, which leaves a partial sum
                assert x.grad.placements == x.placements, name
            loss = loss.full_tensor()
        gx = x.grad.full_tensor() if isinstance(x, DTensor) else x.grad
        found[name] = (loss.detach(), gx, w.grad.full_tensor())

    record("tensor", lambda x, w: sgp.linear_cross_entropy(x, w, labels), hidden)
    record("replicated", lambda x, w: sgp.linear_cross_entropy(x, w, labels), whole)
    record("sequence", lambda x, w: sgp.linear_cross_entropy(x, w, labels), scattered)
    record("Selection", lambda x, w: sgp.linear_cross_entropy(x, w, selection), scattered)
    record(
        "statistics",
        lambda x, w: sgp.linear_cross_entropy(x, w, labels, return_stats=True),
        scattered,
    )
    record(
        "targets",
        lambda x, w: sgp.linear_cross_entropy(x, w, distribute_tensor(labels, mesh, [Shard(1)])),
        whole,
    )
    record("logits", lambda x, w: sgp.cross_entropy(x @ w.T, selection), whole)
    record(
        "log-probabilities of logits",
        lambda x, w: -sgp.token_log_probs(x @ w.T, selection).log_prob.sum() / selection.num_kept,
        whole,
    )
    record(
        "head's log-probabilities",
        lambda x, w: -sgp.linear_token_log_probs(x, w, labels).log_prob.sum() / selection.num_kept,
        whole,
    )
    return found


def test_forms(tmp_path):
    truth = expected()
    for found in run_ranks(forms, 2, tmp_path, 2):
        for name, values in found.items():
            for value, exact in zip(values, truth, strict=True):
                assert relative_error(value, exact) <= LIMIT, name


def refused(_):
    """The errors of DTensors that are no shard of a vocabulary."""
    hidden, head, labels = make()
    mesh = init_device_mesh("cpu", (2,))

    logits = (hidden @ head.T).flatten(0, 1)
    batch = distribute_tensor(logits, mesh, [Shard(0)])
    waiting = DTensor.from_local(logits, mesh, [Partial()])
    narrow = distribute_tensor(head, mesh, [Shard(1)])
    weight = distribute_tensor(head, mesh, [Shard(0)])
    # As FSDP shards it: every rank has its own tokens.
    tokens = labels.roll(distributed.get_rank(), 1)
    return {
        "batch": caught(lambda: sgp.cross_entropy(batch, labels.flatten())),
        "waiting": caught(lambda: sgp.cross_entropy(waiting, labels.flatten())),
        "narrow": caught(lambda: sgp.linear_cross_entropy(hidden, narrow, labels)),
        "bias": caught(
            lambda: sgp.linear_cross_entropy(hidden, weight, labels, linear_bias=torch.zeros(V))
        ),
        "width": caught(
            lambda: sgp.linear_cross_entropy(
                distribute_tensor(hidden, mesh, [Shard(2)]), weight, labels
            )
        ),
        "by hand": caught(lambda: sgp.parallel.linear_cross_entropy(hidden, weight, labels)),
        "fsdp": caught(lambda: sgp.linear_cross_entropy(hidden, weight, tokens)),
    }


def test_other_shards_are_refused(tmp_path):
    for found in run_ranks(refused, 2, tmp_path):
        assert "expected Shard(1), the vocabulary" in found["batch"]
        assert "placements (Partial(sum),)" in found["waiting"]
        assert "linear_weight (11, 8) has placements (Shard(dim=1),)" in found["narrow"]
        assert "linear_bias is a tensor; shard it alike" in found["bias"]
        assert "or Shard of another dimension than the last" in found["width"]
        assert "pass it to sgp.linear_cross_entropy" in found["by hand"]
        assert "disagree on the targets" in found["fsdp"]
        assert "A weight that FSDP shards is no shard of a vocabulary" in found["fsdp"]


def two_dimensions(rank):
    """Data and vocabulary parallel, 2 x 2: this rank's loss and gradients."""
    hidden, head, labels = make()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    mine = slice(rank // 2, rank // 2 + 1)
    x = hidden[mine].clone().requires_grad_()
    head = distribute_tensor(head, mesh["vocabulary"], [Shard(0)]).requires_grad_()
    selection = sgp.Selection.from_labels(labels[mine])
    total = sgp.parallel.global_denominator(selection, group=mesh["data"])
    loss = sgp.linear_cross_entropy(x, head, selection, denominator=total)
    loss.backward()
    gradient = head.grad.full_tensor()
    group = mesh.get_group("data")
    for value in (loss.detach(), gradient):
        distributed.all_reduce(value, group=group)
    return loss.detach() / 2, x.grad / 2, gradient / 2


def test_data_and_vocabulary_parallel(tmp_path):
    loss, of_hidden, of_head = expected()
    for rank, found in enumerate(run_ranks(two_dimensions, 4, tmp_path)):
        mine = slice(rank // 2, rank // 2 + 1)
        for value, exact in zip(found, (loss, of_hidden[mine], of_head), strict=True):
            assert relative_error(value, exact) <= LIMIT


def other_dimensions(_):
    """{placements of the hidden states on a 2 x 2 and a 1 x 4 mesh: an error or the gradients}."""
    hidden, head, labels = make()
    grid = init_device_mesh("cpu", (2, 2))
    line = init_device_mesh("cpu", (1, 4))
    found = {}
    for name, mesh, placements in (
        ("sequence", grid, [Replicate(), Shard(1)]),
        ("whole", grid, [Replicate(), Replicate()]),
        ("batch", grid, [Shard(0), Replicate()]),
        ("both", grid, [Shard(0), Shard(1)]),
        ("of size 1", line, [Shard(0), Shard(1)]),
    ):
        x = distribute_tensor(hidden, mesh, placements).requires_grad_()
        w = distribute_tensor(head, mesh, [Replicate(), Shard(0)]).requires_grad_()
        text = caught(lambda x=x, w=w: sgp.linear_cross_entropy(x, w, labels).backward())
        done = x.grad is not None
        found[name] = (x.grad.full_tensor(), w.grad.full_tensor()) if done else text
        logits = DTensor.from_local(
            (hidden @ head.T).flatten(0, 1).tensor_split(4, 1)[distributed.get_rank()],
            line,
            [Shard(0), Shard(1)],
            shape=(B * T, V),
            stride=(V, 1),
        )
    found["logits of size 1"] = sgp.cross_entropy(logits, labels.flatten()).full_tensor()
    even_head = distribute_tensor(head[:10], grid, [Replicate(), Shard(0)])
    bias = distribute_tensor(torch.randn(10), grid, [Shard(0), Replicate()])
    found["bias"] = caught(
        lambda: sgp.linear_cross_entropy(hidden, even_head, labels.clamp(max=9), linear_bias=bias)
    )
    return found


def test_other_dimensions_of_a_mesh(tmp_path):
    loss, *truth = expected()
    for found in run_ranks(other_dimensions, 4, tmp_path):
        for name in ("sequence", "whole", "of size 1"):
            for value, exact in zip(found[name], truth, strict=True):
                assert relative_error(value, exact) <= LIMIT, name
        for name in ("batch", "both"):
            assert "over the ranks that share the vocabulary" in found[name]
        assert relative_error(found["logits of size 1"], loss) <= LIMIT
        assert "shard it alike" in found["bias"]


def gathering(_):
    """Sequence parallelism by hand through PrepareModuleInput: the loss and gradients."""
    hidden, head, labels = make()
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(D, V, bias=False))
    model[0].weight = nn.Parameter(head.clone())
    gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    layout = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    model = parallelize_module(model, mesh, {"": gather, "0": layout})
    x = distribute_tensor(hidden, mesh, [Shard(1)]).to_local().requires_grad_()
    loss = sgp.cross_entropy(model(x), sgp.Selection.from_labels(labels))
    loss.backward()
    return loss.full_tensor().detach(), x.grad, model[0].weight.grad.full_tensor()


def test_sequence_parallel_input_of_a_module(tmp_path):
    loss, of_hidden, of_head = expected()
    for rank, found in enumerate(run_ranks(gathering, 2, tmp_path)):
        truth = (loss, of_hidden.chunk(2, 1)[rank], of_head)
        for value, exact in zip(found, truth, strict=True):
            assert relative_error(value, exact) <= LIMIT
