"""What the audit shows: table, picture, page, JSON, and the command."""

import html
import html.parser
import io
import json
import shutil
import subprocess

import pytest
from rich.console import Console

import sgp
from sgp.cli import main
from tests.audited import B, T, Tokenizer, make, make_batch

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def model():
    return make("llama").train()


@pytest.fixture
def batch():
    return make_batch()


def test_print_and_to_dict(model, batch):
    batch["labels"][2] = -100
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    console = Console(width=100, record=True, file=io.StringIO())
    report.print(console, rows=2)
    shown = console.export_text()
    assert "error: no-targets (row 2): no token carries loss" in shown
    assert "1 more row\n" in shown.replace(" \n", "\n")
    assert "predictor" in shown
    assert f"{report.tokens[0][5].loss:.3f}" in shown
    assert "|g_context| / |g|" in shown or report.context_share is None
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["findings"][0]["code"] == "no-targets"
    assert len(content["grad_norm"]) == 3
    assert content["tokens"][0][5]["role"] == "predictor"


def test_long_rows_are_cut_and_what_is_left_out_is_counted(model, batch):
    report = sgp.audit(model, batch)
    console = Console(width=80, record=True, file=io.StringIO())
    report.print(console, tokens=6)
    shown = console.export_text()
    rows = shown.split("row 1")[1].split("row 2")[0].splitlines()
    assert [line.split()[:3] for line in rows if line.strip()][1:] == [
        ["0", str(int(batch["input_ids"][1, 0])), "context"],
        ["1", str(int(batch["input_ids"][1, 1])), "predictor"],
        ["2", str(int(batch["input_ids"][1, 2])), "output"],
        ["3", str(int(batch["input_ids"][1, 3])), "output"],
        ["...", "6", "tokens"],
        ["10", str(int(batch["input_ids"][1, 10])), "output"],
        ["11", str(int(batch["input_ids"][1, 11])), "output"],
        ["...", "5", "padding"],
    ]
    assert max(map(len, rows)) <= 80
    assert "dL/dhidden" in shown, "nothing is cut at 80 columns"


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_and_escapes_what_it_shows(model, batch, tmp_path):
    class Markup(Tokenizer):
        def decode(self, ids):
            return f"<b>{ids[0]}&\n"

    batch["labels"][2] = -100
    report = sgp.audit(model, batch, tokenizer=Markup())
    path = report.to_html(tmp_path / "audit.html")
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "b>"} & set(page.tags)
    assert "http" not in text
    assert not [a for a in page.attributes if a[0] in ("src", "href")]
    assert page.tags.count("td") == 3 * B * T
    shown = "".join(page.text)
    assert "error: no-targets" in shown
    assert f"<b>{report.tokens[0][0].token_id}&\\n" in shown, "a line break is seen"
    assert f"loss {report.tokens[0][5].loss:.4f} nats" in shown


LOOK = """<script>
const look = () => {  // once the window has the focus
if (!document.hasFocus()) return setTimeout(look, 50);
const shown = t => getComputedStyle(t.querySelector('.tip')).display !== 'none';
const all = [...document.querySelectorAll('.t')], before = all.filter(shown).length;
let open = 0, outside = 0;
for (const t of all) {
  t.focus();
  if (shown(t) && all.filter(shown).length === 1) open += 1;
  const box = t.querySelector('.tip').getBoundingClientRect();
  if (box.left < 0 || box.right > innerWidth || box.height < 20) outside += 1;
}
const cell = document.querySelector('.map td:not(.dead)').getBoundingClientRect();
document.title = JSON.stringify({tokens: all.length, before, open, outside, width: innerWidth,
  cell: [cell.width, cell.height], scroll: document.documentElement.scrollWidth,
  finding: document.querySelector('.findings li').getBoundingClientRect().top,
  token: all[0].getBoundingClientRect().top});
};
addEventListener('load', look);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to show the page in")
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_in_a_browser(model, batch, tmp_path, width):
    """Each token's box opens alone and lies in the window; findings stand above the tokens."""
    batch["labels"][2] = -100
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    path = report.to_html(tmp_path / "audit.html")
    path.write_text(path.read_text().replace("</body>", LOOK + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--dump-dom", "--virtual-time-budget=9000"]
    command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(html.unescape(done.stdout.split("<title>")[1].split("</title>")[0]))
    assert found["tokens"] == B * T
    assert (found["before"], found["open"], found["outside"]) == (0, B * T, 0), found
    assert found["scroll"] <= found["width"], "nothing makes the page wider than the window"
    assert min(found["cell"]) >= 13
    assert found["finding"] < found["token"]


@pytest.mark.parametrize("row", [0, 1])
def test_the_picture_is_written(model, batch, tmp_path, row):
    report = sgp.audit(model, batch)
    path = report.plot(tmp_path / "audit.png", row=row)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(IndexError, match="row 3 of a batch of 3"):
        report.plot(tmp_path / "audit.png", row=3)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command(tmp_path, capsys):
    right = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}
    twice = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 7, 8, 9, -100]}
    assert main(["audit", write(tmp_path / "right.jsonl", [right] * 3)]) == 0
    shown = capsys.readouterr().out
    assert "3 samples" in shown
    assert "random weights" in shown
    assert main(["audit", str(tmp_path / "right.jsonl"), "--model", str(tmp_path / "nope")]) == 2
    assert "nope" in capsys.readouterr().err
    long = {"input_ids": [5] * 600 + [6, 7], "labels": [-100] * 600 + [6, 7]}
    assert main(["audit", write(tmp_path / "long.jsonl", [long, right])]) == 0
    shown = capsys.readouterr().out
    assert "no-targets" not in shown
    assert "rows 0 to 0 are lines 2: those that carry loss" in shown
    out = tmp_path / "out"
    data = write(tmp_path / "wrong.jsonl", [right, twice, twice])
    assert main(["audit", data, "--rows", "1", "--out", str(out)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "error: labels-shifted-twice: 2 samples, first in line 2, 3 tokens, 1 to 3:" in shown
    assert {p.name for p in out.iterdir()} == {"audit.png", "audit.html", "audit.json"}
    found = json.loads((out / "audit.json").read_text())
    assert found["findings"] == {"labels-shifted-twice": 2}
    assert found["report"]["findings"] == [], "the first sample is right"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no samples"),
        ('{"text": "x"}', ":1: has ['text']; expected input_ids and labels, or prompt"),
        ('{"prompt": "x", "completion": "y"}', ":1: prompt and completion need --tokenizer"),
        ('{"input_ids": [1, 2], "labels": [1]}', ":1: columns of different lengths"),
        ("nonsense", ":1: not valid JSON: Expecting value, column 1"),
        ("3", ":1: is '3'; expected an object with input_ids"),
        ('{"input_ids": [], "labels": []}', ":1: has no tokens"),
        ('{"input_ids": [1, -2], "labels": [1, 2]}', ":1: input_ids has -2; expected 0 or more"),
        ('{"input_ids": [1, 2], "labels": [-100, -1]}', ":1: labels has -1; expected -100 or a t"),
        ('{"input_ids": "abc", "labels": [1, 2, 3]}', ":1: input_ids is 'abc'; expected a list"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(lines, message, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    assert main(["audit", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "missing.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_command_reads_lines_as_json_lines_are(tmp_path, capsys):
    """A line ends where the file says so, not at what Unicode calls a line; masks may be true."""
    row = {
        "input_ids": [5, 6, 7],
        "labels": [-100, -100, 7],
        "completion_mask": [False, False, True],
    }
    text = "\ufeff" + json.dumps(row | {"text": "a\u2028b\x85"}, ensure_ascii=False) + "\n\n"
    path = tmp_path / "data.jsonl"
    path.write_text(text + json.dumps(row | {"labels": [-100] * 3}) + "\n", encoding="utf-8")
    assert main(["audit", str(path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "no-targets: 1 sample, first in line 3" in shown
    assert "first-output-untrained: 1 sample, first in line 3" in shown
    path.write_bytes(b'{"text": "\xff"}\n')
    assert main(["audit", str(path)]) == 2
    assert "can't decode byte 0xff" in capsys.readouterr().err


def test_the_command_pads_packed_rows(tmp_path, capsys):
    long = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, -100, -100, 10]}
    long["position_ids"] = [0, 1, 2, 0, 1, 2]
    short = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "position_ids": [0, 1, 2]}
    out = tmp_path / "out"
    assert main(["audit", write(tmp_path / "data.jsonl", [long, short]), "--out", str(out)]) == 0
    tokens = json.loads((out / "audit.json").read_text())["report"]["tokens"]
    assert [t["role"] for t in tokens[1][3:]] == ["padding"] * 3
    assert "3 of 9 tokens carry loss" in capsys.readouterr().out
    alone = tmp_path / "alone"
    assert (
        main(
            [
                "audit",
                write(tmp_path / "one.jsonl", [short, long]),
                "--rows",
                "1",
                "--out",
                str(alone),
            ]
        )
        == 0
    )
    expected = json.loads((alone / "audit.json").read_text())["report"]["tokens"][0][1]["loss"]
    assert tokens[1][1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_command_asks_the_model(tmp_path, capsys):
    """For its vocabulary, and for what else ends a text."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = make("llama")
    words = Words(WordLevel({"<s>": 1, "</s>": 2, "<end>": 3, "a": 4}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="</s>",  # noqa: S106  (the text of a token)
        additional_special_tokens=["<end>"],
    )
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"input_ids": [5, 6, 7, 8, 3], "labels": [-100, -100, 7, 8, 3]}
    command = ["audit", write(tmp_path / "data.jsonl", [row]), "--model", str(tmp_path / "model")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "no-eos" not in shown
    assert "special-scored" not in shown
    many = [row] * 9 + [row | {"input_ids": [5, 6, 7, 99, 3]}]
    write(tmp_path / "data.jsonl", many)
    assert main(command) == 2
    assert ":10: token 99 is outside the model's [0, 61)" in capsys.readouterr().err
