"""Every finding is planted and found, and absent from a batch that is right."""

import dataclasses
import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sgp
from sgp.auditing import look
from sgp.auditing.checks import find
from sgp.auditing.findings import SEVERITY, grouped, ranges
from sgp.auditing.view import read, suffixes
from tests.audited import (
    CONTEXTS,
    EOS,
    LENGTHS,
    B,
    T,
    Tokenizer,
    V,
    chat_tokenizer,
    make,
    make_batch,
    make_chat,
)


@pytest.fixture
def model():
    return make("llama").train()


@pytest.fixture
def batch():
    return make_batch()


def shifted_twice(c):
    c.labels[0] = torch.cat([c.labels[0, 1:], torch.tensor([-100])])


def other_labels(c):
    c.labels[1, 4] = (c.ids[1, 4] + 1) % V
    c.labels[1, 6] = (c.ids[1, 6] + 5) % V


def first_output_lost(c):
    c.batch["completion_mask"] = (c.labels != -100).long()
    c.labels[0, CONTEXTS[0]] = -100


def nothing_scored(c):
    c.labels[2] = -100


def packed(c):
    c.batch["position_ids"] = torch.arange(T).repeat(B, 1)
    c.batch["position_ids"][0, 9:] = torch.arange(T - 9)


class OtherLoss:
    """A forward with another loss."""

    def __init__(self, forward, loss):
        self.forward, self.loss = forward, loss
        self.__signature__ = inspect.signature(forward)

    def __call__(self, *args, **kwargs):
        out = self.forward(*args, **kwargs)
        out.loss = self.loss(out)
        return out


def attended_over_the_seam(c):
    """transformers looks at the mask alone, if there is one."""
    packed(c)
    c.labels[0, 9] = -100


def end_masked(c):
    c.labels[1, LENGTHS[1] - 1] = -100


def question_scored(c):
    chat = (("user", [9, 10]), ("assistant", [11]), ("user", [12]), ("assistant", [13]))
    c.batch.clear()
    c.batch.update(make_chat(*chat))
    c.batch["labels"][0, 3] = 10
    return chat_tokenizer()


def doubled_begin(c):
    c.ids[0, :2] = 1
    tokenizer = Tokenizer()
    tokenizer.bos_token_id = 1
    return tokenizer


def loss_of_everything(c):
    """A gradient at every position."""
    c.model.forward = OtherLoss(c.model.forward, lambda out: out.logits.logsumexp(-1).mean())


def detached_layer(c):
    c.model.model.layers[1].mlp.register_forward_hook(lambda *args: args[-1].detach())


@torch.no_grad()
def not_a_number(c):
    c.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")


def padding(c):
    c.labels[1, LENGTHS[1]] = c.ids[1, LENGTHS[1]] = 7


def special(c):
    c.labels[0, 8] = c.ids[0, 8] = 1


def no_end(c):
    c.labels[1, LENGTHS[1] - 1] = c.ids[1, LENGTHS[1] - 1] = 9


def context_too(c):
    c.labels[0, 1:] = c.ids[0, 1:]


def unused_tower(c):
    c.model.vision_tower = torch.nn.Linear(3, 3)


@torch.no_grad()
def adapter(c):
    """The MLP's output is multiplied by zero, as an adapter's is at first."""
    c.model.model.layers[1].mlp.down_proj.weight.zero_()


def no_graph(c):
    """Hidden states made without a graph; frozen, so nothing else is wrong."""
    layer = c.model.model.layers[0]
    c.model.requires_grad_(False)
    c.model.model.layers[1].requires_grad_(True)
    layer.forward = torch.no_grad()(layer.forward)


def auxiliary(c):
    c.model.forward = OtherLoss(c.model.forward, lambda out: out.loss + 0.2)


@torch.no_grad()
def confident(c):
    c.model.lm_head.weight.mul_(200)


PLANTS = {  # code: (the fault, the row where it is; None: everywhere)
    "labels-shifted-twice": (shifted_twice, 0),
    "labels-not-the-inputs": (other_labels, 1),
    "first-output-untrained": (first_output_lost, 0),
    "no-targets": (nothing_scored, 2),
    "crosses-boundary": (packed, 0),
    "attends-across-boundary": (attended_over_the_seam, 0),
    "turn-end-unscored": (end_masked, 1),
    "other-turns-scored": (question_scored, 0),
    "doubled-special": (doubled_begin, 0),
    "context-logit-gradient": (loss_of_everything, 0),
    "missing-gradient": (detached_layer, None),
    "nan": (not_a_number, 0),
    "padding-scored": (padding, 1),
    "special-scored": (special, 0),
    "no-eos": (no_end, 1),
    "all-scored": (context_too, 0),
    "module-not-run": (unused_tower, None),
    "zero-gradient": (adapter, None),
    "not-measured": (no_graph, None),
    "another-loss": (auxiliary, None),
    "worse-than-uniform": (confident, None),
}


@pytest.mark.parametrize("code", PLANTS)
def test_a_planted_fault_is_found(code, model, batch):
    fault, row = PLANTS[code]
    parts = SimpleNamespace(
        model=model, ids=batch["input_ids"], labels=batch["labels"], batch=batch
    )
    tokenizer = fault(parts) or Tokenizer()
    report = sgp.audit(model, batch, tokenizer=tokenizer)
    found = [finding for finding in report.findings if finding.code == code]
    assert found, report.findings
    assert found[0].severity == SEVERITY[code]
    assert found[0].message
    assert found[0].where.startswith("" if row is None else f"row {row}")
    assert bool(report.errors) == (SEVERITY[code] == "error")
    assert found[0].row == row


@pytest.mark.parametrize("kind", ["llama", "gpt2", "patched", "without a graph"])
def test_a_batch_without_targets_has_one_fault(kind, batch):
    """A loss of nothing is no number, or 0; all gradients are zero, or there are none."""
    batch["labels"][:] = -100
    model = make("gpt2" if kind == "gpt2" else "llama").train()
    if kind == "patched":
        sgp.huggingface.patch(model)
    elif kind == "without a graph":
        model.forward = OtherLoss(model.forward, lambda out: out.logits.detach().sum() * 0)
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert {f.code for f in report.findings} == {"no-targets"}


def test_the_table_of_severities_is_whole():
    """As the documentation's, in its order."""
    text = (Path(__file__).parents[1] / "docs/how-to/audit.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", text, re.MULTILINE)
    assert rows == list(SEVERITY.items())
    assert set(PLANTS) == set(SEVERITY)


# -- what is no fault ------------------------------------------------------------------------------


def seen(batch, **options):
    return {finding.code for finding in look(batch, tokenizer=Tokenizer(), **options)}


def test_labels_of_column_0_are_never_scored(batch):
    """`labels = input_ids.clone()`: the begin-of-text token has no predictor."""
    batch["labels"][0, 0] = batch["input_ids"][0, 0] = 1
    assert seen(batch) == set()


def test_left_padding(model, batch):
    ids = batch["input_ids"].clone()
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for b, (context, length) in enumerate(zip(CONTEXTS, LENGTHS, strict=True)):
        ids[b] = batch["input_ids"][b].roll(T - length)
        mask[b, : T - length] = 0
        labels[b, T - length + context :] = ids[b, T - length + context :]
    left = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    report = sgp.audit(model, left, tokenizer=Tokenizer())
    assert report.findings == []
    assert report.context_share == pytest.approx(sgp.audit(model, batch).context_share, rel=0.2)
    whole = torch.where(mask == 1, ids, -100)
    found = look({**left, "labels": whole}, tokenizer=Tokenizer())
    assert {f.code for f in found} == {"all-scored", "padding-scored"}
    assert [f.where for f in found if f.code == "padding-scored"] == [
        "row 1, token 4", "row 2, token 2",
    ]  # fmt: skip
    assert "on the left" in next(f.message for f in found if f.code == "padding-scored")


def seams(T, at):
    """Every way in which a batch says that a sequence begins at `at`."""
    first = torch.arange(T) < at
    number = torch.where(first, 1, 2)[None]
    pairs = (number[:, :, None] == number[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    return {
        "position_ids": torch.where(first, torch.arange(T), torch.arange(T) - at)[None],
        "attention_mask": number,
        "pairs": pairs[:, None],
        "biases": torch.where(pairs[:, None], 0.0, torch.finfo(torch.float32).min),
        "seq_idx": number.int(),
        "cu_seqlens": torch.tensor([0, at, T], dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0, at, T], dtype=torch.int32),
    }


@pytest.mark.parametrize("way", seams(T, 9))
def test_seams_are_found_however_they_are_said(way):
    ids = torch.arange(3, 3 + T)[None]
    ids[0, 8] = ids[0, -1] = EOS
    labels = torch.full_like(ids, -100)
    labels[0, 4:9], labels[0, 12:] = ids[0, 4:9], ids[0, 12:]
    key = "attention_mask" if way in ("pairs", "biases") else way
    batch = {"input_ids": ids, "labels": labels, key: seams(T, 9)[way]}
    assert seen(batch) == set()
    labels[0, 9] = ids[0, 9]
    assert seen(batch) == {"crosses-boundary"}
    labels[0, 9] = labels[0, 8] = -100
    found = look(batch, tokenizer=Tokenizer())
    assert [(f.code, f.where) for f in found] == [("turn-end-unscored", "row 0, token 8")]


def test_ends_of_text(model, batch):
    """A turn may end with another token than a text; a template may write one token more."""
    batch["input_ids"][:, -1] = batch["labels"][:, -1] = 9
    ids = {"input_ids": batch["input_ids"][:1], "labels": batch["labels"][:1]}
    assert seen(ids) == {"no-eos"}
    model.generation_config.eos_token_id = [EOS, 9]
    assert sgp.audit(model, ids, tokenizer=Tokenizer()).findings == []
    ids["labels"][0, -2] = ids["input_ids"][0, -2] = EOS
    assert seen(ids) == set()


def test_the_first_output_is_known_from_context_lengths(batch):
    batch["context_lengths"] = torch.tensor(CONTEXTS)
    assert seen(batch) == set()
    batch["labels"][2, CONTEXTS[2]] = -100
    assert seen(batch) == {"first-output-untrained"}
    del batch["context_lengths"]
    assert seen(batch) == set(), "nothing says so"


def test_padding_between_packed_sequences():
    ids, numbers = torch.arange(3, 15)[None], torch.tensor([[1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2]])
    ids[0, 4] = ids[0, -1] = EOS
    labels = torch.where(numbers == 0, -100, ids)
    labels[0, :3] = labels[0, 6] = -100
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
    for batch in (
        {"attention_mask": numbers},
        {"attention_mask": (numbers > 0).long(), "position_ids": positions},
    ):
        batch |= {"input_ids": ids, "labels": labels}
        assert seen(batch) == set()
        assert suffixes(read(batch)) is None, "of two sequences"
        wrong = {**batch, "labels": torch.where(numbers == 0, -100, ids)}
        found = look(wrong, tokenizer=Tokenizer())
        assert [(f.code, f.where) for f in found if f.code == "padding-scored"] == [
            ("padding-scored", "row 0, token 5")
        ]


def test_padding_without_a_mask_is_the_tokenizers(batch):
    """Also where the end of text pads: the first one ends it."""
    del batch["attention_mask"]
    pad = Tokenizer()
    for pad.pad_token_id in (0, EOS):
        for b, length in enumerate(LENGTHS):
            batch["input_ids"][b, length:] = pad.pad_token_id
        assert look(batch, tokenizer=pad) == []
        lengths = read(batch, tokenizer=pad).attended.sum(1).tolist()
        assert lengths == list(LENGTHS)
        wrong = {**batch, "labels": batch["labels"].clone()}
        wrong["labels"][1, LENGTHS[1] :] = pad.pad_token_id
        found = look(wrong, tokenizer=pad)
        assert ("padding-scored", "row 1, 5 tokens, 12 to 16") in [(f.code, f.where) for f in found]
    del batch["labels"]
    batch |= {"labels": wrong["labels"], "lengths": torch.tensor(LENGTHS)}
    assert "padding-scored" in seen(batch)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("given", ["selection", "shift_labels"])
def test_targets_that_nothing_shifts(batch, given, last_only):
    """The model would learn to repeat its input."""
    labels = batch.pop("labels")
    if last_only:  # of the row without padding, where no column follows it
        labels[:, :-1] = -100
    rows = (labels != -100).any(1).nonzero()[:, 0].tolist()
    if given == "selection":
        view = read(batch, selection=sgp.Selection.from_labels(labels))
    else:
        view = read({**batch, "shift_labels": labels})
    found = [f for f in find(view) if f.code == "labels-not-the-inputs"]
    assert [int(f.where.split()[1].strip(",")) for f in found] == rows
    assert all("predict itself" in f.message for f in found)
    right = read(batch, selection=sgp.Selection.from_labels(labels, shift=True))
    assert not [
        f for f in find(right) if f.code in ("labels-shifted-twice", "labels-not-the-inputs")
    ]


def test_a_token_that_repeats_is_shifted():
    ids = torch.full((1, 6), 7)
    labels = ids.clone()
    labels[:, :3] = -100
    assert not [f for f in look({"input_ids": ids, "labels": labels}) if f.severity == "error"]


# -- where a finding begins, and where it ends -----------------------------------------------------


def test_padding_that_a_mask_marks_as_output_is_no_lost_output(batch):
    """A mask that was padded with ones, or made before the row was cut."""
    batch["completion_mask"] = (batch["labels"] != -100).long()
    batch["completion_mask"][1, LENGTHS[1] + 1 :] = 1
    assert seen(batch) == set()


def test_a_few_labels_that_are_the_next_token_are_not_shifted_labels():
    """All but one of them have to be: the last token of a row has no next one."""
    ids, labels = torch.arange(20, 30)[None], torch.full((1, 10), -100)
    labels[0, 4:9] = ids[0, 5:10]
    assert seen({"input_ids": ids, "labels": labels}) >= {"labels-shifted-twice"}
    labels[0, 9] = 40
    assert seen({"input_ids": ids, "labels": labels}) >= {"labels-shifted-twice"}
    labels[0, 8] = 40
    found = seen({"input_ids": ids, "labels": labels})
    assert "labels-not-the-inputs" in found
    assert "labels-shifted-twice" not in found


def test_an_end_of_text_before_two_more_tokens_is_not_at_the_end(batch):
    batch = {"input_ids": batch["input_ids"][:1], "labels": batch["labels"][:1]}
    batch["input_ids"][0, -3:] = batch["labels"][0, -3:] = torch.tensor([9, EOS, 9])
    assert seen(batch) == set(), "a template's line break"
    batch["input_ids"][0, -3:] = batch["labels"][0, -3:] = torch.tensor([EOS, 9, 9])
    assert seen(batch) == {"no-eos"}


def test_packed_sequences_of_one_token():
    """Each has position 0: a position that does not rise begins a sequence."""
    ids = torch.arange(3, 11)[None]
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0, 1, 2]])}
    labels = torch.full_like(ids, -100)
    labels[0, 2] = ids[0, 2]
    for at in (3, 4, 5):
        wrong = labels.clone()
        wrong[0, at] = ids[0, at]
        found = look({**batch, "labels": wrong})
        assert [(f.code, f.where) for f in found] == [("crosses-boundary", f"row 0, token {at}")]
    assert look({**batch, "labels": labels}) == []


@pytest.mark.parametrize(("other", "said"), [("rounded", False), (0.98, True), (1.02, True)])
def test_a_loss_of_bfloat16_is_no_other_loss_and_two_per_cent_are_one(other, said, model, batch):
    def loss(out):
        return out.loss.bfloat16().float() if other == "rounded" else out.loss * other

    model.forward = OtherLoss(model.forward, loss)
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert [f.code for f in report.findings] == ["another-loss"] * said
    assert report.loss != pytest.approx(-mean_log_prob(report), rel=1e-6), "it is another number"


def mean_log_prob(report):
    losses = [token.loss for row in report.tokens for token in row if token.loss is not None]
    return -sum(losses) / len(losses)


@pytest.mark.parametrize(("nats", "said"), [(0.5, False), (2.0, True), (10.0, True)])
def test_worse_than_uniform_by_more_than_a_nat(nats, said, model, batch):
    """Logits that are 0 but for the target's give a loss of any size."""
    targets = torch.full((B, T), -100)
    targets[:, :-1] = batch["labels"][:, 1:]
    # log(V - 1 + exp(x)) - x = log V + nats for the target's logit x
    x = -math.log(V * math.exp(nats) - 1) + math.log(V - 1)

    def logits(_module, _args, result):
        return 0 * result + x * torch.nn.functional.one_hot(targets.clamp(min=0), V)

    model.lm_head.register_forward_hook(logits)
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert -mean_log_prob(report) == pytest.approx(math.log(V) + nats)
    assert ("worse-than-uniform" in {f.code for f in report.findings}) == said


def test_a_gradient_that_is_not_finite_although_the_loss_is(model, batch):
    """As where a fused operator's backward overflows: no token's loss shows it."""
    layer = model.model.layers[0].mlp.down_proj
    layer.register_full_backward_hook(lambda _, grads, __: (torch.full_like(grads[0], torch.inf),))
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert math.isfinite(report.loss)
    found = [f for f in report.findings if f.code == "nan"]
    assert [f.where for f in found] == [""]
    assert "model.layers.0.mlp.gate_proj.weight" in found[0].message
    assert report.errors == found


def test_labels_shifted_twice_are_one_fault(batch):
    """Their ends stand one token behind what carries loss."""
    batch["labels"] = batch["labels"].roll(-1, 1)
    assert seen(batch) == {"labels-shifted-twice"}


def test_labels_shifted_twice_in_a_packed_row():
    """One label of each sequence has no next token."""
    ids = torch.arange(3, 15)[None]
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3] * 3])}
    labels = ids.roll(-1, 1)
    labels[0, [3, 7, 11]] = 40
    kinds = {"labels-shifted-twice", "labels-not-the-inputs"}
    assert seen({**batch, "labels": labels}) & kinds == {"labels-shifted-twice"}
    labels[0, 1] = 40
    assert seen({**batch, "labels": labels}) & kinds == {"labels-not-the-inputs"}


def test_an_output_is_what_both_masks_say(batch):
    """A completion that begins with a tool's turn has no lost output."""
    batch["completion_mask"] = batch["assistant_masks"] = (batch["labels"] != -100).long()
    assert seen(batch) == set()
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][0, CONTEXTS[0] - 2 : CONTEXTS[0]] = 1
    assert seen(batch) == set()
    del batch["assistant_masks"]
    assert seen(batch) == {"first-output-untrained"}


def test_what_many_rows_share_is_one_group(batch):
    batch["labels"][:2] = -100
    found = look(batch)
    (group,) = grouped(found)
    assert (group.code, group.severity, group.rows) == ("no-targets", "error", (0, 1))
    assert group.findings == tuple(found)
    assert str(group).startswith("error: no-targets (2 rows, 0 to 1): no token carries loss")
    (one,) = grouped(found[:1])
    assert str(one) == str(found[0])
    twice = [found[0], dataclasses.replace(found[0], where="row 0, again")]
    assert str(grouped(twice)[0]).startswith("error: no-targets (row 0, 2 times): ")
    whole = [dataclasses.replace(f, severity="note") for f in found]
    assert len(grouped([found[0], *whole])) == 2


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], ""),
        ([3], "3"),
        (range(21, 51), "21 to 50"),
        ([9, 8, 7, 6, 5, 2, 0, 0], "0, 2, 5 to 9"),
        (range(0, 20, 2), "0, 2, 4, 6, 8, 10, ..."),
        (range(0, 12, 2), "0, 2, 4, 6, 8, 10"),
    ],
)
def test_ranges(numbers, expected):
    assert ranges(numbers) == expected
