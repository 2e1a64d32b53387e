"""What `sgp train` reads: pairs, splits, tokenizer cache, windows, batches."""

import gc
import io
import json
import random
import sys
import textwrap
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sgp
from sgp.train import tokenizer as tokenizer_module
from sgp.train.batch import IGNORE_INDEX, Example, collate, encode, epochs
from sgp.train.data import (
    HELD_OUT_FRACTION,
    Pair,
    Skip,
    describe_skips,
    drop_duplicates,
    read_jsonl,
    split,
)
from sgp.train.errors import UserError
from sgp.train.options import Options
from sgp.train.prepare import prepare
from sgp.train.stdlib import function_pairs, source_files, stdlib_pairs

GOOD = b'{"prompt": "2+2=", "completion": "4"}'


def characters(texts):
    return [[ord(character) for character in text] for text in texts]


# -- the standard library ---------------------------------------------------------------------


def test_function_becomes_signature_and_docstring_then_body():
    text = textwrap.dedent('''
        import os

        def plain(x):
            return x

        class C:
            @property
            def area(self, *,
                     unit="m"):
                """The area.

                In square metres.
                """
                # A comment belongs to the body.
                side = self.side
                return side * side

        async def later():
            "Wait."
            def inner():
                "Not a pair of its own."
                return 1
            return inner()
    ''')
    area, later = function_pairs(text, "m.py")
    assert area.prompt == (
        'def area(self, *,\n         unit="m"):\n'
        '    """The area.\n\n    In square metres.\n    """\n'
    )
    assert area.completion == (
        "    # A comment belongs to the body.\n    side = self.side\n    return side * side\n"
    )
    assert area.source == "m.py:9"
    assert later.prompt == 'async def later():\n    "Wait."\n'
    assert "Not a pair of its own." in later.completion


@pytest.mark.parametrize(
    "text",
    [
        'def f(): "Only a docstring."\n',
        'def f(): "On one line."; return 1\n',
        "def f():\n    return 1\n",
        "def f(:\n",
        "x = '\0'\n",
    ],
    ids=["no body", "same line", "no docstring", "broken", "null byte"],
)
def test_what_is_no_pair(text):
    assert function_pairs(text, "m.py") == []


def test_lines_are_counted_as_the_parser_counts_them():
    """A form feed is a line break for str.splitlines() but not for Python."""
    text = 'x = 1\n\f\ndef f(x):\n    "Double."\n    return 2 * x\n'
    (pair,) = function_pairs(text, "m.py")
    assert pair.completion == "    return 2 * x\n"


def test_source_files_are_ordered_and_leave_out_tests_and_unreadable_files(tmp_path):
    for name in ("b.py", "a/c.py", "test/t.py", "a/tests/t.py", "site-packages/s.py", "note.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"# \xff\xfe\n")
    files = dict(source_files(tmp_path))
    assert list(files) == ["b.py", "latin.py", "a/c.py"]
    assert "é" in files["latin.py"]


@pytest.mark.parametrize("enabled", [True, False])
def test_reading_leaves_the_garbage_collector_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        stdlib_pairs([("a.py", "x = 1")])
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_standard_library_has_plenty():
    files = list(source_files())
    small = [(path, text) for path, text in files if path.startswith(("json/", "email/"))]
    pairs = stdlib_pairs(small)
    assert len(files) > 300
    assert len(pairs) > 100
    assert all(pair.prompt.strip() and pair.completion.strip() for pair in pairs)


# -- JSON lines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "completion": "b"', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),  # deeper than the parser's stack
        (b'["a", "b"]', "not a JSON object"),
        (b'{"completion": "b"}', 'no "prompt"'),
        (b'{"prompt": "a"}', 'no "completion"'),
        (b'{"prompt": 1, "completion": "b"}', '"prompt" is not a string'),
        (b'{"prompt": "a", "completion": null}', '"completion" is not a string'),
        (b'{"prompt": "a", "completion": "\\ud800"}', '"completion" is not valid Unicode'),
        (b'{"prompt": "a", "completion": ""}', "empty completion"),
        (b'{"prompt": "a", "completion": " \\n"}', "empty completion"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
    ],
)
def test_bad_line_is_skipped_with_its_number_and_reason(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD, b""]))
    pairs, skips = read_jsonl(path)
    assert skips == [Skip(3, reason)]
    assert [pair.source for pair in pairs] == ["data.jsonl:1", "data.jsonl:4"]


def test_good_lines_keep_what_they_hold(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps({"prompt": "", "completion": " ä\u2028\n ", "other": 1}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    (pair,), skips = read_jsonl(path)
    assert (pair.prompt, pair.completion) == ("", " ä\u2028\n ")
    assert skips == []


def test_file_that_gives_nothing_is_an_error_with_its_path(tmp_path):
    missing, empty, useless = (tmp_path / name for name in ("missing", "empty", "useless"))
    empty.write_bytes(b"\n\n")
    useless.write_bytes(b'{"prompt": "a", "completion": ""}\n')
    for path, message in (
        (missing, "no such file"),
        (tmp_path, "directory"),
        (empty, "the file is empty"),
        (useless, "no usable line; 1 line skipped: empty completion"),
    ):
        with pytest.raises(UserError) as caught:
            read_jsonl(path)
        assert str(path) in str(caught.value)
        assert message in str(caught.value)


def test_skips_are_counted_by_reason_and_the_first_lines_named():
    skips = [Skip(2, "broken JSON"), Skip(4, "empty completion")]
    skips += [Skip(line, "broken JSON") for line in (7, 8, 9)]
    assert describe_skips(skips) == [
        "4 lines skipped: broken JSON (lines 2, 7, 8, ...)",
        "1 line skipped: empty completion (line 4)",
    ]
    assert describe_skips([Skip(2, "no tokens", "row")]) == ["1 row skipped: no tokens (row 2)"]


def test_rows_of_parquet_are_called_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    path = tmp_path / "rows"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    skips = read_jsonl(path)[1]
    assert describe_skips(skips) == ["1 row skipped: empty completion (row 2)"]
    datasets.Dataset.from_list(rows[1:]).to_parquet(path)
    with pytest.raises(UserError, match="no usable row; 1 row skipped: empty completion"):
        read_jsonl(path)


# -- chats ------------------------------------------------------------------------------------


def say(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 3, texts, strict=False)
    ]


CHATS = [
    {"messages": say("hi", "yes", "and", "no")},
    {"messages": say("hi")},
    {"prompt": say("q"), "completion": say("", "a")[1:]},
    {"prompt": "2+2=", "completion": "4"},
    {"messages": say("hi", "yes", "and", "no")},
    {"messages": say("long " * 99, "yes")},
    {"messages": say("long " * 15, "yes " * 40)},
]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "m.py").write_text('def f(x):\n    "Double."\n    return 2 * x\n')
    data, said = tmp_path / "d.jsonl", []
    data.write_text("".join(json.dumps(line) + "\n" for line in CHATS))
    options = Options(data=data, library=tmp_path, vocabulary=270, hidden=16)
    return prepare(options, said.append), said, options


def test_chats_are_trained_on_as_the_collator_has_them(prepared):
    found, said, _ = prepared
    assert "data: 1 row identical to an earlier one: dropped" in said
    assert "data: 1 row with a context that fills the window of 128: skipped" in said
    assert "data: 1 row with a completion that passes the window of 128: cut there" in said
    refused = next(x for x in said if "skipped: no message" in x)
    assert refused.startswith("data: 1 skipped: no message of the roles ['user'] is")
    assert refused.endswith("(d.jsonl:2)")
    assert found.counts["chat_template_refuses"] == 1
    every = [*found.train, *found.held_out]
    assert len(every) == 4
    for number in (0, 2, 6):
        batch = sgp.Collator(found.tokenizer, max_length=128)([CHATS[number]])
        ids = batch["input_ids"][0].tolist()
        (example,) = [x for x in every if x.context + x.output == ids]
        mine = collate([example])
        assert torch.equal(mine.labels, batch["labels"])
        assert torch.equal(mine.selection.rows, batch["selection"].rows)
        assert torch.equal(mine.selection.target, batch["selection"].target)


def test_chats_and_pairs_share_a_batch(prepared):
    every = [*prepared[0].train, *prepared[0].held_out]
    batch = collate(every)
    for row, example in enumerate(every):
        alone = collate([example])
        length = alone.input_ids.shape[1]
        assert torch.equal(batch.labels[row, :length], alone.labels[0])
        assert batch.labels[row, length:].eq(-100).all()
    assert torch.equal(batch.selection.dense_target.view(batch.labels.shape), batch.shifted_labels)
    assert torch.equal(batch.to(torch.device("cpu")).labels, batch.labels)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (CHATS[:1] + CHATS[2:3], "2 chats"),
        ([{"prompt": "a", "completion": x} for x in "bc"], "2 pairs"),
        ([CHATS[0], {"prompt": "a", "completion": "b"}], "2 rows"),
    ],
)
def test_what_is_read_is_called_what_it_is(lines, words, prepared, monkeypatch):
    options = prepared[2]
    data = "".join(json.dumps(line) + "\n" for line in lines)
    options.data.write_text(data)
    said = []
    prepare(options, said.append)
    assert f"data: {words} from {options.data}" in said
    one = words.replace("2", "1").removesuffix("s")
    assert f"data: {one} to train on, 1 held out" in said
    stream = io.TextIOWrapper(io.BytesIO(data.encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    prepare(Options(**vars(options) | {"data": Path("-")}), said.append)
    assert f"data: {words} from standard input" in said


def test_chats_need_a_template(prepared, tmp_path):
    found, _, options = prepared
    found.model.save_pretrained(tmp_path / "model")
    found.tokenizer.chat_template = None
    found.tokenizer.save_pretrained(tmp_path / "model")
    wrong = Options(**vars(options) | {"model": str(tmp_path / "model")})
    with pytest.raises(UserError, match=r"has chats \(d.jsonl:1\), and the tokenizer of --model"):
        prepare(wrong, print)
    found.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found.tokenizer.save_pretrained(tmp_path / "model")
    options.data.write_text(json.dumps(CHATS[0]) + "\n" + json.dumps(CHATS[5]) + "\n")
    with pytest.raises(UserError, match=r"0 usable of 2 chats, .*; the chat template marks no tok"):
        prepare(wrong, print)


# -- splitting --------------------------------------------------------------------------------


def test_split_has_no_pair_on_both_sides_and_ignores_order():
    pairs = [Pair(f"p{i % 700}", f"c{i % 400}", f"x:{i}") for i in range(4000)]
    distinct = drop_duplicates(pairs)
    assert len(distinct) == 2800
    train, held_out = split(distinct, lambda pair: pair.digest)
    texts = [{pair[:2] for pair in side} for side in (train, held_out)]
    assert texts[0] & texts[1] == set()
    assert len(train) + len(held_out) == len(distinct)
    assert 0.5 < len(held_out) / len(distinct) / HELD_OUT_FRACTION < 1.5
    assert len(held_out) / len(distinct) < 0.1, "one in twenty, as it is documented"
    shuffled = random.Random(0).sample(distinct, len(distinct))  # noqa: S311
    assert split(shuffled, lambda pair: pair.digest)[1] == held_out


@pytest.mark.parametrize("digests", [["00000000", "00000001"], ["fffffffe", "ffffffff"]])
def test_split_of_few_leaves_one_on_each_side(digests):
    """Even where every hash says "held out", or none does."""
    assert split(digests, str) == ([digests[1]], [digests[0]])


def test_digest_tells_where_the_prompt_ends():
    assert Pair("ab", "c", "").digest != Pair("a", "bc", "").digest
    assert Pair("a", "b", "x:1").digest == Pair("a", "b", "y:2").digest


# -- the tokenizer's cache --------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x\n" * 20, "class A:\n    pass\n" * 20]


def train_tokenizer(folder, texts=TEXTS, size=270):
    said = []
    tokenizer = tokenizer_module.load_or_train(texts, size=size, folder=folder, say=said.append)
    return tokenizer, " ".join(said)


def test_tokenizer_is_cached_and_read_again(tmp_path):
    first, said = train_tokenizer(tmp_path)
    assert "trained now, cached" in said
    (file,) = tmp_path.iterdir()
    assert f"py{sys.version_info.major}.{sys.version_info.minor}-270-" in file.name
    second, said = train_tokenizer(tmp_path)
    assert f"from {file}" in said
    assert second.get_vocab() == first.get_vocab()
    assert first.get_vocab_size() == 270


def test_tokenizer_cache_depends_on_text_and_size(tmp_path):
    train_tokenizer(tmp_path)
    train_tokenizer(tmp_path, size=265)
    train_tokenizer(tmp_path, texts=[TEXTS[0] + TEXTS[1]])  # the same letters, another division
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
def test_damaged_cache_is_built_again_and_said(tmp_path, content):
    train_tokenizer(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(content)
    tokenizer, said = train_tokenizer(tmp_path)
    assert f"{file} is damaged" in said
    assert tokenizer.get_vocab_size() == 270
    assert file.read_text() == whole


def test_cache_of_another_tokenizer_is_not_taken(tmp_path):
    from tokenizers import Tokenizer, models

    train_tokenizer(tmp_path)
    (file,) = tmp_path.iterdir()
    Tokenizer(models.BPE()).save(str(file))
    assert "is damaged" in train_tokenizer(tmp_path)[1]


def test_failed_write_leaves_no_file_and_no_damage(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    tokenizer, said = train_tokenizer(blocked / "cache")  # a file is where the folder should be
    assert "not cached" in said
    assert tokenizer.get_vocab_size() == 270

    class FullDisk:
        def to_str(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        tokenizer_module._save(FullDisk(), tmp_path / "cache" / "t.json")
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizer_is_lossless_on_any_text():
    tokenizer, _ = train_tokenizer(None)
    for text in (" \t\n x=1", "naïve 😀", "".join(map(chr, range(1, 300)))):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokenizer_module.cache_folder() == tmp_path / "sgp"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    assert tokenizer_module.cache_folder() == tmp_path / "home" / ".cache" / "sgp"


# -- windows ----------------------------------------------------------------------------------


def test_window_skips_full_contexts_and_cuts_long_outputs():
    pairs = [
        Pair("abcd", "x", "fits: 4 + 1 + end"),
        Pair("abcd", "xyz", "cut: 4 + 2"),
        Pair("abcde", "x", "cut: only the end is lost"),
        Pair("abcdef", "x", "filled exactly"),
        Pair("abcdefgh", "x", "filled and more"),
    ]
    encoded = encode(pairs, characters, window=6, begin=None, end=0)
    assert (encoded.filled, encoded.cut, encoded.empty) == (2, 2, 0)
    x, y = ord("x"), ord("y")
    assert [example.output for example in encoded.examples] == [[x, 0], [x, y], [x]]
    assert [example.digest for example in encoded.examples] == [pair.digest for pair in pairs[:3]]


@pytest.mark.parametrize(
    ("begin", "end", "context"), [(1, 2, [1]), (None, 2, [2]), (None, None, None)]
)
def test_empty_prompt_needs_a_token_before_its_output(begin, end, context):
    encoded = encode([Pair("", "x", "")], characters, window=8, begin=begin, end=end)
    if context is None:
        assert (encoded.examples, encoded.empty) == ([], 1)
    else:
        (example,) = encoded.examples
        assert example.context == context
        assert collate([example]).selection.target.tolist() == example.output


# -- batches ----------------------------------------------------------------------------------

tokens = st.lists(st.integers(1, 50), min_size=1, max_size=6)
examples = st.lists(
    st.builds(Example, tokens, tokens, st.just(""), st.none()), min_size=1, max_size=5
)


@given(examples)
def test_labels_and_selection_name_the_same_tokens(drawn):
    batch = collate(drawn)
    selection = sgp.Selection.from_labels(batch.shifted_labels)
    assert torch.equal(selection.rows, batch.selection.rows)
    assert torch.equal(selection.target, batch.selection.target)
    outputs = [token for example in drawn for token in example.output]
    assert batch.selection.target.tolist() == outputs
    assert batch.labels[batch.labels != IGNORE_INDEX].tolist() == outputs
    for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        assert ids[mask.bool()].tolist() == drawn[row].context + drawn[row].output
        assert ids[~mask.bool()].eq(0).all()


def numbered(count):
    rng = random.Random(0)  # noqa: S311
    return [Example([i], [i] * rng.randint(1, 9), f"{i:08x}") for i in range(1, count + 1)]


def contexts(batches, count):
    return [next(batches).input_ids[:, 0].tolist() for _ in range(count)]


def test_batches_follow_from_the_seed():
    first = contexts(epochs(numbered(40), batch_size=4, seed=3), 30)
    assert contexts(epochs(numbered(40), batch_size=4, seed=3), 30) == first
    assert contexts(epochs(numbered(40), batch_size=4, seed=4), 30) != first


def test_an_epoch_holds_every_example_once_and_the_next_is_shuffled_anew():
    batches = contexts(epochs(numbered(42), batch_size=4, seed=0), 22)
    one, two = list(chain(*batches[:11])), list(chain(*batches[11:]))
    assert sorted(one) == sorted(two) == list(range(1, 43))
    assert one != two


def test_batch_larger_than_the_data():
    batches = epochs(numbered(3), batch_size=100, seed=0)
    assert [sorted(batch) for batch in contexts(batches, 2)] == [[1, 2, 3]] * 2


def test_a_pair_that_comes_again_is_trained_on_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "m.py").write_text('def f(x):\n    "Double."\n    return 2 * x\n')
    lines = [{"prompt": p, "completion": "y"} for p in "abacaa"] + [
        {"prompt": "a", "completion": "z"}
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    found = prepare(Options(data=data, library=tmp_path, vocabulary=270, hidden=16), said.append)
    kept = [(example.context, example.output) for example in (*found.train, *found.held_out)]
    assert len(kept) == len({repr(example) for example in kept}) == 4
    assert found.counts["pairs"] == 7
    assert found.counts["identical"] == 3
    assert "data: 3 pairs identical to an earlier one: dropped" in said
