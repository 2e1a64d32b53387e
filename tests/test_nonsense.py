"""Arguments that make no sense: each is refused in words that name the function and the argument.

Every argument of the public functions in turn is given values of the wrong kind and numbers beyond
what a tensor holds. What raises must say `sgp.function: argument ...`; what does not must be a
value that has a meaning there.
"""

import functools
import math

import numpy as np
import pytest
import torch
from torch import distributed

import sgp

X, Y = torch.randn(4, 5), torch.tensor([1, -100, 2, 0])
HIDDEN, HEAD = torch.randn(4, 3), torch.randn(5, 3)
IDS = Y.clamp(min=0)[None]

NONSENSE = {
    "2 ** 70": 2**70,
    "-(2 ** 70)": -(2**70),
    "10 ** 400": 10**400,
    "a string": "yes",
    "bytes": b"",
    "None": None,
    "a fraction": 1.5,
    "-1": -1,
    "NaN": math.nan,
    "inf": math.inf,
    "True": True,
    "a complex number": 1j,
    "a list": [1, "yes"],
    "a dict": {},
    "a type": int,
    "an object": object(),
    "NumPy's float": np.float32(1.5),
    "a bool tensor": torch.tensor(True),
    "a tensor of another shape": torch.ones(7, 2),
    "integers": torch.arange(6),
    "a sparse tensor": torch.ones(5).to_sparse(),
}
# What nobody could mean, wherever it is given.
NEVER = {"a string", "bytes", "a complex number", "a list", "a dict", "a type", "an object"}

LOSS = (
    "weight", "ignore_index", "reduction", "label_smoothing", "token_weight", "denominator",
    "softcap", "logit_scale", "lse_square_scale", "shift", "return_stats",
    "return_argmax",
)  # fmt: skip
MODULE = tuple(name for name in LOSS if name not in ("token_weight", "denominator"))
STATISTICS = ("ignore_index", "temperature", "softcap", "logit_scale", "shift", "return_argmax")
HOW = ("chunk_rows", "memory_budget", "accumulate_into")
OF_HEAD = ("linear_bias", *HOW)
OWN = (
    "loss_fn", "by", "groups", "linear_bias", "ignore_index", "temperature", "softcap",
    "logit_scale", "shift", "chunk_rows", "memory_budget", "return_stats",
)  # fmt: skip


def _lines(tokens, _):
    return -tokens.log_prob


LOGITS = {"input": X, "target": Y}
LINEAR = {"input": HIDDEN, "linear_weight": HEAD, "target": Y}
FUNCTIONS = {
    "cross_entropy": (LOGITS, (*LOSS, "inplace")),
    "linear_cross_entropy": (LINEAR, (*LOSS, *OF_HEAD)),
    "token_log_probs": (LOGITS, STATISTICS),
    "linear_token_log_probs": (LINEAR, (*STATISTICS, *OF_HEAD)),
    "linear_loss": (LINEAR | {"loss_fn": _lines}, OWN),
}
NOT_OF_REFERENCE = ("return_stats", "return_argmax", "inplace", *HOW)
CALLS = {
    **{f"sgp.{name}": (getattr(sgp, name), *call) for name, call in FUNCTIONS.items()},
    **{
        f"sgp.reference.{name}": (
            getattr(sgp.reference, name),
            usual,
            tuple(x for x in arguments if x not in NOT_OF_REFERENCE),
        )
        for name, (usual, arguments) in FUNCTIONS.items()
    },
    "sgp.CrossEntropyLoss": (
        lambda **options: sgp.CrossEntropyLoss(**options)(X, Y),
        {},
        (*MODULE, "inplace"),
    ),
    "sgp.LinearCrossEntropyLoss": (
        lambda **options: sgp.LinearCrossEntropyLoss(**options)(HIDDEN, Y),
        {"in_features": 3, "num_classes": 5},
        (*MODULE, "chunk_rows", "memory_budget", "bias", "out_features"),
    ),
    "a call of sgp.LinearCrossEntropyLoss": (
        lambda **options: sgp.LinearCrossEntropyLoss(3, 5)(HIDDEN, Y, **options),
        {},
        ("token_weight", "denominator", "accumulate_into"),
    ),
    "Selection.from_labels": (
        sgp.Selection.from_labels,
        {"labels": Y},
        ("ignore_index", "shift", "token_weight", "cu_seqlens"),
    ),
    "Selection.from_context_lengths": (
        sgp.Selection.from_context_lengths,
        {"input_ids": IDS, "context_lengths": torch.tensor([1])},
        ("lengths", "shift"),
    ),
    "Selection.from_mask": (
        sgp.Selection.from_mask,
        {"input_ids": IDS, "mask": torch.ones_like(IDS)},
        ("shift", "cu_seqlens"),
    ),
}


@functools.cache
def model():
    """Of five words."""
    from sgp.train.model import tiny_llama

    return tiny_llama(5, 4, seed=0)


PARALLEL = {
    "cross_entropy": {"local_logits": X, "target": Y},
    "linear_cross_entropy": {"input": HIDDEN, "local_weight": HEAD, "target": Y},
    "token_log_probs": {"local_logits": X, "target": Y},
    "linear_token_log_probs": {"input": HIDDEN, "local_weight": HEAD, "target": Y},
    "linear_loss": {"input": HIDDEN, "local_weight": HEAD, "target": Y, "loss_fn": _lines},
}
OF_RANKS = {"cross_entropy": ("group", "vocab_size"), "token_log_probs": ("group", "vocab_size")}
SELECTION = sgp.Selection.from_labels(Y)
CALLS |= {
    **{
        f"sgp.parallel.{name}": (
            getattr(sgp.parallel, name),
            usual,
            (*FUNCTIONS[name][1], *OF_RANKS.get(name, ("group", "vocab_size", "sum_input_grad"))),
        )
        for name, usual in PARALLEL.items()
    },
    "sgp.parallel.global_denominator": (
        sgp.parallel.global_denominator,
        {"selections": [SELECTION]},
        ("group", "weight", "averaged"),
    ),
    "sgp.parallel.positions": (sgp.parallel.positions, {"length": 8}, ("group", "layout")),
    "sgp.parallel.positions of a rank": (
        sgp.parallel.positions,
        {"length": 8, "rank": 0, "ranks": 2},
        (),
    ),
    "Selection.cut": (SELECTION.cut, {"positions": torch.tensor([0, 2])}, ()),
    "sgp.context_loss": (
        lambda **options: sgp.context_loss(**{"model": model(), **options}),
        {"input_ids": IDS, "context_lengths": torch.tensor([1])},
        ("model", "lengths", "context_grad", "num_outputs_per_context", "reduction", "denominator"),
    ),
    "sgp.huggingface.patch": (
        lambda **options: sgp.huggingface.patch(model(), **options).remove(),
        {},
        ("mode", "memory_budget"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _group_of_one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def fault(function, argument, what, options):
    """What is wrong with how the function takes this argument, or None."""
    try:
        function(**options)
    except Exception as error:  # noqa: BLE001  (its words are the subject)
        text = str(error)
        clear = isinstance(error, (TypeError, ValueError, IndexError)) and argument in text
        if clear and text.startswith(("sgp", "Selection")):
            return None
        return f"{argument} = {what}: {type(error).__name__}: {text[:200]}"
    return f"{argument} = {what} was accepted" if what in NEVER else None


@pytest.mark.parametrize("name", CALLS)
def test_nonsense_is_refused_in_words_that_help(name):
    function, usual, optional = CALLS[name]
    faults = [
        fault(function, argument, what, {**usual, argument: value})
        for argument in (*usual, *optional)
        for what, value in NONSENSE.items()
    ]
    assert not any(faults), "\n".join(filter(None, faults))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if "chunk_rows" in call[2]])
def test_chunks_and_a_budget_are_not_taken_together(name):
    function, usual, _ = CALLS[name]
    with pytest.raises(
        ValueError, match="chunk_rows = 2 and memory_budget = 999; pass one"
    ) as said:
        function(**usual, chunk_rows=2, memory_budget=999)
    assert str(said.value).startswith(f"{name}: ")


@pytest.mark.parametrize("scale", [2**70, -(2**70), np.int64(2), np.float64(0.5)], ids=repr)
def test_any_real_number_is_a_scale(scale):
    """Also one that no int64 holds."""
    tiny = X / float(scale)
    expected = sgp.cross_entropy(tiny, Y, logit_scale=float(scale), softcap=float(abs(scale)))
    assert torch.equal(sgp.cross_entropy(tiny, Y, logit_scale=scale, softcap=abs(scale)), expected)


def test_numpys_whole_numbers_and_bools_are_taken():
    labels = Y.clamp(min=0)
    expected, _ = sgp.cross_entropy(X, labels, ignore_index=2, shift=2, return_stats=True)
    numbers = {"ignore_index": np.int64(2), "shift": np.int32(2), "return_stats": np.bool_(True)}
    assert torch.equal(sgp.cross_entropy(X, labels, **numbers)[0], expected)
    for shift in (np.True_, np.False_):
        found = sgp.Selection.from_labels(labels, shift=shift)
        assert torch.equal(found.rows, sgp.Selection.from_labels(labels, shift=bool(shift)).rows)
        loss = sgp.reference.cross_entropy(X, labels, shift=bool(shift))
        assert torch.allclose(sgp.cross_entropy(X, labels, shift=shift), loss)
        assert torch.allclose(sgp.reference.cross_entropy(X, labels, shift=shift), loss)


def test_numpys_whole_numbers_are_taken_by_what_ranks_and_contexts_take():
    logits, labels = torch.randn(3, 6), torch.tensor([1, -100, 2])
    found = sgp.parallel.cross_entropy(logits, labels, vocab_size=np.int64(5))
    assert torch.equal(found, sgp.parallel.cross_entropy(logits, labels, vocab_size=5))
    length, rank, ranks = np.int32(8), np.int64(1), np.int64(2)
    assert sgp.parallel.positions(length, rank=rank, ranks=ranks).tolist() == [4, 5, 6, 7]
    ids = IDS.expand(2, -1)
    losses = [
        sgp.context_loss(model(), ids, torch.tensor([1, 1]), num_outputs_per_context=G)
        for G in (np.int64(2), 2)
    ]
    assert torch.equal(*losses)
