"""Repair: planted faults, rows that come out equal to the truth, what is refused, what is said."""

import copy
import io
import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import sgp
from sgp.auditing import look
from sgp.auditing.repair import SAMPLES, Left, Repair, repair
from sgp.auditing.view import read
from tests.audited import make, make_batch

EOS, V = 2, 500


class Words:
    """A tokenizer of numbers."""

    eos_token_id, pad_token_id, bos_token_id = EOS, 0, 1
    all_special_ids = (0, 1, EOS)

    def decode(self, ids):
        return "".join(f"<{x}>" for x in ids)


class PaddedWithEnds(Words):
    """As many base models have it."""

    pad_token_id = EOS


class WithoutBegins(Words):
    """Whose begin of text is in no row: one inside a row would begin a sequence."""

    bos_token_id = 9
    all_special_ids = (0, EOS)


def mended(batch, tokenizer=None):
    return repair(read(batch, tokenizer=tokenizer or Words()))


# -- the truth, and what is done to it -------------------------------------------------------------


def true_row(dice):
    """A context, then one to three answers that end, with questions between."""
    ids, output = [1], [0]
    for _ in range(dice.randint(1, 3)):
        for length, scored in ((dice.randint(1, 6), 0), (dice.randint(3, 7), 1)):
            ids += dice.choices(range(3, V), k=length)
            output += [scored] * length
        ids[-1] = EOS
    return ids, output


def labels_of(ids, output):
    return [x if scored else -100 for x, scored in zip(ids, output, strict=True)]


def without_ends(ids, labels, _):
    return [-100 if x == EOS else y for x, y in zip(ids, labels, strict=True)]


def without_first(_, labels, output):
    before = [0, *output]
    return [
        -100 if now and not last else y
        for y, now, last in zip(labels, output, before, strict=False)
    ]


FAULTS = {"turn-end-unscored": without_ends, "first-output-untrained": without_first}


def with_faults(ids, output, dice, *, keep_last):
    """The row's labels, and which faults they have."""
    labels, count = labels_of(ids, output), Counter()
    for code, fault in FAULTS.items():
        if dice.random() < 0.4:
            faulty = fault(ids, labels, output)
            if keep_last:
                faulty[-1] = labels[-1]
            count[code] += faulty != labels
            labels = faulty
    return labels, count


def laid_out(columns, layout, *, pad, pad_label):
    """Rows of input_ids, labels and output as a batch."""
    width = max(len(ids) for ids, _, _ in columns) + 2
    flat = {"input_ids": [], "labels": [], "completion_mask": [], "position_ids": [], "mask": []}
    for ids, labels, output in columns:
        rest = 0 if layout == "packed" else width - len(ids)
        for found, fill, column in zip(
            flat.values(),
            (pad, pad_label if layout == "right" else -100, 0, 0, 0),
            (ids, labels, output, range(len(ids)), [1] * len(ids)),
            strict=True,
        ):
            beside = [fill] * rest
            found.append([*beside, *column] if layout == "left" else [*column, *beside])
    if layout == "packed":
        flat = {name: [[x for row in rows for x in row]] for name, rows in flat.items()}
    return {name: torch.tensor(rows) for name, rows in flat.items()}


def planted(rows, dice, *, layout, tokenizer):
    """A batch of these rows with faults, and how many sequences have each."""
    pad, count, columns = tokenizer.pad_token_id, Counter(), []
    shift = dice.choice([None, None, "moved", "chopped"])
    scores_padding = layout == "right" and dice.random() < 0.4
    scores_padding &= not (shift == "chopped" and pad == EOS)  # an end or padding: who knows?
    crosses = layout == "packed" and shift != "chopped" and dice.random() < 0.4
    for number, (ids, output) in enumerate(rows):
        labels, found = with_faults(ids, output, dice, keep_last=shift == "chopped")
        count.update(found)
        if crosses and number:
            labels[0] = ids[0]
            count["crosses-boundary"] += 1
        whole = (ids, labels, output)
        chopped = (ids[:-1], labels[1:], output[:-1])
        columns.append(chopped if shift == "chopped" else whole)
    count["padding-scored"] += len(rows) * scores_padding
    count["labels-shifted-twice"] += len(rows) * (shift is not None)
    batch = laid_out(columns, layout, pad=pad, pad_label=pad if scores_padding else -100)
    if shift == "moved":
        batch["labels"] = batch["labels"].roll(-1, 1)
    mask = batch.pop("mask")
    if layout != "packed":
        batch["attention_mask"] = mask
    elif dice.random() < 0.5:
        batch["seq_idx"] = (batch.pop("position_ids") == 0).long().cumsum(1)
    return batch, +count


@pytest.mark.parametrize("tokenizer", [Words(), PaddedWithEnds()], ids=["pad", "pad is end"])
def test_a_thousand_planted_rows_are_mended_to_the_truth(tokenizer):
    dice = random.Random(22)  # noqa: S311  (the same rows in each run)
    total, found_rows = Counter(), 0
    for batch_number in range(125):
        rows = [true_row(dice) for _ in range(8)]
        layout = ("right", "left", "packed")[batch_number % 3]
        batch, count = planted(rows, dice, layout=layout, tokenizer=tokenizer)
        before = copy.deepcopy(batch)
        found = mended(batch, tokenizer)
        assert all(torch.equal(batch[name], before[name]) for name in batch), "read-only"
        truth = [{"input_ids": ids, "labels": labels_of(ids, output)} for ids, output in rows]
        assert found.rows == truth, (layout, count)
        assert found.left == []
        assert found.changes == count, layout
        assert look(sgp.Collator(tokenizer, selection=False)(found.rows), tokenizer=tokenizer) == []
        total += count
        found_rows += len(found.rows)
    assert found_rows == 1000
    assert min(total[code] for code in ("labels-shifted-twice", "crosses-boundary",
               "padding-scored", "first-output-untrained", "turn-end-unscored")) > 50  # fmt: skip


# -- one rule at a time ----------------------------------------------------------------------------


def batch_of(ids, labels, **more):
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        **{name: torch.tensor([column]) for name, column in more.items()},
    }


def test_a_token_that_only_the_labels_have_is_added():
    """`x[:-1]` and `x[1:]`: the window of many loops."""
    found = mended(batch_of([1, 5, 6, 7], [-100, 6, 7, 8]))
    assert found.rows == [{"input_ids": [1, 5, 6, 7, 8], "labels": [-100, -100, 6, 7, 8]}]
    assert found.labels == {"labels-shifted-twice": 3}
    padded = mended(
        batch_of([1, 5, 6, 7, 0, 0], [-100, 6, 7, 8, -100, -100], attention_mask=[1] * 4 + [0] * 2)
    )
    assert padded.rows == found.rows
    ending = mended(batch_of([1, 5, 6, 2, 2], [-100, 6, 2, -100, -100]), PaddedWithEnds())
    assert ending.rows == [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}]
    lost = batch_of([1, 5, 6, 2, 2], [-100, 6, 2, -100, -100], attention_mask=[1, 1, 1, 0, 0])
    assert mended(lost, PaddedWithEnds()).rows == ending.rows


def test_labels_that_were_rolled_bring_nothing_from_the_front():
    found = mended(batch_of([1, 5, 6, 7], [5, 6, 7, 1]))
    assert found.rows == [{"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    bare = repair(read(batch_of([9, 5, 6, 7], [5, 6, 7, 9])))
    assert bare.rows == [{"input_ids": [9, 5, 6, 7], "labels": [-100, 5, 6, 7]}]


def test_each_sequence_of_a_packed_row_is_judged_by_itself():
    """One is shifted, one is right, one is of another text."""
    ids = [1, 5, 6, 2, 1, 7, 8, 2, 1, 9, 10, 2]
    labels = [-100, 6, 2, -100, -100, -100, 8, 2, -100, -100, 11, 2]
    found = mended(batch_of(ids, labels, seq_idx=[0] * 4 + [1] * 4 + [2] * 4))
    assert found.rows == [
        {"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]},
        {"input_ids": [1, 7, 8, 2], "labels": [-100, -100, 8, 2]},
    ]
    assert found.left == [Left(0, "labels-not-the-inputs")]
    assert found.changes == {"labels-shifted-twice": 1}
    assert found.cut == 1
    assert found.sources == [0, 0]


@pytest.mark.parametrize("key", ["cu_seqlens", "attention_mask", "seq_idx", "position_ids"])
def test_a_packed_row_is_cut_however_it_says_where(key):
    ids = [1, 5, 6, 2, 1, 7, 2]
    said = {
        "cu_seqlens": torch.tensor([0, 4, 7]),
        "attention_mask": torch.tensor([[1] * 4 + [2] * 3]),
        "seq_idx": torch.tensor([[0] * 4 + [1] * 3]),
        "position_ids": torch.tensor([[*range(4), *range(3)]]),
    }[key]
    found = mended(batch_of(ids, [-100, -100, 6, 2, 1, 7, 2]) | {key: said})
    assert [row["input_ids"] for row in found.rows] == [[1, 5, 6, 2], [1, 7, 2]]
    assert found.rows[1]["labels"] == [-100, 7, 2]
    assert found.changes == {"crosses-boundary": 1}


def test_scored_padding_of_a_packed_row_is_counted_once():
    """Between two sequences and behind them."""
    batch = batch_of([1, 5, 2, 0, 1, 7, 2, 0, 0], [-100, 5, 2, 0, -100, 7, 2, 0, 0])
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 0, 2, 2, 2, 0, 0]])
    found = mended(batch)
    assert [row["labels"] for row in found.rows] == [[-100, 5, 2], [-100, 7, 2]]
    assert found.changes == {"padding-scored": 1}
    assert found.labels == {"padding-scored": 3}
    first = batch | {"labels": torch.tensor([[-100, 5, 2, -100, 1, 7, 2, -100, -100]])}
    found = mended(first)  # which the padding before it would have to predict
    assert [row["labels"] for row in found.rows] == [[-100, 5, 2], [-100, 7, 2]]
    assert found.labels == {"padding-scored": 1}


def test_what_the_first_column_has_is_nobodys_loss_and_stays():
    """`labels = input_ids.clone()`."""
    found = mended(batch_of([1, 5, 6, 2], [1, 5, 6, 2]))
    assert found.rows == [{"input_ids": [1, 5, 6, 2], "labels": [1, 5, 6, 2]}]
    assert not found.changes


def test_a_target_after_the_last_token_is_not_lost():
    """As a packed row of `shift_labels` may have it."""
    batch = {
        "input_ids": torch.tensor([[9, 10, 11, 12, 13]]),
        "shift_labels": torch.tensor([[-100, 11, -100, 13, EOS]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }
    found = mended(batch)
    assert found.rows == [
        {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]},
        {"input_ids": [12, 13, EOS], "labels": [-100, 13, EOS]},
    ]
    assert not found.changes


@pytest.mark.parametrize("ids", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("labels", [torch.int16, torch.int32, torch.int64])
def test_ids_of_every_width(ids, labels):
    batch = batch_of([9, 10, 11, 12], [-100, 11, 12, EOS])
    wide = {k: v.to(ids if k == "input_ids" else labels) for k, v in batch.items()}
    assert mended(wide) == mended(batch)
    assert mended(batch).rows[0]["input_ids"][-1] == EOS
    with pytest.raises(TypeError, match=r"labels is torch\.bool"):
        mended({**batch, "labels": batch["labels"] > 0})


def test_targets_in_place_of_labels():
    """`shift_labels` and a `Selection` say what is predicted: labels come out."""
    batch = batch_of([1, 5, 6, 2], [-100, -100, 6, 2])
    targets = batch["labels"].roll(-1, 1)
    found = repair(read({"input_ids": batch["input_ids"], "shift_labels": targets}))
    selection = sgp.Selection.from_labels(batch["labels"], shift=True)
    same = repair(read({"input_ids": batch["input_ids"]}, selection=selection))
    assert found.rows == same.rows == [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}]


REFUSED = {
    "of another text": ([1, 5, 6, 7], [-100, -100, 9, 7], "labels-not-the-inputs"),
    "two of another text": ([1, 5, 6, 7, 8], [-100, 9, 9, 7, 8], "labels-not-the-inputs"),
    "shifted but for one inside": ([1, 5, 6, 7, 8], [-100, 6, 9, 8, -100], "labels-not-the-inputs"),
    "the first column's": ([1, 5, 6, 7], [3, 5, 6, 7], "labels-not-the-inputs"),
    "none": ([1, 5, 6, 7], [-100] * 4, "no-targets"),
    "of the first column alone": ([1, 5, 6, 7], [1, -100, -100, -100], "no-targets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_a_guess_is_left_out(name):
    ids, labels, code = REFUSED[name]
    right = [-100, -100, *ids[2:]]
    batch = {"input_ids": torch.tensor([ids, ids]), "labels": torch.tensor([labels, right])}
    found = repair(read(batch))
    assert found.left == [Left(0, code)]
    assert found.rows == [{"input_ids": ids, "labels": right}]
    assert found.sources == [1]
    assert not found.changes


def test_tokens_that_are_trained_to_predict_themselves_are_left_out():
    ids = torch.tensor([[1, 5, 6, 7]])
    found = repair(read({"input_ids": ids, "shift_labels": ids.clone()}))
    assert (found.rows, found.left) == ([], [Left(0, "labels-not-the-inputs")])


def test_a_row_of_padding_alone_is_left_out():
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    ids = torch.tensor([[0, 0, 0], [5, 6, 7]])
    found = repair(read({"input_ids": ids, "labels": ids, "attention_mask": mask}))
    assert found.left == [Left(0, "no-targets")]
    assert [row["input_ids"] for row in found.rows] == [[5, 6, 7]]


# -- whatever it is given --------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_nonsense_comes_out_right_or_not_at_all_and_only_once(data):
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    token, bit = st.integers(0, 5), st.integers(0, 1)

    def drawn(values):
        column = st.lists(values, min_size=T, max_size=T)
        return torch.tensor(data.draw(st.lists(column, min_size=B, max_size=B)))

    batch = {"input_ids": drawn(token)}
    own = torch.where(drawn(bit) == 1, batch["input_ids"], -100)
    batch["labels"] = data.draw(
        st.sampled_from([own, own.roll(-1, 1), torch.where(drawn(bit) == 1, drawn(token), -100)])
    )
    for name, values in (("attention_mask", bit), ("seq_idx", bit), ("completion_mask", bit)):
        if data.draw(st.booleans()):
            batch[name] = drawn(values)
    found = mended(batch, WithoutBegins())
    assert len(found.rows) == len(found.sources)
    assert found.num_rows == B
    assert set(found.sources) | {left.row for left in found.left} <= set(range(B))
    for row in found.rows:
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        assert all(label in (-100, token) for token, label in pairs)
        assert any(label != -100 for _, label in pairs[1:])
    if found.rows:
        again = sgp.Collator(pad_token_id=0, selection=False)(found.rows)
        again = mended(again, WithoutBegins())
        assert again.rows == found.rows
        assert not again.changes
        assert again.left == []


# -- what is said of it ----------------------------------------------------------------------------


def printed(found, **options):
    console = Console(file=io.StringIO(), width=200)
    found.print(console, **options)
    return console.file.getvalue()


def test_changes_are_listed_with_three_rows_before_and_after():
    ids = [1, 5, 6, 7, EOS]
    batch = {
        "input_ids": torch.tensor([ids] * 6),
        "labels": torch.tensor(
            [[-100, -100, 6, 7, EOS]] + [[-100, -100, 6, 7, -100]] * 3
            + [[-100, 6, 7, EOS, -100], [-100, 9, 9, 9, 9]]
        ),
    }  # fmt: skip
    found = mended(batch)
    assert found.changes == {"turn-end-unscored": 3, "labels-shifted-twice": 1}
    assert len(found.samples) == SAMPLES == 3
    lines = printed(found).splitlines()
    assert lines == [
        "mended: labels-shifted-twice: 1 sequence, 3 labels: moved back by one token",
        "mended: turn-end-unscored: 3 sequences, 3 labels: the end of the turn carries loss",
        "left out: labels-not-the-inputs: 1 sequence, row 5: the right labels would be a guess",
        *(
            line
            for row in (1, 2, 3)
            for line in (
                f"row {row}, turn-end-unscored",
                "  before: <1><5>[<6><7>]<2>",
                "  after:  <1><5>[<6><7><2>]",
            )
        ),
    ]
    assert "line 60: the right" in printed(found, lines=[10, 20, 30, 40, 50, 60])
    assert "\nline 20, turn-end-unscored\n" in printed(found, lines=[10, 20, 30, 40, 50, 60])
    shifted = mended({name: column[4:5] for name, column in batch.items()})
    assert shifted.samples[0].before == "<1>[<5><6><7> => <6><7><2>]<2>"
    assert shifted.samples[0].after == "<1><5>[<6><7><2>]"
    assert printed(mended({name: column[:1] for name, column in batch.items()})) == (
        "nothing to mend\n"
    )
    packed = {
        "input_ids": torch.tensor([ids * 2]),
        "labels": torch.tensor([[-100, *ids[1:]] * 2]),
    }
    packed["position_ids"] = torch.tensor([[*range(5)] * 2])
    assert printed(mended(packed)) == "1 packed row taken apart: one sequence a row\n"
    empty = mended(
        {
            name: torch.full_like(column[:1], -100) if name == "labels" else column[:1]
            for name, column in batch.items()
        }
    )
    assert "left out: no-targets: 1 sequence, row 0: no token carries loss" in printed(empty)


def test_a_long_row_is_shown_near_its_change():
    ids = list(range(3, 203))
    ids[150] = EOS
    labels = [-100] * 100 + ids[100:150] + [-100] * 50
    (sample,) = mended(batch_of(ids, labels)).samples
    assert sample.before.startswith("... [<133>")
    assert sample.after.endswith(" ... 30 more")
    assert "<2>" in sample.after
    bare = Repair(samples=repair(read(batch_of([5, 6, 7], [6, 7, -100]))).samples)
    assert bare.samples[0].before == "[ 5 6  =>  6 7 ] 7 ", "numbers, without a tokenizer"


def test_several_batches_are_one_with_rows_counted_through():
    ids = [1, 5, 6, EOS]
    one = mended(
        {
            "input_ids": torch.tensor([ids] * 3),
            "labels": torch.tensor([[-100, -100, 6, -100], [-100] * 4, [-100, -100, 6, EOS]]),
        }
    )
    whole = Repair.join([one] * 5)
    assert whole.sources == [0, 2, 3, 5, 6, 8, 9, 11, 12, 14]
    assert [left.row for left in whole.left] == [1, 4, 7, 10, 13]
    assert whole.changes == {"turn-end-unscored": 5}
    assert whole.num_rows == 15
    assert [sample.row for sample in whole.samples] == [0, 3, 6]
    assert one.sources == [0, 2], "what is joined stays as it was"
    assert Repair.join([]) == Repair()


def test_written_rows_are_read_back(tmp_path):
    found = mended(batch_of([1, 5, 6, EOS], [-100, -100, 6, -100]))
    path = found.write(tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"input_ids": [1, 5, 6, EOS], "labels": [-100, -100, 6, EOS]}]


def test_the_report_of_an_audit_can_be_mended():
    batch = make_batch()
    truth = batch["labels"].clone()
    batch["labels"] = truth.roll(-1, 1)
    report = sgp.audit(make("llama").train(), batch, tokenizer=Words())
    assert [f.code for f in report.errors] == ["labels-shifted-twice"] * 3
    found = report.repair()
    again = sgp.Collator(pad_token_id=0)(found.rows)
    assert torch.equal(again["labels"], truth)
    del again["selection"]
    assert sgp.audit(make("llama").train(), again, tokenizer=Words()).errors == []


# -- padding that only its loss shows --------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([1, 5, 6, EOS, EOS, EOS], 4),
        ([1, 5, 6, 0, 0, 0], 3),
        ([1, 5, 6, EOS, EOS, EOS, 0, 0, 0], 4),
        ([1, 5, 6, EOS, EOS], 5),  # doubled, which may be meant
        ([1, 5, 6, EOS, 7, 7, 7], 7),  # padding, if one guesses
        ([1, 5, 6, *[7] * 40], 43),
    ],
)
def test_scored_padding_that_no_mask_names_is_left_out(ids, kept):
    """The first of the ends is the answer's."""
    batch = batch_of(ids, [-100, *ids[1:]], attention_mask=[1] * len(ids))
    found = mended(batch, WithoutBegins())
    assert found.rows == [{"input_ids": ids[:kept], "labels": [-100, *ids[1:kept]]}]
    dropped = len(ids) - kept
    assert found.changes == Counter({"padding-scored": 1} if dropped else {})
    assert found.labels == Counter({"padding-scored": dropped} if dropped else {})
    if dropped:
        assert "padding-scored: 1 sequence" in printed(found)
        assert found.samples[0].after.endswith(f"<{ids[kept - 1]}>]")
        again = sgp.Collator(pad_token_id=0, selection=False)(found.rows)
        assert "padding-scored" not in {f.code for f in look(again, tokenizer=WithoutBegins())}
    shifted = batch | {"labels": batch["labels"].roll(-1, 1)}
    assert mended(shifted, WithoutBegins()).rows == found.rows


def test_a_sequence_of_scored_padding_alone_is_counted_with_its_row():
    ids = [5, 6, EOS, EOS, EOS, EOS]
    batch = batch_of(ids, [-100, 6, EOS, -100, EOS, EOS], seq_idx=[0] * 3 + [1] * 3)
    found = mended(batch)
    assert found.rows == [{"input_ids": [5, 6, EOS], "labels": [-100, 6, EOS]}]
    assert (found.changes, found.labels) == ({"padding-scored": 1}, {"padding-scored": 2})
    assert found.left == []


def test_a_long_row_of_which_padding_is_left_out_is_shown_at_its_end():
    ids = [*range(3, 103), EOS, EOS, EOS]
    (sample,) = mended(batch_of(ids, [-100, *ids[1:]])).samples
    assert sample.after.endswith("<102><2>]")
