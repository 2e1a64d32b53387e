"""Greedy answers in a batch's own contexts: what is said, whether it ends, what stays as it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sgp
from sgp.auditing.answers import BEYOND, answer
from sgp.auditing.view import read
from tests import families
from tests.audited import CONTEXTS, EOS, LENGTHS, B, T, Tokenizer, V, make, make_batch


class Words(Tokenizer):
    """Decodes each token."""

    def decode(self, ids):
        return " ".join(map(str, ids))


class Parrot(nn.Module):
    """Says the row's tokens by heart, whatever it is asked: what follows (length, last token)."""

    def __init__(self, rows, twist=None):
        super().__init__()
        self.rows, self.twist = rows, twist
        self.weight = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout()

    def forward(self, input_ids):
        assert not self.drop.training
        assert not torch.is_grad_enabled()
        torch.rand(1)
        logits = torch.zeros(*input_ids.shape, V)
        ids = input_ids[0].tolist()
        for row in self.rows:
            if row[: len(ids)] == ids and len(ids) < len(row):
                logits[0, -1, row[len(ids)] if self.twist is None else self.twist] = 1.0
        return SimpleNamespace(logits=logits)


def known_rows(batch):
    return [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), LENGTHS, strict=True)]


def test_a_model_that_knows_the_answers_says_them_and_ends():
    batch = make_batch()
    rows = known_rows(batch)
    found = answer(Parrot(rows), read(batch, tokenizer=Words()), Words(), 2)
    assert [a.row for a in found] == [0, 1]
    for a, row, context in zip(found, rows, CONTEXTS, strict=False):
        assert a.expected == a.generated == Words().decode(row[context:])
        assert a.ends
        assert a.tokens == len(row) - context


def test_an_answer_that_does_not_end_is_16_tokens_longer():
    batch = make_batch()
    found = answer(Parrot([], twist=5), read(batch, tokenizer=Words()), Words(), B)
    assert [a.tokens for a in found] == [
        n - c + BEYOND for n, c in zip(LENGTHS, CONTEXTS, strict=True)
    ]
    assert not any(a.ends for a in found)


def test_a_turn_may_end_with_another_token_than_a_text():
    batch = make_batch()
    parrot = Parrot(known_rows(batch), twist=9)
    view = read(batch, tokenizer=Words(), eos=(9,))
    assert [(a.generated, a.ends) for a in answer(parrot, view, None, 1)] == [("9", True)]


def test_a_full_window_leaves_no_room_for_an_answer():
    """The rows after it are asked in its place."""
    model, batch = make("llama"), make_batch()
    model.config = copy.deepcopy(model.config)
    model.config.max_position_embeddings = CONTEXTS[0]
    found = answer(model, read(batch, tokenizer=Words()), Words(), 1)
    assert [(a.row, a.tokens) for a in found] == [(1, CONTEXTS[0] - CONTEXTS[1])]


@pytest.mark.parametrize("name", ["masked", "other", "blank", "beyond"])
def test_whether_the_labels_end(name):
    """By what carries loss; a template may write a line break after an end."""
    batch = make_batch()
    ids, labels = batch["input_ids"], batch["labels"]
    if name == "masked":
        labels[0, -1] = -100
    elif name == "other":
        ids[0, -1] = labels[0, -1] = 9
    else:
        at = -2 if name == "blank" else -3
        ids[0, at], ids[0, at + 1 :] = EOS, 9
        labels[0, at:] = ids[0, at:]
    found = answer(Parrot([]), read(batch, tokenizer=Words()), Words(), B)
    assert [a.expected_ends for a in found] == [name == "blank", True, True]


def test_a_model_that_does_not_say_its_embeddings():
    class Wrapped(Parrot):
        def get_input_embeddings(self):
            raise NotImplementedError

    batch = make_batch()
    found = answer(Wrapped(known_rows(batch)), read(batch, tokenizer=Words()), Words(), 1)
    assert found[0].generated == found[0].expected


def test_each_sequence_of_a_packed_row_has_its_own_context():
    """A row whose first sequence carries no loss: its tokens are no context of the second's."""
    ids = torch.arange(3, 13)[None]
    ids[0, -1] = EOS
    labels = torch.full_like(ids, -100)
    labels[0, 7:] = ids[0, 7:]
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.tensor([[*range(5), *range(5)]]),
    }
    (found,) = answer(Parrot([ids[0, 5:].tolist()]), read(batch, tokenizer=Words()), Words(), 1)
    assert found.generated == found.expected == Words().decode(ids[0, 7:].tolist())


def test_of_several_turns_the_first_is_asked_for():
    batch = make_batch()
    batch["labels"][0, 9:12] = -100
    found = answer(Parrot([]), read(batch, tokenizer=Words()), Words(), 1)
    assert found[0].expected == Words().decode(batch["input_ids"][0, 6:9].tolist())


def test_rows_without_a_context_or_without_loss_have_none():
    batch = make_batch()
    batch["labels"][1] = -100
    left = batch["attention_mask"]
    left[2, : CONTEXTS[2]] = 0  # the whole context
    parrot = Parrot(known_rows(batch))
    view = read(batch, tokenizer=Words())
    assert [a.row for a in answer(parrot, view, Words(), B)] == [0]
    assert answer(parrot, view, Words(), 0) == ()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generate_and_the_loop_say_the_same(name):
    """With the model's own cache, or once for each token; at the window's end both stop."""
    model, batch = make(name), make_batch()
    view = read(batch, tokenizer=Words())

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids)

    by_generate = answer(model, view, Words(), B)
    assert by_generate == answer(Bare(), view, Words(), B)
    assert len(by_generate) == B
    model.config = copy.deepcopy(model.config)  # which other tests share
    model.config.max_position_embeddings = CONTEXTS[0] + 2
    short = answer(model, view, Words(), B)
    assert [(a.row, a.tokens, a.ends) for a in short] == [(0, 2, False), (1, 6, False)]
    assert short == answer(Bare(), view, Words(), B)


@pytest.mark.parametrize("kind", ["whole", "patched", "bare"])
def test_modes_gradients_and_random_state_are_as_before(kind):
    model, batch = make("llama"), make_batch()
    if kind == "patched":
        sgp.huggingface.patch(model)
    if kind == "bare":
        model = Parrot(known_rows(batch))
    model.train()
    next(iter(model.children())).eval()  # a part that is frozen, as users have it
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = answer(model, read(batch, tokenizer=Words()), Words(), 2)
    assert len(found) == 2
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_mixtures_recording_hooks_do_not_stay():
    model = families.make("qwen3_moe")
    hooks = [len(m._forward_hooks) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    assert len(answer(model, read(families.make_batch(), tokenizer=Words()), Words(), 1)) == 1
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    with torch.no_grad():
        assert len(model(**make_batch(), output_router_logits=True).router_logits) == 2


@pytest.mark.parametrize("model", [make("llama"), Parrot([])], ids=["llama", "bare"])
def test_a_model_without_a_configuration_of_generation(model):
    view = read(make_batch(), tokenizer=Words())
    expected = answer(model, view, Words(), B)
    model.generation_config = None
    assert answer(model, view, Words(), B) == expected
    assert len(expected) == B


def test_the_modes_are_as_before_after_an_error():
    class Broken(Parrot):
        def forward(self, input_ids):
            raise RuntimeError(f"no memory for {tuple(input_ids.shape)}")

    model = Broken([]).train()
    with pytest.raises(RuntimeError, match=r"no memory for \(1, 6\)"):
        answer(model, read(make_batch(), tokenizer=Words()), Words(), 1)
    assert model.training
    assert model.drop.training


def test_what_is_trained_in_is_said():
    """A few steps on one row: a real model answers as it was taught, and stops there."""
    model, batch = make("llama").train(), make_batch()
    one = {k: v[:1] for k, v in batch.items()}
    before = answer(model, read(one, tokenizer=Words()), Words(), 1)[0]
    assert before.generated != before.expected
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        model(**one).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = answer(model, read(one, tokenizer=Words()), Words(), 1)[0]
    assert after.generated == after.expected
    assert after.ends
    assert after.tokens == T - CONTEXTS[0]


def test_an_audit_answers_if_it_is_asked():
    model, batch = make("llama").train(), make_batch()
    assert sgp.audit(model, batch, tokenizer=Words()).answers == ()
    report = sgp.audit(model, batch, tokenizer=Words(), generate=2)
    assert report.answers == answer(model, report.view, Words(), 2)
    assert [a.row for a in report.answers] == [0, 1]
    assert len(sgp.audit(model, batch, generate=9).answers) == B


def test_answers_in_the_dtype_that_is_asked_for():
    model, batch, seen = make("llama"), make_batch(), []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    answer(model, read(batch, tokenizer=Words()), Words(), 1, torch.bfloat16)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that PEFT uses
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "LoraConfig"])
def test_adapters_and_virtual_tokens_have_their_part_in_an_answer(kind):
    peft = pytest.importorskip("peft")
    more = {"r": 2} if kind == "LoraConfig" else {"num_virtual_tokens": 3}
    model = peft.get_peft_model(make("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **more))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(generator=torch.Generator().manual_seed(3))
    batch = make_batch()
    (found,) = answer(model, read(batch, tokenizer=Words()), None, 1)
    ids = batch["input_ids"][:1, : CONTEXTS[0]]
    with torch.no_grad():
        for _ in range(found.tokens):
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert found.generated == " ".join(map(str, ids[0, CONTEXTS[0] :].tolist()))
    (bare,) = answer(make("llama"), read(batch, tokenizer=Words()), None, 1)
    assert found.generated != bare.generated
