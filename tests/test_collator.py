"""The collator: TRL's labels for the same rows, and the selection of those labels."""

import pickle
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import sgp
from sgp.huggingface import patch
from tests import streamed
from tests.families import V, make
from tests.ranks import run_ranks

TEMPLATE = """{% for tool in tools or [] %}{{ tool['name'] + ' ' }}{% endfor %}\
{% if polite %}{{ 'thanks ' }}{% endif %}\
{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}\
{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}{% else %}\
{{ m['content'] + ' ' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
WORDS = [
    "Square",
    "this",
    "number",
    ".",
    "2",
    "3",
    "4",
    "9",
    "The",
    "result",
    "is",
    "thanks",
    "why",
    "because",
    "it",
    "hello",
]

SIGNS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, SIGNS["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=["<user>", "<assistant>"], **SIGNS
    )
    made.chat_template = TEMPLATE
    return made


def say(*turns):
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


EXAMPLES = {
    "prompt and completion": [
        {"prompt": "Square this number . 2 .", "completion": " The result is 4 ."},
        {"prompt": "hello", "completion": " thanks"},
        {"prompt": "Square this number . 3 . why", "completion": " The result is 9 . </s>"},
    ],
    "conversations": [
        {"prompt": say("Square this number . 2 ."),
         "completion": [{"role": "assistant", "content": "The result is 4 ."}]},
        {"prompt": say("hello", "hello", "why"),
         "completion": [{"role": "assistant", "content": "because"}]},
    ],
    "messages": [
        {"messages": say("hello", "hello", "Square this number . 3 .", "The result is 9 .")},
        {"messages": say("why", "because")},
    ],
    "messages with tools": [
        {"messages": say("Square this number . 3 .", "9"), "tools": [{"name": "Square"}],
         "chat_template_kwargs": {"polite": True}},
        {"messages": say("why", "because"), "tools": [{"name": "hello"}],
         "chat_template_kwargs": {"polite": False}},
    ],
    "prompt with tools": [
        {"prompt": say("why"), "completion": [{"role": "assistant", "content": "because"}],
         "tools": '[{"name": "Square"}]', "chat_template_kwargs": {"polite": True}},
    ],
    "text": [{"text": "hello why"}, {"text": "because it is 4 ."}],
    "labels": [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
        {"input_ids": [9, 5], "labels": [-100, 5]},
    ],
    "masks": [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1],
         "assistant_masks": [0, 1, 0, 1]},
        {"input_ids": [9, 5, 6], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 1]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def trl_batch(tokenizer, tmp_path_factory):
    """TRL's own batch of the examples."""
    import trl

    def batch(kind, *, padding_free):
        rows = EXAMPLES[kind]
        folder = str(tmp_path_factory.mktemp("trl"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = trl.SFTConfig(
                output_dir=folder, report_to=[], use_cpu=True, bf16=False,
                assistant_only_loss=kind.startswith("messages"),
            )  # fmt: skip
            trainer = trl.SFTTrainer(
                make("llama"), arguments, train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )  # fmt: skip
        collate = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(
            pad_token_id=tokenizer.pad_token_id, padding_free=padding_free
        )
        return collate(list(trainer.train_dataset))

    return batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind not in ("labels", "masks")])
def test_labels_are_trls(kind, packed, tokenizer, trl_batch):
    expected = trl_batch(kind, padding_free=packed)
    found = sgp.Collator(tokenizer, packed=packed)(EXAMPLES[kind])
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        if name in expected:
            assert torch.equal(found[name], expected[name]), name
    if packed:
        assert torch.equal(found["cu_seqlens"], expected["cu_seq_lens_q"])


@pytest.mark.core
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_selection_is_of_the_labels(kind, packed, tokenizer):
    found = sgp.Collator(tokenizer, packed=packed, pad_to_multiple_of=8)(EXAMPLES[kind])
    assert found["input_ids"].shape[1] % 8 == 0
    rows, labels = found["selection"].rows, found["labels"].flatten()
    assert torch.equal(labels[rows + 1], found["selection"].target)
    assert len(rows) == (found["labels"][:, 1:] != -100).sum()
    assert found["selection"].num_sequences == len(EXAMPLES[kind])
    scored = labels != -100
    assert torch.equal(labels[scored], found["input_ids"].flatten()[scored])
    report = sgp.audit(make("llama"), {k: v for k, v in found.items() if k != "selection"})
    assert report.errors == []


def test_masks_and_labels_of_tokens():
    found = sgp.Collator()(EXAMPLES["masks"])
    assert found["labels"].tolist() == [[-100, 6, -100, 8], [-100, 5, 6, -100]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    whole = sgp.Collator(context_loss=True)(EXAMPLES["masks"])
    assert whole["labels"].tolist() == [[5, 6, 7, 8], [9, 5, 6, -100]]
    packed = sgp.Collator(packed=True, pad_to_multiple_of=5)(EXAMPLES["labels"])
    assert packed["labels"].tolist() == [[-100, 6, -100, 8, -100, 5, -100, -100, -100, -100]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert packed["cu_seqlens"].tolist() == [0, 4, 6, 10]
    tensors = [{k: torch.tensor(v) for k, v in row.items()} for row in EXAMPLES["labels"]]
    again = sgp.Collator(packed=True, pad_to_multiple_of=5)(tensors)
    assert torch.equal(again["labels"], packed["labels"])


PADDED = {  # rows of two real ones, padded as a tokenizer would, and what beside them is harmless
    "left": {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1],
             "labels": [-100, -100, -100, 6, 7], "position_ids": [0, 0, 0, 1, 2]},
    "right": {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0],
              "completion_mask": [0, 1, 1, 0, 0], "special_tokens_mask": [0, 0, 0, 1, 1]},
    "both": {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0],
             "labels": [-100, -100, 6, 7, -100], "token_type_ids": [0] * 5, "seq_idx": [0] * 5},
    "none": {"input_ids": [5, 6, 7], "attention_mask": [True] * 3, "labels": [-100, 6, 7],
             "position_ids": [0, 1, 2], "seq_idx": None, "token_type_ids": None},
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("row", PADDED.values(), ids=PADDED)
def test_a_rows_own_padding_is_taken_away(row, packed):
    plain = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, EXAMPLES["labels"][0]]
    for given in (row, {k: None if v is None else torch.tensor(v) for k, v in row.items()}):
        found = sgp.Collator(packed=packed)([given, plain[1]])
        expected = sgp.Collator(packed=packed)(plain)
        for name in expected.keys() - {"selection"}:
            assert torch.equal(found[name], expected[name]), name
        assert torch.equal(found["selection"].rows, expected["selection"].rows)


def test_a_list_of_numpys_whole_numbers_is_taken():
    row = {"input_ids": list(np.arange(3)), "labels": list(np.array([-100, 1, 2], np.int32))}
    assert sgp.Collator()([row])["labels"].tolist() == [[-100, 1, 2]]


def test_context_loss_leaves_padding_out():
    row = {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}
    assert sgp.Collator(context_loss=True)([row])["labels"].tolist() == [[5, 6]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_of_padded_rows_is_that_of_the_rows(family):
    """Rotary positions do not feel how far on the left padding pushes a row; learned ones do."""
    row = {"input_ids": [0, 0, 11, 12, 13], "attention_mask": [0, 0, 1, 1, 1],
           "labels": [-100, -100, -100, 12, 13]}  # fmt: skip
    model = make(family).eval()
    batch = sgp.Collator()(
        [row, {"input_ids": [21, 22, 23, 24, 25], "labels": [-100, 22, -100, 24, 25]}]
    )
    del batch["selection"]
    right = {k: torch.tensor([v]) for k, v in row.items()}
    right["position_ids"] = torch.tensor([[0, 0, 0, 1, 2]])
    logits = model(**batch).logits[0, :3]
    torch.testing.assert_close(logits, model(**right).logits[0, 2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "seams",
    [
        {"position_ids": [0, 1, 2, 0, 1]},
        {"attention_mask": [1, 1, 1, 2, 2]},
        {"seq_idx": [0, 0, 0, 1, 1]},
        {"seq_lengths": [3, 2]},
        {"seq_lengths": [3, 2], "position_ids": [0, 1, 2, 0, 1], "attention_mask": [1] * 5},
    ],
    ids=" and ".join,
)
def test_rows_that_were_packed_before_are_taken_apart(seams):
    found = sgp.Collator(packed=True, max_length=2)(
        [ROW | seams, {"input_ids": [3, 4], "labels": [3, 4]}]
    )
    assert found["cu_seqlens"].tolist() == [0, 2, 4, 6]
    assert found["input_ids"].tolist() == [[5, 6, 8, 9, 3, 4]]
    assert found["position_ids"].tolist() == [[0, 1] * 3]
    assert found["labels"].tolist() == [[-100, 6, -100, 9, -100, 4]]
    assert found["selection"].num_sequences == 3


def test_padding_around_a_packed_row():
    row = {"input_ids": [0, 5, 6, 8, 9, 0], "attention_mask": [0, 1, 1, 2, 2, 0],
           "labels": [-100, -100, 6, 8, 9, -100]}  # fmt: skip
    found = sgp.Collator(packed=True)([row])
    assert found["labels"].tolist() == [[-100, 6, -100, 9]]


def test_labels_that_are_shifted_already_are_said():
    """They are aligned with the logits; the collator's are aligned with the tokens."""
    shifted = {"input_ids": [5, 6, 7, 8], "labels": [-100, 7, 8, 2]}
    repeated = {"input_ids": [5, 5, 5, 5], "labels": [-100, 5, 5, 5]}
    last = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}
    with pytest.warns(UserWarning, match=r"examples \[1\] of 4 have labels that are the next"):
        sgp.Collator()([repeated, shifted, last, EXAMPLES["labels"][0]])


def test_a_first_token_alone_carries_no_loss():
    """It has no predictor."""
    with pytest.warns(UserWarning, match=r"examples \[1\] of 2 carry no loss"):
        found = sgp.Collator()([ROW, {"input_ids": [5, 6], "labels": [5, -100]}])
    assert found["selection"].sequence.tolist() == [0] * 4


@pytest.fixture(scope="module")
def beginning(tokenizer):
    """A tokenizer that puts a begin of text before what it is given."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        **SIGNS | {"bos_token": "<s>"},
    )
    made.add_tokens(["<s>"], special_tokens=True)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(kind, packed) for kind in ("text", "prompt", "tokens") for packed in (False, True)]
    + [("packed", True)],
)
def test_a_doubled_begin_of_text_is_said_once_for_each_batch(kind, packed, beginning):
    bos = beginning.bos_token_id
    rows = {
        "text": [{"text": "hello"}, {"text": "<s> hello"}],
        "prompt": [{"prompt": f"{begin} why", "completion": " it"} for begin in ("", "<s>")],
        "tokens": [{"input_ids": [*begin, 6, bos, bos], "labels": [-100] * len(begin) + [6, -100,
                    -100]} for begin in ([bos], [bos, bos])],
        "packed": [{"input_ids": [bos, 6, *begin, 7, 8], "seq_lengths": [2, 2 + len(begin)],
                    "labels": [-100, 6, *[-100] * len(begin), 7, 8]}
                   for begin in ([bos], [bos] * 2)],
    }[kind]  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"examples \[1\] of 2 begin with two begin-of-.*'<s> ?<s>'"
    ):
        sgp.Collator(beginning, packed=packed)(rows)
    sgp.Collator(beginning, packed=packed)(rows[:1])  # warnings are errors here
    if kind in ("tokens", "packed"):
        sgp.Collator(packed=packed)(rows)  # no one says what begins a text


def test_what_is_cut_off_is_said(tokenizer):
    collate = sgp.Collator(tokenizer, max_length=6)
    with pytest.warns(UserWarning, match=r"examples \[0, 2\] of 3 carry no loss within"):
        found = collate(EXAMPLES["prompt and completion"])
    assert found["input_ids"].shape == (3, 6)
    assert found["selection"].num_kept == 2, "thanks, and the end of text"


class Merging:
    """A tokenizer that merges the last character of a prompt with the completion."""

    eos_token = None

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.replace("a b", "ab").split()]}

    def decode(self, ids):
        return str(ids)


def test_a_prompt_that_is_not_a_prefix_is_said():
    with pytest.warns(UserWarning, match=r"'\[1\]' is scored as completion"):
        found = sgp.Collator(Merging())([{"prompt": "xx a", "completion": " b c"}])
    assert found["labels"].tolist() == [[-100, 2, 1]]


MERGED = [{"prompt": "xx a", "completion": " b c"}]
EMPTY = [{"input_ids": [1, 2], "labels": [-100, -100]}]


IMAGE = Image.new("RGB", (2, 2))
COLUMNS = {
    "pixel_values": torch.zeros(3, 2, 2),
    "nested pixel_values": [[[0.0, 1.0], [1.0, 0.5]]],
    "image_grid_thw": np.array([1, 2, 2]),
    "images": [IMAGE],
    "image": IMAGE,
    "image that is not decoded": {"bytes": b"", "path": "a.png"},
    "audio": {"array": np.zeros(3), "sampling_rate": 8},
    "token_weight": [0.5, 1.0, 1.0],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_a_model_could_take_is_said_once(name):
    plain, row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {name: COLUMNS[name]}
    collate = sgp.Collator()
    with pytest.warns(UserWarning, match=r"left out: a batch has tokens") as seen:
        batch = collate([plain, plain | row, plain | row])
    (warning,) = seen
    assert f"the columns [{name!r}] (in example 1) are" in str(warning.message)
    assert name not in batch
    collate([plain | row])  # warnings are errors here
    with pytest.warns(UserWarning, match=r"\['mask_of_mine'\]"):
        collate([plain | row | {"mask_of_mine": [1, 1, 0]}])


def test_columns_that_no_model_takes_are_left_out_without_a_word():
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "special_tokens_mask": [0, 0, 1]}
    kept = {
        "id": 7, "score": 0.5, "count": np.int64(3), "seed": torch.tensor(1), "source": "a book",
        "tags": ["a", "b"], "metadata": {"url": "b", "rank": 1, "ids": [1, 2]}, "none": None,
        "empty": [], "chosen": [{"role": "user", "content": "a"}], "good": True,
    }  # fmt: skip
    assert set(sgp.Collator()([row | kept])) == set(sgp.Collator()([row]))


@pytest.mark.parametrize("examples", [MERGED, EMPTY], ids=["a merge", "no loss"])
def test_warnings_point_at_the_users_line(examples):
    collate = sgp.Collator(Merging())
    loader = torch.utils.data.DataLoader(examples, collate_fn=collate)
    thread = threading.Thread(target=collate, args=(examples,))  # in which no line is the user's
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        collate(examples)
        next(iter(loader))
        thread.start()
        thread.join()
    assert [warning.filename for warning in said][:2] == [__file__] * 2
    assert "collate(examples)" in Path(__file__).read_text().splitlines()[said[0].lineno - 1]
    assert Path(said[2].filename).is_file(), "and not sys"


ROW = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([{"x": 1}], r"example 0: sgp.Collator: an example has \['x'\]; expected input_ids"),
        ([{"text": "x"}], "needs a tokenizer"),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}],
            "example 1: .* 2 input_ids",
        ),
        ([{"input_ids": "abc"}], "input_ids is 'abc'; expected a list of integers"),
        ([{"input_ids": [1, 2]}], r"has \['input_ids'\]: which tokens carry loss\? .*context_loss"),
        ([{"input_ids": [1], "labels": None}], "Trainer removes .*: remove_unused_columns=False"),
        ([{"input_ids": [], "labels": []}], "example 0: sgp.Collator: no tokens"),
        ([ROW | {"attention_mask": [0] * 5, "labels": [-100] * 5}], "example 0: .* no tokens"),
        ([ROW | {"attention_mask": [1, 1, 0, 1, 1]}], r"is \[1, 1, 0, 1, 1\]; expected 1"),
        ([ROW | {"attention_mask": [-1, 1, 1, 1, 1]}], r"is \[-1, 1, 1, 1, 1\]; expected 1"),
        ([ROW | {"attention_mask": [1, 1, 1, 1]}], "5 input_ids and 4 attention_mask"),
        (
            [ROW | {"attention_mask": [1, 1, 1, 1, 0]}],
            r"attention_mask\[4\] is 0 and the label there is 9: padding carries loss",
        ),
        ([ROW | {"position_ids": [2, 3, 4, 5, 6]}], r"are \[2, 3, 4, 5, 6\]; expected to count"),
        ([ROW | {"position_ids": [0, 1, 0, 1, 2]}], r"2 packed sequences, .*\[2, 3\]; packed=True"),
        ([ROW | {"seq_lengths": [2, 2]}], r"5 input_ids and seq_lengths = \[2, 2\]"),
        ([ROW | {"token_type_ids": [0, 0, 1, 1, 1]}], r"token_type_ids is \[0, 0, 1, 1, 1\]"),
    ],
)  # fmt: skip
def test_what_is_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        sgp.Collator()(examples)


def test_a_template_without_generation_is_refused(tokenizer):
    template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = template
    try:
        with pytest.raises(ValueError, match="the chat template marks no token"):
            sgp.Collator(tokenizer)(EXAMPLES["messages"])
    finally:
        tokenizer.chat_template = TEMPLATE


def test_what_a_template_refuses_is_said_by_roles(tokenizer):
    asked = {"role": "user", "content": "Where?"}
    with pytest.raises(ValueError, match=r"no message of the roles \['user'\] is the assistant's"):
        sgp.Collator(tokenizer)([{"messages": [asked]}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    refused = r"example 0: .*refuses messages of the roles \['user', 'user'\]: .*must alternate"
    try:
        with pytest.raises(ValueError, match=refused):
            sgp.Collator(tokenizer)([{"messages": [asked, asked]}])
    finally:
        tokenizer.chat_template = TEMPLATE


def test_the_context_loss_of_a_prompt(tokenizer):
    for kind in ("prompt and completion", "conversations"):
        found = sgp.Collator(tokenizer, context_loss=True)(EXAMPLES[kind])
        attended = found["attention_mask"] == 1
        assert torch.equal(found["labels"][attended], found["input_ids"][attended])


# -- turns and tools -------------------------------------------------------------------------------

TRACE = {
    "prompt": say("Square this number . 3 ."),
    "completion": [
        {"role": "assistant", "content": "Square 3"},
        {"role": "user", "content": "9"},  # as a tool would answer
        {"role": "assistant", "content": "The result is 9 ."},
    ],
}


def scored(tokenizer, example, **options):
    labels = sgp.Collator(tokenizer, **options)([example])["labels"][0]
    return tokenizer.decode(labels[labels != -100])


def test_the_assistants_tokens_of_a_completion(tokenizer):
    whole = "Square 3 </s> <user> 9 <assistant> The result is 9 . </s>"
    assert scored(tokenizer, TRACE) == whole
    only = "Square 3 </s> The result is 9 . </s>"
    assert scored(tokenizer, TRACE, assistant_only_loss=True) == only
    before = TRACE | {"prompt": say("hello", "hello", "why")}
    assert scored(tokenizer, before, assistant_only_loss=True) == only, "no turn of the prompt"
    chat = EXAMPLES["messages"][0]
    assert scored(tokenizer, chat, assistant_only_loss=True) == scored(tokenizer, chat)
    masks = sgp.Collator(assistant_only_loss=True)(EXAMPLES["masks"])
    assert torch.equal(masks["labels"], sgp.Collator()(EXAMPLES["masks"])["labels"])


@pytest.mark.parametrize(
    ("example", "what"),
    [
        ({"prompt": "hello", "completion": " why"}, "the completion is a text"),
        ({"text": "hello"}, "the example is a text"),
        ({"input_ids": [5], "completion_mask": [1]}, r"has \['completion_mask', 'input_ids'\]"),
    ],
)
def test_where_nothing_says_what_is_the_assistants(example, what, tokenizer):
    with pytest.raises(ValueError, match=f"example 0: .*assistant_only_loss=True asks .*{what}"):
        sgp.Collator(tokenizer, assistant_only_loss=True)([example])


def test_context_and_assistant_only_contradict_each_other():
    with pytest.raises(ValueError, match="context_loss=True and assistant_only_loss=True"):
        sgp.Collator(context_loss=True, assistant_only_loss=True)


class Template:
    """A tokenizer that keeps what its template was given."""

    eos_token = None

    def apply_chat_template(self, messages, **options):
        self.given = {"messages": messages, **options}
        alone = options.get("add_generation_prompt", False)
        return {"input_ids": [1] if alone else [1, 2], "assistant_masks": [0, 1]}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, *required, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_none_that_datasets_put_in_is_left_out():
    """A row gets the keys of all rows: what the template sees is the row as it was written."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    call("find", thing="key", where={"room": "hall"}, many=[{"a": 1}])]},
            ],
            "tools": [tool("find", "thing", thing={"type": "string"})],
            "chat_template_kwargs": {"polite": True},
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "x.png"}], "name": "Ann"},
                {"role": "assistant", "content": [], "tool_calls": [
                    call("walk", steps=3, where={"floor": 2}, many=[{"b": 2}])]},
            ],
            "tools": [tool("walk", steps={"type": "integer", "enum": [1, 3]})],
            "chat_template_kwargs": {"terse": True},
        },
    ]  # fmt: skip
    assert Dataset.from_list(rows)[0] != rows[0], "it puts None in"
    template = Template()
    for row, given in zip(rows, Dataset.from_list(rows), strict=True):
        sgp.Collator(template)([given])
        for name in ("messages", "tools"):
            assert template.given[name] == row[name], name
        assert {"polite", "terse"} & template.given.keys() == row["chat_template_kwargs"].keys()
        prompt, completion = given.pop("messages")
        sgp.Collator(template)([given | {"prompt": [prompt], "completion": [completion]}])
        assert template.given["messages"] == row["messages"]


def test_none_that_is_meant_stays():
    """What the tools say is required, a schema's default, and what is written as JSON."""
    message = {"role": "assistant", "content": None, "tool_calls": [call("set", to=None, by=None)]}
    text = {"role": "assistant", "content": "", "tool_calls": [
        {"name": "set", "arguments": '{"to": null}'}]}  # fmt: skip
    by = {"type": "integer", "default": None}
    template = Template()
    sgp.Collator(template)([{"messages": [message, text], "tools": [tool("set", "to", by=by)]}])
    kept, unread = template.given["messages"]
    assert kept["tool_calls"] == [call("set", to=None)]
    assert kept["content"] is None
    assert unread == text
    assert template.given["tools"] == [tool("set", "to", by=by)]
    for tools in ([len], [{"function": {"name": "set", "parameters": '{"type": "object"}'}}]):
        sgp.Collator(template)([{"messages": [message], "tools": tools}])
        assert template.given["tools"] == tools, "code, or JSON"
    sgp.Collator(template)(
        [{"messages": [message], "tools": '[{"name": "set", "parameters": null}]'}]
    )
    assert template.given["tools"] == [{"name": "set", "parameters": None}]


@pytest.mark.parametrize("tools", ["", "Square"])
def test_tools_that_are_a_text_but_no_json_are_refused(tools):
    messages = [{"role": "assistant", "content": "4"}]
    with pytest.raises(
        ValueError, match=f"example 0: .*tools is '{tools}', which is not valid JSON"
    ):
        sgp.Collator(Template())([{"messages": messages, "tools": tools}])


# -- beside a model, and processes -----------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_patched_model_takes_the_batch(mode, packed):
    generator = torch.Generator().manual_seed(4)
    examples = []
    for n in (9, 5, 12):
        ids = torch.randint(3, V, (n,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    batch = sgp.Collator(packed=packed)(examples)
    model = make("llama")
    plain = {k: v for k, v in batch.items() if k not in ("selection", "cu_seqlens")}
    stock = model(**plain, use_cache=False).loss  # with a cache a packed row is one sequence
    patch(model, mode=mode)
    assert model(**batch).loss.item() == pytest.approx(stock.item(), rel=2e-5)
    del batch["labels"]
    assert model(**batch).loss.item() == pytest.approx(stock.item(), rel=2e-5)
    model.eval()
    assert model(**batch).loss.item() == pytest.approx(stock.item(), rel=2e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("step", [None, 4])
def test_a_batch_without_its_selection(packed, step):
    """Everything else is there, and a model can be given all of it."""
    rows = EXAMPLES["labels"]
    whole = sgp.Collator(packed=packed, pad_to_multiple_of=step)(rows)
    bare = sgp.Collator(packed=packed, pad_to_multiple_of=step, selection=False)(rows)
    assert whole.keys() - bare.keys() == {"selection"}
    for name, column in bare.items():
        assert isinstance(column, torch.Tensor)
        assert torch.equal(column, whole[name]), name


def test_workers_carry_the_selection():
    loader = torch.utils.data.DataLoader(
        EXAMPLES["labels"], batch_size=2, collate_fn=sgp.Collator(packed=True), num_workers=1
    )
    (batch,) = loader
    assert batch["selection"].rows.tolist() == [0, 2, 4]
    assert batch["selection"].to("cpu", non_blocking=True).num_sequences == 2


def test_a_stream_that_one_process_reads_for_two(tmp_path):
    """accelerate puts batches together and cuts them up, which only tensors survive."""
    ways = [(0, None), (1, None), (0, False)]  # workers, dispatch_batches
    (first, error), (second, _) = run_ranks(streamed.batches, 2, tmp_path, ways)
    tensors = {"input_ids", "labels", "attention_mask", "position_ids"}
    for here, there, (_, dispatch) in zip(first, second, ways, strict=True):
        alone = dispatch is False  # each process reads for itself
        for keys, _, kept in (*here, *there):
            assert keys == (tensors | {"selection"} if alone else tensors)
            assert kept == (6 if alone else None)
        assert {t for _, tokens, _ in (*here, *there) for t in tokens} == set(range(0, 100, 10))
        assert here[0][1] + there[0][1] == [0, 10, 20, 30]
    assert "packed=True, and accelerate reads the data in one process" in error
    assert "dispatch_batches" in error


def test_a_stream_in_one_process_keeps_its_selection():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.data_loader.prepare_data_loader(
        torch.utils.data.DataLoader(streamed.Stream(), 2, collate_fn=sgp.Collator()),
        num_processes=1, process_index=0, put_on_device=True, device=torch.device("cpu"),
    )  # fmt: skip
    assert isinstance(loader, accelerate.data_loader.DataLoaderDispatcher)
    assert all(batch["selection"].num_kept == 6 for batch in loader)
    assert pickle.loads(pickle.dumps(sgp.Collator())) == sgp.Collator()  # noqa: S301
