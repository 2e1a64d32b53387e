"""What the audit shows: table, picture, page, JSON, and the command."""

import dataclasses
import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import pytest
from rich.console import Console

import sgp
from sgp.auditing.colors import color, step
from tests.audited import LENGTHS, B, T, Tokenizer, make, make_batch

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
        if tag not in ("meta", "input", "br"):
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
    assert [a[1][0] for a in page.attributes if a[0] in ("src", "href")] == ["#"] * B
    shown = "".join(page.text)
    assert "error: no-targets" in shown
    assert f"<b>{report.tokens[0][0].token_id}&\\n" in shown, "a line break is seen"
    assert f"loss {report.tokens[0][5].loss:.4f} nats" in shown
    assert f"its own loss {report.tokens[0][5].loss:.4f} nats" in shown


def columns_of(text, row):
    """Of each token of a row: its class, and the classes of the cells under it."""
    part = text.split(f"id='row-{row}'")[1].split("</details>")[0]
    tokens = re.split(r"<span class='t( l\d+)?' tabindex", part)[1:]
    pairs = zip(tokens[::2], tokens[1::2], strict=True)
    return [(kind or "", re.findall(r"<span class='m (\w+)'", x)) for kind, x in pairs]


def test_each_token_stands_over_its_own_column(model, batch, tmp_path):
    report = sgp.audit(model, batch)
    text = report.to_html(tmp_path / "audit.html").read_text()
    layers = len(report.grad_norm)
    every = report.grad_norm[report.grad_norm > 0].log10()
    low, high = float(every.min()), float(every.max())
    largest = max(x.loss for row in report.tokens for x in row if x.loss is not None)
    for row, length in enumerate(LENGTHS):
        found = columns_of(text, row)
        assert len(found) == min(T, length + 3), "more padding is counted"
        for t, (kind, cells) in enumerate(found):
            norms = report.grad_norm[:, row, t].flip(0).tolist()  # the last layer on top
            assert cells == [
                "dead" if x == 0 else f"v{step(math.log10(x), low, high)}" for x in norms
            ]
            before = report.tokens[row][t - 1].loss if t else None
            assert kind == ("" if before is None else f" l{step(before, 0.0, largest)}")
        assert len(cells) == layers
    assert f"... {T - LENGTHS[1] - 3} more of padding" in text
    assert f"{10**low:.0e}<span class='scale'>" in text
    assert f"{largest:.2f}" in text.split("loss of a token, in nats: 0")[1][:60]


def test_unmeasured_cells_are_hatched_and_findings_are_grouped(model, batch, tmp_path):
    batch["labels"][1:] = -100
    report = sgp.audit(model, batch)
    report.grad_norm[1] = float("nan")
    names = ["line 7", "line 8", "line 9"]
    text = report.to_html(tmp_path / "audit.html", labels=names).read_text()
    assert {cells[1] for _, cells in columns_of(text, 0)} == {"lost"}
    assert text.count("error: no-targets") == 1
    assert "<span class='where'>line 8, line 9</span>" in text
    assert "<summary>line 7</summary>" in text


def test_no_findings_is_said(model, batch, tmp_path):
    batch["labels"][:, 0] = -100
    text = sgp.audit(model, batch).to_html(tmp_path / "audit.html").read_text()
    assert "<p class='none'>No findings.</p>" in text
    assert "<p class='sub'>no findings</p>" in text


def test_what_cannot_be_seen_or_would_be_markup_is_shown_as_text(model, batch, tmp_path):
    class Odd(Tokenizer):
        def decode(self, _):
            return "[bold]\x1b\r\ud800"

    report = sgp.audit(model, batch, tokenizer=Odd())
    console = Console(width=100, record=True, file=io.StringIO())
    report.print(console)
    assert "[bold]\\x1b\\r\\ud800" in console.export_text()
    assert "[bold]\\x1b\\r" in report.to_html(tmp_path / "audit.html").read_text()
    assert report.plot(tmp_path / "audit.png").is_file()


def test_the_picture_has_the_colours_of_the_page(model, batch, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    usual = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda *x, **y: drawn.append(usual(*x, **y)) or drawn[-1])
    report = sgp.audit(model, batch)
    report.plot(tmp_path / "audit.png")
    every = report.grad_norm[report.grad_norm > 0].log10()
    for value in (float(every.min()), float(every.median()), float(every.max())):
        shown = drawn[0].cmap(drawn[0].norm(value))[:3]
        share = (value - float(every.min())) / float(every.max() - every.min())
        assert [round(255 * x) for x in shown] == pytest.approx(color(share), abs=2)


@pytest.mark.parametrize("depth", [1, 11])
def test_the_text_of_long_tokens_stays_in_the_strip(depth, model, batch, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    row = [
        dataclasses.replace(x, text=("<|im_start|>", "mammograms")[x.position % 2])
        for x in report.tokens[0]
    ]
    report.tokens[0] = row
    report = dataclasses.replace(report, grad_norm=report.grad_norm.repeat(depth, 1, 1))
    outside = []

    def look(figure, *_, **__):
        figure.draw_without_rendering()
        strip = figure.axes[0]
        boxes = [text.get_window_extent() for text in strip.texts]
        assert len(boxes) == len(row)
        outside.extend(x for x in boxes if x.y0 < strip.bbox.y0 or x.y1 > strip.bbox.y1)

    monkeypatch.setattr(Figure, "savefig", look)
    report.plot(tmp_path / "audit.png")
    assert not outside


def test_answers_are_shown(model, batch, tmp_path):
    from sgp.auditing.answers import Answer

    answers = (
        Answer(0, "Paris", "Par\nis", ends=True, tokens=3, expected_ends=True),
        Answer(1, "Rome", "R" * 9, ends=False, tokens=20, expected_ends=True),
        Answer(2, "Bern", "Bern", ends=True, tokens=1, expected_ends=False),
        Answer(3, "Oslo", "O", ends=False, tokens=20, expected_ends=False),
    )
    report = dataclasses.replace(sgp.audit(model, batch), answers=answers)
    console = Console(width=200, record=True, file=io.StringIO())
    report.print(console, labels=["line 4"])
    shown = console.export_text()
    assert "line 4: the model answers 'Par\\nis'" in shown
    said = (
        "and ends, as the labels do; expected 'Paris'",
        "row 1: the model answers 'RRRRRRRRR' and does not end within 20 tokens; the labels end; ",
        "row 2: the model answers 'Bern' and ends; the labels do not; ",
        "and does not end within 20 tokens; the labels do not end either; expected 'Oslo'",
    )
    text = html.unescape(report.to_html(tmp_path / "audit.html").read_text())
    for words in said:
        assert words in shown
        assert words in text
    assert "row 0: the model answers" in text
    told = report.to_dict()["answers"]
    assert told[0]["expected"] == "Paris"
    assert [answer["expected_ends"] for answer in told] == [True, True, False, False]


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
const cell = document.querySelector('.m:not(.dead)').getBoundingClientRect();
const word = t => t.querySelector('.w').getBoundingClientRect();
const apart = all.filter(t => [...t.querySelectorAll('.m')].some(m => {
  const box = m.getBoundingClientRect();
  return Math.abs(box.left - word(t).left) > 1 || Math.abs(box.right - word(t).right) > 1;
})).length;
const paint = () => getComputedStyle(document.querySelector('.l23 .w')).backgroundColor;
const of_role = paint();
document.querySelector('[for=by-loss]').click();
const of_loss = paint();
document.title = JSON.stringify({tokens: all.length, apart, of_role, of_loss, before,
  open, outside, width: innerWidth,
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
    count = sum(min(T, length + 3) for length in LENGTHS)
    assert found["tokens"] == count
    assert (found["before"], found["open"], found["outside"]) == (0, count, 0), found
    assert found["apart"] == 0, "each column is as wide as its token"
    assert (found["of_role"], found["of_loss"]) == ("rgba(0, 0, 0, 0)", "rgb(253, 231, 37)")
    assert found["scroll"] <= found["width"], "nothing makes the page wider than the window"
    assert found["cell"][0] >= 13
    assert found["cell"][1] >= 7
    assert found["finding"] < found["token"]


@pytest.mark.parametrize("row", [0, 1])
def test_the_picture_is_written(model, batch, tmp_path, row):
    report = sgp.audit(model, batch)
    path = report.plot(tmp_path / "audit.png", row=row)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(IndexError, match="row 3 of a batch of 3"):
        report.plot(tmp_path / "audit.png", row=3)
