"""DTensors: a head under `parallelize_module`, as users of PyTorch's `loss_parallel` have it."""

import pytest
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
from sgp.head import chunks
from sgp.tolerance import relative_error
from tests.ranks import caught, run_ranks
from tests.split_cases import flat
from tests.test_nonsense import NEVER, NONSENSE, fault

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
    # A DTensor knows its vocabulary: parts that are equal are no mistake.
    twice = distribute_tensor((hidden @ head.T).repeat(1, 1, 2), mesh, [Shard(2)])
    found["equal parts"] = sgp.cross_entropy(twice, selection).full_tensor()
    twice = distribute_tensor(head.repeat(2, 1), mesh, [Shard(0)])
    found["equal parts of a head"] = sgp.linear_cross_entropy(whole, twice, selection).full_tensor()
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


@pytest.mark.core
def test_forms(tmp_path):
    truth = expected()
    for found in run_ranks(forms, 2, tmp_path, 2):
        for name in ("equal parts", "equal parts of a head"):
            torch.testing.assert_close(found.pop(name), truth[0] + torch.tensor(2.0).log())
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
        "own part": caught(lambda: sgp.cross_entropy(batch, labels.flatten()[:6])),
        "cut": caught(
            lambda: sgp.cross_entropy(batch, labels.flatten(), reduction="sequence_mean")
        ),
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
        "adds": caught(
            lambda: sgp.linear_cross_entropy(hidden, weight, labels, accumulate_into=head)
        ),
        "adds to a DTensor": caught(
            lambda: sgp.linear_token_log_probs(hidden, weight, labels, accumulate_into=weight)
        ),
        "adds beside one": caught(
            lambda: sgp.linear_cross_entropy(
                distribute_tensor(hidden, mesh, [Shard(0)]), head, labels, accumulate_into=head
            )
        ),
    }


def test_other_shards_are_refused(tmp_path):
    for found in run_ranks(refused, 2, tmp_path):
        assert "target is (6,); expected (12,), of all ranks' tokens" in found["own part"]
        assert "no rank has a whole sequence" in found["cut"]
        assert "placements (Partial(sum),)" in found["waiting"]
        assert "linear_weight (11, 8) has placements (Shard(dim=1),)" in found["narrow"]
        assert "linear_bias is a tensor; shard it alike" in found["bias"]
        assert "or Shard of another dimension than the last" in found["width"]
        assert "pass it to sgp.linear_cross_entropy" in found["by hand"]
        assert "disagree on the targets" in found["fsdp"]
        assert "A weight that FSDP shards is no shard of a vocabulary" in found["fsdp"]
        assert "ValueError: sgp.linear_cross_entropy: accumulate_into of a" in found["adds"]
        assert "is a DTensor (Shard(dim=0),)" in found["adds"]
        assert "leave it out and use .grad" in found["adds"]
        assert "sgp.parallel.linear_token_log_probs takes" in found["adds to a DTensor"]
        assert "accumulate_into beside DTensors; leave it out" in found["adds beside one"]


def budgeted(_):
    """Of a head and of tokens that are sharded: errors of one byte, and (budgets seen, values)."""
    hidden, head, labels = make()
    mesh = init_device_mesh("cpu", (2,))
    placements = {"head": ([Replicate()], [Shard(0)]), "tokens": ([Shard(1)], [Replicate()])}
    seen, inner, found = [], chunks.plan, {}

    def spy(*arguments, **asked):
        seen.append(asked["memory_budget"])
        return inner(*arguments, **asked)

    for name, (of_hidden, of_head) in placements.items():
        for reduction in ("mean", "none"):
            x = distribute_tensor(hidden, mesh, of_hidden).requires_grad_()
            w = distribute_tensor(head, mesh, of_head).requires_grad_()
            given = (sgp.linear_cross_entropy, x, w, labels)
            text = caught(lambda: given[0](*given[1:], memory_budget=1))  # noqa: B023
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chunks, "plan", spy)
                loss = given[0](*given[1:], memory_budget=10_000, reduction=reduction)
                loss.sum().backward()
            values = (loss.detach(), x.grad, w.grad)
            found[name, reduction] = (text, {*seen}, [v.full_tensor() for v in values])
            seen.clear()
    return found


def test_a_budget_arrives(tmp_path):
    for found in run_ranks(budgeted, 2, tmp_path):
        for (name, reduction), (text, seen, values) in found.items():
            assert "memory_budget = 1; the least that" in text, name
            assert seen == {10_000}
            for value, exact in zip(values, expected(reduction=reduction), strict=True):
                assert relative_error(value, exact) <= LIMIT, name


def added_to(_):
    """What a rank's own part of a DTensor's gradient was added to, as the error advises."""
    hidden, head, labels = make()
    weight = distribute_tensor(head, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    own = weight.to_local().detach().requires_grad_()
    into = torch.ones_like(own).detach()
    sgp.parallel.linear_cross_entropy(hidden, own, labels, accumulate_into=into).backward()
    return into - 1


def test_a_part_of_a_dtensor_has_its_gradient_added(tmp_path):
    _, _, truth = expected()
    found = torch.cat(run_ranks(added_to, 2, tmp_path))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


TOKENS = {  # of (5, 6) targets on 4 ranks: chunks of 2, 2, 1 and 0 rows, or of 2, 2 and 2 columns
    "batch": ((4,), [Shard(0)]),
    "sequence": ((4,), [Shard(1)]),
    "batch and sequence": ((2, 2), [Shard(0), Shard(1)]),
    "batch twice": ((2, 2), [Shard(0), Shard(0)]),
    "batch and copies": ((2, 2), [Shard(0), Replicate()]),
}
CLASSES = torch.linspace(0.1, 2.0, V)
LOSSES = {
    "mean": {},
    "class weight": {"weight": CLASSES},
    "two divisors": {"weight": CLASSES, "lse_square_scale": 0.1},
    "all": {
        "weight": CLASSES, "token_weight": True, "label_smoothing": 0.1,
        "softcap": 5.0, "ignore_index": 3,
    },
    "denominator": {"denominator": 7.0},
    "sum": {"reduction": "sum", "token_weight": True},
    "none": {"reduction": "none"},
    "sequence_sum": {"reduction": "sequence_sum", "token_weight": True},
    "sequence_mean": {"reduction": "sequence_mean"},
    "statistics": {"return_stats": True, "return_argmax": True},
}  # fmt: skip


def many():
    """Hidden states (5, 6, D), a head, a bias, labels with context, and weights of the tokens."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 6, D, generator=random)
    head, bias = torch.randn(V, D, generator=random), torch.randn(V, generator=random)
    labels = torch.randint(V, (5, 6), generator=random)
    labels[:, :2] = -100
    labels[3] = -100
    return hidden, head, bias, labels, torch.rand(5, 6, generator=random)


def values_of(result, leaves):
    """Everything that a call returns, whole, and the gradients of its leaves."""
    outputs = flat(result)
    outputs[0].sum().backward()
    found = [*outputs, *(x.grad for x in leaves)]
    return [x.full_tensor().detach() if isinstance(x, DTensor) else x.detach() for x in found]


def on_tokens(_):
    """{(placements, form, loss): values and gradients} of DTensors that are sharded on tokens."""
    hidden, head, bias, labels, weights = many()
    logits, found = hidden @ head.T, {}

    def leaf(x, mesh, placements):
        return distribute_tensor(x, mesh, placements).requires_grad_()

    for name, (size, placements) in TOKENS.items():
        mesh, whole = init_device_mesh("cpu", size), [Replicate()] * len(size)
        # The vocabulary is second: what shards tokens of (B, V, T) is Shard(0) and Shard(2).
        second = [Shard(2) if p.is_shard(1) else p for p in placements]
        for loss, given in LOSSES.items():
            if name not in ("batch", "batch and sequence") and loss not in ("mean", "none"):
                continue
            if loss == "sequence_mean" and "sequence" in name:
                continue
            options = given | ({"token_weight": weights} if "token_weight" in given else {})
            y = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
            x = leaf(logits.movedim(-1, 1), mesh, second)
            found[name, "logits", loss] = values_of(sgp.cross_entropy(x, y, **options), [x])
            leaves = (
                leaf(hidden, mesh, placements),
                leaf(head, mesh, whole),
                leaf(bias, mesh, whole),
            )
            h, w, b = leaves
            result = sgp.linear_cross_entropy(h, w, y, linear_bias=b, shift=True, **options)
            found[name, "head", loss] = values_of(result, leaves)
            if "ignore_index" in options:
                continue
            weight = options.pop("token_weight", None)
            selection = sgp.Selection.from_labels(y, token_weight=weight)
            x = leaf(logits, mesh, placements)
            result = sgp.cross_entropy(x, selection, **options)
            found[name, "Selection", loss] = values_of(result, [x])
        x = leaf(logits.movedim(-1, 1), mesh, second)
        found[name, "shifted logits", ""] = values_of(of_shifted(x, labels), [x])
        h, w = leaf(hidden, mesh, placements), head.clone().requires_grad_()
        y = distribute_tensor(labels, mesh, placements)
        found[name, "head's tokens", ""] = values_of(sgp.linear_token_log_probs(h, w, y), [h, w])
    mesh = init_device_mesh("cpu", (4,))
    x = leaf(logits[:, 0], mesh, [Shard(0)])
    p = distribute_tensor(probabilities(), mesh, [Shard(0)])
    found["probabilities"] = values_of(sgp.cross_entropy(x, p, CLASSES), [x])
    nothing = torch.full((5,), -100)
    found["nothing"] = sgp.cross_entropy(x, nothing).full_tensor().detach()
    return found


def of_shifted(logits, labels):
    """A mean and log-probabilities of labels that are moved over the ranks' bounds, as one."""
    loss = sgp.cross_entropy(logits, labels, CLASSES, lse_square_scale=0.1, shift=3)
    assert sgp.token_log_probs(logits, labels).argmax is None
    return loss, sgp.token_log_probs(logits, labels, shift=True, return_argmax=True)


def probabilities():
    """Class probabilities of five tokens."""
    return torch.linspace(0, 1, 5 * V).view(5, V).softmax(1)


def expected_of(form, loss):
    """The same of one process."""
    hidden, head, bias, labels, weights = many()
    h, w, b = (x.clone().requires_grad_() for x in (hidden, head, bias))
    if form == "head's tokens":
        return values_of(sgp.linear_token_log_probs(h, w, labels), [h, w])
    if form == "shifted logits":
        x = (hidden @ head.T).movedim(-1, 1).clone().requires_grad_()
        return values_of(of_shifted(x, labels), [x])
    given = loss if isinstance(loss, dict) else LOSSES[loss]
    options = given | ({"token_weight": weights} if "token_weight" in given else {})
    y = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
    if loss == "two divisors":  # by its definition: the z-loss is a mean over the tokens
        plain = {"reduction": "mean"}
        parts = (plain | {"weight": CLASSES}, plain | {"lse_square_scale": 0.1})
        of_classes, with_z_loss, without = (expected_of(form, x) for x in (*parts, plain))
        return [a + b - c for a, b, c in zip(of_classes, with_z_loss, without, strict=True)]
    if form == "head":
        result = sgp.linear_cross_entropy(h, w, y, linear_bias=b, shift=True, **options)
        return values_of(result, [h, w, b])
    x = (hidden @ head.T).movedim(-1, 1).clone().requires_grad_()
    found = values_of(sgp.cross_entropy(x, y, **options), [x])
    return [*found[:-1], found[-1].movedim(1, -1)] if form == "Selection" else found


def test_tokens_stay_where_they_are(tmp_path):
    """A batch or a sequence that is sharded: as one process, with the count of all ranks."""
    hidden, head, *_ = many()
    x = (hidden @ head.T)[:, 0].clone().requires_grad_()
    of_probabilities = values_of(F.cross_entropy(x, probabilities(), CLASSES), [x])
    truths = {}
    for found in run_ranks(on_tokens, 4, tmp_path):
        assert found.pop("nothing") == 0
        torch.testing.assert_close(found.pop("probabilities"), of_probabilities)
        assert len(found) == 3 * (2 * len(LOSSES) - 1) + 3 * 7 + len(TOKENS)
        for (placements, *case), values in found.items():
            key = tuple(case)
            truths[key] = truths.get(key) or expected_of(*key)
            text = f"{placements}, {case}"
            for value, exact in zip(values, truths[key], strict=True):
                torch.testing.assert_close(
                    value, exact, msg=lambda why, text=text: f"{text}: {why}"
                )


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
        # Over a dimension of size 1 a vocabulary is as whole as the tokens are.
        of_head = [Shard(0) if mesh is line else Replicate(), Shard(0)]
        w = distribute_tensor(head, mesh, of_head).requires_grad_()
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
        for name in ("sequence", "whole", "of size 1", "batch", "both"):
            for value, exact in zip(found[name], truth, strict=True):
                assert relative_error(value, exact) <= LIMIT, name
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


def nonsense_of_shared_tokens(_, world):
    """What is wrong with how arguments of the wrong kind are refused, and a Selection's error."""
    mesh = init_device_mesh("cpu", (world,))
    logits, hidden, head = torch.randn(4, 5), torch.randn(4, 3), torch.randn(5, 3)
    logits, hidden = (distribute_tensor(x, mesh, [Shard(0)]) for x in (logits, hidden))
    labels = torch.tensor([1, -100, 2, 0])
    usual = {
        "cross_entropy": {"input": logits, "target": labels},
        "linear_cross_entropy": {"input": hidden, "linear_weight": head, "target": labels},
    }
    others = ("target", "reduction", "shift", "ignore_index", "token_weight", "weight")
    of_head = ("chunk_rows", "memory_budget", "accumulate_into")
    faults = [
        fault(getattr(sgp, name), argument, what, {**usual[name], argument: value})
        for name in usual
        for argument in (others + of_head if "linear" in name else others)
        for what, value in NONSENSE.items()
        # What one rank alone refuses would leave the others in an exchange.
        if what in NEVER or (argument in ("reduction", "shift") and isinstance(value, torch.Tensor))
    ]
    short = sgp.Selection.from_labels(labels[:3])
    return list(filter(None, faults)), [
        caught(lambda name=name: getattr(sgp, name)(**{**usual[name], "target": short}))
        for name in usual
    ]


def test_nonsense_is_refused_by_name_where_tokens_are_shared_out(tmp_path):
    for faults, (of_logits, of_head) in run_ranks(nonsense_of_shared_tokens, 2, tmp_path, 2):
        assert not faults, "\n".join(faults)
        assert "the Selection has shape (3,); expected (N, V) or (..., V)" in of_logits
        assert "the Selection has shape (3,); expected (N, D) or (..., D)" in of_head
