"""One reader for every command: JSON lines, compressed too, and Parquet, a broken line at a time.

What a line cannot be used for is said of that line, and the others are read on.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from sgp.data.examples import MASKS
from sgp.labels import IGNORE

STDIN = "-"
PACKED = {  # how a compressed file begins, and what reads it
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
}
PARQUET = b"PAR1"
MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
EXPECTED = '{"prompt": "...", "completion": "..."}'
NO_OBJECT = "not a JSON object"
KINDS = ("input_ids", "prompt", "messages", "text")
TOKENS = ("input_ids", "labels", *MASKS, "attention_mask", "position_ids", "seq_idx")
TRAIN = ("transformers", "tokenizers", "matplotlib")  # packages of the extra of that name
CORE = ("rich", "torch", "numpy")


class UnreadableError(Exception):
    """A file of which nothing can be used; a command prints it as one line."""


class Line(NamedTuple):
    """A line that is not blank: its row, or the reason why there is none."""

    number: int  # counted from 1
    row: dict[str, Any]
    reason: str = ""


class Skip(NamedTuple):
    """A line that was not used, and why."""

    line: int  # counted from 1
    reason: str
    unit: str = "line"  # "row", of Parquet


class Reading:
    r"""The lines of a file that are not blank, in their order.

    Gzip, bzip2, xz, zstd and Parquet are known by how they begin, whatever the file is called. A
    file that breaks off is read up to there, and its last line has the reason. `unit` is what its
    lines are called, `size` how many bytes there are (None where a pipe does not tell) and `done`
    how many of them were read.

    Example:
        >>> _ = Path("a.jsonl").write_text('{"text": "4"}\nnonsense\n')
        >>> [*Reading(Path("a.jsonl"))]
        [Line(number=1, row={'text': '4'}, reason=''), Line(number=2, row={}, reason='broken JSON')]

    Args:
        source: a file, or `-` for standard input.
        kinds: the rows that can be used, of `KINDS`.

    Raises:
        UnreadableError: while it iterates: the file is missing, a folder, or needs a package.
    """

    def __init__(self, source: Path, kinds: Sequence[str] = KINDS) -> None:
        self.source, self.kinds = source, kinds
        self.is_stdin = str(source) == STDIN
        self.name = "standard input" if self.is_stdin else source.name
        self.shown = self.name if self.is_stdin else str(source)
        self.unit = "line"
        self.size: int | None = None
        self.done = 0

    def __iter__(self) -> Iterator[Line]:
        try:
            raw: Any = sys.stdin.buffer if self.is_stdin else self.source.open("rb")
        except OSError as error:
            raise UnreadableError(f"{self.shown}: {_reason(error)}") from error
        try:
            yield from self._of(raw if hasattr(raw, "peek") else io.BufferedReader(raw))
        finally:
            if not self.is_stdin:
                raw.close()

    def _of(self, raw: Any) -> Iterator[Line]:
        try:
            first = raw.peek(len(PARQUET))[:6]
            self.size = None if self.is_stdin else self.source.stat().st_size
        except OSError as error:
            raise UnreadableError(f"{self.shown}: {_reason(error)}") from error
        if first.startswith(PARQUET):
            self.unit = "row"
            yield from self._of_parquet()
        else:
            yield from self._of_lines(raw, _unpacked(raw, first, self.shown))

    def _of_lines(self, raw: Any, file: Iterable[bytes]) -> Iterator[Line]:
        lines, number = iter(file), 0
        array = _Array()
        while True:
            try:
                data = next(lines, None)
            except _broken() as error:
                if not number:
                    raise UnreadableError(f"{self.shown}: {_reason(error)}") from error
                reason = f"the file breaks off here: {_reason(error)}"
                yield Line(number + 1, {}, reason)
                return
            if data is None:
                self.done = self.size or self.done
                if array.whole:
                    raise UnreadableError(
                        f"{self.shown}: the file is one JSON array; write an object a line"
                    )
                return
            number += 1
            if number == 1:
                data = data.removeprefix(MARK)
            if raw is file:
                self.done += len(data)
            elif not number % 256 and self.size is not None:
                self.done = raw.tell()
            if data.strip():
                row, reason = parsed(data)
                array.see(data, reason)
                yield Line(number, row, reason or fault(row, self.kinds))

    def _of_parquet(self) -> Iterator[Line]:
        if self.is_stdin:
            raise UnreadableError(
                "standard input is Parquet, which is read from its end; name a file"
            )
        try:
            import datasets  # noqa: PLC0415  (optional)
        except ModuleNotFoundError as error:
            raise UnreadableError(f"{self.shown} is Parquet: {needed('datasets')}") from error
        try:
            rows = datasets.IterableDataset.from_parquet(str(self.source))
            for number, row in enumerate(rows, 1):
                yield Line(number, row, fault(row, self.kinds))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UnreadableError(f"{self.shown}: {_reason(error)}") from error
        self.done = self.size or 0


def needed(*packages: str) -> str:
    """What to install, in the words of every command.

    Example:
        >>> needed("datasets")
        'needs datasets; run: pip install datasets'
    """
    names = " and ".join(packages)
    if set(packages) <= {*TRAIN, *CORE}:
        extra = "'.[train]'" if set(packages) & {*TRAIN} else "."
        return f"needs {names}; in your clone of sgp, run: pip install -e {extra}"
    return f"needs {names}; run: pip install {' '.join(packages)}"


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
        unit, plural = skips[0].unit, "s" if len(lines) > 1 else ""
        numbers = ", ".join(map(str, lines[:shown])) + (", ..." if len(lines) > shown else "")
        sentences.append(
            f"{len(lines)} {unit}{plural} skipped: {reason} ({unit}{plural} {numbers})"
        )
    return sentences


def alike(reason: str) -> str:
    """A reason without what differs from line to line: quotes and numbers.

    Example:
        >>> alike("token 'a' at 3") == alike("token 'b' at 17")
        True
    """
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "_", reason)


class _Array:
    """Whether the lines that are not blank are those of one JSON array, and not each an array."""

    def __init__(self) -> None:
        self._lines = 0
        self._opens = self._closed = False
        self._alone = False  # the first line is whole

    def see(self, data: bytes, reason: str) -> None:
        """Take in a line."""
        data = data.strip()
        if not self._lines:
            self._alone = reason == NO_OBJECT
            self._opens = data.startswith(b"[")
            self._opens &= not self._alone or data[1:].lstrip().startswith(b"{")
        self._lines += 1
        self._closed = data.endswith(b"]")

    @property
    def whole(self) -> bool:
        """After the last of them."""
        return self._opens and self._closed and (self._lines == 1 or not self._alone)


# -- one line --------------------------------------------------------------------------------------


def parsed(line: bytes) -> tuple[dict[str, Any], str]:
    """The object of a line, or the reason why it has none.

    Example:
        >>> parsed(b"[1, 2]")
        ({}, 'not a JSON object')
    """
    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            return {}, NO_OBJECT
        # Strict UTF-8 has no surrogates: only an escape can make one.
        if b"\\ud" in line or b"\\uD" in line:
            for key, value in record.items():
                if _has_surrogate(value) or _has_surrogate(key):
                    return {}, f'"{key}" is not valid Unicode'.encode(errors="replace").decode()
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except (ValueError, RecursionError):
        return {}, "broken JSON"
    return record, ""


def kind(row: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> str:
    """Which kind of row this is, by its columns that are not None; "" for none of them.

    Example:
        >>> kind({"prompt": "a", "completion": "b"}), kind({"input_ids": None, "text": "c"})
        ('prompt', 'text')
    """
    for name in kinds:
        needs = (name, "completion") if name == "prompt" else (name,)
        if all(row.get(x) is not None for x in needs):
            return name
    return ""


def fault(row: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> str:
    """Why a row cannot be used; "" if it can.

    Example:
        >>> fault({"prompt": "2+2=", "completion": ""})
        'empty completion'

    Args:
        row: a line's object.
        kinds: the rows that can be used.
    """
    found = kind(row, kinds)
    return CHECKS[found](row) if found else _no_kind(row, kinds)


def _no_kind(row: Mapping[str, Any], kinds: Sequence[str]) -> str:
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key in row and row.get(other) is not None:
            return f'"{key}" is not a string'  # but null
        if key not in row and other in row:
            return f'no "{key}"'
    names = [f'"{x}" with "completion"' if x == "prompt" else f'"{x}"' for x in kinds]
    has = ", ".join(f'"{str(x)[:24]}"' for x in sorted(row, key=str)[:4]) or "nothing"
    return f"has {has}; expected {', '.join(names[:-1])} or {names[-1]}"


def _tokens(row: Mapping[str, Any]) -> str:
    columns = {name: row[name] for name in TOKENS if row.get(name) is not None}
    columns = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in columns.items()}
    for name, column in columns.items():
        wrong = _wrong_column(name, column)
        if wrong:
            return f'"{name}" {wrong}'
    if len(set(map(len, columns.values()))) > 1:
        return f"columns of different lengths: {', '.join(columns)}"
    return "" if columns["input_ids"] else "no tokens"


def _wrong_column(name: str, column: Any) -> str:
    kinds = set(map(type, column)) - {int, bool} if isinstance(column, list) else {type(column)}
    if kinds == {str} and isinstance(column, list):
        return "has numbers as text"
    if kinds:
        return "is not a list of whole numbers"
    if max(column, default=0) >= 1 << 63:
        return "has a number of 2^63 or more"
    if name == "labels" and any(x < 0 and x != IGNORE for x in column):
        return f"has a number below 0 that is not {IGNORE}"
    return "has a number below 0" if name != "labels" and min(column, default=0) < 0 else ""


def _pair(row: Mapping[str, Any]) -> str:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        wrong = _wrong_chat("prompt", prompt) or _wrong_chat("completion", completion)
        return wrong or ("" if any(map(_says, completion)) else "empty completion")
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            return f'"{name}" is not a string'
    return "" if completion.strip() else "empty completion"


def _chat(row: Mapping[str, Any]) -> str:
    messages = row["messages"]
    wrong = _wrong_chat("messages", messages)
    if wrong:
        return wrong
    if not messages:
        return '"messages" is empty'
    answers = [message for message in messages if message.get("role") == "assistant"]
    return "empty completion" if answers and not any(map(_says, answers)) else ""


def _text(row: Mapping[str, Any]) -> str:
    if not isinstance(row["text"], str):
        return '"text" is not a string'
    return "" if row["text"].strip() else "empty text"


def _wrong_chat(name: str, value: Any) -> str:
    good = isinstance(value, list) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    )
    if not good:
        return f'"{name}" is not a list of messages, each with a "role"'
    if any(isinstance(message.get("content"), (int, float)) for message in value):
        return f'"{name}" has a content that is a number, not a string'
    return ""


def _says(message: Mapping[str, Any]) -> bool:
    """Whether anything stands in a message beside its role."""
    values = (value for key, value in message.items() if key not in ("role", "name"))
    return any(value.strip() if isinstance(value, str) else value for value in values)


CHECKS = {"input_ids": _tokens, "prompt": _pair, "messages": _chat, "text": _text}
_SURROGATE = re.compile("[\ud800-\udfff]")


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(_has_surrogate(x) for pair in value.items() for x in pair)
    return isinstance(value, list) and any(map(_has_surrogate, value))


# -- compressed files ------------------------------------------------------------------------------


def _unpacked(raw: Any, first: bytes, shown: str) -> Any:
    """The file as lines, whatever it is compressed with."""
    packing = next((name for mark, name in PACKED.items() if first.startswith(mark)), None)
    if packing is None:
        return raw
    if packing == "zstd":
        return _zstd(raw, shown)
    try:
        return importlib.import_module(packing).open(raw)
    except ImportError as error:  # a Python that was built without the library
        reason = f"is compressed with {packing}, which this Python does not have"
        raise UnreadableError(f"{shown} {reason}") from error


def _zstd(raw: IO[bytes], shown: str) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415

        return zstd.open(raw)
    try:
        import pyarrow as pa  # noqa: PLC0415  (comes with datasets)
    except ModuleNotFoundError as error:
        raise UnreadableError(f"{shown} is compressed with zstd: {needed('datasets')}") from error
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))


def _broken() -> tuple[type[Exception], ...]:
    """What reading a file that is not whole raises; not every Python has lzma."""
    of_xz: type[Exception] = getattr(sys.modules.get("lzma"), "LZMAError", OSError)
    return OSError, EOFError, ValueError, zlib.error, of_xz


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return said[:1].lower() + said[1:] if said else type(error).__name__
