"""Prompt/completion pairs: reading them, dropping duplicates, holding some out."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from sgp.train.errors import UserError

_Item = TypeVar("_Item")

HELD_OUT_FRACTION = 0.05


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


class Skip(NamedTuple):
    """A line that was not used, and why."""

    line: int  # counted from 1
    reason: str


def read_jsonl(path: Path) -> tuple[list[Pair], list[Skip]]:
    r"""Read `{"prompt": ..., "completion": ...}` a line; keep the good lines, name the others.

    Blank lines are ignored; other keys are too. A line that is not UTF-8 or not JSON, is not an
    object, lacks a key, holds something that is not text, or has an empty completion is skipped.

    Args:
        path: The file to read.

    Returns:
        The pairs in the order of the file, and one `Skip` for each line that was not usable.

    Raises:
        UserError: The file cannot be read, is empty, or has no usable line.

    Example:
        >>> _ = Path("a.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\nnonsense\n')
        >>> pairs, skips = read_jsonl(Path("a.jsonl"))
        >>> pairs
        [Pair(prompt='2+2=', completion='4', source='a.jsonl:1')]
        >>> skips
        [Skip(line=2, reason='broken JSON')]
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: {_reason(error)}") from error
    pairs: list[Pair] = []
    skips: list[Skip] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        reason, prompt, completion = _parse(line)
        if reason:
            skips.append(Skip(number, reason))
        else:
            pairs.append(Pair(prompt, completion, f"{path.name}:{number}"))
    if not pairs and not skips:
        raise UserError(
            f'--data {path}: the file is empty; expected a line like {{"prompt": "...", '
            '"completion": "..."}'
        )
    if not pairs:
        raise UserError(f"--data {path}: no usable line; {'; '.join(describe_skips(skips))}")
    return pairs, skips


def describe_skips(skips: Sequence[Skip], *, shown: int = 3) -> list[str]:
    """Return one sentence for each reason: how many lines, and the first few line numbers.

    Example:
        >>> describe_skips([Skip(2, "broken JSON"), Skip(9, "broken JSON")])
        ['2 lines skipped: broken JSON (lines 2, 9)']
    """
    lines_of: dict[str, list[int]] = {}
    for skip in skips:
        lines_of.setdefault(skip.reason, []).append(skip.line)
    sentences = []
    for reason, lines in lines_of.items():
        plural = "s" if len(lines) > 1 else ""
        numbers = ", ".join(map(str, lines[:shown])) + (", ..." if len(lines) > shown else "")
        sentences.append(f"{len(lines)} line{plural} skipped: {reason} (line{plural} {numbers})")
    return sentences


def drop_duplicates(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs without those whose prompt and completion came before.

    Example:
        >>> drop_duplicates([Pair("a", "b", "x:1"), Pair("a", "b", "x:2")])
        [Pair(prompt='a', completion='b', source='x:1')]
    """
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        first.setdefault((pair.prompt, pair.completion), pair)
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


def _parse(line: bytes) -> tuple[str, str, str]:
    """Return `(reason why the line cannot be used or "", prompt, completion)`."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8", "", ""
    except (ValueError, RecursionError):
        return "broken JSON", "", ""
    if not isinstance(record, dict):
        return "not a JSON object", "", ""
    reason = _wrong_text(record, "prompt") or _wrong_text(record, "completion")
    if not reason and not record["completion"].strip():
        reason = "empty completion"
    return (reason, "", "") if reason else ("", record["prompt"], record["completion"])


def _wrong_text(record: dict[str, object], key: str) -> str:
    if key not in record:
        return f'no "{key}"'
    value = record[key]
    if not isinstance(value, str):
        return f'"{key}" is not a string'
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f'"{key}" is not valid Unicode'
    return ""


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
