"""The reader of every command: kinds of files, kinds of rows, broken lines."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgp.data.examples import tokenize, tokenize_all
from sgp.data.reading import Line, Reading, UnreadableError, alike, fault, needed

ROWS = [
    {"text": "a\u2028b"},
    {"prompt": "2+2=", "completion": "4"},
    {"input_ids": [5], "labels": [5]},
]


def say(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 3, texts, strict=False)
    ]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data):
    pa = pytest.importorskip("pyarrow")
    found = pa.BufferOutputStream()
    with pa.CompressedOutputStream(found, "zstd") as file:
        file.write(data)
    return found.getvalue().to_pybytes()


PACKERS = {"plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("name", [*PACKERS, "zst"])
def test_files_are_known_by_how_they_begin(name, tmp_path):
    path = tmp_path / "data.jsonl"  # whatever it is called
    data = b"\xef\xbb\xbf" + as_lines(ROWS)
    path.write_bytes(zstd(data) if name == "zst" else PACKERS[name](data))
    reading = Reading(path)
    assert [*reading] == [Line(n, row) for n, row in enumerate(ROWS, 1)]
    assert (reading.unit, reading.done) == ("line", path.stat().st_size)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("rows", [ROWS, ROWS[2:] * 40])
def test_a_file_of_one_json_array_is_told(rows, indent, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(f"\n{json.dumps(rows, indent=indent)}\n\n")
    with pytest.raises(UnreadableError, match=r"data.json: the file is one JSON array; write an"):
        [*Reading(path)]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    with pytest.raises(UnreadableError, match="is one JSON array"):
        [*Reading(path)]


@pytest.mark.parametrize("lines", [["[1]"], ["[1]", "[2]"], ["[{}]", "[{}]"], ["[x", '{"a": 1}']])
def test_lines_that_are_arrays_are_lines(lines, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    assert len([*Reading(path)]) == len(lines)


@pytest.mark.parametrize("name", ["gz", "xz"])
def test_a_file_that_breaks_off_is_read_up_to_there(name, tmp_path):
    rows = [{"text": str(n) * 50} for n in range(3000)]
    path = tmp_path / "data"
    path.write_bytes(PACKERS[name](as_lines(rows))[:-30])
    found = [*Reading(path)]
    assert [line.row for line in found[:-1]] == rows[: len(found) - 1]
    assert "the file breaks off here: " in found[-1].reason
    path.write_bytes(PACKERS[name](as_lines(rows))[:20])
    with pytest.raises(UnreadableError, match="data: compressed file ended"):
        list(Reading(path))


def test_standard_input_and_its_compressed_form(monkeypatch):
    for data in (as_lines(ROWS), gzip.compress(as_lines(ROWS))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        reading = Reading(Path("-"))
        assert [line.row for line in reading] == ROWS
        assert reading.name == "standard input"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"PAR1....")))
    with pytest.raises(UnreadableError, match="standard input is Parquet"):
        list(Reading(Path("-")))


def test_parquet_has_mixed_kinds_of_rows_with_none(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"messages": say("a", "b"), "prompt": None, "completion": None},
            {"messages": None, "prompt": "x", "completion": "y"},
            {"messages": None, "prompt": "x", "completion": None}]  # fmt: skip
    path = tmp_path / "rows"
    datasets.Dataset.from_list(rows).to_parquet(path)
    reading = Reading(path)
    found = [*reading]
    assert [line.row for line in found] == rows
    assert [line.reason for line in found] == ["", "", '"completion" is not a string']
    assert reading.unit == "row"


def test_parquet_without_its_package(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = "rows is Parquet: needs datasets; run: pip install datasets"
    with pytest.raises(UnreadableError, match=message):
        list(Reading(path))
    path.write_bytes(b"PAR1 and no Parquet")
    monkeypatch.undo()
    with pytest.raises(UnreadableError, match="rows: "):
        list(Reading(path))


def test_what_to_install():
    assert "'.[train]'" in needed("transformers")
    assert needed("rich").endswith("pip install -e .")
    assert needed("tokenizers", "matplotlib").startswith("needs tokenizers and matplotlib; in your")


@pytest.mark.parametrize(("name", "module"), [("bz2", "bz2"), ("xz", "lzma")])
def test_a_python_without_a_library(name, module, tmp_path):
    """Built without it, as on a machine without its headers: the others work."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.write_bytes(as_lines(ROWS) + b"nonsense")
    packed.write_bytes(PACKERS[name](as_lines(ROWS)))
    code = f"""if True:
        import sys
        sys.modules[{module!r}] = None
        from pathlib import Path
        from sgp.cli import main
        from sgp.data.reading import Reading
        print(len([*Reading(Path({str(plain)!r}))]))
        sys.exit(main(["audit", {str(packed)!r}]))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    reason = f"is compressed with {module}, which this Python does not have"
    assert (done.returncode, done.stdout) == (2, "4\n")
    assert done.stderr == f"sgp audit: {packed} {reason}\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": ["5", "6"], "labels": [5, 6]}, '"input_ids" has numbers as text'),
        ({"input_ids": [5, 6], "labels": ["-100", "6"]}, '"labels" has numbers as text'),
        ({"input_ids": "56", "labels": [5, 6]}, '"input_ids" is not a list of whole numbers'),
        ({"input_ids": [5.5], "labels": [5]}, '"input_ids" is not a list of whole numbers'),
        ({"input_ids": [[5]], "labels": [5]}, '"input_ids" is not a list of whole numbers'),
        ({"input_ids": [1 << 63], "labels": [5]}, '"input_ids" has a number of 2^63 or more'),
        ({"input_ids": [5], "labels": [1 << 99]}, '"labels" has a number of 2^63 or more'),
        ({"input_ids": [-5], "labels": [5]}, '"input_ids" has a number below 0'),
        ({"input_ids": [5], "labels": [-1]}, '"labels" has a number below 0 that is not -100'),
        ({"input_ids": [5], "attention_mask": [-1]}, '"attention_mask" has a number below 0'),
        ({"input_ids": [5, 6], "labels": [5]}, "columns of different lengths: input_ids, labels"),
        ({"input_ids": [], "labels": []}, "no tokens"),
        ({"prompt": 3, "completion": "a"}, '"prompt" is not a string'),
        ({"prompt": "a", "completion": 3}, '"completion" is not a string'),
        ({"prompt": "a", "completion": " \n"}, "empty completion"),
        ({"prompt": say("a"), "completion": []}, "empty completion"),
        ({"prompt": say("a"), "completion": "b"}, '"completion" is not a list of messages, each'),
        ({"messages": say("a", "  ")}, "empty completion"),
        ({"messages": say("a", 4)}, '"messages" has a content that is a number, not a string'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": [{"content": "a"}]}, '"messages" is not a list of messages, each with'),
        ({"messages": "[]"}, '"messages" is not a list of messages, each with a "role"'),
        ({"text": 3}, '"text" is not a string'),
        ({"text": ""}, "empty text"),
        ({"foo": 1, "bar": 2}, 'has "bar", "foo"; expected "input_ids", "prompt" with "compl'),
        ({}, 'has nothing; expected "input_ids"'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row(row, reason):
    assert fault(row).startswith(reason)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [True, True]},
        {"input_ids": [5], "completion_mask": [1], "prompt": None},
        {"prompt": "", "completion": " a"},
        {"messages": [*say("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        {"messages": say("a")},
        {"input_ids": None, "text": "a"},
    ],
)
def test_nothing_is_wrong_with_a_row(row):
    assert fault(row) == ""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', '"messages" is not valid Uni'),
        (b'{"text": "\\uDfff"}', '"text" is not valid Unicode'),
        (b'{"text": "a", "\\ud800": 1}', '"?" is not valid Unicode'),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON"),
        (b'{"text": ' + b"[" * 900 + b'"\\ud800"' + b"]" * 900 + b"}", "broken JSON"),
        (b'{"text": ' + b"[" * 90000 + b"]" * 90000 + b"}", "broken JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"text": "\\ud83d\\ude00"}', ""),
        (b'{"text": "\\\\ud800"}', ""),
    ],
)
def test_broken_lines_have_their_number(line, reason, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + line + b"\r\n" + as_lines(ROWS[:1]))
    first, second = Reading(path)
    assert (first.number, second) == (2, Line(3, ROWS[0]))
    assert first.reason.startswith(reason) if reason else not first.reason


@given(st.text(), st.integers(0, 99))
def test_reasons_are_alike_whatever_they_quote(text, number):
    quoted = repr(text.replace("'", "").replace('"', ""))
    assert alike(f"token {quoted} at {number}") == alike("token 'x' at 3")


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(UnreadableError, match="is a directory"):
        list(Reading(tmp_path))
    with pytest.raises(UnreadableError, match="no such file"):
        list(Reading(tmp_path / "missing"))


# -- many rows at once -----------------------------------------------------------------------------


class Counting:
    """A tokenizer of characters that counts how often it is called, and merges "=4"."""

    eos_token = "\0"  # noqa: S105  (the text of a token)
    chat_template = None

    def __init__(self):
        self.calls = 0

    def __call__(self, text):
        self.calls += 1
        one = [text] if isinstance(text, str) else text
        ids = [[1, *map(ord, x.replace("=4", "\1")), 2] for x in one]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, ids):
        return "".join(map(chr, ids))


EVERY = [
    {"prompt": "2+2 is", "completion": " 4"},
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "", "completion": "a\0"},
    {"text": "all"},
    {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]},
    {"input_ids": [5, 6], "labels": [-100, 6], "text": "not this"},
    {"input_ids": None, "prompt": None, "completion": None, "text": "this"},
]


def test_many_rows_are_tokenized_as_each_alone():
    tokenizer = Counting()
    with pytest.warns(UserWarning, match="are not the first") as caught:
        alone = [tokenize(example, tokenizer) for example in EVERY]
    assert len(caught) == 3, "it ends each text by itself, and merges once more"
    tokenizer.calls = 0
    found = tokenize_all(EVERY, tokenizer)
    assert [x.rows for x in found] == alone
    assert tokenizer.calls == 1
    assert [bool(x.merged) for x in found] == [True, True, True, *[False] * 4]


def test_one_row_that_cannot_be_tokenized_disturbs_no_other():
    wrong = [{"id": 3}, {"messages": say("a", "b")}, {"input_ids": [5], "labels": [5, 6]}]
    found = tokenize_all([*wrong, *EVERY], Counting())
    assert found[3:] == tokenize_all(EVERY, Counting())
    assert [x.reason[:30] for x in found[:3]] == [
        "an example has ['id']; expecte",
        "the chat template refuses mess",
        "1 input_ids and 2 labels",
    ]
    assert all(not x.rows for x in found[:3])
