"""One training example as token ids and labels: text, chat or tokens that stand already.

Labels are the token itself where it carries loss and -100 elsewhere; they are not shifted.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sgp.selection import IGNORE

NAME = "sgp.Collator"
MASKS = ("completion_mask", "assistant_masks")
KINDS = "input_ids (with labels or masks), prompt and completion, messages, or text"

REMOVED = "(Trainer removes the columns that a model does not take: remove_unused_columns=False.)"


class Row(NamedTuple):
    """One sequence."""

    input_ids: list[int]
    labels: list[int]


def tokenize(example: Mapping[str, Any], tokenizer: Any, *, context_loss: bool = False) -> Row:
    """Turn an example into a row.

    * `input_ids` and `labels`; or `input_ids` and `completion_mask`, `assistant_masks` (1: carries
      loss; where both are there, both must be 1); or `input_ids` alone, with `context_loss=True`.
    * `prompt` and `completion`, strings or lists of messages: the completion carries loss. Both
      are tokenized together; the completion begins where they differ from the prompt alone.
    * `messages`: what the template marks with `{% generation %}`, the assistant's turns.
    * `text`: all.

    Chats are given the template's `tools` (also as JSON) and `chat_template_kwargs`, if they have
    them.

    Example:
        >>> tokenize({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, None)
        Row(input_ids=[5, 6, 7], labels=[-100, -100, 7])

    Args:
        example: one of the above.
        tokenizer: of transformers; not needed for `input_ids`.
        context_loss: prompts and the other side's turns carry loss too.

    Raises:
        ValueError: an example of no kind, tokens that nothing says the loss of, columns of
            different lengths, a tokenizer that is missing, a chat template that marks nothing.
    """
    if "input_ids" in example:
        return _of_tokens(example, context_loss=context_loss)
    if not {"prompt", "completion"} <= set(example) and not {"messages", "text"} & set(example):
        raise ValueError(f"{NAME}: an example has {sorted(example)}; expected {KINDS}. {REMOVED}")
    if tokenizer is None:
        raise ValueError(f"{NAME}: an example has {sorted(example)}; that needs a tokenizer")
    if "prompt" in example:
        ids, start = _prompt_and_completion(example, tokenizer)
        start = 0 if context_loss else start
        return Row(ids, [IGNORE] * start + ids[start:])
    if "messages" in example:
        return _of_messages(example, tokenizer, context_loss=context_loss)
    ids = list(tokenizer(_ended(example["text"], tokenizer))["input_ids"])
    return Row(ids, list(ids))


def _of_tokens(example: Mapping[str, Any], *, context_loss: bool) -> Row:
    ids = _integers(example, "input_ids")
    if example.get("labels") is not None:
        labels = _integers(example, "labels")
        _same_length(ids, labels, "labels")
        return Row(ids, labels)
    labels = list(ids)
    if not context_loss and all(example.get(name) is None for name in MASKS):
        raise ValueError(
            f"{NAME}: an example has {sorted(example)}: which tokens carry loss? Give it labels, "
            f"completion_mask or assistant_masks, or context_loss=True if all do. {REMOVED}"
        )
    for name in MASKS:
        if example.get(name) is None or context_loss:
            continue
        mask = _integers(example, name)
        _same_length(ids, mask, name)
        labels = [x if bit else IGNORE for x, bit in zip(labels, mask, strict=True)]
    return Row(ids, labels)


def _integers(example: Mapping[str, Any], name: str) -> list[int]:
    column = example[name]
    column = column.tolist() if hasattr(column, "tolist") else column
    if not isinstance(column, Sequence) or not all(isinstance(x, int) for x in column):
        raise ValueError(f"{NAME}: {name} is {str(column)[:60]!r}; expected a list of integers")
    return [int(x) for x in column]


def _same_length(ids: list[int], column: list[int], name: str) -> None:
    if len(ids) != len(column):
        raise ValueError(f"{NAME}: {len(ids)} input_ids and {len(column)} {name}")


def _prompt_and_completion(example: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of both, and where the completion begins."""
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        alone = list(tokenizer(prompt)["input_ids"])
        ids = list(tokenizer(prompt + _ended(completion, tokenizer))["input_ids"])
    else:
        given = _given(example)
        alone = _template(tokenizer, prompt, **given, add_generation_prompt=True)["input_ids"]
        ids = _template(tokenizer, [*prompt, *completion], **given)["input_ids"]
    pairs = zip(alone, ids, strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if start < len(alone):
        _warn_of_boundary(tokenizer.decode(alone[start:]))
    return ids, start


def _ended(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _of_messages(example: Mapping[str, Any], tokenizer: Any, *, context_loss: bool) -> Row:
    messages, given = example["messages"], _given(example)
    if context_loss:
        ids = _template(tokenizer, messages, **given)["input_ids"]
        return Row(ids, list(ids))
    found = _template(tokenizer, messages, **given, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found.get("assistant_masks", [])
    if not any(mask):
        raise ValueError(
            f"{NAME}: the chat template marks no token of {str(messages)[:80]!r} as the "
            "assistant's; it needs {% generation %} ... {% endgeneration %} around those turns"
        )
    return Row(ids, [x if bit else IGNORE for x, bit in zip(ids, mask, strict=True)])


def _given(example: Mapping[str, Any]) -> dict[str, Any]:
    """What an example says to the template beside its messages."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(example.get("chat_template_kwargs") or {})}


def _template(tokenizer: Any, messages: Any, **options: Any) -> dict[str, list[int]]:
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return {name: list(column) for name, column in found.items()}


def _warn_of_boundary(lost: str) -> None:
    warnings.warn(
        f"{NAME}: the tokens of a prompt alone are not the first of prompt and completion together "
        f"(they merge, or the template differs): {lost!r} is scored as completion",
        stacklevel=5,
    )
