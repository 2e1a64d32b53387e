"""One training example as token ids and labels: text, chat or tokens that stand already.

Labels are the token itself where it carries loss and -100 elsewhere; they are not shifted.
"""

from __future__ import annotations

import contextlib
import itertools
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sgp.caller import warn
from sgp.data.messages import NAME, messages_of, tools_of
from sgp.labels import IGNORE

MASKS = ("completion_mask", "assistant_masks")
KEYS = ("input_ids", "prompt", "completion", "messages", "text")
COLUMNS = {
    "input_ids", "labels", *MASKS, "attention_mask", "position_ids", "seq_idx", "seq_lengths",
    "token_type_ids", "special_tokens_mask", "prompt", "completion", "messages", "text", "tools",
    "chat_template_kwargs",
}  # fmt: skip
"""What is read of an example, or has nothing that a batch needs."""

REMOVED = "(Trainer removes the columns that a model does not take: remove_unused_columns=False.)"


class Row(NamedTuple):
    """One sequence."""

    input_ids: list[int]
    labels: list[int]


def tokenize(
    example: Mapping[str, Any],
    tokenizer: Any,
    *,
    context_loss: bool = False,
    assistant_only_loss: bool = False,
) -> list[Row]:
    """Turn an example into the sequences that it holds: one, unless tokens were packed before.

    * `input_ids` and `labels`; or `input_ids` and `completion_mask`, `assistant_masks` (1: carries
      loss; where both are there, both must be 1); or `input_ids` alone, with `context_loss=True`.
    * `prompt` and `completion`, strings or lists of messages: the completion carries loss. Both
      are tokenized together; the completion begins where they differ from the prompt alone.
    * `messages`: what the template marks with `{% generation %}`, the assistant's turns.
    * `text`: all.

    Beside `input_ids`, where they are there and not None:

    * `attention_mask`: tokens of 0, on the left or the right, are padding and left out. Other
      numbers than 1 number the sequences of a packed row.
    * `position_ids` that begin again from 0, `seq_idx` (a number for each token) and TRL's
      `seq_lengths` say where the sequences of a packed row begin.
    * `token_type_ids` must be 0. `special_tokens_mask` says nothing of the loss and is not read.

    Chats are given the template's `tools` (also as JSON) and `chat_template_kwargs`, if they have
    them. `datasets` gives every row the keys of all others, with None: these are left out of
    messages (but for `content`), of tools (but for `default` and `const`), and of the arguments of
    a tool call, unless the row's tools say that the argument is required. What is JSON stays as it
    is.

    Example:
        >>> tokenize({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, None)
        [Row(input_ids=[5, 6, 7], labels=[-100, -100, 7])]

    Args:
        example: one of the above.
        tokenizer: of transformers; not needed for `input_ids`.
        context_loss: prompts and the other side's turns carry loss too.
        assistant_only_loss: of a completion, only what the template marks as the assistant's.

    Raises:
        ValueError: an example of no kind, tokens that nothing says the loss of, columns of
            different lengths or with values that are not those above, padding that carries loss, a
            tokenizer that is missing, a chat template that marks nothing, `assistant_only_loss`
            where nothing says what is the assistant's.
    """
    found = _tokenized(example, tokenizer, context_loss, assistant_only_loss)
    if found.merged:
        warn(
            f"{NAME}: the tokens of a prompt alone are not the first of prompt and completion "
            f"together (they merge, or the template differs): {found.merged!r} is scored as "
            "completion"
        )
    return found.rows


class Tokenized(NamedTuple):
    """What came of one example among many."""

    rows: list[Row]
    reason: str = ""  # why there are none
    merged: str = ""  # tokens of the prompt that are scored, as they differ before a completion


def tokenize_all(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    context_loss: bool = False,
    assistant_only_loss: bool = False,
) -> list[Tokenized]:
    """Turn each example into its sequences as `tokenize` does, with fewer calls of the tokenizer.

    An example that cannot be read has a reason in place of rows, and the others are not disturbed.

    Example:
        >>> found = tokenize_all([{"input_ids": [5, 6], "labels": [-100, 6]}, {"id": 3}], None)
        >>> found[0].rows, found[1].reason[:23]
        ([Row(input_ids=[5, 6], labels=[-100, 6])], "an example has ['id']; ")

    Args:
        examples, tokenizer, context_loss, assistant_only_loss: as for `tokenize`.
    """
    ahead = tokenizer if tokenizer is None else _Ahead(tokenizer, examples)
    options = context_loss, assistant_only_loss
    return [_tolerant(example, ahead, options) for example in examples]


def _tolerant(example: Mapping[str, Any], tokenizer: Any, options: tuple[bool, bool]) -> Tokenized:
    try:
        return _tokenized(example, tokenizer, *options)
    except Exception as error:  # noqa: BLE001  (a chat template raises what it likes)
        reason = " ".join(str(error).removeprefix(f"{NAME}: ").split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Tokenized([], f"{kind}{reason}"[:300])


class _Ahead:
    """A tokenizer that has seen the texts of a list of examples, all in one call."""

    def __init__(self, tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> None:
        self._tokenizer = tokenizer
        texts = dict.fromkeys(t for example in examples for t in _texts(example, tokenizer))
        self._ids: dict[str, list[int]] = {}
        if texts:
            with contextlib.suppress(Exception):  # each is then tokenized alone, and its error said
                ids = tokenizer(list(texts))["input_ids"]
                self._ids = dict(zip(texts, ids, strict=True))

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = self._ids.get(text)
        return {"input_ids": list(self._tokenizer(text)["input_ids"]) if ids is None else ids}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _texts(example: Mapping[str, Any], tokenizer: Any) -> Iterator[str]:
    """What `_tokenized` will ask the tokenizer for."""
    if example.get("input_ids") is not None:
        return
    prompt, completion = example.get("prompt"), example.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        yield prompt
        yield prompt + _ended(completion, tokenizer)
    elif example.get("messages") is None and isinstance(example.get("text"), str):
        yield _ended(example["text"], tokenizer)


def _tokenized(
    example: Mapping[str, Any], tokenizer: Any, context_loss: bool, assistant_only_loss: bool
) -> Tokenized:
    if any(example.get(name, 0) is None for name in KEYS):  # `datasets` mixed kinds of rows
        example = {k: v for k, v in example.items() if v is not None or k not in KEYS}
    if "input_ids" in example:
        return Tokenized(_of_tokens(example, context_loss, assistant_only_loss))
    is_pair = {"prompt", "completion"} <= set(example)
    if not is_pair and not {"messages", "text"} & set(example):
        raise ValueError(
            f"{NAME}: an example has {sorted(example)}; expected input_ids (with "
            f"labels or masks), prompt and completion, messages, or text. {REMOVED}"
        )
    if tokenizer is None:
        raise ValueError(f"{NAME}: an example has {sorted(example)}; that needs a tokenizer")
    if is_pair:
        ids, start, mask, merged = _prompt_and_completion(example, tokenizer, assistant_only_loss)
        start = 0 if context_loss else start
        return Tokenized([Row(ids, [IGNORE] * start + _marked(ids, mask)[start:])], merged=merged)
    if "messages" in example:
        return Tokenized([_of_messages(example, tokenizer, context_loss=context_loss)])
    if assistant_only_loss:
        raise ValueError(_no_turns("the example is a text"))
    ids = list(tokenizer(_ended(example["text"], tokenizer))["input_ids"])
    return Tokenized([Row(ids, list(ids))])


# -- tokens ----------------------------------------------------------------------------------------


def _of_tokens(
    example: Mapping[str, Any], context_loss: bool, assistant_only_loss: bool
) -> list[Row]:
    ids = _integers(example, "input_ids")
    columns = {
        name: _integers(example, name)
        for name in ("labels", *MASKS, "attention_mask", "position_ids", "seq_idx")
        if example.get(name) is not None
    }
    for name, column in columns.items():
        if len(ids) != len(column):
            raise ValueError(f"{NAME}: {len(ids)} input_ids and {len(column)} {name}")
    types = example.get("token_type_ids")
    if types is not None and any(_integers(example, "token_type_ids")):
        raise ValueError(
            f"{NAME}: token_type_ids is {str(types)[:60]}; a batch has no token types, expected 0 "
            "everywhere or no such column"
        )
    labels = _labels(example, ids, columns, context_loss, assistant_only_loss)
    kept = _attended(columns.get("attention_mask", [1] * len(ids)), labels)
    starts = _starts(example, {k: v[kept] for k, v in columns.items()}, len(ids[kept]))
    bounds = itertools.pairwise([*starts, len(ids[kept])])
    return [Row(ids[kept][a:b], labels[kept][a:b]) for a, b in bounds]


def _labels(
    example: Mapping[str, Any],
    ids: list[int],
    columns: dict[str, list[int]],
    context_loss: bool,
    assistant_only_loss: bool,
) -> list[int]:
    if "labels" in columns:
        return columns["labels"]
    masks = [columns[name] for name in MASKS if name in columns]
    if context_loss:
        masks = [columns.get("attention_mask", [1] * len(ids))]
    elif assistant_only_loss and "assistant_masks" not in columns:
        raise ValueError(_no_turns(f"an example has {sorted(example)}"))
    elif not masks:
        raise ValueError(
            f"{NAME}: an example has {sorted(example)}: which tokens carry loss? Give it labels, "
            f"completion_mask or assistant_masks, or context_loss=True if all do. {REMOVED}"
        )
    return [x if all(bits) else IGNORE for x, *bits in zip(ids, *masks, strict=True)]


def _attended(mask: list[int], labels: list[int]) -> slice:
    """The tokens between the padding on the left and on the right, of which nothing is learned."""
    if min(mask, default=0) > 0:
        return slice(None)
    first = next((t for t, number in enumerate(mask) if number), len(mask))
    end = len(mask) - next((t for t, number in enumerate(reversed(mask)) if number), len(mask))
    if 0 in mask[first:end] or min(mask, default=0) < 0:
        raise ValueError(
            f"{NAME}: attention_mask is {str(mask)[:60]}; expected 1, or the number of a packed "
            "sequence, for tokens and 0 for padding on the left or the right"
        )
    for t in (*range(first), *range(max(first, end), len(mask))):
        if labels[t] != IGNORE:
            raise ValueError(
                f"{NAME}: attention_mask[{t}] is 0 and the label there is {labels[t]}: padding "
                "carries loss. Give it the label -100 or, if it is an end of text to be learned, "
                "the mask 1"
            )
    return slice(first, end)


def _starts(example: Mapping[str, Any], columns: dict[str, list[int]], N: int) -> list[int]:
    """Where the sequences of a row begin, by what its columns say, padding left out."""
    starts = {0}
    for name in ("attention_mask", "seq_idx"):
        numbers = columns.get(name, [])
        pairs = enumerate(itertools.pairwise(numbers), 1)
        starts |= {t for t, (before, number) in pairs if number != before}
    if example.get("seq_lengths") is not None:
        lengths = _integers(example, "seq_lengths")
        if sum(lengths) != N or any(length <= 0 for length in lengths):
            raise ValueError(f"{NAME}: {N} input_ids and seq_lengths = {str(lengths)[:60]}")
        starts |= {end for end in itertools.accumulate(lengths) if end < N}
    positions = columns.get("position_ids")
    if positions is not None:
        starts |= {t for t in range(1, N) if positions[t] == 0}
    found = sorted(starts)
    counted = [t for a, b in itertools.pairwise([*found, N]) for t in range(b - a)]
    if positions is not None and positions != counted:
        raise ValueError(
            f"{NAME}: position_ids of the {N} tokens are {str(positions)[:60]}; expected to count "
            "from 0 in each sequence, as the batch's do"
        )
    return found


def _integers(example: Mapping[str, Any], name: str) -> list[int]:
    column = example[name]
    column = column.tolist() if hasattr(column, "tolist") else column
    if not isinstance(column, Sequence) or not all(isinstance(x, numbers.Integral) for x in column):
        raise ValueError(f"{NAME}: {name} is {str(column)[:60]!r}; expected a list of integers")
    return [int(x) for x in column]


# -- text and chats --------------------------------------------------------------------------------


def _prompt_and_completion(
    example: Mapping[str, Any], tokenizer: Any, assistant_only_loss: bool
) -> tuple[list[int], int, list[int], str]:
    """The tokens of both, where the completion begins, which may carry loss, and what merged."""
    if isinstance(example["prompt"], str):
        if assistant_only_loss:
            raise ValueError(_no_turns("the completion is a text"))
        prompt, completion = example["prompt"], _ended(example["completion"], tokenizer)
        alone = list(tokenizer(prompt)["input_ids"])
        ids = list(tokenizer(prompt + completion)["input_ids"])
        mask = [1] * len(ids)
    else:
        given = _given(example)
        prompt, completion = (messages_of(example, name) for name in ("prompt", "completion"))
        alone = _template(tokenizer, prompt, **given, add_generation_prompt=True)["input_ids"]
        ids, mask = _turns(tokenizer, [*prompt, *completion], given, assistant_only_loss)
    start = len(alone)
    if ids[:start] != alone:
        pairs = zip(alone, ids, strict=False)
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    merged = tokenizer.decode(alone[start:]) if start < len(alone) else ""
    return ids, start, mask, merged


def _ended(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _of_messages(example: Mapping[str, Any], tokenizer: Any, *, context_loss: bool) -> Row:
    messages = messages_of(example, "messages")
    ids, mask = _turns(tokenizer, messages, _given(example), not context_loss)
    return Row(ids, _marked(ids, mask))


def _marked(ids: list[int], mask: list[int]) -> list[int]:
    return [x if bit else IGNORE for x, bit in zip(ids, mask, strict=True)]


def _turns(
    tokenizer: Any, messages: Any, given: dict[str, Any], assistant_only: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and which of them are the assistant's, or all."""
    if not assistant_only:
        ids = _template(tokenizer, messages, **given)["input_ids"]
        return ids, [1] * len(ids)
    found = _template(tokenizer, messages, **given, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found.get("assistant_masks", [])
    if not any(mask):
        roles = _roles(messages)
        if "assistant" not in roles:
            raise ValueError(f"{NAME}: no message of the roles {roles} is the assistant's")
        raise ValueError(
            f"{NAME}: the chat template marks no token of the roles {roles} as the assistant's: "
            "write {% generation %} and {% endgeneration %} around its turns in the template, or "
            "give prompt and completion as messages, which need no marks"
        )
    return ids, mask


def _roles(messages: Any) -> list[Any]:
    found = messages if isinstance(messages, list) else []
    return [message.get("role") if isinstance(message, Mapping) else None for message in found]


def _no_turns(what: str) -> str:
    return (
        f"{NAME}: assistant_only_loss=True asks which tokens are the assistant's, and {what}; "
        "expected messages, or input_ids with assistant_masks"
    )


def _given(example: Mapping[str, Any]) -> dict[str, Any]:
    """What an example says to the template beside its messages."""
    options = example.get("chat_template_kwargs") or {}
    options = {name: value for name, value in options.items() if value is not None}
    return {"tools": tools_of(example), **options}


def _template(tokenizer: Any, messages: Any, **options: Any) -> dict[str, list[int]]:
    try:
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"{NAME}: the chat template refuses messages of the roles {_roles(messages)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return {name: list(column) for name, column in found.items()}
