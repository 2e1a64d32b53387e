"""`Selection` against a slow definition, token by token, of which row predicts which target."""

import copy
import dataclasses
import functools
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import sgp
from sgp.labels import IGNORE
from sgp.selection import Selection

pytestmark = pytest.mark.core

SENTENCE = ["Square", "this", "number", ".", "2", ".", "The", "result", "is", "4", "."]
WORDS = {word: i for i, word in enumerate(sorted(set(SENTENCE)))}
X = IGNORE


# -- the definition --------------------------------------------------------------------------------


def sequences_of(shape, boundaries=None):
    """Lists of flat positions, one a sequence; padding after the last boundary is in none."""
    if boundaries is not None:
        return [list(range(a, b)) for a, b in itertools.pairwise(boundaries)]
    count, length = math.prod(shape[:-1]), shape[-1]
    return [list(range(i * length, (i + 1) * length)) for i in range(count)]


def definition(flat_labels, shape, *, shift, boundaries=None, ignore_index=-100):
    """[(row, target, position of the target, sequence)], rows ascending."""
    found = []
    for number, positions in enumerate(sequences_of(shape, boundaries)):
        for k, at in enumerate(positions):
            if flat_labels[at] == ignore_index or k < shift:
                continue
            found.append((positions[k - shift], flat_labels[at], at, number))
    return sorted(found)


def assert_is(selection, expected, *, weights=None):
    assert selection.rows.tolist() == [row for row, _, _, _ in expected]
    assert selection.target.tolist() == [target for _, target, _, _ in expected]
    assert selection.sequence.tolist() == [number for _, _, _, number in expected]
    assert selection.num_kept == len(expected)
    if weights is None:
        assert selection.weight is None
    else:
        assert selection.weight.tolist() == [weights[at] for _, _, at, _ in expected]
    assert_consistent(selection)


def assert_consistent(s):
    """What operators rely on, whatever the constructor."""
    N, M = math.prod(s.shape), s.num_kept
    assert s.num_tokens == N
    for tensor in (s.dense_target, s.padded_rows):
        assert tensor.shape == (N,)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert s.count.shape == ()
    assert s.count.dtype == torch.int64
    assert s.count.device.type == "cpu"
    assert s.rows.dtype == s.target.dtype == s.sequence.dtype == torch.int64
    assert (s.rows.diff() > 0).all(), "rows ascend"
    kept = torch.zeros(N, dtype=torch.bool)
    kept[s.rows] = True
    assert (s.dense_target[~kept] == IGNORE).all()
    assert (s.dense_target[kept] >= 0).all()
    assert ((s.padded_rows[M:] >= 0) & (s.padded_rows[M:] < N)).all(), "padding stays in bounds"
    if M:
        assert s.sequence.min() >= 0
        assert s.sequence.max() < s.num_sequences


@st.composite
def batches(draw, max_rows=3, max_length=6):
    """(shape, flat labels, weights, boundaries or None, shift): any batch from_labels takes."""
    lead = draw(st.lists(st.integers(0, max_rows), max_size=2))
    length = draw(st.integers(0, max_length))
    shape = (*lead, length)
    N = math.prod(shape)
    flat = draw(st.lists(st.sampled_from([X, X, 0, 1, 2, 70_000]), min_size=N, max_size=N))
    weights = draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 2.0, -1.0]),
                                        min_size=N, max_size=N))  # fmt: skip
    boundaries = None
    if draw(st.booleans()):
        stop = draw(st.integers(0, N))  # where the padding tail begins
        flat[stop:] = [X] * (N - stop)
        cuts = draw(st.lists(st.integers(0, stop), max_size=5))  # repeated cuts: empty sequences
        ends = list(range(length, stop, length)) if length else []
        boundaries = sorted([0, *cuts, *ends, stop])
    return shape, flat, weights, boundaries, draw(st.booleans() | st.integers(0, 8))


@given(batches())
@settings(deadline=None, max_examples=200)
def test_from_labels_is_its_definition(batch):
    shape, flat, weights, boundaries, shift = batch
    selection = Selection.from_labels(
        torch.tensor(flat, dtype=torch.int64).reshape(shape),
        shift=shift,
        token_weight=None if weights is None else torch.tensor(weights).reshape(shape),
        cu_seqlens=None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32),
    )
    assert_is(selection, definition(flat, shape, shift=shift, boundaries=boundaries),
              weights=weights)  # fmt: skip
    assert selection.shape == shape
    assert selection.num_sequences == len(sequences_of(shape, boundaries))


@given(batches())
@settings(deadline=None, max_examples=200)
def test_shift_loses_none_doubles_none_and_crosses_no_boundary(batch):
    """The same, stated without the definition: a bijection between scored tokens and rows."""
    shape, flat, _, boundaries, _ = batch
    numbered = [X if label == X else at for at, label in enumerate(flat)]  # label = own position
    s = Selection.from_labels(
        torch.tensor(numbered, dtype=torch.int64).reshape(shape),
        shift=True,
        cu_seqlens=None if boundaries is None else torch.tensor(boundaries),
    )
    sequences = sequences_of(shape, boundaries)
    first = {positions[0] for positions in sequences if positions}
    scored = {at for at, label in enumerate(flat) if label != X} - first
    assert sorted(s.target.tolist()) == sorted(scored), "each scored token once, none lost"
    assert (s.rows == s.target - 1).all(), "shifted by one, once"
    number = {at: i for i, positions in enumerate(sequences) for at in positions}
    for row, target, sequence in zip(s.rows.tolist(), s.target.tolist(), s.sequence.tolist(),
                                     strict=True):  # fmt: skip
        assert number[row] == number[target] == sequence


@given(batches(), st.data())
@settings(deadline=None, max_examples=100)
def test_from_mask_is_from_labels_of_the_marked_tokens(batch, data):
    shape, flat, _, boundaries, shift = batch
    N = len(flat)
    mask = data.draw(st.lists(st.integers(0, 1), min_size=N, max_size=N))
    if boundaries is not None:
        mask[boundaries[-1] :] = [0] * (N - boundaries[-1])
    ids = torch.tensor([max(label, 0) for label in flat], dtype=torch.int64).reshape(shape)
    mask = torch.tensor(mask, dtype=data.draw(st.sampled_from([torch.bool, torch.uint8])))
    mask = mask.reshape(shape)
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries)
    ours = Selection.from_mask(ids, mask, shift=shift, cu_seqlens=cu_seqlens)
    theirs = Selection.from_labels(
        torch.where(mask.bool(), ids, X), shift=shift, cu_seqlens=cu_seqlens
    )
    assert torch.equal(ours.dense_target, theirs.dense_target)
    assert torch.equal(ours.padded_rows, theirs.padded_rows)
    assert torch.equal(ours.sequence, theirs.sequence)
    assert_consistent(ours)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_from_context_lengths_is_a_mask_of_columns(data):
    B, T = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    given_lengths = data.draw(st.booleans())
    lengths = [data.draw(st.integers(0, T)) if given_lengths else T for _ in range(B)]
    contexts = [data.draw(st.integers(0, length)) for length in lengths]
    shift = data.draw(st.booleans())
    ids = torch.arange(B * T).reshape(B, T)
    mask = [[contexts[b] <= t < lengths[b] for t in range(T)] for b in range(B)]
    by_length = Selection.from_context_lengths(
        ids,
        torch.tensor(contexts, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32) if given_lengths else None,
        shift=shift,
    )
    by_mask = Selection.from_mask(
        ids, torch.tensor(mask, dtype=torch.bool).reshape(B, T), shift=shift
    )
    assert torch.equal(by_length.dense_target, by_mask.dense_target)
    assert torch.equal(by_length.padded_rows, by_mask.padded_rows)
    assert by_length.num_kept == by_mask.num_kept
    assert by_length.shape == (B, T)
    assert by_length.num_sequences == B


# -- written-out cases -----------------------------------------------------------------------------


def test_worked_example_selects_the_five_output_tokens():
    ids = torch.tensor([[WORDS[word] for word in SENTENCE]])
    selection = Selection.from_context_lengths(ids, torch.tensor([6]))
    assert selection.rows.tolist() == [5, 6, 7, 8, 9]  # row 5 is the context's last token
    assert selection.target.tolist() == [WORDS[w] for w in ("The", "result", "is", "4", ".")]
    assert selection.kept_fraction == 5 / 11


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        ([[0, 1, 1, 0, 0, 1]], [0, 1, 4]),  # two turns with a hole between them
        ([[1, 1, 1, 1, 1, 1]], [0, 1, 2, 3, 4]),  # the whole sequence: token 0 has no predictor
        ([[1, 0, 0, 0, 0, 0]], []),  # only the token that nothing predicts
        ([[0, 0, 0, 0, 0, 1]], [4]),  # only the last
        ([[0, 0, 0, 0, 0, 0]], []),  # all context
        ([[0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]], [4, 6]),  # row 5 must not predict token 6
        ([[1] * 6, [0] * 6, [1] * 6], [0, 1, 2, 3, 4, 12, 13, 14, 15, 16]),  # full, empty, full
    ],
)
def test_masks(mask, rows):
    mask = torch.tensor(mask)
    ids = torch.arange(mask.numel()).reshape(mask.shape)
    selection = Selection.from_mask(ids, mask)
    assert selection.rows.tolist() == rows
    assert selection.target.tolist() == [row + 1 for row in rows]


@pytest.mark.parametrize(
    ("boundaries", "rows", "sequence", "count"),
    [
        ([0, 3, 6], [0, 1, 3, 4], [0, 0, 1, 1], 2),  # row 2 must not predict token 3
        ([0, 0, 3, 3, 6, 6], [0, 1, 3, 4], [1, 1, 3, 3], 5),  # empty first, middle and last
        ([0, 1, 2, 3, 4, 5, 6], [], [], 6),  # sequences of one token: nothing is predicted
        ([0, 6], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0], 1),  # one sequence
    ],
)
def test_packed_sequences(boundaries, rows, sequence, count):
    selection = Selection.from_labels(
        torch.arange(6), shift=True, cu_seqlens=torch.tensor(boundaries)
    )
    assert selection.rows.tolist() == rows
    assert selection.sequence.tolist() == sequence
    assert selection.num_sequences == count


def test_padding_after_the_last_boundary_is_in_no_sequence():
    labels = torch.tensor([1, 2, 3, X, X])
    selection = Selection.from_labels(labels, shift=True, cu_seqlens=torch.tensor([0, 2, 3]))
    assert selection.rows.tolist() == [0]
    assert selection.num_sequences == 2
    losses = sgp.reference.cross_entropy(torch.zeros(5, 4), selection, reduction="sequence_sum")
    assert losses.tolist() == pytest.approx([math.log(4), 0.0])


def test_packed_rows_of_a_batch():
    labels = torch.arange(8).reshape(2, 4)
    selection = Selection.from_labels(labels, shift=True, cu_seqlens=torch.tensor([0, 1, 4, 6, 8]))
    assert selection.rows.tolist() == [1, 2, 4, 6]
    assert selection.sequence.tolist() == [1, 1, 2, 3]
    assert selection.shape == (2, 4)


@pytest.mark.parametrize(
    ("shape", "sequences"),
    [((0,), 1), ((1,), 1), ((0, 4), 0), ((3, 0), 3), ((0, 0), 0), ((2, 0, 3), 0), ((2, 2, 1), 4)],
    ids=str,
)
@pytest.mark.parametrize("shift", [False, True])
def test_degenerate_shapes(shape, sequences, shift):
    """B = 0, T = 0 and T = 1; when shifting, a sequence of one token predicts nothing."""
    labels = torch.ones(shape, dtype=torch.int64)
    selection = Selection.from_labels(labels, shift=shift)
    assert selection.num_kept == (0 if shift else labels.numel())
    assert selection.num_sequences == sequences
    assert selection.kept_fraction == (1.0 if labels.numel() and not shift else 0.0)
    assert_consistent(selection)
    sums = sgp.cross_entropy(torch.zeros(*shape, 3), selection, reduction="sequence_mean")
    assert sums.shape == (sequences,)


def test_labels_of_three_dimensions_shift_along_the_last():
    labels = torch.arange(12).reshape(2, 3, 2)
    selection = Selection.from_labels(labels, shift=True)
    assert selection.rows.tolist() == [0, 2, 4, 6, 8, 10]
    assert selection.sequence.tolist() == [0, 1, 2, 3, 4, 5]


def test_strided_labels_are_read_by_their_indices():
    labels = torch.arange(6).reshape(3, 2).t()  # (2, 3), last dimension strided
    selection = Selection.from_labels(labels, shift=True)
    assert selection.target.tolist() == [2, 4, 3, 5]
    assert selection.rows.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    selection = Selection.from_labels(torch.tensor([3, 0, 7], dtype=dtype), ignore_index=0)
    assert selection.target.tolist() == [3, 7]
    assert_consistent(selection)


@pytest.mark.parametrize(
    ("ignore_index", "kept"),
    [(None, [0, 2]), (-100, [0, 2])],
    ids=["None means -100", "-100"],
)
def test_ignore_index_default(ignore_index, kept):
    labels = torch.tensor([1, -100, 2])
    assert Selection.from_labels(labels, ignore_index=ignore_index).rows.tolist() == kept


def test_weights_are_shifted_with_their_labels():
    labels = torch.tensor([[X, 1, 2], [3, X, 4]])
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    kwargs = {"token_weight": weights}
    shifted = Selection.from_labels(labels, shift=True, **kwargs)
    assert shifted.rows.tolist() == [0, 1, 4]
    assert torch.equal(shifted.weight, torch.tensor([0.2, 0.3, 0.6]))
    plain = Selection.from_labels(labels, **kwargs)
    assert plain.rows.tolist() == [1, 2, 3, 5]
    assert torch.equal(plain.weight, torch.tensor([0.2, 0.3, 0.4, 0.6]))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
    ids=str,
)
def test_weights_are_stored_in_float32_or_float64(dtype, stored):
    weights = torch.tensor([1, 0, 1]).to(dtype)
    selection = Selection.from_labels(torch.tensor([1, 2, 3]), token_weight=weights)
    assert selection.weight.dtype == stored
    assert selection.weight.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("shift", [False, True])
def test_arguments_are_not_modified(shift):
    labels = torch.tensor([[1, X, 2], [3, 4, 5]])
    weights, boundaries = torch.rand(2, 3), torch.tensor([0, 3, 6])
    before = [t.clone() for t in (labels, weights, boundaries)]
    Selection.from_labels(labels, shift=shift, token_weight=weights, cu_seqlens=boundaries)
    for tensor, copied in zip((labels, weights, boundaries), before, strict=True):
        assert torch.equal(tensor, copied)


@pytest.mark.parametrize("shift", [False, True])
def test_a_selection_does_not_change_with_the_buffers_it_was_made_from(shift):
    """Data loaders reuse their buffers; a Selection is frozen."""
    labels, weights, boundaries = torch.tensor([1, 2, 3]), torch.ones(3), torch.tensor([0, 1, 3])
    selection = Selection.from_labels(
        labels, shift=shift, token_weight=weights, cu_seqlens=boundaries
    )
    before = [t.tolist() for t in (selection.target, selection.weight, selection.sequence)]
    labels.fill_(0)
    weights.fill_(7.0)
    boundaries.fill_(3)
    after = [t.tolist() for t in (selection.target, selection.weight, selection.sequence)]
    assert after == before


# -- errors repeat what was passed -----------------------------------------------------------------


def label(value):
    """A parameter's name in the test report: the arguments' names, the first words expected."""
    if isinstance(value, dict):
        return ",".join(value)
    return value[0] if isinstance(value, list) else value.__name__ if callable(value) else value


IDS = torch.tensor([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"labels": torch.tensor([[1, X], [3, -7]])}, ValueError, ["labels[1, 1] = -7", "-100"]),
        (
            {"labels": torch.tensor([-1, 3, -100]), "ignore_index": -1},
            ValueError,
            ["labels[2] = -100", "ignore_index = -1"],
        ),
        ({"labels": torch.tensor([0.5])}, TypeError, ["labels", "float32", "integers"]),
        ({"labels": torch.tensor([True])}, TypeError, ["labels", "bool", "integers"]),
        ({"labels": torch.tensor([1j])}, TypeError, ["labels", "complex64", "integers"]),
        ({"labels": [1, 2]}, TypeError, ["labels", "list", "Tensor"]),
        ({"labels": torch.tensor(3)}, ValueError, ["labels", "no dimensions", "(T,)"]),
        (
            {"labels": IDS, "token_weight": torch.ones(4)},
            ValueError,
            ["token_weight", "(4,)", "(2, 2)"],
        ),
        (
            {"labels": IDS, "token_weight": torch.ones(2, 2, requires_grad=True)},
            ValueError,
            ["token_weight", "requires grad", "detach"],
        ),
        (
            {"labels": IDS, "token_weight": [[1.0, 1.0], [1.0, 1.0]]},
            TypeError,
            ["token_weight", "list", "Tensor"],
        ),
        (
            {"labels": IDS, "token_weight": torch.ones(2, 2, dtype=torch.complex64)},
            TypeError,
            ["token_weight", "complex64"],
        ),
        (
            {"labels": IDS, "cu_seqlens": torch.tensor([0, 3, 2, 4])},
            ValueError,
            ["[0, 3, 2, 4]", "never fall"],
        ),
        ({"labels": IDS, "cu_seqlens": torch.tensor([1, 2, 4])}, ValueError, ["[1, 2, 4]", "at 0"]),
        ({"labels": IDS, "cu_seqlens": torch.tensor([-1, 4])}, ValueError, ["[-1, 4]", "at 0"]),
        (
            {"labels": IDS, "cu_seqlens": torch.tensor([0, 2, 5])},
            ValueError,
            ["ends at 5", "4 tokens", "(2, 2)"],
        ),
        (
            {"labels": IDS, "cu_seqlens": torch.tensor([0, 1, 4])},
            ValueError,
            ["[0, 1, 4]", "(2, 2)", "token 2"],
        ),
        (
            {"labels": IDS, "cu_seqlens": torch.tensor([0, 2])},
            ValueError,
            ["ends at 2", "padding"],
        ),
        ({"labels": IDS, "cu_seqlens": torch.tensor([0])}, ValueError, ["ends at 0", "padding"]),
        (
            {"labels": IDS, "cu_seqlens": torch.tensor([], dtype=torch.int64)},
            ValueError,
            ["cu_seqlens = []", "(S + 1,)"],
        ),
        (
            {"labels": IDS, "cu_seqlens": torch.tensor([[0, 2, 4]])},
            ValueError,
            ["[[0, 2, 4]]", "(S + 1,)"],
        ),
        ({"labels": IDS, "cu_seqlens": torch.tensor(4)}, ValueError, ["cu_seqlens", "(S + 1,)"]),
        ({"labels": IDS, "cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, ["float32"]),
        ({"labels": IDS, "cu_seqlens": [0, 2, 4]}, TypeError, ["cu_seqlens", "list"]),
        ({"labels": IDS, "shift": -1}, ValueError, ["shift = -1", "at least 0"]),
        ({"labels": IDS, "shift": 1.0}, TypeError, ["shift = 1.0", "whole number"]),
        ({"labels": IDS, "shift": None}, TypeError, ["shift = None", "whole number"]),
        ({"labels": IDS, "shift": torch.ones(9)}, TypeError, ["shift = a tensor (9,)"]),
    ],
    ids=label,
)
def test_from_labels_errors(kwargs, error, words):
    with pytest.raises(error) as caught:
        Selection.from_labels(**kwargs)
    for word in ["Selection.from_labels", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"context_lengths": [3, 0]}, ValueError, ["row 0", "3", "2", "0 <= context"]),
        ({"context_lengths": [0, -1]}, ValueError, ["row 1", "-1"]),
        ({"context_lengths": [0, 0], "lengths": [2, 3]}, ValueError, ["row 1", "3", "<= 2"]),
        ({"context_lengths": [0, 2], "lengths": [2, 1]}, ValueError, ["row 1", "2", "1"]),
        ({"context_lengths": [0]}, ValueError, ["context_lengths", "(1,)", "(2,)", "(2, 2)"]),
        ({"context_lengths": [0, 0], "lengths": [2]}, ValueError, ["lengths", "(1,)", "(2,)"]),
        ({"context_lengths": [0.0, 1.0]}, TypeError, ["context_lengths", "float32"]),
        (
            {"context_lengths": [0, 0], "input_ids": [1, 2]},
            ValueError,
            ["input_ids", "(2,)", "(B, T)"],
        ),
    ],
    ids=label,
)
def test_from_context_lengths_errors(kwargs, error, words):
    tensors = {"input_ids": IDS} | {k: torch.tensor(v) for k, v in kwargs.items()}
    with pytest.raises(error) as caught:
        Selection.from_context_lengths(**tensors)
    for word in ["Selection.from_context_lengths", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.tensor([[0, 1], [2, 1]]), ValueError, ["mask[1, 0] = 2", "0 or 1"]),
        (torch.tensor([[0, 1], [-1, 1]]), ValueError, ["mask[1, 0] = -1"]),
        (torch.ones(2, 2), TypeError, ["mask", "float32", "bool"]),
        (torch.tensor([0, 1, 1, 1]), ValueError, ["(4,)", "(2, 2)"]),
        ([[0, 1], [1, 1]], TypeError, ["mask", "list"]),  # a tokenizer's assistant_masks
    ],
    ids=["2", "-1", "float", "shape", "list"],
)
def test_from_mask_errors(mask, error, words):
    with pytest.raises(error) as caught:
        Selection.from_mask(IDS, mask)
    for word in ["Selection.from_mask", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("token", [-7, -100], ids=["-7", "-100 is nobody's token"])
def test_a_marked_token_that_is_no_token_is_an_error(token):
    """A target must not be lost without a word because its id is negative."""
    ids = torch.tensor([[1, token]])
    with pytest.raises(ValueError, match=rf"input_ids\[0, 1\] = {token}"):
        Selection.from_mask(ids, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=rf"input_ids\[0, 1\] = {token}"):
        Selection.from_context_lengths(ids, torch.tensor([1]))


def test_unmarked_tokens_may_hold_anything():
    ids = torch.tensor([[-7, 3]])
    assert Selection.from_mask(ids, torch.tensor([[0, 1]])).target.tolist() == [3]


@pytest.mark.parametrize(
    ("function", "kwargs", "words"),
    [
        ("cross_entropy", {"token_weight": torch.ones(2, 3)}, ["token_weight"]),
        ("cross_entropy", {"ignore_index": 0}, ["ignore_index", "0"]),
        ("cross_entropy", {"shift": 2}, ["shift=2"]),
        ("token_log_probs", {"shift": True}, ["shift=True"]),
        ("linear_cross_entropy", {"shift": True}, ["shift"]),
        ("linear_cross_entropy", {"token_weight": torch.ones(2, 3)}, ["token_weight"]),
        ("linear_cross_entropy", {"ignore_index": 0}, ["ignore_index", "0"]),
        ("linear_token_log_probs", {"shift": True}, ["shift"]),
        ("linear_token_log_probs", {"ignore_index": 0}, ["ignore_index", "0"]),
        ("token_log_probs", {"ignore_index": 0}, ["ignore_index", "0"]),
    ],
    ids=label,
)
def test_nothing_is_shifted_weighted_or_ignored_twice(function, kwargs, words):
    """In the reference, which says what everything else must do."""
    selection = Selection.from_labels(torch.tensor([[1, 2, 3], [1, 2, 3]]), shift=True)
    head = (torch.zeros(4, 5),) if function.startswith("linear") else ()
    with pytest.raises(ValueError, match="Selection") as caught:
        getattr(sgp.reference, function)(torch.zeros(2, 3, 5), *head, selection, **kwargs)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_a_selection_of_another_batch_is_an_error(function):
    selection = Selection.from_labels(torch.tensor([[1, 2, 3], [1, 2, 3]]))
    head = (torch.zeros(4, 5),) if function.startswith("linear") else ()
    with pytest.raises(ValueError, match=r"\(3, 3, 5\)"):
        getattr(sgp.reference, function)(torch.zeros(3, 3, 5), *head, selection)


# -- as an object ----------------------------------------------------------------------------------


@pytest.fixture
def full():
    """A selection with every field set."""
    return Selection.from_labels(
        torch.tensor([[1, X, 2, 3], [4, 5, 6, X]]),
        shift=True,
        token_weight=torch.rand(2, 4),
        cu_seqlens=torch.tensor([0, 1, 4, 7]),
    )


def assert_same(a, b):
    for field in dataclasses.fields(Selection):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


@pytest.mark.parametrize(
    "duplicate",
    [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy],  # noqa: S301
    ids=["pickle", "deepcopy", "copy"],
)
def test_copies_are_the_same(full, duplicate):
    assert_same(duplicate(full), full)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_data_loader_worker_makes_selections():
    labels = [torch.tensor([[X, 1, 2]]), torch.tensor([[3, X, X]]), torch.tensor([[X, 4, X]])]
    loader = torch.utils.data.DataLoader(
        labels,
        batch_size=None,
        collate_fn=functools.partial(Selection.from_labels, shift=True),
        num_workers=1,
        multiprocessing_context="fork",
    )
    assert [(s.rows.tolist(), s.target.tolist()) for s in loader] == [
        ([0, 1], [1, 2]),
        ([], []),
        ([0], [4]),
    ]


def test_to_moves_everything_but_the_count(full):
    moved = full.to("meta", non_blocking=True)  # a device that every machine has
    for tensor in (moved.dense_target, moved.padded_rows, moved.dense_weight, moved.boundaries):
        assert tensor.device.type == "meta"
    assert moved.count.device.type == "cpu"
    assert moved.num_kept == full.num_kept
    assert moved.device.type == "meta"
    assert moved.rows.shape == full.rows.shape
    assert (moved.shape, moved.num_sequences) == (full.shape, full.num_sequences)
    assert_same(full.to("cpu"), full)


@pytest.mark.parametrize("non_blocking", [False, True])
def test_to_waits_only_where_it_is_told_to(full, non_blocking, monkeypatch):
    """Whether a copy waits shows on a GPU alone; what it is asked for shows everywhere."""
    asked = []

    def to(tensor, _device, *, non_blocking=False):
        asked.append(non_blocking)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    full.to("cuda", non_blocking=non_blocking)
    assert asked == [non_blocking] * 4


def test_to_without_weights_and_boundaries(device):
    selection = Selection.from_labels(torch.tensor([1, X])).to(device)
    assert selection.device.type == device
    assert selection.weight is None
    assert selection.boundaries is None


def test_pin_memory_pins_everything_but_the_count(full, monkeypatch):
    """Page-locked memory needs a GPU; which tensors are pinned does not."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: (pinned.append(t), t.clone())[1])
    result = full.pin_memory()
    fields = (full.dense_target, full.padded_rows, full.dense_weight, full.boundaries)
    assert {id(t) for t in pinned} == {id(t) for t in fields}
    assert_same(result, full)
    assert result.dense_target is not full.dense_target


def test_pin_memory_for_real(full):
    if not torch.cuda.is_available():
        # not a silent no-op
        with pytest.raises(RuntimeError, match=r"accelerator|CUDA|NVIDIA|pin"):
            full.pin_memory()
        return
    assert full.pin_memory().dense_target.is_pinned()


def test_frozen(full):
    with pytest.raises(dataclasses.FrozenInstanceError):
        full.shape = (8,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del full.count
    with pytest.raises(AttributeError):
        full.rows = torch.zeros(0)
    assert full == full  # noqa: PLR0124  (identity, and no comparison of tensors)
    assert full != copy.copy(full)
    assert hash(full) == hash(full)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (
            [[1, X, 2]],
            "Selection(shape=(1, 3), 2 of 3 tokens carry loss, 1 sequence, device=cpu)",
        ),
        (
            [[1], [X]],
            "Selection(shape=(2, 1), 1 of 2 tokens carry loss, 2 sequences, device=cpu)",
        ),
    ],
    ids=["1 sequence", "2 sequences"],
)
def test_repr(labels, text):
    assert repr(Selection.from_labels(torch.tensor(labels))) == text


def test_kept_fraction():
    assert Selection.from_labels(torch.tensor([1, X, X, 2])).kept_fraction == 0.5
    assert Selection.from_labels(torch.zeros(0, dtype=torch.int64)).kept_fraction == 0.0


def test_the_default_device_is_not_asked():
    """A model may be built under `torch.device("meta")`; the batch is not."""
    labels = torch.tensor([[X, 1, 2], [3, 4, X]])
    contexts, lengths = torch.tensor([1, 1]), torch.tensor([3, 2])
    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[0, 1, 1], [0, 1, 0]])
    boundaries, weights = torch.tensor([0, 3, 5]), torch.ones(2, 3)
    logits = torch.zeros(6, 7)
    with torch.device("meta"):
        for selection in (
            Selection.from_labels(labels, shift=True),
            Selection.from_labels(labels, shift=True, cu_seqlens=boundaries, token_weight=weights),
            Selection.from_context_lengths(ids, contexts),
            Selection.from_context_lengths(ids, contexts, lengths=lengths),
            Selection.from_mask(ids, mask, cu_seqlens=boundaries),
        ):
            assert_consistent_on_cpu(selection)
            assert sgp.cross_entropy(logits, selection).item() == pytest.approx(math.log(7))


def test_a_number_as_denominator_does_not_ask_the_default_device():
    logits, target = torch.zeros(2, 7), torch.tensor([1, X])
    with torch.device("meta"):
        loss = sgp.cross_entropy(logits, target, denominator=2.0)
    assert loss.item() == pytest.approx(math.log(7) / 2)


def assert_consistent_on_cpu(s):
    for tensor in (s.dense_target, s.padded_rows, s.count, s.rows, s.target, s.sequence):
        assert tensor.device.type == "cpu"
    assert s.num_kept == s.rows.numel() > 0


# -- Hugging Face's convention ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [[X, X, 3, 4, 5, X], [X, 6, 7, X, 8, 9]],  # padding; a hole
        [[1, 2, 3, 4, 5, 6], [X, X, X, X, X, 0]],  # a whole sequence; the last token only
        [[X, X, X, X, X, X], [1, X, X, X, X, 2]],  # nothing; a first token that nothing predicts
    ],
    ids=["holes", "whole", "empty"],
)
def test_shifted_labels_are_hugging_faces_loss(labels):
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    labels = torch.tensor(labels)
    logits = torch.randn(2, 6, 11, requires_grad=True)
    theirs = ForCausalLMLoss(logits, labels, vocab_size=11, num_items_in_batch=1)  # 1: the sum
    (their_grad,) = torch.autograd.grad(theirs, logits)
    selection = Selection.from_labels(labels, shift=True)
    for loss in (sgp.cross_entropy, sgp.reference.cross_entropy):
        ours = loss(logits, selection, reduction="sum")
        (our_grad,) = torch.autograd.grad(ours, logits)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_grad, their_grad)


def test_shifted_labels_are_the_loss_of_a_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    ids = torch.randint(32, (2, 9))
    contexts = torch.tensor([3, 5])
    labels = torch.where(torch.arange(9) >= contexts[:, None], ids, -100)
    out = model(input_ids=ids, labels=labels)
    for selection in (
        Selection.from_labels(labels, shift=True),
        Selection.from_context_lengths(ids, contexts),
    ):
        torch.testing.assert_close(sgp.cross_entropy(out.logits, selection), out.loss)
        hidden = model.model(input_ids=ids).last_hidden_state
        linear = sgp.reference.linear_cross_entropy(hidden, model.lm_head.weight, selection)
        torch.testing.assert_close(linear, out.loss)
    by_hand = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
