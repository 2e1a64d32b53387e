"""README and docs: every Python block runs, every table is its results file's, every link leads on.

A block that cannot run here says why in a comment above it: `<!-- not run: the reason -->`.
"""

import doctest
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import sgp
from bench import __main__ as bench_main
from bench.gpu import tables as gpu_tables
from bench.proof import resources
from bench.shown import memory, page, readme, report
from sgp.commands import plan
from sgp.head import chunks
from sgp.kernels import table as launch_table
from sgp.rows.divergence import KINDS
from tests import families, page_names

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
PAGES = report.pages()
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block of Python."""

    line: int
    code: str
    reason: str  # why it is not run; "" if it is


def blocks_of(path):
    text = path.read_text()
    found = []
    for match in FENCE.finditer(text):
        if match[2] in ("python", "py"):
            why = NOT_RUN.search(text, max(0, match.start() - 300), match.start())
            line = text.count("\n", 0, match.start()) + 2
            code = "\n".join(x.removeprefix(match[1]) for x in match[3].splitlines()) + "\n"
            found.append(Block(line, code, why[1] if why else ""))
    return found


def run_block(path, block, names):
    """As a program, or as a session whose output is compared."""
    if ">>>" not in block.code:
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), names)  # noqa: S102
        return
    session = doctest.DocTestParser().get_doctest(
        block.code, names, name_of(path), str(path), block.line
    )
    said = []
    result = doctest.DocTestRunner().run(session, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)
    names |= session.globs


# -- code ------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", [p for p in PAGES if blocks_of(p)], ids=name_of)
def test_blocks_run(path, tmp_path, monkeypatch):
    """In order, in one namespace for each page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(path)
    assert not [b for b in blocks if b.reason and len(b.reason) < 10], "a reason says why"
    names = page_names.usual()
    with warnings.catch_warnings(), page_names.one_rank():
        if any("trl" in block.code for block in blocks):  # TRL and transformers deprecate
            warnings.simplefilter("ignore")  # each other's options
            names |= page_names.with_trl(tmp_path)
        for block in blocks:
            if not block.reason:
                run_block(path, block, names)


@pytest.mark.parametrize(
    ("family", "row"),
    [("gemma2", "Gemma 2"), ("cohere", "Cohere"), ("granite", "Granite"), ("phi", "Phi")],
)
def test_what_to_pass_for_a_model_is_right(family, row):
    """The table of own-loop.md, as code: with it the loss is the model's, without it another."""
    text = (ROOT / "docs" / "how-to" / "own-loop.md").read_text()
    (line,) = (x for x in text.splitlines() if x.startswith(f"| {row}"))
    passed = line.split("|")[-2].strip(" `")
    model, batch = families.make(family).train(), families.make_batch()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    given = eval(f"dict({passed})", {"config": model.config, "head": head})  # noqa: S307
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state
    wrong, right = (
        sgp.linear_cross_entropy(hidden, head.weight, batch["labels"], shift=True, **more).item()
        for more in ({}, given)
    )
    assert right == pytest.approx(model(**batch).loss.item(), abs=1e-4)
    assert abs(wrong - right) > 0.1


def test_most_blocks_run():
    blocks = [block for path in PAGES for block in blocks_of(path)]
    assert sum(bool(block.reason) for block in blocks) <= len(blocks) // 3


def test_a_block_that_fails_is_seen(tmp_path):
    wrong = tmp_path / "page.md"
    wrong.write_text(
        "```python\n>>> 1 + 1\n3\n\n```\n\n<!-- not run: needs a GPU -->\n```python\nx\n```\n"
    )
    first, second = blocks_of(wrong)
    assert second.reason == "needs a GPU"
    with pytest.raises(AssertionError, match="Expected"):
        run_block(README, first, {})


# -- links, commands, size -------------------------------------------------------------------------


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 200


def anchors_of(text):
    """Of headings, as MkDocs and GitHub both make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"[\s]+", "-", word.strip()) for word in words}


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of
)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(found.read_text()), target


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_files_that_are_named_are_there(path):
    folders = "sgp|kernels|bench|tests|docs|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text()):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p != README
    )


def test_the_site_builds(tmp_path):
    """With warnings as errors: a link, an anchor or a docstring that is not there fails."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for path in PAGES[1:]:
        page_html = path.relative_to(ROOT / "docs").with_suffix(".html")
        if page_html.name != "index.html":
            page_html = page_html.with_suffix("") / "index.html"
        assert (tmp_path / "site" / page_html).is_file(), page_html


def test_every_public_name_is_in_the_reference():
    import sgp.trl

    text = {p.stem: p.read_text() for p in (ROOT / "docs" / "reference").glob("*.md")}
    for module, stem in (
        (sgp, "sgp"), (sgp.parallel, "parallel"), (sgp.huggingface, "huggingface"),
        (sgp.trl, "trl"),
    ):  # fmt: skip
        for name in module.__all__:
            if not isinstance(getattr(module, name), type(sgp)):
                here, made = module.__name__, getattr(module, name).__module__
                listed = [f"\n::: {x}.{name}\n" in text[stem] for x in (here, made)]
                assert any(listed), name
    for name in ("cross_entropy", "linear_cross_entropy", "token_log_probs"):
        assert f"\n::: sgp.reference.{name}\n" in text["reference"]


def test_the_page_of_the_benchmarks_lists_every_command():
    text = (ROOT / "docs" / "commands" / "bench.md").read_text()
    for command in ("all", *bench_main.COMMANDS):
        assert f"| `{command}` |" in text


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    """The fixed words of each heading's message, without what is filled in."""
    sources = "".join(
        p.read_text() for folder in ("sgp", "kernels") for p in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        for piece in message.split("..."):
            assert piece.strip() in code, piece


# -- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_tables_are_the_results_files(path):
    assert report.filled(path) == path.read_text(), "run `python -m bench report`"


def test_every_table_stands_somewhere():
    text = "".join(path.read_text() for path in PAGES)
    for name in report.BLOCKS:
        assert f"<!-- {name}: begin -->" in text, name


def test_a_table_that_does_not_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    broken = tmp_path / "README.md"
    broken.write_text("<!-- traffic: begin -->\n")
    with pytest.raises(ValueError, match="without <!-- traffic: end -->"):
        report.filled(broken)


def prose_of(path):
    """Without tables that are made, blocks of code, and code in a line."""
    text = path.read_text()
    for name in report.BLOCKS:
        before, found, rest = text.partition(f"<!-- {name}: begin -->")
        text = before + rest.partition(f"<!-- {name}: end -->")[2] if found else text
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


def test_no_time_or_size_without_a_source():
    """Outside the tables that are made of results, there is none but those of a formula."""
    units = r"\d[\d.]*\s?(?:ms|us|microseconds|s|MiB|GiB|GB/s|TB/s|TFLOP/s|%)(?=\W)"
    found = {(name_of(p), x) for p in PAGES for x in re.findall(units, prose_of(p))}
    default = chunks.default_budget(plan.shape_of(8192, 8192, 128_256, 4096)) / 2**30
    formula = {f"{default:.0f} GiB", "256 MiB", "3 %"}
    assert (chunks.DEFAULT_ROWS, chunks.CPU_BYTES, chunks.AS_FAST) == (4096, 256 << 20, 1.03)
    asked = {("docs/how-to/memory.md", "520MiB"), ("docs/commands/plan.md", "520MiB")}  # --budget
    assert found == asked | {("docs/how-to/memory.md", figure) for figure in formula}


def test_the_picture_of_memory_is_the_planners():
    with Image.open(memory.picture()) as shown:
        assert shown.text["Description"] == memory.fingerprint(), "run `python -m bench report`"


def test_the_picture_of_memory_has_the_records(tmp_path, monkeypatch):
    """Some by hand; a drawing of them comes out, in a file of its own."""
    from bench.shown import frontier

    points = memory.measured()
    found = {
        (kept, p.who, round(p.gib, 2), round(p.ms, 1)) for kept in points for p in points[kept]
    }
    assert found >= {
        (1.0, "Liger", 0.06, 64.3),
        (1.0, "torch.compile", 1.96, 39.4),
        (1.0, memory.OURS, 1.99, 40.1),
        (1.0, memory.OURS_LATE, 3.91, 40.3),
        (0.25, memory.OURS, 0.06, 14.3),
    }
    assert not [p for p in points[1.0] if p.who == memory.OURS and p.ms < 30], "head frozen"
    assert not [p for p in points[0.25] if p.who == "torch.compile"], "it computes every row"
    monkeypatch.setattr(memory, "picture", lambda: tmp_path / "frontier.png")
    with Image.open(frontier.draw()) as drawn:
        assert drawn.text["Description"] == memory.fingerprint()


def test_resident_rows_are_the_launch_table():
    prose = " ".join((ROOT / "docs" / "explain" / "cost.md").read_text().split())
    block = gpu_tables.spaced(launch_table.ONE_BLOCK[-1].columns)
    first = gpu_tables.spaced(launch_table.CLUSTERS_FROM)
    last = gpu_tables.spaced(max(line.columns for line in launch_table.CLUSTERS))
    assert f"rows of up to {block} columns" in prose
    assert f"from {first} to {last} columns" in prose


def test_what_is_counted_is_right_and_of_these_sources():
    counted = json.loads((RESULTS / "traffic.json").read_text())
    records = counted["records"]
    assert all(record["ok"] for record in records + counted["two_rows"])
    of_long = {(r["divergence"], r["V"]) for r in counted["two_rows"] if r["gradient"]}
    assert of_long >= {(kind, V) for kind in KINDS for V in (50_257, 151_936)}
    long = {32_000, 50_257, 128_256, 151_936, 248_320, 262_144}
    for form, wanted in (("resident", {1_000}), ("streaming", long), ("staying", long)):
        rows = [record for record in records if record["form"] == form]
        assert {record["V"] for record in rows} >= wanted
        for kept in (1.0, 0.25):  # one number speaks for all widths and dtypes
            asked = [record["asked"] for record in rows if record["kept"] == kept]
            assert max(asked) - min(asked) < 0.02
    loops = json.loads((RESULTS / "loops-sm_90-triton-3.6.0.json").read_text())
    assert loops["fingerprint"] == resources.fingerprint(), "run `python -m bench loops` (3.6.0)"
    compiled = json.loads((RESULTS / "resources.json").read_text())["records"]
    assert {r["target"] for r in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [r for r in compiled if r["broken"]]


def test_the_readmes_table_is_the_results_file():
    """Some cells by hand: names and sizes are those of the records, losses included."""
    _, _, records = gpu_tables.newest()[0]
    shown = [line for line in readme.worth("").splitlines() if "|" in line]
    lines = {line.split("|")[1].strip(): line for line in shown}
    names = [name.strip() for name in lines[""].split("|")[2:-1]]

    def cell(row, name):
        text = lines[row].split("|")[2:-1][names.index(name)].strip()
        return text and float(text.split(" to ")[0])

    def least(phase, name, key, **size):
        wanted = {"phase": phase, "name": name, **size}
        return min(r[key] for r in records if key in r and r.items() >= wanted.items())

    size = {"V": 128_256, "kept": 0.25}
    for column, name in (("sgp", "sgp"), ("PyTorch", "PyTorch, all rows"),
                         ("Liger", "Liger"), ("CCE", "cut-cross-entropy")):  # fmt: skip
        time, memory = (least("head", name, key, **size) for key in ("both_ms", "memory_bytes"))
        assert cell("head, a quarter kept: time, ms", column) == pytest.approx(time, rel=5e-3)
        assert cell("head, a quarter kept: extra memory, GiB", column) == round(memory / 2**30, 2)
    for column, name in (("sgp", "sgp, fused"), ("PyTorch", "PyTorch"), ("Liger", "Liger")):
        time = least("train", name, "ms", kept=0.25)
        row = "training step, a quarter kept: time, ms"
        assert cell(row, column) == pytest.approx(time, rel=5e-3)


def test_where_others_win_is_the_results_file():
    _, _, records = gpu_tables.newest()[0]
    times = {}
    for r in records:
        if r["phase"] == "calls" and "both_ms" in r:
            of_case = times.setdefault((r["V"], r["kept"]), {})
            of_case[r["name"]] = min(of_case.get(r["name"], float("inf")), r["both_ms"])
    assert len(times) >= 4
    for (V, kept), of_case in times.items():
        case = f"V = {V:,}".replace(",", " ") + (" and every" if kept == 1 else f" and {kept:.0%}")
        line = next((x for x in readme.slower("").splitlines() if case in x), "")
        for name in {"Liger", "quack", "torch.compile"} & set(of_case):
            assert (f"{name} {of_case[name]:.3g} ms" in line) == (of_case[name] < of_case["sgp"])


@pytest.mark.parametrize(
    ("file", "commit"),
    [
        ("nvidia-h100-80gb-hbm3", "bcac0b3"),
        ("nvidia-h200", "bcac0b3"),
        ("nvidia-h200-318fc76", "318fc76"),
    ],
)
def test_what_a_gpu_file_says_was_not_right_is_a_prototype(file, commit):
    """Or a phase that was ended at its limit."""
    head, records = gpu_tables.load(RESULTS / f"gpu-{file}-2026-11-27.jsonl")
    assert head["commit"] == commit
    assert not head["dry_run"]
    assert head["versions"]["triton"] == "3.6.0"
    for r in records:
        late = r.get("status", "").startswith("ended at its limit")
        assert r["ok"] is not False or late or r["name"].endswith("(prototype)")
        assert r["ok"] is not False or "ms" not in r


def test_a_detached_context_is_no_better_than_a_guess():
    _, found = page.newest("recall")
    last = {mode: curve[-1]["accuracy"] for mode, curve in found["curves"].items()}
    assert last["exact"] > 0.95
    assert last["detach"] < found["guessing"] + 0.03
