"""The collator: TRL's labels for the same rows, and the selection of those labels."""

import warnings

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sgp
from sgp.huggingface import patch
from tests.families import V, make

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


def test_workers_carry_the_selection():
    loader = torch.utils.data.DataLoader(
        EXAMPLES["labels"], batch_size=2, collate_fn=sgp.Collator(packed=True), num_workers=1
    )
    (batch,) = loader
    assert batch["selection"].rows.tolist() == [0, 2, 4]
    assert batch["selection"].to("cpu", non_blocking=True).num_sequences == 2
