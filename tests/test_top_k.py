"""`sgp.TopK`: what is refused, and rows of different lengths as rows of one."""

import pytest
import torch

import sgp

INF, NAN = float("inf"), float("nan")
INDICES = torch.tensor([[3, 0], [2, 7], [1, 4]])
LOG_PROBS = torch.tensor([[0.6, 0.3], [0.9, 0.05], [0.5, 0.5]]).log()
FLAT = torch.tensor([3, 0, 1, 2])
FLAT_LOG_PROBS = torch.tensor([0.6, 0.3, 0.1, 0.8]).log()
OFFSETS = torch.tensor([0, 0, 3, 4, 4])


def test_rows_of_one_length_are_as_they_were():
    top = sgp.TopK(INDICES, LOG_PROBS)
    assert top.num_rows == 3
    assert str(top) == "TopK(3 rows, 2 entries each, device=cpu)"
    indices, log_probs, valid = top.padded()
    assert torch.equal(indices, INDICES)
    assert torch.equal(log_probs, LOG_PROBS)
    assert valid is None


def test_rows_of_different_lengths_are_padded():
    top = sgp.TopK(FLAT, FLAT_LOG_PROBS, OFFSETS)
    assert top.num_rows == 4
    assert str(top) == "TopK(4 rows, 4 entries, device=cpu)"
    indices, log_probs, valid = top.padded()
    assert indices.tolist() == [[0, 0, 0], [3, 0, 1], [2, 2, 2], [0, 0, 0]]
    assert valid.tolist() == [[False] * 3, [True] * 3, [True, False, False], [False] * 3]
    assert torch.equal(log_probs[valid], FLAT_LOG_PROBS)
    assert (log_probs[~valid] == -INF).all()


def test_a_padded_slot_adds_nothing_to_what_is_scattered():
    """Of a row with entries: it names a column that the row names anyway."""
    indices, log_probs, _ = sgp.TopK(FLAT, FLAT_LOG_PROBS, OFFSETS).padded()
    marked = torch.zeros(4, 8, dtype=torch.bool).scatter(1, indices, True)
    assert marked[1].nonzero().flatten().tolist() == [0, 1, 3]
    assert marked[2].nonzero().flatten().tolist() == [2]
    added = torch.zeros(4, 8).scatter_add(1, indices, log_probs.exp())
    assert added.sum(1).tolist() == pytest.approx([0, 1, 0.8, 0])


def test_offsets_of_equal_lengths_need_no_mask():
    top = sgp.TopK(FLAT, FLAT_LOG_PROBS, torch.tensor([0, 2, 4], dtype=torch.int32))
    indices, log_probs, valid = top.padded()
    assert indices.tolist() == [[3, 0], [1, 2]]
    assert torch.equal(log_probs.flatten(), FLAT_LOG_PROBS)
    assert valid is None


@pytest.mark.parametrize("M", [0, 3])
def test_no_entries_at_all(M):
    nothing = torch.empty(0, dtype=torch.int64)
    ragged = sgp.TopK(nothing, torch.empty(0), torch.zeros(M + 1, dtype=torch.int64))
    dense = sgp.TopK(nothing.view(M, 0), torch.empty(M, 0))
    for top in (ragged, dense):
        indices, log_probs, _ = top.padded()
        assert top.num_rows == M
        assert tuple(indices.shape) == tuple(log_probs.shape) == (M, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_are_what_the_loss_computes_in(dtype):
    padded = sgp.TopK(INDICES.int(), LOG_PROBS.to(dtype)).padded()
    assert padded.indices.dtype == torch.int64
    assert padded.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(padded.log_probs, LOG_PROBS.to(dtype).to(padded.log_probs.dtype))


def test_a_teacher_that_requires_grad_is_detached():
    assert (
        not sgp.TopK(INDICES, LOG_PROBS.clone().requires_grad_()).padded().log_probs.requires_grad
    )


def test_it_moves():
    for top in (sgp.TopK(INDICES, LOG_PROBS), sgp.TopK(FLAT, FLAT_LOG_PROBS, OFFSETS)):
        moved = top.to("meta")
        assert moved.device.type == "meta"
        assert moved.indices.shape == top.indices.shape
        assert (moved.offsets is None) == (top.offsets is None)
        assert torch.equal(top.to("cpu").indices, top.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_server_rounded_is_taken(dtype):
    """Two tokens of 0.5 add up to 1.0017 in bfloat16, and to that also as float32 again."""
    torch.manual_seed(0)
    half = torch.tensor([[0.5, 0.5]]).log().to(dtype)
    many = (2 * torch.randn(200, 20)).log_softmax(-1).to(dtype)
    for log_probs in (half, many, half.float(), many.float()):
        indices = torch.arange(log_probs.shape[1]).expand_as(log_probs)
        sgp.TopK(indices, log_probs)
    assert half.float().exp().sum() > 1.001 or dtype == torch.float16
    slightly_above = torch.tensor([[1e-6, -INF]])  # a logit less a rounded log-sum-exp
    sgp.TopK(torch.tensor([[0, 1]]), slightly_above)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((INDICES.tolist(), LOG_PROBS), TypeError, ["indices", "list"]),
        ((INDICES, LOG_PROBS.tolist()), TypeError, ["log_probs", "list"]),
        ((INDICES.float(), LOG_PROBS), TypeError, ["indices", "float32"]),
        ((INDICES.bool(), LOG_PROBS), TypeError, ["indices", "bool"]),
        ((INDICES, INDICES), TypeError, ["log_probs", "int64"]),
        ((INDICES, LOG_PROBS.to_sparse()), TypeError, ["log_probs", "sparse"]),
        ((INDICES[0], LOG_PROBS[0]), ValueError, ["indices is (2,)", "(M, k)", "offsets"]),
        ((INDICES[None], LOG_PROBS[None]), ValueError, ["indices is (1, 3, 2)", "(M, k)"]),
        (
            (torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4)),
            ValueError,
            ["log_probs is (3, 4); expected (3, 5), as indices are"],
        ),
        ((INDICES, LOG_PROBS, torch.arange(4)), ValueError, ["indices is (3, 2)", "(total,)"]),
        ((FLAT, FLAT_LOG_PROBS, [0, 4]), TypeError, ["offsets", "list"]),
        ((FLAT, FLAT_LOG_PROBS, torch.tensor([0.0, 4.0])), TypeError, ["offsets", "float32"]),
        ((FLAT, FLAT_LOG_PROBS, torch.tensor([[0, 4]])), ValueError, ["offsets is (1, 2)"]),
        (
            (FLAT, FLAT_LOG_PROBS, torch.tensor([0, 3, 2, 4])),
            ValueError,
            ["offsets = [0, 3, 2, 4]"],
        ),
        (
            (FLAT, FLAT_LOG_PROBS, torch.tensor([0, 3])),
            ValueError,
            ["offsets = [0, 3]", "end at 4"],
        ),
        ((FLAT, FLAT_LOG_PROBS, torch.tensor([1, 4])), ValueError, ["offsets = [1, 4]", "at 0"]),
        ((-INDICES, LOG_PROBS), ValueError, ["indices[0, 0] = -3", "negative"]),
        ((INDICES, -LOG_PROBS), ValueError, ["log_probs[0, 0] = 0.51", "at most 0"]),
        ((INDICES, LOG_PROBS * NAN), ValueError, ["log_probs[0, 0] = nan"]),
        ((INDICES, LOG_PROBS + INF), ValueError, ["log_probs[0, 0] = inf"]),
        ((INDICES * 0 + 5, LOG_PROBS), ValueError, ["row 0", "index 5 twice", "offsets"]),
        (
            (torch.tensor([1, 2, 2]), FLAT_LOG_PROBS[:3] - 1, torch.tensor([0, 1, 3])),
            ValueError,
            ["row 1", "index 2 twice"],
        ),
        ((INDICES, LOG_PROBS / 2), ValueError, ["row 0", "add up to 1.32"]),
        (
            (FLAT, torch.tensor([-1.0, -0.2, -0.3, -0.2]), torch.tensor([0, 1, 4])),
            ValueError,
            ["row 1", "add up to 2.3"],
        ),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error) as caught:
        sgp.TopK(*arguments)
    assert str(caught.value).startswith("sgp.TopK: ")
    for word in words:
        assert word in str(caught.value)


def test_the_same_index_in_two_rows_is_no_error():
    sgp.TopK(torch.tensor([1, 1, 1]), torch.tensor([-1.0, -2.0, -3.0]), torch.arange(4))


def test_values_are_not_looked_at_where_that_would_wait(monkeypatch):
    monkeypatch.setattr("sgp.rows.top_k.may_wait", lambda _: False)
    top = sgp.TopK(-INDICES, -LOG_PROBS)
    top.check_vocabulary("sgp.distillation", 2)
    monkeypatch.setattr("sgp.rows.top_k.may_wait", lambda _: True)
    with pytest.raises(ValueError, match=r"TopK\.indices\[0, 0\] = -3 is outside \[0, 5\)"):
        top.check_vocabulary("sgp.distillation", 5)


def test_rows_and_vocabulary_are_checked_by_the_loss():
    top = sgp.TopK(INDICES, LOG_PROBS)
    top.check_rows("sgp.distillation", "teacher", 3)
    top.check_vocabulary("sgp.distillation", 8)
    with pytest.raises(ValueError, match=r"f: teacher is an sgp\.TopK of 3 rows; expected 4, one"):
        top.check_rows("f", "teacher", 4)
    with pytest.raises(ValueError, match=r"f: sgp\.TopK\.indices\[1, 1\] = 7 is outside \[0, 7\)"):
        top.check_vocabulary("f", 7)
