"""The names that the pages' Python blocks may use without making them: a small model and its batch.

Each page gets its own. The names are those that a reader has at hand: `model`, `tokenizer`,
`input_ids`, `labels`, `hidden`, `head`, `logits`, `data`, `optimizer`, and two wider models,
`teacher` and `other_teacher`.
"""

import contextlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed
from transformers import PreTrainedTokenizerFast

import sgp
from sgp.train.model import tiny_llama

SIGNS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (  # marks the assistant's turns
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)
TEXT = "square this number . 1 2 3 4 9 the result is what why hello thanks <user>"
DATA = [
    {"prompt": "square this number . 2 .", "completion": " the result is 4 . </s>"},
    {"prompt": "square this number . 3 .", "completion": " the result is 9 . </s>"},
    {"prompt": "square this number . 1 .", "completion": " the result is 1 . </s>"},
    {"prompt": "hello", "completion": " thanks </s>"},
]


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate([*SIGNS.values(), *TEXT.split()])}
    inner = Tokenizer(models.WordLevel(vocabulary, SIGNS["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **SIGNS)
    made.chat_template = TEMPLATE
    return made


def usual():
    """A namespace for one page."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = tiny_llama(len(tokenizer), 64, seed=0, hidden=16).train()
    batch = sgp.Collator(tokenizer)(DATA)
    input_ids, labels = batch["input_ids"], batch["labels"]
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids).last_hidden_state
    return {
        "sgp": sgp,
        "torch": torch,
        "tokenizer": tokenizer,
        "model": model,
        "config": model.config,
        "batch": batch,
        "input_ids": input_ids,
        "labels": labels,
        "T": labels.shape[1],
        "hidden": hidden.detach().requires_grad_(),
        "head": head,
        "teacher": tiny_llama(len(tokenizer), 64, seed=1, hidden=32).eval(),
        "other_teacher": tiny_llama(len(tokenizer), 64, seed=2, hidden=24).eval(),
        "local_head": head.weight,
        "logits": torch.randn(*labels.shape, len(tokenizer), requires_grad=True),
        "data": DATA,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "tp_group": None,  # all ranks: here one
        "dp_group": None,
        "cp_group": None,
    }


def with_trl(folder):
    """What a page needs besides that makes a trainer of TRL's."""
    import trl
    from datasets import Dataset

    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=2, report_to=[], use_cpu=True, bf16=False,
        completion_only_loss=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return {"args": args, "dataset": Dataset.from_list(DATA)}


@contextlib.contextmanager
def one_rank():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
