"""What the examples share: a tiny random model, a tokenizer, and real text without a download.

The text is the functions of Python's standard library: the prompt is signature and docstring, the
completion the body.
"""

from __future__ import annotations

from typing import Any

from sgp.train.model import tiny_llama
from sgp.train.stdlib import source_files, stdlib_pairs
from sgp.train.tokenizer import load_or_train, wrap

VOCABULARY, WINDOW = 2_048, 256
MODULES = 60  # of the library: enough for a few steps


def make_data() -> tuple[list[dict[str, str]], Any]:
    """Rows of prompt and completion whose prompt leaves room, and a tokenizer trained on them."""
    files = [file for file, _ in zip(source_files(), range(MODULES), strict=False)]
    rows = [_row(pair.prompt, pair.completion) for pair in stdlib_pairs(files)]
    texts = [row["prompt"] + row["completion"] for row in rows]
    tokenizer = wrap(load_or_train(texts, size=VOCABULARY, folder=None))
    return [row for row in rows if len(tokenizer(row["prompt"]).input_ids) < WINDOW], tokenizer


def make_model(tokenizer: Any) -> Any:
    """A small Llama with random weights; put `AutoModelForCausalLM.from_pretrained` here."""
    return tiny_llama(len(tokenizer), WINDOW, seed=0)


def _row(prompt: str, completion: str) -> dict[str, str]:
    """The line break goes to the body: a tokenizer merges it with the indentation after it."""
    head = prompt.removesuffix("\n")
    return {"prompt": head, "completion": prompt[len(head) :] + completion}
