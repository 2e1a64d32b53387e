"""The losses of a split vocabulary, case by case, and each rank's part of its tensors."""

from typing import Any, NamedTuple

import torch

import sgp

V, D = 48, 6
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.3},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"lse_square_scale": 0.1},
    "softcap": {"softcap": 3.0},
    "negative scale": {"logit_scale": -0.7},
    "class weight": {"weight": True},
    "class weight and smoothing": {"weight": True, "label_smoothing": 0.2},
    "token weight": {"token_weight": True},
    "a class is ignored": {"ignore_index": 3},
    "all": {
        "label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 5.0, "logit_scale": 1.5,
        "weight": True, "token_weight": True,
    },
}  # fmt: skip
ALL = OPTIONS["all"]


def even(world):
    """V / world columns each."""
    assert V % world == 0
    return [V // world] * world


def uneven(world):
    """All ranks differ; of four, one has no column."""
    sizes = [V // 2 + 1, 0, V // 4] if world == 4 else [V // 2 + 1, V // 4][: world - 1]
    return [*sizes, V - sum(sizes)]


class Case(NamedTuple):
    """A call; `options` are its keywords, True standing for the tensor of that name."""

    function: str
    options: dict[str, Any]
    second: bool = False  # logits (B, V, T) instead of (B T, V)
    selection: bool = False
    nothing: bool = False  # no token carries loss
    padding: int = 0  # columns after the vocabulary, which hold NaN
    frozen: str = ""

    @property
    def linear(self):
        """Whether it has a head."""
        return self.function.startswith("linear")


def cases():
    """Every option with mean and sum, every reduction, and what the arguments may look like."""
    for function in ("cross_entropy", "linear_cross_entropy"):
        logits = function == "cross_entropy"
        for options in OPTIONS.values():
            second = logits and bool(options.get("token_weight"))
            yield Case(function, options, second)
            yield Case(function, {**options, "reduction": "sum"}, second)
        yield Case(function, {"denominator": 7.0})
        for reduction in ("none", "sequence_sum", "sequence_mean"):
            yield Case(function, {"reduction": reduction}, second=logits)
            yield Case(function, {**ALL, "reduction": reduction}, second=logits)
        yield Case(function, {"shift": 2, **ALL}, second=logits)
        yield Case(function, {"return_stats": True, **ALL}, second=logits)
        asked = {"return_stats": True, "return_argmax": True}
        yield Case(function, {**asked, "label_smoothing": 0.3}, second=logits)
        yield Case(function, ALL, second=logits, nothing=True)
        yield Case(function, {"label_smoothing": 0.1}, selection=True)
        yield Case(function, {"label_smoothing": 0.1}, padding=5)
    yield Case("cross_entropy", {"inplace": True, **ALL}, second=True)
    for options in ({"softcap": 4.0}, {"temperature": 0.7, "logit_scale": 2.0}):
        yield Case("token_log_probs", {"return_argmax": True, **options}, second=True)
        yield Case("token_log_probs", {"shift": True, **options}, second=True)
        yield Case("linear_token_log_probs", options)
    head = "linear_cross_entropy"
    yield Case(head, {"linear_bias": True, **ALL})
    yield Case(head, {"linear_bias": True}, padding=5)
    yield Case(head, {"chunk_rows": 2, **ALL})
    yield Case(head, {"chunk_rows": 2, "reduction": "none"})
    yield Case(head, {"memory_budget": 1 << 13, **ALL})
    yield Case(head, {"memory_budget": 1 << 13, "reduction": "none"})  # holds the logits
    yield Case(head, {"shift": True})
    for frozen in ("head", "hidden"):
        yield Case(head, {}, frozen=frozen)
        yield Case(head, {"reduction": "none"}, frozen=frozen)


def make(B=3, T=5, dtype=torch.float32):
    """Logits (B, T, V), hidden states, a head and its bias, labels with context, weights."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    labels = torch.randint(V, (B, T), generator=random)
    labels[:, :2] = -100
    labels[0] = -100  # a sequence without targets
    labels[1, 2], labels[2, 4] = 0, V - 1
    weight = torch.rand(V, generator=random) + 0.5
    weight[::5] = 0
    return {
        "logits": 4 * normal(B, T, V),
        "hidden": normal(B, T, D),
        "head": normal(V, D),
        "linear_bias": normal(V),
        "labels": labels,
        "weight": weight,
        "token_weight": torch.rand(B, T, generator=random) + 0.1,
    }


class Part(NamedTuple):
    """Which columns of the vocabulary are taken."""

    sizes: list[int]
    rank: int


ALONE = Part([V], 0)


def run(module, case, made, part=ALONE):
    """(outputs, gradients by name) of the case's function in `module`, for a part of V."""
    options = {k: made[k] if v is True and k in made else v for k, v in case.options.items()}
    labels = torch.full_like(made["labels"], -100) if case.nothing else made["labels"].clone()
    if case.options.get("ignore_index"):
        labels[labels == -100] = case.options["ignore_index"]
    if case.padding and part is not ALONE:
        part = Part([*part.sizes[:-1], part.sizes[-1] + case.padding], part.rank)
        options["vocab_size"] = V

    def leaf(name, dim=None):
        x = made[name]
        if dim is not None:
            extra = [*x.shape]
            extra[dim] = sum(part.sizes) - V
            x = torch.cat([x, x.new_full(extra, torch.nan)], dim).split(part.sizes, dim)[part.rank]
        return x.clone().requires_grad_(name != case.frozen)

    if case.linear:
        leaves = {"hidden": leaf("hidden"), "head": leaf("head", 0)}
        if options.get("linear_bias") is not None:
            leaves["linear_bias"] = options["linear_bias"] = leaf("linear_bias", 0)
        first = (leaves["hidden"], leaves["head"])
    else:
        leaves = {"logits": leaf("logits", 2)}
        x = leaves["logits"] * 1.0 if options.get("inplace") else leaves["logits"]
        first = (x if case.selection else x.movedim(2, 1) if case.second else x.flatten(0, 1),)
        labels = labels if case.selection or case.second else labels.flatten()
    target = sgp.Selection.from_labels(labels, shift=True) if case.selection else labels
    result = getattr(module, case.function)(*first, target, **options)
    outputs = flat(result)
    backward(outputs)
    return [x.detach() for x in outputs], {name: x.grad for name, x in leaves.items()}


def flat(result):
    """A loss, statistics, or both, as a list of tensors."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, sgp.TokenLogProbs):
        return [x for x in result if x is not None]
    return [result[0], *flat(result[1])]


def backward(outputs):
    """From all that is differentiable, with an upstream gradient that is no constant."""
    random = torch.Generator().manual_seed(1)
    upstream = [torch.rand(x.shape, generator=random).to(x.dtype) for x in outputs]
    pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))


def own_part(name, gradient, part):
    """A rank's part of the gradient that one process has; of the hidden states the whole."""
    if name == "hidden" or gradient is None:
        return gradient
    dim = gradient.dim() - 1 if name == "logits" else 0
    return gradient.split(part.sizes, dim)[part.rank]
