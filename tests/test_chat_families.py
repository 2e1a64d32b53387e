"""Chats of 24 families through Collator, audit and repair: what carries loss, what is found."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sgp
from sgp.auditing import look
from sgp.auditing.repair import repair
from sgp.auditing.view import read
from tests.chat_families import FAMILIES, TRACE, WEATHER, stops_of, tokenizer_of

WITH_TOOLS = [name for name, family in FAMILIES.items() if family.call]
WITH_THOUGHTS = [name for name, family in FAMILIES.items() if family.thoughts]
WITH_BOS = [name for name, family in FAMILIES.items() if family.bos]
ROLES_ARE_TEXT = {"falcon", "llama2", "mistral", "olmo2", "vicuna", "zephyr"}
"""Headers without a token of their own: nothing says for sure where a role's words begin."""

FORMS = [
    *((name, "chat") for name in FAMILIES),
    *((name, "trace") for name in WITH_TOOLS),
    *((name, "thinking") for name in WITH_THOUGHTS),
]


def example(name, form):
    family = FAMILIES[name]
    if form == "trace":
        return {"messages": TRACE, "tools": [WEATHER]}
    return {"messages": family.chat() if form == "chat" else family.thinking()}


def expected(name, form):
    family = FAMILIES[name]
    if form == "trace":
        return family.scored_of_trace()
    return family.scored() if form == "chat" else list(family.thoughts)


def collated(name, *examples, **options):
    return sgp.Collator(tokenizer_of(name), selection=False, **options)(list(examples))


def runs(name, batch, row=0):
    """What of a row carries loss, as text."""
    found, run = [], []
    for label in [*batch["labels"][row].tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            found.append(tokenizer_of(name).decode(run))
            run = []
    return found


def seen(name, batch):
    found = look(batch, tokenizer=tokenizer_of(name), eos=stops_of(name))
    return {(f.code, f.severity) for f in found}


def codes(name, batch):
    return {code for code, _ in seen(name, batch)}


# -- Collator --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_assistants_words_carry_loss_and_their_end(name, form):
    batch = collated(name, example(name, form))
    assert runs(name, batch) == expected(name, form)
    given = example(name, form)
    text = tokenizer_of(name).apply_chat_template(
        given["messages"], tools=given.get("tools"), tokenize=False
    )
    assert tokenizer_of(name).decode(batch["input_ids"][0]) == text


@pytest.mark.parametrize(
    ("name", "form"), [f for f in FORMS if f != ("deepseek-r1", "chat")]
)  # whose prompt opens thoughts that this chat has not
def test_a_prompt_is_where_the_answer_begins(name, form):
    """Warnings are errors here: the prompt alone is what both begin with."""
    given = example(name, form)
    messages = given.pop("messages")
    cut = 1 if form == "trace" else len(messages) - 1
    split = {**given, "prompt": messages[:cut], "completion": messages[cut:]}
    batch = collated(name, split, assistant_only_loss=True)
    assert runs(name, batch) == expected(name, form)[-2 if form == "trace" else -1 :]
    assert codes(name, batch) == set()
    whole = collated(name, split)
    assert torch.equal(whole["input_ids"], batch["input_ids"])
    assert (whole["labels"] != -100).sum() >= (batch["labels"] != -100).sum()


def test_a_prompt_that_opens_thoughts_which_the_answer_has_not_is_said():
    """As with R1's template, whose answers would have to begin within thoughts."""
    messages = example("deepseek-r1", "chat")["messages"]
    with pytest.warns(UserWarning, match="'<think>.n' is scored as completion"):
        collated("deepseek-r1", {"prompt": messages[:-1], "completion": messages[-1:]})


def test_thoughts_that_were_asked_for_and_those_that_were_not():
    """Qwen3's `enable_thinking=False` writes empty thoughts in the prompt alone."""
    messages = example("qwen3", "chat")["messages"]
    split = {"prompt": messages[:-1], "completion": messages[-1:]}
    split["chat_template_kwargs"] = {"enable_thinking": False}
    with pytest.warns(UserWarning, match="is scored as completion"):
        collated("qwen3", split)


# -- audit: what is right --------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_false_alarm(name, packed):
    examples = [example(name, form) for of, form in FORMS if of == name]
    examples.append({"messages": example(name, "chat")["messages"][:-2]})
    batch = collated(name, *examples, packed=packed)
    assert look(batch, tokenizer=tokenizer_of(name), eos=stops_of(name)) == []
    assert look(batch, tokenizer=tokenizer_of(name)) == [], "without a model's ends"
    longest = max(batch["input_ids"].shape[1], 64)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer_of(name)), hidden_size=16, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=longest,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = list(stops_of(name)) or None
    report = sgp.audit(model, batch, tokenizer=tokenizer_of(name))
    assert report.findings == []


@pytest.mark.parametrize("step", [7, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_no_fault(name, step):
    """Also where the end of text pads, and behind a packed row."""
    for packed in (False, True):
        batch = collated(name, example(name, "chat"), pad_to_multiple_of=step, packed=packed)
        assert codes(name, batch) == set()
        del batch["position_ids"]
        batch.pop("attention_mask", None)
        batch.pop("cu_seqlens", None)
        assert codes(name, batch) == set()


# -- audit: what is wrong --------------------------------------------------------------------------


def ends(name, batch):
    """(T,) bool: the tokens of the ends of all answers of a chat, in one row."""
    found = torch.zeros_like(batch["labels"][0], dtype=torch.bool)
    tokenizer = tokenizer_of(name)
    family = FAMILIES[name]
    scored = [t for t, x in enumerate(batch["labels"][0].tolist()) if x != -100]
    last = scored[-1]
    for t in scored:
        if t + 1 in scored:
            continue
        end = (family.last or family.end) if t == last else family.end
        n = len(tokenizer(end, add_special_tokens=False)["input_ids"])
        assert tokenizer.decode(batch["input_ids"][0, t + 1 - n : t + 1]) == end
        found[t + 1 - n : t + 1] = True
    return found


@pytest.mark.parametrize("which", ["all", "first", "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ends_without_loss_are_found_and_mended(name, which):
    batch = collated(name, example(name, "chat"))
    truth = batch["labels"].clone()
    at = ends(name, batch)
    half = int(at.nonzero()[0]) + len(tokenizer_of(name)(FAMILIES[name].end)["input_ids"]) + 1
    if which == "first":
        at[half:] = False
    elif which == "last":
        at[:half] = False
    batch["labels"][0, at] = -100
    assert seen(name, batch) == {("turn-end-unscored", "error")}
    found = repair(read(batch, tokenizer=tokenizer_of(name), eos=stops_of(name)))
    (row,) = found.rows
    assert row["input_ids"] == batch["input_ids"][0].tolist()
    mended = torch.tensor(row["labels"])
    beside = mended != truth[0]
    text = tokenizer_of(name).decode(batch["input_ids"][0][beside])
    assert text.replace("<|endoftext|>", "").strip() == "", "what a template writes after an end"
    assert bool((truth[0][beside] != -100).all()), "no more than the truth"
    assert found.changes == {"turn-end-unscored": 1}
    again = {"input_ids": batch["input_ids"], "labels": mended[None]}
    assert codes(name, again) == set()


def turn_of(name, batch, content):
    """(T,) bool: the tokens of a text in a row."""
    ids = batch["input_ids"][0].tolist()
    decode = tokenizer_of(name).decode
    spans = [
        (a, b)
        for a in range(len(ids))
        for b in range(a + 1, min(a + len(content), len(ids)) + 1)
        if decode(ids[a:b]).strip() == content
    ]
    first, last = min(spans, key=lambda span: span[1] - span[0])
    found = torch.zeros(len(ids), dtype=torch.bool)
    found[first:last] = True
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_users_words_that_carry_loss_are_told(name):
    batch = collated(name, example(name, "chat"))
    at = turn_of(name, batch, "And the door?")
    batch["labels"][0, at] = batch["input_ids"][0, at]
    found = look(batch, tokenizer=tokenizer_of(name), eos=stops_of(name))
    if name in ROLES_ARE_TEXT:  # Zephyr's questions end like its answers
        assert [f.code for f in found] == ["turn-end-unscored"] * (name == "zephyr")
        return
    (finding,) = found
    assert (finding.code, finding.severity) == ("other-turns-scored", "warning")
    assert "user" in finding.message
    assert set(finding.tokens) == set(at.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_tools_result_that_carries_loss_is_told(name):
    batch = collated(name, example(name, "trace"))
    at = turn_of(name, batch, "18 degrees")
    batch["labels"][0, at] = batch["input_ids"][0, at]
    found = [
        f
        for f in look(batch, tokenizer=tokenizer_of(name), eos=stops_of(name))
        if f.code == "other-turns-scored"
    ]
    assert len(found) == 1
    assert "tool" in found[0].message or "user" in found[0].message, "some answer as a user"
    assert set(found[0].tokens) == set(at.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", WITH_BOS)
def test_a_doubled_begin_of_text_is_found(name):
    text = tokenizer_of(name).apply_chat_template(example(name, "chat")["messages"], tokenize=False)
    bos = FAMILIES[name].bos
    text = bos + bos + text.removeprefix(bos)
    ids = tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * 8 + ids[8:]}
    with pytest.warns(UserWarning, match="two begin-of-text tokens"):
        batch = collated(name, row)
    assert ("doubled-special", "warning") in seen(name, batch)
    batch = collated(name, {"input_ids": ids[1:], "labels": [-100] * 7 + ids[8:]})
    assert "doubled-special" not in codes(name, batch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_shift_is_found_and_mended(name, packed):
    right = collated(name, example(name, "chat"), example(name, "chat"), packed=packed)
    batch = {**right, "labels": right["labels"].roll(-1, 1)}
    assert seen(name, batch) == {("labels-shifted-twice", "error")}
    found = repair(read(batch, tokenizer=tokenizer_of(name), eos=stops_of(name)))
    assert found.changes == {"labels-shifted-twice": 2}
    truth = collated(name, example(name, "chat"))
    for row in found.rows:
        assert row["input_ids"] == truth["input_ids"][0].tolist()
        assert row["labels"] == truth["labels"][0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_its_end_is_no_answer_that_ends(name):
    batch = collated(name, example(name, "chat"))
    last = ends(name, batch).nonzero()[:, 0].tolist()
    while last[-2] == last[-1] - 1:
        last.pop()
    cut = {k: v[:, : last[-1]] for k, v in batch.items()}
    both = {k: torch.cat([v, v[:, :1]], 1) for k, v in cut.items()}  # and a column of padding
    both["labels"][:, -1] = -100
    both["attention_mask"][:, -1] = 0
    for some in (cut, both):
        assert seen(name, some) == {("no-eos", "warning")}, "the window may have cut it"
        longer = look(some, tokenizer=tokenizer_of(name), eos=stops_of(name), max_length=512)
        assert {(f.code, f.severity) for f in longer} == {("no-eos", "error")}


def without(batch, at):
    """The batch without some tokens of its one row."""
    return {k: v[:, ~at] if v.shape == at[None].shape else v for k, v in batch.items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - ROLES_ARE_TEXT - {"glm4"}))
def test_an_earlier_answer_without_any_end_is_found(name, packed):
    """Its end was never appended; GLM's is the header of the next turn."""
    batch = collated(name, example(name, "chat"), packed=packed)
    at = ends(name, batch)
    half = int(at.nonzero()[0]) + len(tokenizer_of(name)(FAMILIES[name].end)["input_ids"]) + 1
    at[half:] = False
    cut = without(batch, at)
    findings = look(cut, tokenizer=tokenizer_of(name), eos=stops_of(name))
    assert [(f.code, f.severity) for f in findings] == [("no-eos", "error")]
    (last,) = findings[0].tokens
    assert last == int(at.nonzero()[0]) - 1
    assert "another turn follows" in findings[0].message
    (said,) = look(cut, tokenizer=tokenizer_of(name), eos=stops_of(name), max_length=last + 1)
    assert said.severity == "error", "no window cut it"


@pytest.mark.parametrize("name", sorted(set(WITH_TOOLS) - {"glm4"}))
def test_a_call_of_a_tool_without_any_end_is_found(name):
    batch = collated(name, example(name, "trace"))
    scored = batch["labels"][0] != -100
    first = int(scored.long().argmax())
    last = first + int(scored[first:].long().cumprod(0).sum()) - 1
    stops = read(batch, tokenizer=tokenizer_of(name), eos=stops_of(name)).eos
    end = next(t for t in range(last, first, -1) if int(batch["input_ids"][0, t]) in stops)
    cut = without(batch, (torch.arange(len(scored)) >= end) & (torch.arange(len(scored)) <= last))
    findings = look(cut, tokenizer=tokenizer_of(name), eos=stops_of(name))
    assert [(f.code, f.severity) for f in findings] == [("no-eos", "error")]
    assert findings[0].tokens == (end - 1,)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_that_carries_loss_is_said_once(name):
    batch = collated(name, example(name, "chat"), context_loss=True)
    assert "all-scored" in codes(name, batch)
    assert "other-turns-scored" not in codes(name, batch)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - ROLES_ARE_TEXT))
def test_a_header_that_carries_loss_is_found(name):
    """The assistant's own, between a user's words and the answer."""
    batch = collated(name, example(name, "chat"))
    scored = (batch["labels"][0] != -100).nonzero()[:, 0].tolist()
    second = next(t for a, t in itertools.pairwise(scored) if t > a + 1)
    user = int(turn_of(name, batch, "And the door?").nonzero()[-1]) + 1
    batch["labels"][0, user:second] = batch["input_ids"][0, user:second]
    found = codes(name, batch)
    assert found & {"special-scored", "other-turns-scored"}


# -- repair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_repair_leaves_what_is_right(name, packed):
    examples = [example(name, form) for of, form in FORMS if of == name]
    batch = collated(name, *examples, packed=packed, pad_to_multiple_of=8)
    found = repair(read(batch, tokenizer=tokenizer_of(name), eos=stops_of(name)))
    assert not found.changes
    assert not found.left
    assert len(found.rows) == len(examples)
    for row, given in zip(found.rows, examples, strict=True):
        alone = collated(name, given)
        assert row["input_ids"] == alone["input_ids"][0].tolist()
        assert row["labels"] == alone["labels"][0].tolist()
