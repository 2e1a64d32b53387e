"""Turns: how they end, who speaks, and what of that the labels may say."""

import pytest
import torch

import sgp
from sgp.auditing import look
from sgp.auditing.repair import repair
from sgp.auditing.turns import learn
from sgp.auditing.view import read
from tests.audited import CHAT, CHATML, EOS, Tokenizer, chat_tokenizer, make_chat

START, END, USER, ASSISTANT, SYSTEM, IMAGE = 3, 4, 5, 6, 7, 8
CHATTED = (
    ("user", [9, 10]), ("assistant", [11, 12]), ("user", [13]), ("assistant", [14, 15]),
)  # fmt: skip


def found(batch, tokenizer=None, **options):
    findings = look(batch, tokenizer=tokenizer or chat_tokenizer(), **options)
    return [(f.code, f.severity, f.tokens) for f in findings]


def codes(batch, tokenizer=None, **options):
    return {code for code, *_ in found(batch, tokenizer, **options)}


def ends(batch):
    """The positions of the ends of the assistant's turns."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    return ((ids == END) & (labels == END)).nonzero()[:, 0].tolist()


# -- what a template says --------------------------------------------------------------------------


def test_what_is_learned():
    turns = learn(chat_tokenizer())
    assert turns.ends == {END}
    assert dict(turns.headers) == {
        "assistant": (START, ASSISTANT), "user": (START, USER), "system": (START, SYSTEM),
    }  # fmt: skip
    assert turns.unlearned == {0, 1, START, IMAGE}
    assert not turns.several_begins


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}",
        "no messages",
        "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}",
    ],
)
def test_templates_that_say_nothing(template):
    tokenizer = chat_tokenizer(template)
    turns = learn(tokenizer)
    assert turns.headers == ()
    assert turns.ends == set()
    batch = make_chat(*CHATTED)
    batch["labels"][0, -1] = batch["input_ids"][0, -1] = EOS
    assert codes(batch, tokenizer) == set()


def test_a_template_that_wants_parts():
    """As those of vision models do; of a content that is text some write nothing, some raise."""
    parts = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    strict = "{% if m.content is string %}{{ raise_exception('no list') }}{% endif %}" + parts
    for content in (parts, strict):
        tokenizer = chat_tokenizer(CHATML.replace("{{ m.content }}", content))
        assert learn(tokenizer) == learn(chat_tokenizer())
        assert found(make_chat(*CHATTED), tokenizer) == []


def test_a_template_that_is_changed_is_asked_again():
    tokenizer = chat_tokenizer()
    assert learn(tokenizer) is learn(tokenizer)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    assert learn(tokenizer).ends == {EOS}


class Bare:
    """Without text, special tokens or a place for weak references."""

    __slots__ = ("eos_token_id",)

    def __init__(self, eos):
        self.eos_token_id = eos

    def decode(self, ids):
        return str(ids[0])


@pytest.mark.parametrize("eos", [EOS, [EOS, END], None])
def test_tokenizers_of_few_words(eos):
    batch = make_chat(*CHATTED)
    batch["input_ids"][0, -1] = batch["labels"][0, -1] = EOS
    expected = {"turn-end-unscored"} if eos == [EOS, END] else set()
    batch["labels"][0, ends(batch)] = -100
    assert codes(batch, Bare(eos)) == expected


class Processor:
    """As of a vision model: the template is its own, the tokens are its tokenizer's."""

    chat_template = CHATML

    def __init__(self):
        self.tokenizer = chat_tokenizer(None)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def test_a_processor_has_a_tokenizer():
    assert learn(Processor()) == learn(chat_tokenizer())
    batch = make_chat(*CHATTED)
    assert codes(batch, Processor()) == set()
    batch["labels"][0, ends(batch)] = -100
    assert codes(batch, Processor()) == {"turn-end-unscored"}


class Raises:
    """A tokenizer that cannot be asked."""

    chat_template, eos_token_id, all_special_ids = CHATML, EOS, (0, 1, EOS)

    def __init__(self, text):
        self.text = text

    def decode(self, ids):
        return str(ids[0])

    def get_added_vocab(self):
        return {"<|im_start|>": START, "<|im_end|>": END}

    def apply_chat_template(self, messages, **_):
        if self.text:
            return "".join(f"<|im_start|>{m['role']} {m['content']}<|im_end|>" for m in messages)
        raise RuntimeError("no")

    def __call__(self, text, **_):
        raise NotImplementedError(text)


@pytest.mark.parametrize("text", [True, False])
def test_a_tokenizer_that_raises_is_not_asked_again(text):
    assert learn(Raises(text)).headers == ()
    assert codes(make_chat(*CHATTED), Raises(text)) == {"no-eos"}


# -- ends ------------------------------------------------------------------------------------------


def test_every_end_of_a_turn_is_looked_at():
    batch = make_chat(*CHATTED)
    assert found(batch) == []
    first, last = ends(batch)
    for without in ([first], [last], [first, last]):
        wrong = {**batch, "labels": batch["labels"].clone()}
        wrong["labels"][0, without] = -100
        assert found(wrong) == [("turn-end-unscored", "error", tuple(without))]
        report = look(wrong, tokenizer=chat_tokenizer())
        assert "no-eos" not in {f.code for f in report}, "said once"


def test_a_turn_of_which_nothing_carries_loss_needs_no_end():
    """As where only the last answer is trained."""
    batch = make_chat(*CHATTED)
    batch["labels"][0, : ends(batch)[0] + 1] = -100
    assert found(batch) == []


def test_a_sequence_that_begins_with_an_end():
    """GPT-2's begin of text is its end; that of the next sequence is not this one's."""
    ids = torch.tensor([[EOS, 9, 10, 11, EOS, 12, 13, EOS]])
    labels = torch.tensor([[-100, -100, 10, 11, -100, -100, 13, EOS]])
    batch = {"input_ids": ids, "labels": labels}
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    assert codes({**batch, "position_ids": positions}, Tokenizer()) == {"no-eos"}
    assert codes(batch, Tokenizer()) == {"turn-end-unscored"}


def test_white_space_before_an_end():
    """A template may write a blank there; more than two tokens of it are no template's."""

    class Blanks(Tokenizer):
        def decode(self, ids):
            return " " if ids[0] == 7 else f"<{ids[0]}>"

    def row(between):
        ids = [9, 10, 11, *[7] * between, EOS, 12, 13, EOS]
        labels = [-100, 10, 11, *[-100] * between, -100, -100, 13, EOS]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}

    for between, said in ((0, True), (1, True), (2, True), (3, False)):
        expected = {"turn-end-unscored"} if said else set()
        assert codes(row(between), Blanks()) == expected, between
    assert codes(row(1), Tokenizer()) == set(), "another word is no blank"


def test_what_a_template_writes_after_an_end_is_none():
    """<|im_end|> carries loss and </s> after it does not, as Phi-3's template writes them."""
    batch = make_chat(*CHATTED)
    more = torch.tensor([[EOS]])
    batch = {
        "input_ids": torch.cat([batch["input_ids"], more], 1),
        "labels": torch.cat([batch["labels"], torch.full_like(more, -100)], 1),
    }
    assert found(batch) == []
    batch["labels"][0, ends(batch)[-1]] = -100
    assert codes(batch) == {"turn-end-unscored"}
    ids = torch.tensor([[9, 10, END, 7, EOS]])  # a line break is learned too, and no more
    labels = torch.tensor([[-100, 10, END, 7, -100]])
    assert found({"input_ids": ids, "labels": labels}) == []


def test_an_end_that_begins_the_next_message():
    """GLM's <|user|>, which its generation_config has among the ends."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% else %}<|im_end|>"
        "{% endif %} {{ m.content }} {% endfor %}"
    )
    tokenizer = chat_tokenizer(template, eos_token=None)
    ids = [START, 9, END, 10, 11, START, 12, END, 13, START]
    labels = [-100, -100, -100, 10, 11, START, -100, -100, 13, START]
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    assert codes(batch, tokenizer, eos=(START,)) == set()
    for at in (5, 9):
        wrong = {**batch, "labels": batch["labels"].clone()}
        wrong["labels"][0, at] = -100
        assert found(wrong, tokenizer, eos=(START,)) == [("turn-end-unscored", "error", (at,))]


def test_padding_with_the_end_of_text():
    """What masks padding by its token loses the end; the first of them is one, if attended."""
    ids = torch.tensor([[9, 10, 11, EOS, EOS, EOS]])
    labels = torch.tensor([[-100, -100, 11, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = Tokenizer()
    padded.pad_token_id = EOS
    for batch in (
        {"input_ids": ids, "labels": labels, "attention_mask": mask},
        {"input_ids": ids, "labels": labels},
    ):
        assert codes(batch, padded) == {"turn-end-unscored"}
        right = {**batch, "labels": labels.clone()}
        right["labels"][0, 3] = EOS
        assert codes(right, padded) == set()
    mask[0, 3] = 0  # it counts as padding: there is no end
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    assert codes(batch, padded) == {"no-eos"}


def test_who_is_at_fault_for_a_missing_end_is_said_by_severity():
    """Surely not cut: shorter than the window, or followed by something."""
    ids = torch.tensor([[9, 10, 11, 12, 0, 0], [9, 10, 11, 12, 13, 14]])
    labels = torch.where(ids > 10, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()}
    pairs = ("no-eos", "error", (3,)), ("no-eos", "warning", (5,))
    assert found(batch, Tokenizer()) == list(pairs)
    severe = [severity for _, severity, _ in found(batch, Tokenizer(), max_length=6)]
    assert severe == ["error", "warning"]
    severe = [severity for _, severity, _ in found(batch, Tokenizer(), max_length=8)]
    assert severe == ["error", "error"]
    severe = [severity for _, severity, _ in found(batch, Tokenizer(), max_length=4)]
    assert severe == ["warning", "warning"]
    left = {k: torch.stack([v[0].roll(2), v[1]]) for k, v in batch.items()}
    assert [f.severity for f in look(left, tokenizer=Tokenizer())] == ["error", "warning"]
    packed = {
        "input_ids": ids[1:], "labels": labels[1:].clone(),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }  # fmt: skip
    packed["labels"][0, 3:5] = -100
    both = ("no-eos", "warning", (2,)), ("no-eos", "warning", (5,))
    assert found(packed, Tokenizer()) == list(both), "a window of three may have cut both"
    rest = {k: torch.cat([v, v[:, :4] * 0], 1) for k, v in packed.items()}  # padding, no one's
    rest["position_ids"][0, -4:] = torch.arange(4)
    rest["labels"][0, -4:] = -100
    assert found(rest, Tokenizer()) == list(both)
    packed["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1]])
    packed["labels"] = torch.where(torch.arange(6) == 4, -100, ids[1:])
    assert found(packed, Tokenizer())[:2] == [
        ("no-eos", "error", (5,)), ("no-eos", "warning", (3,)),
    ]  # fmt: skip
    asked = {"no-eos": "warning"}
    assert {f.severity for f in look(packed, tokenizer=Tokenizer(), severity=asked)} == {"warning"}


def test_scored_padding_behind_a_scored_end_is_one_fault():
    ids = torch.tensor([[9, 10, 11, EOS, 0, 0]])
    labels = torch.where(torch.arange(6) > 1, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()}
    assert codes(batch, Tokenizer()) == {"padding-scored"}


def test_sequences_that_a_window_cut_are_no_error():
    """Also where they are padded further, to a multiple."""
    rows = [{"input_ids": list(range(9, 9 + n)), "completion_mask": [0] * 2 + [1] * (n - 2)}
            for n in (9, 12, 5)]  # fmt: skip
    rows[2]["input_ids"][-1] = EOS
    for packed in (False, True):
        batch = sgp.Collator(max_length=7, pad_to_multiple_of=8, packed=packed)(rows)
        severe = [(code, severity) for code, severity, _ in found(batch, Tokenizer())]
        assert severe == [("no-eos", "warning")] * 2


def test_an_answer_that_another_turn_follows_needs_an_end():
    """The last one too, where a question follows it; said once, and surely not cut."""
    batch = make_chat(*CHATTED, ("user", [16]))
    first, last = ends(batch)
    assert found(batch) == []
    for at in ([first], [last], [first, last]):
        kept = torch.ones_like(batch["input_ids"][0], dtype=torch.bool)
        kept[at] = False
        cut = {k: v[:, kept] for k, v in batch.items()}
        expected = tuple(t - n - 1 for n, t in enumerate(at))
        assert {(code, level) for code, level, _ in found(cut)} == {("no-eos", "error")}
        assert sorted(t for *_, tokens in found(cut) for t in tokens) == list(expected)


def test_messages_in_a_row_and_ends_that_no_one_names():
    """An answer may go on with another message; a special token before a turn may be an end."""
    going_on = make_chat(("user", [9]), ("assistant", [10]), ("assistant", [11]), ("user", [12]))
    kept = torch.ones_like(going_on["input_ids"][0], dtype=torch.bool)
    kept[7] = False
    assert codes({k: v[:, kept] for k, v in going_on.items()}) == set()
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [*CHAT[3:5], CHAT[8], "<|eom_id|>", "<|tool_end|>"]}
    )
    for name, expected in (("<|eom_id|>", set()), ("<|tool_end|>", {"no-eos"})):
        batch, token = make_chat(*CHATTED), tokenizer.convert_tokens_to_ids(name)
        at = ends(batch)[0]
        batch["input_ids"][0, at] = batch["labels"][0, at] = token
        assert codes(batch, tokenizer) == expected


@pytest.mark.parametrize("calls_end", [True, False])
def test_calls_of_tools_that_a_template_does_not_end(calls_end):
    """Results that stand in the same turn, as Apertus has them."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}[TOOL_OUT] {{ m.content }} [/TOOL_OUT] "
        "{% else %}<|im_start|>{{ m.role }} {{ m.content }} {% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.arguments.x }} {% if END %}<|im_end|>{% endif %}"
        "{% else %}<|im_end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    ).replace("END", str(calls_end))
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [*CHAT[3:5], CHAT[8], "[TOOL_OUT]", "[/TOOL_OUT]"]}
    )
    result, back = tokenizer.convert_tokens_to_ids(["[TOOL_OUT]", "[/TOOL_OUT]"])
    turns = learn(tokenizer)
    assert dict(turns.headers)["tool"] == (result,)
    assert turns.calls_end == calls_end
    asked = [START, USER, 9, END, START, ASSISTANT]
    ids = torch.tensor([[*asked, 10, result, 11, back, START, ASSISTANT, 12, END]])
    labels = torch.where(torch.isin(ids, torch.tensor([10, 12])), ids, -100)
    labels[0, -1] = END
    batch = {"input_ids": ids, "labels": labels}
    assert codes(batch, tokenizer) == ({"no-eos"} if calls_end else set())


def test_scored_padding_is_no_answer_without_an_end():
    ids = torch.tensor([[9, 10, 11, EOS, 0, 0, 0, 0]])
    labels = torch.where(torch.arange(8) > 1, ids, -100)
    mask = (ids > 0).long()
    assert codes({"input_ids": ids, "labels": labels, "attention_mask": mask}, Tokenizer()) == {
        "padding-scored"
    }
    labels[0, 3] = ids[0, 3] = 12
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    assert codes(batch, Tokenizer()) == {"padding-scored", "no-eos"}


def test_a_blank_with_loss_behind_an_end_without():
    """The end stands there: one fault, and not one that is missing."""

    class Blanks(Tokenizer):
        def decode(self, ids):
            return " " if ids[0] == 7 else f"<{ids[0]}>"

    for behind, expected in (
        ([7], {"turn-end-unscored"}),
        ([7, 7], {"turn-end-unscored"}),
        ([8], {"turn-end-unscored"}),
        ([8, 8], {"turn-end-unscored", "no-eos"}),
        ([7, 7, 7], {"turn-end-unscored", "no-eos"}),
    ):
        ids = torch.tensor([[9, 10, 11, EOS, *behind]])
        labels = torch.where(
            torch.isin(torch.arange(ids.shape[1]), torch.tensor([0, 3])), -100, ids
        )
        assert codes({"input_ids": ids, "labels": labels}, Blanks()) == expected, behind
    ids = torch.tensor([[9, 10, EOS, 9, 12]])  # of the next sequence
    labels = torch.tensor([[-100, 10, -100, -100, 12]])
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    assert codes(batch, Blanks()) == {"turn-end-unscored", "no-eos"}


def test_a_sequence_alone_may_be_cut():
    """Whatever stands beside it: padding to a multiple, or a sequence without loss."""
    row = {"input_ids": list(range(9, 18)), "completion_mask": [0] * 2 + [1] * 7}
    other = {"input_ids": list(range(20, 29)), "completion_mask": [0] * 6 + [1] * 3}
    for rows in ([row], [row, other]):
        batch = sgp.Collator(max_length=7, pad_to_multiple_of=16, packed=True)(rows)
        batch["labels"] = torch.where(batch["input_ids"] < 20, batch["labels"], -100)
        said = [(code, severity) for code, severity, _ in found(batch, Tokenizer())]
        assert said == [("no-eos", "warning")]
        severe = [severity for _, severity, _ in found(batch, Tokenizer(), max_length=8)]
        assert severe == ["error"]


def test_messages_are_text():
    batch = make_chat(*CHATTED)
    batch["labels"][0, -1] = batch["input_ids"][0, -1] = 20
    (finding,) = look(batch, tokenizer=chat_tokenizer(), max_length=64)
    assert "'</s>', '<|im_end|>'" in finding.message
    assert "20" not in finding.message


# -- who speaks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "system"])
def test_words_of_others_with_loss_are_told_by_role(role):
    batch = make_chat((role, [20, 21, 22]), *CHATTED)
    assert found(batch) == []
    batch["labels"][0, 2:5] = batch["input_ids"][0, 2:5]
    (finding,) = look(batch, tokenizer=chat_tokenizer())
    assert (finding.code, finding.severity) == ("other-turns-scored", "warning")
    assert finding.tokens == (2, 3, 4)
    assert finding.where == "row 0, 3 tokens, 2 to 4"
    assert f"of {role} turns" in finding.message


def test_what_all_scored_says_is_not_said_again():
    batch = make_chat(*CHATTED)
    batch["labels"] = batch["input_ids"].clone()
    assert codes(batch) == {"all-scored", "special-scored"}


def test_a_token_that_crosses_a_boundary_is_one_fault():
    """Not also a header or another's word with loss."""
    first, second = make_chat(*CHATTED), make_chat(*CHATTED)
    second["labels"][0, 0] = START
    batch = {k: torch.cat([first[k], second[k]], 1) for k in first}
    T = first["input_ids"].shape[1]
    batch["position_ids"] = torch.arange(T).repeat(2)[None]
    assert found(batch) == [("crosses-boundary", "error", (T,))]
    batch["labels"][0, T + 2] = batch["input_ids"][0, T + 2]
    assert codes(batch) == {"crosses-boundary", "other-turns-scored"}


def test_a_text_without_turns_has_no_others():
    """Prompt and completion as text, with the tokenizer of a chat."""
    ids = torch.tensor([[1, 20, 21, 22, 23, EOS]])
    labels = torch.where(torch.arange(6) > 2, ids, -100)
    assert found({"input_ids": ids, "labels": labels}) == []
    labels[0, -1] = -100
    assert found({"input_ids": ids, "labels": labels}) == [("turn-end-unscored", "error", (5,))]


def test_roles_begin_anew_in_a_packed_row():
    """Text behind a chat that ended with a question is no question."""
    chat = make_chat(("assistant", [9]), ("user", [10, 11]))
    text = torch.tensor([[20, 21, EOS]])
    batch = {
        "input_ids": torch.cat([chat["input_ids"], text], 1),
        "labels": torch.cat([chat["labels"], torch.tensor([[-100, 21, EOS]])], 1),
    }
    T = batch["input_ids"].shape[1]
    positions = torch.cat([torch.arange(T - 3), torch.arange(3)])[None]
    assert codes({**batch, "position_ids": positions}) == set()
    assert codes(batch) == {"other-turns-scored"}


@pytest.mark.parametrize("token", [1, 0, START, IMAGE])
def test_special_tokens_that_are_no_part_of_an_answer(token):
    batch = make_chat(*CHATTED)
    at = 8 if token != START else 5  # within the answer; its header
    if token != START:
        batch["input_ids"][0, at] = token
    batch["labels"][0, at] = token
    (finding,) = look(batch, tokenizer=chat_tokenizer())
    assert (finding.code, finding.tokens) == ("special-scored", (at,))
    assert repr(CHAT[token]) in finding.message


def test_the_header_of_an_answer_that_goes_on_is_the_models_own():
    """As of gpt-oss, whose thoughts and answer are two messages; not after a question."""
    batch = make_chat(("user", [9]), ("assistant", [10]), ("assistant", [11]), ("user", [12]))
    second = slice(8, 10)
    batch["labels"][0, second] = batch["input_ids"][0, second] = torch.tensor([START, ASSISTANT])
    assert found(batch) == []
    batch["labels"][0, 12] = START
    assert codes(batch) == {"other-turns-scored", "special-scored"}


def test_marks_within_an_answer_are_its_own():
    """Tools, thoughts, and whatever else someone adds."""
    marks = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<extra>"]
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*CHAT[3:5], CHAT[8], *marks]})
    ids = tokenizer.convert_tokens_to_ids(marks)
    assert len(set(ids)) == len(marks)
    assert set(ids) <= set(tokenizer.all_special_ids)
    batch = make_chat(("user", [9]), ("assistant", [*ids, 10]))
    assert found(batch, tokenizer) == []
    without = chat_tokenizer(None)
    without.add_special_tokens({"extra_special_tokens": [*CHAT[3:5], CHAT[8], *marks]})
    batch["input_ids"][0, -1] = batch["labels"][0, -1] = EOS
    assert found(batch, without) == [], "nor without a template"
    batch["labels"][0, 4] = START
    assert codes(batch, without) == {"special-scored"}


# -- doubled ---------------------------------------------------------------------------------------


def text(*ids, scored=3):
    row = torch.tensor([ids])
    return {"input_ids": row, "labels": torch.where(torch.arange(len(ids)) >= scored, row, -100)}


def begins(bos=1, eos=EOS, pad=0):
    tokenizer = Tokenizer()
    tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id = bos, eos, pad
    tokenizer.all_special_ids = (0, 1, 2)
    return tokenizer


@pytest.mark.parametrize(
    ("ids", "at"),
    [
        ((1, 9, 10, 11, EOS), ()),
        ((1, 1, 10, 11, EOS), (1,)),
        ((1, 9, 10, 11, EOS, EOS), (5,)),
        ((1, 9, EOS, 11, EOS), ()),
        ((1, 1, 10, 11, EOS, EOS), (1, 5)),
        ((0, 0, 1, 1, 10, 11, EOS), (3,)),
    ],
)
def test_two_begins_or_ends_in_a_row(ids, at):
    batch = text(*ids, scored=4)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    said = [tokens for code, _, tokens in found(batch, begins()) if code == "doubled-special"]
    assert said == ([at] if at else [])
    assert codes(batch, begins()) <= {"doubled-special"}


def test_one_token_that_begins_ends_and_pads():
    """GPT-2's: an end before a begin of the next text, and padding, are not doubled."""
    one = begins(bos=EOS, pad=EOS)
    for ids in (
        (EOS, 9, 10, 11, EOS),
        (EOS, 9, 10, 11, EOS, EOS, 12, 13, EOS),  # two texts, of which nothing says a seam
        (9, 10, 11, 12, EOS, EOS, EOS, EOS),
    ):
        batch = text(*ids)
        for mask in ({}, {"attention_mask": torch.ones_like(batch["input_ids"])}):
            labels = torch.where(torch.arange(len(ids)) > 4, -100, batch["labels"])
            assert codes({**batch, **mask, "labels": labels}, one) == set(), (ids, mask)
        assert codes({**batch, "labels": labels}, begins(bos=EOS, pad=0)) <= {"turn-end-unscored"}
    batch = text(9, 10, 11, 12, EOS, EOS)  # the second is padding that no mask says
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"][0, -1] = -100
    assert codes(batch, begins(pad=EOS)) == set()
    assert codes(batch, begins()) == {"doubled-special"}
    assert codes(text(EOS, EOS, 10, 11, EOS), one) == {"doubled-special"}
    assert codes(text(EOS, 9, 10, 11, EOS, EOS), begins(bos=EOS)) == {"doubled-special"}


def test_padding_on_the_left_by_the_begin_of_text():
    """Many are padding, which no mask says; two are doubled."""
    pads = begins(pad=1)
    assert codes(text(1, 1, 10, 11, EOS), pads) == {"doubled-special"}
    assert codes(text(1, 1, 1, 1, 10, 11, EOS, scored=5), pads) == set()


@pytest.mark.parametrize("more", [1, 2, 3])
def test_padding_by_an_end_without_a_mask_or_a_padding_token(more):
    """As collators pad where the tokenizer has none to pad with."""
    ids = torch.tensor([[9, 10, 11, EOS] + [EOS] * more])
    labels = torch.where(torch.arange(4 + more) < 4, ids, -100)
    labels[0, :2] = -100
    batch = {"input_ids": ids, "labels": labels}
    assert codes(batch, begins(pad=None)) == set()
    row = {"input_ids": ids[0, :4].tolist(), "labels": labels[0, :4].tolist()}
    assert repair(read(batch, tokenizer=begins(pad=None))).rows == [row]
    ids = torch.tensor([[9, 10, 11, 4] + [EOS] * more])  # behind the end of a turn
    labels = torch.where(torch.arange(4 + more) < 4, ids, -100)
    labels[0, :2] = -100
    batch = {"input_ids": ids, "labels": labels}
    assert codes(batch, chat_tokenizer(pad_token=None)) == set()


def test_padding_of_a_packed_row_is_not_doubled():
    """Which is a sequence of its own, of the end of text."""
    examples = [{"input_ids": [9, 10, 11, EOS], "completion_mask": [0, 0, 1, 1]}] * 2
    for pad in (EOS, 1, 0):
        for step in (8, 9, 10, 16):
            collate = sgp.Collator(packed=True, pad_to_multiple_of=step, pad_token_id=pad)
            batch = collate(examples)
            del batch["selection"]
            for tokenizer in (begins(pad=pad), begins(EOS, pad=pad), begins(EOS, pad=None)):
                assert codes(batch, tokenizer) == set(), (pad, step)


# -- padding that only its loss shows --------------------------------------------------------------


def scored(*rows, begin=2, **more):
    """Everything carries loss from `begin` on, as where padding was copied into the labels."""
    ids = torch.tensor(rows)
    labels = torch.where(torch.arange(ids.shape[1]) >= begin, ids, -100)
    return {"input_ids": ids, "labels": labels, **more}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("ids", "pad", "at"),
    [
        ((9, 10, 11, EOS, EOS, EOS), 0, (4, 5)),
        ((9, 10, 11, EOS, EOS, EOS, EOS), None, (4, 5, 6)),
        ((9, 10, 11, 12, 0, 0, 0), 0, (4, 5, 6)),
        ((9, 10, 11, EOS, EOS, EOS, 0, 0, 0), 0, (4, 5, 6, 7, 8)),
        ((9, 10, 11, EOS, 7, 7, 7), 0, (4, 5, 6)),
        ((9, 10, 11, 12, *[7] * 32), 0, tuple(range(4, 36))),
    ],
)
def test_a_token_that_ends_a_row_many_times_with_loss_is_padding(ids, pad, at, masked):
    """No mask says so, or one that is all ones; an end at the first of them is the answer's own."""
    batch = scored(ids)
    if masked:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    said = [f for f in look(batch, tokenizer=begins(pad=pad)) if f.code != "no-eos"]
    assert {(f.code, f.severity) for f in said} == {("padding-scored", "warning")}
    assert tuple(sorted(t for f in said for t in f.tokens)) == at
    ended = EOS in ids
    assert ("no-eos" in codes(batch, begins(pad=pad))) == (not ended)
    assert [t for code, _, t in found(batch, begins(pad=pad)) if code == "no-eos"] == [(3,)] * (
        not ended
    )


def test_scored_padding_is_told_by_its_text():
    batch = scored((9, 10, 11, EOS, EOS, EOS, EOS), (9, 10, 11, 12, EOS, EOS, EOS))
    (group,) = sgp.auditing.grouped(look(batch, tokenizer=begins()))
    assert group.message == "'<2>' ends the row 3 times or more, with loss: is it padding?"
    assert group.rows == (0, 1)


def test_one_token_that_pads_several_rows():
    """To one length, some more than others; of rows of other lengths no one knows."""
    rows = (9, 10, 11, 7, 7, 7, 7), (9, 10, 11, 12, 7, 7, 7), (9, 10, 11, 12, 13, 14, 15)
    said = [(code, t) for code, _, t in found(scored(*rows), Bare(None))]
    assert said == [("padding-scored", (3, 4, 5, 6)), ("padding-scored", (4, 5, 6))]
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 0] = 0
    batch = scored(*rows, attention_mask=mask)
    assert "padding-scored" not in codes(batch, Bare(None))


@pytest.mark.parametrize(
    "rows",
    [
        [(9, 10, 11, 7, 7, 7)],
        [(9, 10, 11, 7, 7, 7), (9, 12, 11, 7, 7, 7)],  # as often: both may say "!!!"
        [(9, 10, 7, 7, 7, 7)],  # the answer itself
        [(9, 10, *[7] * 40)],
        [(9, 10, 11, 12, *[7] * 31)],
        [(7, 7, 7, 7, 7, 7)],
        [(9, 10, 11, EOS, EOS, 7)],
        [(9, 10, 11, EOS, 8, 8, 8), (9, 10, EOS, 8, 8, 8, 8)],  # a template's line breaks
        [(9, 10, 11, EOS, 8, 8, 8)],
        [(7,)],
        [(EOS,)],
        [(EOS, EOS)],
    ],
)
def test_tokens_that_an_answer_or_a_template_repeats_are_no_padding(rows):
    class Blanks(Tokenizer):
        def decode(self, ids):
            return "\n" if ids[0] == 8 else f"<{ids[0]}>"

    batch = scored(*rows)
    assert "padding-scored" not in codes(batch, Blanks())
    assert not repair(read(batch, tokenizer=Blanks())).changes


def test_padding_without_loss_is_no_fault_whatever_pads():
    for token in (0, EOS, 7):
        batch = scored((9, 10, 11, EOS, token, token, token))
        batch["labels"][0, 4:] = -100
        assert codes(batch, begins(pad=None)) == set()


def test_three_ends_within_a_row_are_doubled():
    batch = scored((9, 10, 11, EOS, EOS, EOS, 12, 13, EOS))
    assert found(batch, begins()) == [("doubled-special", "warning", (4, 5))]


def test_scored_padding_of_each_packed_sequence():
    """And a first token behind it crosses a boundary, and no padding has to predict it."""
    batch = scored((9, 10, 11, EOS, EOS, EOS, 9, 10, 11, EOS, EOS, EOS))
    batch["position_ids"] = torch.arange(6).repeat(2)[None]
    assert found(batch, begins()) == [
        ("crosses-boundary", "error", (6,)), ("padding-scored", "warning", (4, 5, 10, 11)),
    ]  # fmt: skip
