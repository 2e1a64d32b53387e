"""What is trained on: pairs and chats, dropping duplicates, holding some out."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sgp.data.reading import EXPECTED, Reading, Skip, UnreadableError, describe_skips, kind
from sgp.train.errors import UserError

__all__ = ["Chat", "Pair", "Skip", "describe_skips", "drop_duplicates", "read_jsonl", "split"]

_Item = TypeVar("_Item")

HELD_OUT_FRACTION = 0.05
TRAINED = ("prompt", "messages")  # kinds of rows


class Pair(NamedTuple):
    """A context and the output that is trained on, and where the two come from."""

    prompt: str
    completion: str
    source: str  # "json/decoder.py:332" or "data.jsonl:17"

    @property
    def digest(self) -> str:
        """A stable hash of prompt and completion: the same on every machine and in every run."""
        text = json.dumps([self.prompt, self.completion])
        return hashlib.sha256(text.encode()).hexdigest()


class Chat(NamedTuple):
    """Messages, or a prompt and a completion of messages, and where they come from."""

    row: dict[str, Any]
    source: str

    @property
    def digest(self) -> str:
        """A stable hash of the row."""
        text = json.dumps(self.row, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def read_jsonl(path: Path) -> tuple[list[Pair | Chat], list[Skip]]:
    r"""Read prompt and completion, or messages, a line; keep the good lines, name the others.

    Blank lines are ignored; other keys are too. A line that is not UTF-8 or not JSON, is not an
    object, lacks a key, holds something that is not text, or has an empty completion is skipped.
    `sgp.data.reading` says what files there may be.

    Args:
        path: The file to read, or `-` for standard input.

    Returns:
        The rows in the order of the file, and one `Skip` for each line that was not usable.

    Raises:
        UserError: The file cannot be read, is empty, or has no usable line.

    Example:
        >>> _ = Path("a.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\nnonsense\n')
        >>> pairs, skips = read_jsonl(Path("a.jsonl"))
        >>> pairs
        [Pair(prompt='2+2=', completion='4', source='a.jsonl:1')]
        >>> skips
        [Skip(line=2, reason='broken JSON', unit='line')]
    """
    rows: list[Pair | Chat] = []
    skips: list[Skip] = []
    reading = Reading(path, TRAINED)
    try:
        for number, row, reason in reading:
            if reason:
                skips.append(Skip(number, reason, reading.unit))
            else:
                rows.append(_item(row, f"{reading.name}:{number}"))
    except UnreadableError as error:
        raise UserError(f"--data {error}") from error
    if not rows and not skips:
        raise UserError(
            f"--data {reading.shown}: the file is empty; expected a line like {EXPECTED}"
        )
    if not rows:
        raise UserError(
            f"--data {reading.shown}: no usable {reading.unit}; {'; '.join(describe_skips(skips))}"
        )
    return rows, skips


def _item(row: dict[str, Any], source: str) -> Pair | Chat:
    if kind(row, TRAINED) == "prompt" and isinstance(row["prompt"], str):
        return Pair(row["prompt"], row["completion"], source)
    return Chat(row, source)


def drop_duplicates(pairs: Iterable[Pair | Chat]) -> list[Pair | Chat]:
    """Return the pairs without those whose prompt and completion came before; chats alike.

    Example:
        >>> drop_duplicates([Pair("a", "b", "x:1"), Pair("a", "b", "x:2")])
        [Pair(prompt='a', completion='b', source='x:1')]
    """
    first: dict[Any, Pair | Chat] = {}
    for pair in pairs:
        key = (pair.prompt, pair.completion) if isinstance(pair, Pair) else pair.digest
        first.setdefault(key, pair)
    return list(first.values())


def split(
    items: Sequence[_Item], digest: Callable[[_Item], str]
) -> tuple[list[_Item], list[_Item]]:
    """Split into `(train, held out)` by the hash of each item, whatever the seed or the order.

    About 5 % are held out, in the order of their hash; at least one is held out and at least one
    is left to train on.

    Args:
        items: At least two items with different hashes.
        digest: Returns an item's hash as hexadecimal digits.

    Example:
        >>> split(["f0000000", "00000001", "80000000"], digest=str)
        (['f0000000', '80000000'], ['00000001'])
    """
    ordered = sorted(items, key=digest)
    limit = int(HELD_OUT_FRACTION * 16**8)
    count = sum(int(digest(item)[:8], 16) < limit for item in ordered)
    count = min(max(count, 1), len(ordered) - 1)
    held_out = ordered[:count]
    out = {digest(item) for item in held_out}
    return [item for item in items if digest(item) not in out], held_out
