"""`sgp audit`: a whole file, its findings by line, what it refuses, and its exit code."""

import copy
import gzip
import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgp
from sgp.auditing import look
from sgp.auditing.findings import Finding
from sgp.auditing.page import SEVERITIES
from sgp.auditing.survey import OF_FILES, Survey, shown
from sgp.cli import main
from sgp.commands.audit_rows import FileRow, Maker, batch_of, batches, chunks
from sgp.data.reading import Line
from sgp.train.prepare import CHAT
from tests.audited import make

RIGHT = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}
TWICE = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 7, 8, 9, -100]}


def say(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 3, texts, strict=False)
    ]


def write(path, *lines):
    data = (x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    path.write_bytes(b"".join(x + b"\n" for x in data))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    """Of characters, but for what its chat template and its ends need."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {x: n + 3 for n, x in enumerate(letters)}
    words["al"] = len(words)
    inner = Tokenizer(models.BPE(words, [("a", "l")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",  # noqa: S106  (the text of a token)
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
    )
    found.chat_template = CHAT
    return found


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """A model with 61 classes and 64 positions, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model = make("llama")
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def audited(capsys, *words):
    """(exit code, what was printed on one line, what stands on standard error)."""
    code = main(["audit", *map(str, words)])
    found = capsys.readouterr()
    return code, " ".join(found.out.split()), found.err


def refused(capsys, *words):
    code, out, err = audited(capsys, *words)
    assert (code, out) == (2, ""), "said before the work"
    assert err.count("\n") == 1
    assert err.startswith("sgp audit: ")
    return err


def findings(out):
    return {x["code"]: x for x in json.loads((out / "audit.json").read_text())["findings"]}


# -- what it finds, by line ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "gz", "stdin"])
def test_terminal_page_and_json_name_the_lines(form, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "fifty.jsonl", *[RIGHT] * 20, *[TWICE] * 30)
    out = tmp_path / "out"
    if form == "gz":
        data = write(tmp_path / "fifty.gz", b"")
        (tmp_path / "fifty.gz").write_bytes(gzip.compress((tmp_path / "fifty.jsonl").read_bytes()))
    elif form == "stdin":
        stream = io.TextIOWrapper(io.BytesIO((tmp_path / "fifty.jsonl").read_bytes()))
        monkeypatch.setattr(sys, "stdin", stream)
        data = "-"
    code, said, _ = audited(capsys, data, "--out", out)
    name = {"plain": "fifty.jsonl", "gz": "fifty.gz", "stdin": "standard input"}[form]
    assert code == 1
    assert f"50 lines of {name}: 1 error" in said
    assert "error: labels-shifted-twice: lines 21 to 50 (30 of 50): labels are the next" in said
    assert "line 21, 3 tokens, 1 to 3: 5 [6 7 8] 9" in said
    assert said.index("line 21 t token role predicts") < said.index("line 24 t token")
    content = json.loads((out / "audit.json").read_text())
    assert (content["file"], content["samples"], content["exit_code"]) == (name, 50, 1)
    (found,) = content["findings"]
    assert (found["where"], found["count"]) == ("lines 21 to 50", 30)
    assert found["ranges"] == [[21, 50]]
    assert [x["line"] for x in found["samples"]] == [21, 22, 23]
    assert content["lines"] == [21, 22, 23, 24]
    page = html.unescape((out / "audit.html").read_text())
    assert f"50 lines of {name}: 1 error" in page
    assert "error: labels-shifted-twice</b> <span class='where'>lines 21 to 50" in page
    assert page.index("<summary>line 21<") < page.index("<summary>line 24<")
    assert "No findings" not in page
    assert {x.name for x in out.iterdir()} == {"audit.png", "audit.html", "audit.json"}


def test_no_findings_is_said_in_all_three(tmp_path, capsys):
    out = tmp_path / "out"
    code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", *[RIGHT] * 3), "--out", out)
    assert code == 0
    assert "3 lines of a.jsonl: no findings" in said
    assert "random weights" in said
    page = (out / "audit.html").read_text()
    assert "3 lines of a.jsonl: no findings" in page
    assert "<p class='none'>No findings.</p>" in page
    content = json.loads((out / "audit.json").read_text())
    assert (content["findings"], content["exit_code"], content["failed"]) == ([], 0, False)


def test_a_row_of_each_finding_is_shown_first(tmp_path, capsys):
    """The rarest fault too, however late its line comes."""
    empty = RIGHT | {"labels": [-100] * 5}
    lines = [RIGHT] * 3 + [TWICE] * 1500 + [empty] + [RIGHT]
    code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", *lines), "--rows", "2")
    assert code == 1
    assert "labels-shifted-twice: lines 4 to 1503 (1500 of 1505)" in said
    assert "no-targets: line 1504:" in said
    assert "line 4 t token" in said
    assert "line 1504 t token" in said


def test_rows_without_findings_are_shown_where_they_carry_loss(tmp_path, capsys):
    long = {"input_ids": [5] * 600 + [6, 7], "labels": [-100] * 600 + [6, 7]}
    data = write(tmp_path / "long.jsonl", long, RIGHT)
    code, said, _ = audited(capsys, data)
    assert code == 0
    assert "line 2 t token" in said
    assert "line 1 t token" not in said
    assert "line 1 t token" in audited(capsys, data, "--max-length", "700")[1]
    assert "line 1 t token" in audited(capsys, write(tmp_path / "long.jsonl", long))[1]


def test_lines_that_cannot_be_used_are_counted_and_the_rest_is_audited(tmp_path, capsys):
    lines = [RIGHT, b'{"text": "\xff"}', b'{"x":', b"", RIGHT | {"input_ids": list("56789")}]
    lines += [{"prompt": "a", "completion": "b"}, {"input_ids": [1 << 70], "labels": [3]}, [1]]
    lines += [{"messages": say("\ud800")}, {"foo": 1}, {"input_ids": [], "labels": []}, b'{"x":']
    out = tmp_path / "out"
    code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", *lines), "--out", out)
    assert code == 0, "warnings"
    assert "1 of 11 lines of a.jsonl: 9 warnings" in said
    for words in (
        "line 2: not UTF-8", "lines 3, 12 (2 of 11): broken JSON",
        'line 5: "input_ids" has numbers as text',
        "line 6: needs --tokenizer or --model to become tokens", "line 8: not a JSON object",
        'line 7: "input_ids" has a number of 2^63 or more', "line 11: no tokens",
        'line 9: "messages" is not valid Unicode', 'line 10: has "foo"; expected "input_ids"',
    ):  # fmt: skip
        assert f"warning: unusable-line: {words}" in said, words
    strict = ["--error", "unusable-line"]
    assert audited(capsys, str(tmp_path / "a.jsonl"), *strict)[0] == 1
    ignored = audited(capsys, str(tmp_path / "a.jsonl"), "--ignore", "unusable-line")
    assert "1 of 11 lines of a.jsonl: no findings" in ignored[1]


def test_tokens_outside_a_vocabulary_are_an_error_of_their_line(tmp_path, capsys, small, folder):
    outside = RIGHT | {"input_ids": [5, 6, 7, 99, 9]}
    data = write(tmp_path / "a.jsonl", RIGHT | {"labels": [-100, -100, 7, 8, 9]}, outside)
    code, said, err = audited(capsys, data, "--model", small, "--ignore", "no-eos")
    assert code == 1, err
    assert "outside-vocabulary: line 2: tokens are outside the model's [0, 61); was the" in said
    assert "line 2: input_ids[3] is 99" in said
    huge = write(tmp_path / "b.jsonl", RIGHT, RIGHT | {"labels": [-100] * 4 + [1 << 40]})
    code, said, _ = audited(capsys, huge)
    assert code == 1
    assert "line 2: tokens are 1048576 or more, which no vocabulary has" in said
    assert "line 2: labels[4] is 1099511627776" in said
    assert "the tokenizer's [0, 260)" in audited(capsys, huge, "--tokenizer", folder)[1]
    code, said, err = audited(capsys, write(tmp_path / "c.jsonl", outside), "--model", small)
    assert (code, said) == (2, "")
    assert "no usable line; line 1: tokens are outside the model's [0, 61)" in err


# -- what is audited is what is trained ------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
FORMS = {
    "prompt ending in a space": {"prompt": "2+2= ", "completion": "4"},
    "ended": {"prompt": "2+2=", "completion": "4</s>"},
    "merged": {"prompt": "tot a", "completion": "ll"},
    "messages": {"messages": say("hi", "yes", "and", "no")},
    "tools": {"messages": say("hi", "yes"), "tools": TOOLS},
    "tools as JSON": {"messages": say("hi", "yes"), "tools": json.dumps(TOOLS)},
    "a pair of messages": {"prompt": say("q"), "completion": say("", "a")[1:]},
    "text": {"text": "all of it"},
    "completion_mask": {"input_ids": [5, 6, 7, 2], "completion_mask": [0, 1, 1, 1]},
    "assistant_masks": {"input_ids": [5, 6, 7, 2], "assistant_masks": [0, 1, 0, 1]},
    "both masks": {
        "input_ids": [5, 6, 7, 2], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1],
    },
    "labels": {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
    "padded": {"input_ids": [5, 6, 2, 0], "labels": [-100, 6, 2, -100],
               "attention_mask": [1, 1, 1, 0]},
    "kinds of others": {"text": "a", "input_ids": None, "messages": None, "prompt": None},
}  # fmt: skip


def test_every_form_is_tokenized_as_the_collator_does(tmp_path, capsys, tokenizer, folder):
    """In one file of mixed kinds of rows, row by row."""
    data = write(tmp_path / "forms.jsonl", *FORMS.values())
    out = tmp_path / "out"
    command = [data, "--tokenizer", folder, "--rows", len(FORMS), "--out", out]
    code, said, _ = audited(capsys, *command)
    assert f"{len(FORMS)} lines of forms.jsonl" in said
    assert code == 0, said
    content = json.loads((out / "audit.json").read_text())
    trained = {}
    for line, (name, row) in enumerate(FORMS.items(), 1):
        if name == "merged":
            with pytest.warns(UserWarning, match="are not the first"):
                batch = sgp.Collator(tokenizer)([row])
        else:
            batch = sgp.Collator(tokenizer)([row])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        trained[line] = (ids, labels[1:])
    seen = {}
    for line, row in zip(content["lines"], content["report"]["tokens"], strict=True):
        count = sum(x["role"] != "padding" for x in row)
        targets = [-100 if x["target_id"] is None else x["target_id"] for x in row]
        seen[line] = ([x["token_id"] for x in row][:count], targets[: count - 1])
    assert seen == trained
    merged = findings(out)["prompt-merged"]
    assert merged["samples"][0]["line"] == list(FORMS).index("merged") + 1
    assert merged["samples"][0]["text"] == "tot  [all</s>]"
    assert "move it to the completion" in merged["message"]
    assert "[ ]: carries loss" in said


def test_parquet_is_audited_by_rows(tmp_path, capsys, folder):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    names = ("messages", "prompt", "completion", "text")
    rows = [FORMS["messages"], FORMS["ended"], {"text": "a"}, {"prompt": "a", "completion": ""}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{x: row.get(x) for x in names} for row in rows]).to_parquet(path)
    fixed = tmp_path / "fixed"
    code, said, _ = audited(capsys, path, "--tokenizer", folder, "--repair", fixed)
    assert code == 0
    assert "3 of 4 rows of rows.parquet" in said
    assert "after the repair, by the rows of the file as it was: 3 rows of fixed: " in said
    assert "unusable-line: row 4: not written: empty completion" in said
    assert "line 4" not in said
    assert "unusable-line: row 4: empty completion" in said
    assert "row 1 t token" in said


def test_packed_rows_keep_their_seams(tmp_path, capsys):
    long = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, -100, -100, 10]}
    long["position_ids"] = [0, 1, 2, 0, 1, 2]
    short = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "position_ids": [0, 1, 2]}
    out = tmp_path / "out"
    code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", long, short), "--out", out)
    assert code == 0
    tokens = json.loads((out / "audit.json").read_text())["report"]["tokens"]
    assert [t["role"] for t in tokens[1][3:]] == ["padding"] * 3
    assert "3 of 9 tokens carry loss" in said
    crossing = long | {"labels": [-100, -100, 7, 8, -100, 10]}
    lengths = {k: v for k, v in crossing.items() if k != "position_ids"} | {"seq_lengths": [3, 3]}
    for row in (crossing, lengths):
        code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", long, row))
        assert code == 1
        assert "crosses-boundary: line 2:" in said
    wrong = lengths | {"seq_lengths": [3, 4]}
    said = refused(capsys, write(tmp_path / "a.jsonl", wrong))
    assert 'line 1: "seq_lengths" does not add up to the tokens' in said


def test_rows_that_trl_packed_are_kept_apart(tmp_path, capsys, folder):
    """With positions that count in each sequence, as its collator makes them."""
    ids = [5, 6, 7, 8, 9, 10, 2]
    packed = {"input_ids": ids, "labels": [-100, -100, 7, -100, -100, 10, 2]}
    packed["seq_lengths"] = [3, 4]
    more = {"input_ids": ids[:3], "labels": [-100, -100, 7], "position_ids": [0, 1, 2]}
    padded = {k: packed[k] + [fill] * 2 for k, fill in (("input_ids", 0), ("labels", -100))}
    padded["seq_lengths"] = [3, 4]
    out = tmp_path / "out"
    masks = [{}, {"attention_mask": [1] * 7}, {"attention_mask": [True] * 7}]
    for rows in ([packed | mask for mask in masks], [packed, more], [packed, padded]):
        words = [write(tmp_path / "a.jsonl", *rows), "--tokenizer", folder, "--ignore", "no-eos"]
        code, said, _ = audited(capsys, *words, "--out", out)
        assert (code, "no findings" in said) == (0, True), said
        content = json.loads((out / "audit.json").read_text())
        assert content["lines"] == list(range(1, len(rows) + 1))
        assert content["report"]["tokens"][0][2]["target_id"] is None, "a seam"


def test_a_mask_of_outputs_is_believed(tmp_path, capsys):
    row = {"input_ids": [5, 6, 7], "completion_mask": [False, False, True]}
    text = {"labels": [-100] * 3, "text": "a\u2028b\x85"}
    data = write(tmp_path / "a.jsonl", row, row | text)
    code, said, _ = audited(capsys, data)
    assert code == 1
    assert "no-targets: line 2" in said
    assert "first-output-untrained: line 2" in said


# -- windows and ends ------------------------------------------------------------------------------


def test_the_window_reaches_every_line(tmp_path, capsys, folder, small):
    rows = [{"prompt": "abc", "completion": "d" * n} for n in (2, 3, 9)]
    rows.append({"prompt": "a" * 20, "completion": "b"})
    data = write(tmp_path / "a.jsonl", *rows)
    assert audited(capsys, data, "--tokenizer", folder)[0] == 0
    code, said, _ = audited(capsys, data, "--tokenizer", folder, "--max-length", "6")
    assert code == 1
    assert "completion-cut: lines 2 to 3 (2 of 4): the window of 6 tokens cuts" in said
    assert "1 of 4 tokens with loss are beyond it: abc [ddd]" in said
    assert "no-targets: line 4: the prompt alone fills the window of 6 tokens: no loss is" in said
    empty = write(tmp_path / "empty.jsonl", RIGHT, {"input_ids": [5] * 9, "labels": [-100] * 9})
    assert (
        "no-targets: line 2: no token carries loss"
        in (audited(capsys, empty, "--max-length", "6")[1])
    )
    assert "completion-cut: line 4: the window of 6 tokens cuts the completion: nothing of" in said
    assert "line 4: all 2 tokens with loss are beyond it: aaaaaa" in said
    assert "no-eos" not in said, "completion-cut says it"
    long = [{"input_ids": [5] * 40 + [6] * 40 + [2], "labels": [-100] * 40 + [6] * 40 + [2]}]
    data = write(tmp_path / "b.jsonl", *long, RIGHT)
    said = audited(capsys, data, "--model", small)[1]
    assert "completion-cut: line 1: the window of 64 tokens" in said, "the model's positions"
    assert "--max-length 65 is more than the 64 positions of --model" in refused(
        capsys, data, "--model", small, "--max-length", "65"
    )


def test_whether_an_end_was_cut_off_is_judged_by_the_whole_file(tmp_path, capsys, folder):
    long = {"input_ids": [5, 6, 7, 8, 9, 9], "labels": [-100, -100, 7, 8, 9, 9]}
    data = write(tmp_path / "a.jsonl", long, RIGHT, long)
    out = tmp_path / "out"
    code, said, _ = audited(capsys, data, "--tokenizer", folder, "--out", out)
    assert code == 1
    assert "error: no-eos: line 2: the last token with loss is not an end" in said
    assert (
        "warning: no-eos: lines 1, 3 (2 of 3): the last token with loss is not an end, and no "
        in said
    )
    data = write(tmp_path / "a.jsonl", long)
    assert audited(capsys, data, "--tokenizer", folder)[0] == 0
    fixed = tmp_path / "fixed"
    assert audited(capsys, data, "--tokenizer", folder, "--repair", fixed)[0] == 0
    assert audited(capsys, data, "--tokenizer", folder, "--error", "no-eos")[0] == 1
    wide = [data, "--tokenizer", folder, "--max-length"]
    code, said, _ = audited(capsys, *wide, "2048", "--repair", fixed)
    assert code == 1
    assert said.count("error: no-eos: line 1: ") == 2, "no window cut it, after the repair neither"
    assert audited(capsys, *wide, "6")[0] == 0, "it fills the window"


def test_text_without_an_end_was_not_cut_off(tmp_path, capsys, tokenizer):
    """By a template that writes none: nobody can have cut it."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHAT.replace("{{ eos_token }}", "")
    other.save_pretrained(tmp_path / "endless")
    row = {"prompt": say("a"), "completion": say("", "b")[1:]}
    ids = sgp.Collator(other)([row])["input_ids"][0].tolist()
    tokens = {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}
    data = write(tmp_path / "a.jsonl", row, tokens)
    code, said, _ = audited(capsys, data, "--tokenizer", tmp_path / "endless")
    assert code == 1
    assert "error: no-eos: line 1: " in said
    assert "warning: no-eos: line 2: " in said


def test_the_models_ends_are_ends(tmp_path, capsys, small):
    row = {"input_ids": [5, 6, 7, 8, 3], "labels": [-100, -100, 7, 8, 3]}
    code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", row), "--model", small)
    assert code == 0
    assert "no-eos" not in said


# -- severities, repair, answers -------------------------------------------------------------------


def test_severities_and_what_is_ignored(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", RIGHT, TWICE)
    assert audited(capsys, data)[0] == 1
    assert audited(capsys, data, "--generate", "0")[0] == 1, "as without"
    code, said, _ = audited(capsys, data, "--warning", "labels-shifted-twice")
    assert (code, "warning: labels-shifted-twice: line 2" in said) == (0, True)
    code, said, _ = audited(capsys, data, "--note", "labels-shifted-twice")
    assert (code, "note: labels-shifted-twice: line 2" in said) == (0, True)
    code, said, _ = audited(capsys, data, "--ignore", "labels-shifted-twice")
    assert (code, "2 lines of a.jsonl: no findings" in said) == (0, True)


def test_modules_are_ignored_by_pattern(tmp_path, capsys, small, monkeypatch):
    from sgp.commands import audit as command

    load = command.load

    def without_gradient(*words):
        model, tokenizer = load(*words)
        model.model.layers[0].mlp.forward = lambda x: x * 0
        return model, tokenizer

    monkeypatch.setattr(command, "load", without_gradient)
    row = {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2]}
    words = [write(tmp_path / "a.jsonl", row), "--model", small, "--error", "module-not-run"]
    words += ["--error", "missing-gradient"]
    code, said, _ = audited(capsys, *words)
    assert (code, "layers.0.mlp" in said) == (1, True)
    for pattern in ("*.layers.0.mlp.*", "model.layers.0.mlp"):
        code, said, _ = audited(capsys, *words, "--ignore", pattern)
        assert (code, "layers.0.mlp" in said) == (0, False), pattern
    for pattern in ("*.nix.*", "mlp", "no-eoss"):
        said = refused(capsys, *words, "--ignore", "no-eos", "--ignore", pattern)
        assert f"--ignore {pattern}: no such finding, and no module of --model {small}" in said


def test_repair_writes_what_is_mended_and_judges_what_is_left(tmp_path, capsys):
    guess = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 17, 18, 19]}
    fixed, out = tmp_path / "fixed.jsonl", tmp_path / "out"
    data = write(tmp_path / "a.jsonl", *[RIGHT] * 20, *[TWICE] * 30)
    code, said, _ = audited(capsys, data, "--repair", fixed, "--out", out)
    assert code == 0
    assert "1 error" in said
    assert "after the repair, by the lines of the file as it was: 50 lines of fixed.jsonl" in said
    assert [json.loads(x) for x in fixed.read_text().splitlines()] == [RIGHT] * 50
    content = json.loads((out / "audit.json").read_text())
    repaired = content["repair"]
    assert repaired["changes"] == {"labels-shifted-twice": 30}
    assert repaired["labels"] == {"labels-shifted-twice": 90}
    assert [x["line"] for x in repaired["samples"]] == [21, 22, 23]
    assert repaired["samples"][0]["rules"] == ["labels-shifted-twice"]
    assert "mended: labels-shifted-twice: 30 sequences, 90 labels: moved back" in said
    assert content["exit_code"] == 0
    page = html.unescape((out / "audit.html").read_text())
    assert "after the repair: 50 lines of fixed.jsonl: no findings" in page
    for words in (
        "mended: labels-shifted-twice: 30 sequences, 90 labels: moved back", "line 21, labels-sh",
        f"before: {repaired['samples'][0]['before']}", f"after:  {repaired['samples'][0]['after']}",
    ):  # fmt: skip
        assert words in page, words
    code, said, _ = audited(capsys, fixed)
    assert (code, "50 lines of fixed.jsonl: no findings" in said) == (0, True)
    code, said, _ = audited(
        capsys, write(tmp_path / "a.jsonl", TWICE, guess, RIGHT), "--repair", fixed
    )
    assert code == 1
    words = "line 2: not written: the right labels would be a guess"
    assert f"error: labels-not-the-inputs: {words}" in said
    assert [json.loads(x) for x in fixed.read_text().splitlines()] == [RIGHT] * 2


def test_repair_says_which_lines_it_could_not_write(tmp_path, capsys):
    huge = {"input_ids": [5, 2**40], "labels": [-100, 2**40]}
    data, fixed = tmp_path / "a.jsonl", tmp_path / "fixed.jsonl"
    data.write_text("\n".join([json.dumps(TWICE), "broken", json.dumps(RIGHT), json.dumps(huge)]))
    code, said, _ = audited(capsys, data, "--repair", fixed)
    after = said.partition("after the repair")[2]
    assert "2 lines of fixed.jsonl: 1 error, 1 warning" in after
    assert "unusable-line: line 2: not written: broken JSON" in after
    assert "error: outside-vocabulary: line 4: not written: " in after
    assert code == 1


def test_what_is_not_written_is_no_line_of_what_is(tmp_path, capsys):
    """Nor does anything stay that was found in it, or that was mended by taking rows apart."""
    ids, labels = [5, 6, 7, 8, 9, 10], [-100, -100, 7, -100, -100, 10]
    guess = {"input_ids": ids, "labels": [-100, -100, 17, 18, 19, 20]}
    empty = {"input_ids": ids, "labels": [-100] * 6}
    data, fixed = tmp_path / "a.jsonl", tmp_path / "fixed.jsonl"
    write(data, empty, guess, empty, guess, {"input_ids": ids, "labels": labels})
    code, said, _ = audited(capsys, data, "--repair", fixed)
    assert code == 1
    after = said.partition("after the repair")[2]
    assert "1 line of fixed.jsonl: 2 errors" in after
    assert "no-targets: lines 1, 3 (2 of 5): not written: no token carries loss" in after
    assert "labels-not-the-inputs: lines 2, 4 (2 of 5): not written: the right labels" in after
    leaks = {"position_ids": [0, 1, 2] * 2, "attention_mask": [1] * 6}
    write(data, *[{"input_ids": ids, "labels": labels} | leaks] * 2)
    code, said, _ = audited(capsys, data, "--repair", fixed)
    before, _, after = said.partition("after the repair")
    assert (code, "attends-across-boundary" in before) == (0, True)
    assert "4 lines of fixed.jsonl: no findings" in after
    assert "attends" not in after


def test_a_gradient_that_is_not_finite_stays_with_what_is_written(tmp_path, capsys, small):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "model")
    guess = RIGHT | {"labels": [-100, -100, 17, 18, 19]}
    words = ["--model", tmp_path / "model", "--repair", tmp_path / "fixed", "--ignore", "no-eos"]
    for rows, stays in (([guess], False), ([guess, RIGHT], True)):
        _, said, _ = audited(capsys, write(tmp_path / "a.jsonl", *rows), *words)
        before, _, after = said.partition("after the repair")
        assert ("error: nan" in before, "error: nan" in after) == (True, stays)
        assert ("backward pass of line 2:" in after) == stays


def test_one_row_without_loss_takes_part_in_the_backward_pass(tmp_path, capsys):
    empty = RIGHT | {"labels": [-100] * 5}
    out = tmp_path / "out"
    for lines, seen in (
        ([empty] * 6 + [RIGHT] * 6, [1, 7, 8, 9]),
        ([empty] * 6 + [TWICE] * 6, [1, 7, 8, 9]),
        ([RIGHT] + [empty] * 6, [2, 1]),
        ([empty] * 6, [1]),
    ):
        audited(capsys, write(tmp_path / "a.jsonl", *lines), "--out", out)
        assert json.loads((out / "audit.json").read_text())["lines"] == seen


def test_the_page_marks_what_findings_mean(tmp_path, capsys, folder):
    """By the severity that the file's finding has, in the rows of the backward pass."""
    merged = {"prompt": "tot a", "completion": "ll"}
    padded = RIGHT | {"input_ids": [5, 6, 7, 8, 9, 0, 0], "labels": [-100, -100, 7, 8, 9, -100, 0]}
    data = write(tmp_path / "a.jsonl", RIGHT, TWICE, merged, padded)
    out = tmp_path / "out"
    audited(capsys, data, "--tokenizer", folder, "--out", out, "--note", "prompt-merged")
    page = (out / "audit.html").read_text()
    lines = json.loads((out / "audit.json").read_text())["lines"]
    rows = dict(zip(lines, page.split("<details open id='row-")[1:], strict=True))

    def marks(line):
        tokens = rows[line].split("tabindex='0'")[1:]
        return {
            n: re.findall(r"(?:error|warning|note): ([\w-]+)", token)
            for n, token in enumerate(tokens)
            if "<span class='f' style='--f:#" in token
        }

    assert marks(1) == {4: ["no-eos"]}
    assert {t: codes[0] for t, codes in marks(2).items()} == dict.fromkeys(
        (1, 2, 3), "labels-shifted-twice"
    )
    assert marks(3) == {4: ["prompt-merged"]}
    assert marks(4)[6] == ["padding-scored"]
    assert "note: prompt-merged" in rows[3]
    assert f"--f:{SEVERITIES['note']}" in rows[3]
    filled = rows[1].split("tabindex='0'")[-1]
    assert "padding, id 0" in filled
    assert "<span class='w'>&lt;pad&gt;</span>" in filled


def test_padding_is_the_tokenizers(tmp_path, capsys, tokenizer, small):
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.convert_ids_to_tokens(40)
    other.save_pretrained(tmp_path / "other")
    short = {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}
    data = write(tmp_path / "a.jsonl", RIGHT, short)
    out = tmp_path / "out"

    def last(*words):
        audited(capsys, data, "--tokenizer", tmp_path / "other", "--out", out, *words)
        content = json.loads((out / "audit.json").read_text())
        return content["report"]["tokens"][content["lines"].index(2)][4]["token_id"]

    assert last() == 40
    other.pad_token = other.convert_ids_to_tokens(99)
    other.save_pretrained(tmp_path / "other")
    assert last("--model", small) == 0, "a model of 61 classes has no 99"


def test_an_end_that_comes_early_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """Ctrl-C, a full disk, a model that fails: no half of a file, and nothing beside it."""
    from sgp.auditing.repair import Repair
    from sgp.commands import audit
    from sgp.train.errors import UserError

    data, fixed = write(tmp_path / "a.jsonl", *[TWICE] * 3), tmp_path / "fixed.jsonl"
    fixed.write_text("before\n")
    fixed.chmod(0o640)
    command = ["audit", data, "--repair", str(fixed)]
    for what, error, code in (
        ((Repair, "json_lines"), KeyboardInterrupt(), 130),
        ((Repair, "json_lines"), OSError(28, "No space left"), 2),
        ((audit, "_closer_look"), KeyboardInterrupt(), 130),
        ((audit, "_closer_look"), UserError("a model that fails"), 2),
        ((Path, "replace"), OSError(28, "No space left"), 2),
    ):

        def fails(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(*what, fails)
            assert main(command) == code
        assert sorted(x.name for x in tmp_path.iterdir()) == ["a.jsonl", "fixed.jsonl"]
        assert fixed.read_text() == "before\n"
    link = tmp_path / "link"
    link.symlink_to(fixed)
    assert main([*command[:-1], str(link)]) == 0
    assert link.is_symlink()
    assert [json.loads(x) for x in fixed.read_text().splitlines()] == [RIGHT] * 3
    assert fixed.stat().st_mode & 0o777 == 0o640
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.jsonl", "fixed.jsonl", "link"]
    done = subprocess.run(
        [sys.executable, "-m", "sgp", *command[:-1], "/dev/stderr"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [json.loads(x) for x in done.stderr.splitlines()] == [RIGHT] * 3


def test_padding_that_no_mask_says(tmp_path, capsys, folder, tokenizer):
    """Is found as in a batch without a mask, and not written by the repair."""
    ids = [5, 6, 7, 2]
    ended = {"input_ids": ids, "labels": [-100, -100, 7, 2]}
    padded = [
        {"input_ids": ids + [0] * 4, "labels": [-100, -100, 7, 2] + [label] * 4}
        for label in (0, -100)
    ]
    positions = {"position_ids": [*range(8)]}
    data, fixed, out = tmp_path / "a.jsonl", tmp_path / "fixed.jsonl", tmp_path / "out"
    for more in ({}, positions, {"attention_mask": [1] * 4 + [0] * 4}):
        rows = [row | more for row in padded]
        batch = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
        expected = look(batch, tokenizer=tokenizer)
        assert ("padding-scored", 0) in [(x.code, x.row) for x in expected]
        where = {x.code: x.where.removeprefix("row 0, ") for x in expected}
        write(data, *rows)
        words = [
            "--tokenizer",
            folder,
            "--out",
            out,
            "--repair",
            fixed,
            "--error",
            "padding-scored",
        ]
        code, said, _ = audited(capsys, data, *words)
        assert code == 0, "after the repair"
        found = findings(out)
        assert {k: x["samples"][0]["where"] for k, x in found.items()} == where
        assert found["padding-scored"]["where"] == "line 1"
        assert [json.loads(x) for x in fixed.read_text().splitlines()] == [ended] * 2
        assert "mended: padding-scored: 1 sequence, 4 labels" in said


def test_padding_by_the_end_of_text(tmp_path, capsys, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    other.save_pretrained(tmp_path / "ends")
    ids = [5, 6, 7, 2, 2, 2]
    rows = [{"input_ids": ids, "labels": [-100, -100, 7, 2, -100, -100]}]
    rows += [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}]
    rows += [{"input_ids": ids, "labels": [-100, -100, 7, 2, 2, 2], "attention_mask": [1] * 6}]
    data, fixed = write(tmp_path / "a.jsonl", *rows), tmp_path / "fixed"
    _, said, _ = audited(capsys, data, "--tokenizer", tmp_path / "ends", "--repair", fixed)
    assert "padding-scored: line 3: '</s>' ends the row 3 times or more, with loss" in said
    written = [json.loads(x)["input_ids"] for x in fixed.read_text().splitlines()]
    assert written == [[5, 6, 7, 2]] * 3


def test_findings_come_first_whatever_the_columns(tmp_path, capsys):
    """A mask of ones says nothing that other rows do not say."""
    twice = TWICE | {"labels": [-100, 7, -100, -100, -100]}
    masks = ([1] * 5, [True] * 5, [1, 1, 1, 0, 0])
    lines = [TWICE, *(twice | {"attention_mask": mask} for mask in masks)]
    out = tmp_path / "out"
    audited(capsys, write(tmp_path / "a.jsonl", *lines), "--out", out)
    content = json.loads((out / "audit.json").read_text())
    assert content["lines"] == [1, 2, 3, 4]
    roles = [x["role"] for x in content["report"]["tokens"][3]]
    assert roles[3:] == ["padding"] * 2
    kept = [
        RIGHT | {"attention_mask": [0, 0, 1, 1, 1]},
        RIGHT | {"attention_mask": [1, 1, 2, 2, 2]},
    ]
    audited(capsys, write(tmp_path / "a.jsonl", *kept), "--out", out)
    tokens = json.loads((out / "audit.json").read_text())["report"]["tokens"]
    assert [x["role"] for x in tokens[0]][:2] == ["padding"] * 2
    assert tokens[1][1]["target_id"] == 7, "crosses a seam"


def test_brackets_are_explained_where_there_are_any(tmp_path, capsys):
    line = RIGHT | {"input_ids": [5, 1 << 40, 7, 8, 9]}
    said = audited(capsys, write(tmp_path / "a.jsonl", RIGHT, line))[1]
    assert "input_ids[1] is 1099511627776" in said
    assert "[ ]: carries loss" not in said
    assert "[ ]: carries loss" in audited(capsys, write(tmp_path / "a.jsonl", line, TWICE))[1]


def test_contexts_longer_than_the_backward_pass_looks_at(tmp_path, capsys):
    rows = [{"input_ids": [7] * n + [5, 2], "labels": [-100] * n + [5, 2]} for n in (900, 700, 800)]
    out = tmp_path / "out"
    code, said, _ = audited(capsys, write(tmp_path / "a.jsonl", *rows), "--out", out)
    assert (code, "3 lines of a.jsonl: no findings" in said) == (0, True)
    assert json.loads((out / "audit.json").read_text())["lines"] == [2]


def test_rows_with_findings_are_shown_first(tmp_path, capsys):
    out = tmp_path / "out"
    audited(capsys, write(tmp_path / "a.jsonl", RIGHT, RIGHT, TWICE), "--out", out)
    assert json.loads((out / "audit.json").read_text())["lines"] == [3, 1, 2]
    assert (out / "audit.html").read_text().count("line 3") > 1


def test_repair_keeps_order_and_what_the_window_leaves_out(tmp_path, capsys):
    rows = [
        {"input_ids": list(range(5, 8 + n % 7)), "labels": [-100, *range(6, 8 + n % 7)]}
        for n in range(40)
    ]
    data, fixed = write(tmp_path / "a.jsonl", *rows), tmp_path / "fixed.jsonl"
    audited(capsys, data, "--repair", fixed, "--max-length", "4")
    assert [json.loads(x) for x in fixed.read_text().splitlines()] == rows


def test_the_model_answers(tmp_path, capsys, small):
    row = {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2]}
    out = tmp_path / "out"
    data = write(tmp_path / "a.jsonl", *[row] * 3)
    command = [data, "--model", small, "--generate", "2", "--autocast", "bf16", "--out", out]
    _, said, _ = audited(capsys, *command)
    assert said.count("the model answers") == 2
    assert "line 2: the model answers" in said
    assert len(json.loads((out / "audit.json").read_text())["report"]["answers"]) == 2
    assert "line 2: the model answers" in (out / "audit.html").read_text()


# -- what it refuses -------------------------------------------------------------------------------


def test_what_it_refuses_is_one_line_and_code_2(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", RIGHT)
    empty, useless = write(tmp_path / "empty"), write(tmp_path / "b", b"nonsense", b"nonsense")
    nothing = write(tmp_path / "nothing", *[RIGHT | {"labels": [-100] * 5}] * 2)
    file = tmp_path / "a.jsonl"
    for words, message in (
        ([empty], "empty: the file has no samples; expected a line like"),
        ([useless], "b: no usable line; lines 1 to 2: broken JSON"),
        ([tmp_path], f"{tmp_path}: is a directory"),
        ([tmp_path / "missing"], "missing: no such file or directory"),
        ([data, "--generate", "2"], "--generate 2 needs --model"),
        ([data, "--ignore", "*.x.*"], "--ignore *.x.*: no such finding, and no --model"),
        ([data, "--error", "foo"], "--error foo: no such finding; they are labels-shifted-twice"),
        ([data, "--model", tmp_path / "nope"], "nope: no such folder"),
        ([data, "--tokenizer", tmp_path / "nope"], "--tokenizer "),
        ([data, "--out", file], "is a file, not a folder"),
        ([data, "--out", "x" * 300], "File name too long"),
        ([data, "--out", "/proc/x/y"], "--out /proc/x/y: cannot write "),
        ([nothing, "--ignore", "no-targets"], "nothing: no line carries loss"),
        ([data, "--repair", file], "a.jsonl: is the file that is read; name another"),
        ([data, "--repair", tmp_path], "is a folder; name a file"),
        ([data, "--repair", "-"], "--repair -: name a file, or /dev/stdout"),
        ([data, "--repair", "x.gz"], "--repair x.gz: JSON lines are written, as they are; name a"),
        ([data, "--repair", "x.parquet"], "name a file that does not end in .parquet"),
        ([data, "--repair", tmp_path / "no" / "x"], f"no folder {tmp_path / 'no'}"),
        ([data, "--repair", tmp_path / ("x" * 300)], "File name too long"),
    ):
        assert message in refused(capsys, *words), words
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.jsonl", "b", "empty", "nothing"]


@pytest.mark.parametrize(
    ("package", "words"),
    [("transformers", []), ("matplotlib", ["--out", "out"]), ("rich", []), ("tokenizers", [])],
)
def test_a_missing_package_is_named(package, words, tmp_path):
    """In a process of its own: what is imported stays."""
    data = write(tmp_path / "a.jsonl", RIGHT)
    code = f"import sys; sys.modules[{package!r}] = None; from sgp.cli import main; "
    code += f"sys.exit(main(['audit', {data!r}, *{words}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"sgp audit: needs {package}; in your clone of sgp, run: pip ")
    assert done.stderr.count("\n") == 1


def test_a_foreign_model_that_fails_is_one_line(tmp_path, capsys, small, monkeypatch):
    from transformers import LlamaForCausalLM

    def fails(*_, **__):
        raise KeyError("rope")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fails)
    data = write(tmp_path / "a.jsonl", RIGHT)
    code, _, err = audited(capsys, data, "--model", small)
    assert code == 2
    assert err.splitlines()[-1].startswith("sgp audit: --model ")


@pytest.mark.parametrize("row", [RIGHT, TWICE])
def test_a_reader_that_leaves_changes_nothing(row, tmp_path):
    """As `sgp audit ... | head` does."""
    data, fixed = write(tmp_path / "a.jsonl", *[row] * 9), tmp_path / "fixed"
    read, gone = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sgp", "audit", data, "--rows", "9"]
    command += ["--repair", str(fixed)]
    done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    os.close(gone)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [json.loads(x) for x in fixed.read_text().splitlines()] == [RIGHT] * 9


def test_a_terminal_of_few_letters(tmp_path, folder):
    data = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "\u00e9\U0001f600"})
    command = [sys.executable, "-m", "sgp", "audit", data, "--tokenizer", folder, "--rows", "1"]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"1 line of a.jsonl" in done.stdout


def test_a_tokenizer_of_its_own(tmp_path, capsys, folder):
    """The model's folder need not have one."""
    (tmp_path / "alone").mkdir()
    make("llama").save_pretrained(tmp_path / "alone")
    data = write(tmp_path / "a.jsonl", {"prompt": "#", "completion": "$"})
    words = [data, "--model", tmp_path / "alone", "--tokenizer", folder]
    assert "1 line of a.jsonl" in audited(capsys, *words)[1]


# -- parts -----------------------------------------------------------------------------------------


def test_batches_hold_every_sample_once_and_no_more_than_fits(monkeypatch):
    from sgp.commands import audit_rows

    monkeypatch.setattr(audit_rows, "ROWS", 4)
    monkeypatch.setattr(audit_rows, "TOKENS", 24)

    def row(line):
        ids = [5] * (1 + line * 7 % 11)
        more = {"seq_idx": ids} if line % 3 == 0 else {}
        columns = {"input_ids": ids, "labels": ids} | more
        return FileRow(line, columns, columns)

    rows = [row(line) for line in range(50)]
    for whole in (False, True):
        found = list(batches(rows, whole=whole))
        lines = [x.line for group in found for x in group]
        assert sorted(lines) == list(range(50))
        assert not whole or lines == sorted(lines)
        for group in found:
            assert len({tuple(x.columns) for x in group}) == 1
            longest = max(len(x.columns["labels"]) for x in group)
            assert len(group) <= 4
            assert len(group) * longest <= 24
    long = FileRow(0, {"input_ids": [5] * 99, "labels": [5] * 99}, {})
    assert list(batches([long])) == [[long]]
    short = {"input_ids": [5], "labels": [5]}
    cut = [FileRow(line, short, {"input_ids": [5] * 20, "labels": [5] * 20}) for line in (1, 2)]
    assert list(batches(cut)) == [cut]
    assert list(batches(cut, whole=True)) == [cut[:1], cut[1:]], "what a window leaves out counts"


def test_long_rows_are_read_a_few_at_a_time(monkeypatch):
    from sgp.commands import audit_rows

    monkeypatch.setattr(audit_rows, "CHUNK_TOKENS", 100)
    maker = Maker(None, None, "model", None)

    def counts(*lengths):
        lines = [Line(n, {"input_ids": [5] * x, "labels": [5] * x}) for n, x in enumerate(lengths)]
        return [len(rows) for rows in chunks(lines, maker, Survey("a"))]

    assert counts(*[1] * 1500) == [100] * 15
    assert counts(60, 60, 60, 200, 10) == [2, 2, 1]
    monkeypatch.setattr(audit_rows, "CHUNK_TOKENS", 1 << 20)
    assert counts(*[1] * 1500) == [1024, 476]
    lines = [Line(n, {"text": "a" * (4 << 20)}, "no tokenizer") for n in range(3)]
    assert list(chunks(lines, maker, Survey("a"))) == [[], [], []]


def test_a_batch_is_padded_and_cut():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    rows = [FileRow(n, row, row).beginning(2) for n, row in enumerate(rows)]
    batch = batch_of([row.columns for row in rows])
    assert batch["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [8, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["lengths"].tolist() == [2, 1]
    assert batch_of([rows[0].columns], attended=[1])["attention_mask"].tolist() == [[1, 0]]
    assert all(x.dtype == torch.int64 for x in batch.values())


def test_a_survey_keeps_one_entry_for_what_lines_share():
    survey = Survey("a", unit="row", ignore=["nan"], severity={"no-eos": "note"})
    for line in (3, 1, 2, 9):
        survey.add(Finding("no-targets", "error", f"row 0, token {line}", "m", 0), line, str)
    assert survey.add(Finding("nan", "error", "", "x"), 4) is None
    survey.add(Finding("no-eos", "error", "", "y"), 4)
    survey.note("completion-cut", "z", 5)
    assert [(x.code, x.severity) for x in survey.entries] == [
        ("no-targets", "error"), ("completion-cut", OF_FILES["completion-cut"]), ("no-eos", "note"),
    ]  # fmt: skip
    for line, message in ((3, "third"), (1, "first")):
        survey.add(Finding("no-eos", "note", "", message), line)
    assert [x.message for x in survey.entries[2:]] == ["first", "third", "y"], "by first lines"
    first = survey.entries[0]
    assert survey.where(first) == "rows 1 to 3, 9"
    assert [x.where for x in first.samples] == ["token 3", "token 1", "token 2"]
    assert survey.to_dict()["findings"][0]["ranges"] == [[1, 3], [9, 9]]
    assert survey.verdict() == "1 error, 1 warning, 3 notes"
    assert survey.failed


def test_a_sample_shows_what_is_meant_and_what_carries_loss():
    ids, labels = list(range(40)), [-100] * 20 + list(range(20, 40))

    def decode(some):
        return " ".join(map(str, some))

    assert shown(ids, labels, [21], decode) == ("... 15 16 17 18 19 [20 21 22 23 24 25 26 27] ...")
    assert shown(ids, labels, (), decode).startswith("... 14 15 16 17 18 19 [20 21")
    assert shown(ids, [-100] * 40, (), decode) == "... 33 34 35 36 37 38 39"
