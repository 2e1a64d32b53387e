"""The README does what it says: its examples, its two set-up lines, its figures."""

import doctest
import json
import re
from pathlib import Path

import pytest

from bench.gpu import tables as gpu_tables
from bench.proof import resources
from bench.shown import page, report
from sgp.head import chunks
from sgp.kernels import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())
RESULTS = ROOT / "bench" / "results"


def test_examples_print_what_they_show():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_results_that_are_linked_exist():
    linked = re.findall(r"\((bench/results/[^)]+)\)", README)
    assert len(linked) >= 3
    for path in linked:
        assert (ROOT / path).is_file(), path


def test_traffic_table_is_the_results_file():
    records = json.loads((RESULTS / "traffic.json").read_text())["records"]
    assert all(record["ok"] for record in records)
    long = {32_000, 50_257, 128_256, 151_936, 248_320, 262_144}
    for label, forms, wanted in (
        ("resident", ("resident",), {1_000}),
        ("streaming", ("streaming", "staying"), long),
    ):
        rows = [record for record in records if record["form"] in forms]
        for form in forms:
            assert {record["V"] for record in rows if record["form"] == form} >= wanted
        line = next(line for line in README.splitlines() if line.startswith(f"| {label} "))
        shown = [float(cell) for cell in line.split("|")[2:-1]]
        for f, touched, asked in ((1.0, shown[0], shown[2]), (0.25, shown[1], shown[3])):
            for record in rows:
                if record["kept"] == f:
                    assert record["touched"] == pytest.approx(touched, abs=0.01)
                    assert record["asked"] == pytest.approx(asked, abs=0.01)


def test_rivals_in_the_traffic_table_are_the_results_file():
    found = json.loads((RESULTS / "traffic.json").read_text())["rivals"]
    for name in ("Liger", "flash-linear-attention"):
        rows = [r for r in found if r["name"] == name]
        (line,) = (s for s in README.splitlines() if s.startswith(f"| {name} {rows[0]['version']}"))
        shown = [float(cell) for cell in line.split("|")[4:-1]]
        for row in rows:
            assert row["asked"] == pytest.approx(shown[0 if row["kept"] == 1 else 1], abs=0.01)


def test_resident_rows_are_the_launch_table():
    def shown(columns):
        return f"{columns:_}".replace("_", " ")

    assert f"rows of up to {shown(table.ONE_BLOCK[-1].columns)} columns" in PROSE
    longest = max(line.columns for line in table.CLUSTERS)
    assert f"from {shown(table.CLUSTERS_FROM)} to {shown(longest)} columns" in PROSE


def test_loops_table_is_the_results_files():
    now, before = "loops-sm_90-triton-3.6.0.json", "loops-sm_90-triton-3.6.0-bcac0b3.json"
    content = json.loads((RESULTS / now).read_text())
    assert content["fingerprint"] == resources.fingerprint(), "run `python -m bench loops` (3.6.0)"
    liger = f"Liger's kernel, {content['liger']}"
    for label, file, kernel in (
        ("sgp", now, "sgp, streaming"),
        ("sgp before", before, "sgp at bcac0b3"),
        (liger, now, "Liger"),
    ):
        records = json.loads((RESULTS / file).read_text())["records"]
        (row,) = (
            r for r in records if (r["kernel"], r["V"], r["data"]) == (kernel, 151_936, "bf16")
        )
        shown = README[README.index("| kernel | first loop |") :].splitlines()
        line = next(x for x in shown if re.match(rf"\| {label}( \(.*\))? \|", x))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == [f"{row['first']:.2f}", f"{row['second']:.2f}", str(row["meetings"])]


def test_train_table_is_the_results_file():
    found = json.loads((RESULTS / "train-2-cores-2026-11-23.json").read_text())
    rows = {row["name"]: row for row in found["head"]["rows"]}
    first = rows["PyTorch, all rows"]
    for label, name in (
        ("PyTorch, all rows", "PyTorch, all rows"),
        ("PyTorch, kept rows gathered by hand", "PyTorch, kept rows"),
        ("sgp, kept rows", "sgp, kept rows"),
        ("sgp, linear head", "sgp, linear head"),
    ):
        table = README[README.index("| head | gradient error |") :]
        line = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        row = rows[name]
        assert cells == [
            f"{row['gradient_error']:.0e}".replace("e-0", "e-"),
            f"{1e3 * row['seconds']:.0f} ms",
            f"{row['seconds'] / first['seconds']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
            f"{row['peak_bytes'] / first['peak_bytes']:.2f}",
        ]
    largest = f"{found['losses']['largest_difference']:.1e}".replace("e-0", "e-")
    assert f"differ by {largest} nats" in PROSE
    before, after = found["held_out"]["before"]["sgp"], found["held_out"]["after"]["sgp"]
    assert f"{before:.2f} to {after:.2f}" in PROSE
    assert f"{found['seconds']:.0f} s on 2 CPU cores" in PROSE


def test_no_time_or_size_without_a_source():
    """What is not in a block or table that a test compares with a results file is a formula's."""
    text = README.replace(report.block_of(README), "")
    train = text[text.index("`sgp train` compares the heads") : text.index("## Measure it")]
    train += text[text.index("## sgp train") : text.index("## Check it yourself")]
    found = re.findall(r"\d[\d.]*\s?(?:ms|s|MiB|GiB|GB/s|TB/s|TFLOP/s|%)(?=\W)", text)
    checked = re.findall(r"\d[\d.]*\s?(?:ms|s|MiB|GiB|GB/s|TB/s|TFLOP/s|%)(?=\W)", train)
    for figure in checked:
        found.remove(figure)
    sizes = {"4 GiB": chunks.GPU_BYTES, "256 MiB": chunks.CPU_BYTES}
    assert sizes == {"4 GiB": 4 << 30, "256 MiB": 256 << 20}
    V, D = 151_936, 4_096
    rows = chunks.default_chunk_rows(V, "cuda")
    logits, accumulator = 4 * rows * V / 2**30, 4 * V * D / 2**30
    assert f"the formula says {logits:.1f} + {accumulator:.1f} GiB" in PROSE
    assert sorted(found) == sorted([*sizes, f"{accumulator:.1f} GiB"])


def records_of(card):
    return gpu_tables.load(RESULTS / f"gpu-{card}-2026-11-27.jsonl")


def test_the_summary_of_a_gpu_is_the_results_file():
    """Each of some cells, by hand: names and sizes are those of the records, losses included."""
    head, records = records_of("nvidia-h100-80gb-hbm3")
    text = report.block_of(README).partition("**On 2 CPU cores")[0]
    (_, newest, _), *_ = gpu_tables.newest()
    assert f"commit {newest['commit']}" in text
    assert "the kernels of later commits were not measured" in head["note"]
    table = gpu_tables.summary(records).splitlines()
    lines = {line.split("|")[1].strip(): line for line in table}
    names = [name.strip() for name in lines[""].split("|")[2:-1]]

    def cell(row, name):
        return lines[row].split("|")[2:-1][names.index(name)].strip()

    def one(phase, name, key, **size):
        found = [r[key] for r in records if key in r and r["phase"] == phase and r["name"] == name
                 and all(r.get(k) == v for k, v in size.items())]  # fmt: skip
        return sorted(found)

    size = {"V": 151_936, "data": "bf16", "kept": 1.0}
    row = "row kernel, V = 151 936: of a copy"
    for name in ("sgp", "Liger", "quack"):
        (share,) = one("rows", name, "of_copy", **size)
        assert cell(row, name) == f"{100 * share:.0f} %"
    best = max(one("sweep", "lanes (prototype)", "of_copy", **size))
    assert cell(row, "prototype") == f"{100 * best:.0f} %"
    first, *_, last = one("calls", "sgp", "both_ms", V=32_000, kept=1.0)
    assert cell("forward and backward, V = 32 000: ms", "sgp") == f"{first:.3g} to {last:.3g}"
    (memory,) = one("head", "cut-cross-entropy", "memory_bytes", V=128_256, kept=0.25)
    assert cell("head, V = 128 256, f = 0.25: extra GiB", "CCE") == f"{memory / 2**30:.2f}"
    (stock,) = one("train", "PyTorch", "ms", kept=1.0)
    assert cell("training step, Qwen2: ms", "PyTorch") == f"{stock:.0f}"


@pytest.mark.parametrize("card", ["nvidia-h100-80gb-hbm3", "nvidia-h200"])
def test_what_a_gpu_file_says_was_not_right_is_a_prototype(card):
    head, records = records_of(card)
    assert head["commit"] == "bcac0b3"
    assert not head["dry_run"]
    assert head["versions"]["triton"] == "3.6.0"
    for r in records:
        assert r["ok"] is not False or (r["name"].endswith("(prototype)") and "ms" not in r)


def test_no_figure_of_the_gpu_page_stands_outside_its_tables():
    text = page.GPU.read_text()
    before, _, rest = text.partition("<!-- gpu: begin -->")
    prose = before + rest.partition("<!-- gpu: end -->")[2]
    units = r"\d[\d.]*\s?(?:ms|us|s|MiB|GiB|GB/s|TB/s|TFLOP/s|%)(?=\W)"
    assert re.findall(units, prose) == []
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.GPU.parent / target).is_file(), target


def test_no_kernel_in_the_results_breaks_its_budget():
    records = json.loads((RESULTS / "resources.json").read_text())["records"]
    assert {r["target"] for r in records} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [record for record in records if record["broken"]]


def test_the_page_of_selective_gradients_is_the_results_files():
    for path in page.PAGES:
        text = path.read_text()
        assert page.filled(text) == text, "run `python -m bench report`"
    text = page.PAGE.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.PAGE.parent / target).is_file(), target
    _, found = page.newest("recall")
    last = {mode: curve[-1]["accuracy"] for mode, curve in found["curves"].items()}
    assert last["exact"] > 0.95
    assert last["detach"] < found["guessing"] + 0.03, "no better than a guess"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """And makes the picture."""
    code = page.PAGE.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102  (our own page)
    assert (tmp_path / "square-this-number.png").is_file()
