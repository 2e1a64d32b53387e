"""What TRL's trainers train on in the tests: rows of numbers, in a few steps on a CPU."""

import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import V

COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
    "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 3,
    "disable_tqdm": True,
}  # fmt: skip


def quiet(make_it):
    """TRL and transformers deprecate each other's options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_it()


def numbers_as_text():
    """Prompts and completions of numbers, and a tokenizer for them."""
    inner = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0", eos_token="2")  # noqa: S106
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(3, V, (32, 20), generator=generator).tolist()
    rows = [
        {"prompt": " ".join(map(str, row[:14])), "completion": " " + " ".join(map(str, row[14:]))}
        for row in words
    ]
    return tokenizer, Dataset.from_list(rows)
