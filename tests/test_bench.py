"""The benchmarks measure what they say: right rivals, right bytes, no figure without a file."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_main
from bench import files, tables
from bench.against import cases, compare, machine, measure, right, rivals
from bench.against.cases import Case, Model
from bench.proof import predict, rival_traffic, traffic
from bench.shown import plots, report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
CPU = torch.device("cpu")
TINY = Model("tiny", 512, 64)
FORMS = ("logits", "linear", "log-probs", "linear log-probs", cases.OWN, cases.KL, cases.JSD)
COMPILED = "Liger, chunked"  # calls torch.compile itself


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    """On a CPU a benchmark runs PyTorch's operators."""
    monkeypatch.delenv("SGP_BACKEND", raising=False)


# -- cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [cases.gpu_cases(), cases.cpu_cases()], ids=["GPU", "CPU"])
def test_every_axis_is_there(every):
    names = [case.name for case in every]
    assert len(set(names)) == len(names), "a name is a case"
    assert {case.form for case in every} == set(FORMS)
    assert {case.model.V for case in every} >= {32_000, 128_256, 151_936, 248_320, 262_144}
    for form in ("logits", "linear"):
        assert {case.kept for case in every if case.form == form} == {0.05, 0.1, 0.25, 0.5, 1.0}
    assert {case.pattern for case in every} == {"prefix", "scattered"}
    if every == cases.gpu_cases():
        assert {case.dtype for case in every} == {"bfloat16", "float16", "float32"}
        assert {case.N for case in every} >= {2_048, 8_192, 16_384, 32_768, 65_536}


@pytest.mark.parametrize("pattern", ["prefix", "scattered"])
@pytest.mark.parametrize("kept", [1.0, 0.25, 0.1])
def test_a_problem_keeps_what_its_case_says(kept, pattern):
    case = Case("logits", TINY, 2_048, kept, "float32", pattern)
    problem = cases.make(case, CPU)
    scored = problem.labels != -100
    assert int(scored.sum()) == problem.rows.numel() == pytest.approx(case.M, abs=2)
    assert torch.equal(scored.nonzero()[:, 0], problem.rows)
    assert torch.equal(problem.labels[problem.rows], problem.target)
    first = scored[: cases.SEQUENCE]
    if kept < 1:
        assert bool((first.int().diff() >= 0).all()) == (pattern == "prefix")
    part = cases.make(case, CPU, rows=64)
    assert part.labels.numel() == 64
    assert kept == 1 or 0 < part.rows.numel() < 64, "both kinds of token are checked"
    again = cases.make(case, CPU)
    assert torch.equal(problem.logits, again.logits)


# -- rivals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rivals_that_run_here_are_right(form, dtype):
    case = Case(form, TINY, 128, 0.25, dtype)
    contestants = [
        r for r in rivals.rivals_of(form) if "compile" not in r.name and r.name != COMPILED
    ]
    found = measure.check(case, contestants, CPU)
    missing = {name for name, m in found.items() if m.status == "needs a GPU"}
    missing |= {name for name, m in found.items() if m.status.endswith("is not installed")}
    assert missing <= {"Liger", "cut-cross-entropy", "quack", "flash-linear-attention"}
    ran = {name: m for name, m in found.items() if name not in missing}
    assert {"sgp", rivals.BASELINE} <= set(ran)
    for name, m in ran.items():
        if (name, dtype) != ("TRL", "bfloat16"):  # it is what it is
            assert m.status == "ok", (name, m)
    assert ran["sgp"].gradient_error <= 1.5 * ran[rivals.BASELINE].gradient_error + 1e-6


def test_torch_compile_is_a_rival():
    case = Case("logits", TINY, 64, 0.5, "float32")
    (compiled,) = (r for r in rivals.rivals_of("logits") if "compile" in r.name)
    assert measure.check(case, [compiled], CPU)[compiled.name].status == "ok"


@pytest.mark.parametrize("form", ["logits", "linear", "log-probs"])
def test_what_torch_compile_is_given_is_right(form, monkeypatch):
    """Without compiling it."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rivals._compiled.cache_clear()
    (compiled,) = (r for r in rivals.rivals_of(form) if "compile" in r.name)
    found = measure.check(Case(form, TINY, 64, 0.5, "float32"), [compiled], CPU)
    rivals._compiled.cache_clear()
    assert found[compiled.name].status == "ok"


@pytest.mark.parametrize("form", [cases.KL, cases.JSD])
def test_what_liger_compiles_is_right(form, monkeypatch):
    """Without compiling it."""
    (chunked,) = (r for r in rivals.rivals_of(form) if r.name == COMPILED)
    if reason := chunked.missing(CPU):
        pytest.skip(reason)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = measure.check(Case(form, TINY, 64, 0.5, "float32"), [chunked], CPU)
    assert found[chunked.name].status == "ok"


def test_every_rival_is_named_once_a_form():
    for form in FORMS:
        names = [rival.name for rival in rivals.rivals_of(form)]
        assert len(set(names)) == len(names)
        assert names[0] == "sgp"
        assert rivals.BASELINE in names, "the honest baseline is always shown"
        assert set(names) <= set(plots.COLORS)


def test_who_is_wrong_fails_or_is_missing_is_shown_as_that(monkeypatch):
    def wrong(p):
        return 1.1 * rivals.pytorch(p)

    def broken(_):
        raise RuntimeError("no kernel image\nand a second line")

    def late(p):
        if p.labels.numel() > right.ROWS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rivals.pytorch(p)

    field = (
        rivals.Rival("wrong", "logits", wrong),
        rivals.Rival("broken", "logits", broken),
        rivals.Rival("late", "logits", late),
        rivals.Rival("absent", "logits", wrong, rivals.Package("nothing-here", "nothing_here")),
        rivals.Rival("right", "logits", rivals.pytorch),
    )
    monkeypatch.setattr(rivals, "RIVALS", field)
    bound, measured = measure.measure(Case("logits", TINY, 128, 0.5, "float32"), CPU, seconds=0.1)
    found = {m.rival: m for m in measured}
    assert bound > 0
    assert found["wrong"].status.startswith("wrong: error 1.0e-01")
    assert found["broken"].status == "fails: RuntimeError: no kernel image"
    assert found["late"].status == "out of memory"
    assert found["absent"].status == "nothing-here is not installed"
    assert found["right"].status == "ok"
    assert found["right"].turns >= measure.FEWEST
    assert [m.both_ms is None for m in measured] == [True, True, True, True, False]


@pytest.mark.parametrize("form", ["logits", "linear", cases.KL, cases.JSD])
def test_samples_at_full_size_see_what_a_few_rows_do_not(form):
    """The formula is PyTorch's; one row of one gradient, or the loss, is enough to be wrong."""
    case = Case(form, TINY, 2_048, 0.5, "float32")
    problem = cases.make(case, CPU)
    sample = right.sample(problem)
    found = right.truth(problem)
    assert sample.errors(found).worst < 1e-5
    for number in range(len(found)):
        broken = [x.clone() for x in found]
        broken[number].view(-1)[-3:] += 0.1  # the last row, or the loss
        if number == 0:
            assert sample.errors(broken).worst > 1e-3
        else:
            assert sample.errors(broken).gradient > 1e-3


def test_a_rival_that_is_wrong_in_a_later_chunk_is_not_timed(monkeypatch):
    def first_rows_only(p):
        kept = p.rows[: right.ROWS]
        return rivals.F.cross_entropy(p.logits[kept], p.labels[kept])

    monkeypatch.setattr(rivals, "RIVALS", (rivals.Rival("short", "logits", first_rows_only),))
    case = Case("logits", TINY, 512, 1.0, "float32")
    _, (short,) = measure.measure(case, CPU, seconds=0.1)
    assert short.status.startswith("wrong: error")
    assert short.status.endswith("at full size")
    assert short.both_ms is None


def test_who_overwrites_leaves_the_others_their_logits():
    problem = cases.make(Case("logits", TINY, 64, 0.5, "float32"), CPU)
    before = problem.logits.detach().clone()
    (in_place,) = (r for r in rivals.rivals_of("logits") if r.name == "sgp, in place")
    assert in_place.overwrites
    found = measure.run(in_place, problem)
    assert torch.equal(problem.logits, before)
    assert right.errors(found, right.truth(problem)).worst < 1e-6


def test_memory_is_what_is_held_beyond_inputs_and_returned_gradients():
    case = Case("logits", TINY, 1_024, 0.5, "float32")
    problem = cases.make(case, CPU)
    unit = problem.logits.nbytes
    held = {
        r.name: measure.memory(r, problem) / unit
        for r in rivals.rivals_of("logits")
        if r.missing(CPU) is None and "compile" not in r.name
    }
    assert held["sgp, in place"] < 0.6, "the kept rows, at most"
    assert held["sgp"] == pytest.approx(held["sgp, in place"] + 1, abs=0.1), "and the gradient"
    assert held["PyTorch, all rows"] >= 2, "log-softmax and gradient"


# -- numbers ---------------------------------------------------------------------------------------


def test_compulsory_bytes_and_flops():
    model = Model("m", 1_000, 10)
    assert measure.compulsory_bytes(Case("logits", model, 100, 0.25)) == 1.25 * 100 * 1_000 * 2
    assert measure.compulsory_bytes(Case("log-probs", model, 100, 0.25, "float32")) == 6e5
    assert Case("linear", model, 100, 0.25).flops == 25 * 1_000 * (8 + 6 * 10)
    assert Case("linear log-probs", model, 100, 0.25).flops == 25 * 1_000 * (8 + 6 * 10)
    assert Case(cases.JSD, model, 100, 0.25).flops == 25 * 1_000 * (16 + 8 * 10)


def test_predictions_by_hand():
    gpu = predict.Gpu("g", "g", bandwidth=1e12, half=1e14, single=1e13, source="none")
    logits = predict.predict(Case("logits", cases.QWEN_3, 8_192, 0.25), gpu)
    moved = 1.25 * 8_192 * 151_936 * 2
    assert logits.total_ms == pytest.approx(1e3 * moved / 0.9e12 + 0.005)
    assert logits.reread_ms == pytest.approx(1e3 * moved * 1.5 / 1.25 / 0.9e12 + 0.005)
    linear = predict.predict(Case("linear", cases.QWEN_3, 8_192, 0.25), gpu)
    flops = 6 * 2_048 * 151_936 * 4_096
    assert linear.flops_ms == pytest.approx(1e3 * flops / 0.75e14)
    assert linear.bytes_ms == pytest.approx(1e3 * 6 * 2_048 * 151_936 / 0.9e12)
    whole = predict.predict(Case("linear", cases.QWEN_3, 8_192, 1.0), gpu)
    assert whole.bytes == pytest.approx(4 * linear.bytes), "the gradient is kept, nothing summed"
    large = predict.predict(Case("linear", cases.QWEN_3, 32_768, 1.0), gpu)
    extra = large.bytes - 16 * linear.bytes
    assert extra == pytest.approx(8 * 7 * 151_936 * 4_096), "eight groups into one sum"
    late = predict.predict(Case("linear log-probs", cases.QWEN_3, 8_192, 1.0), gpu)
    kernels = (2 * 4 + 2) * 8_192 * 151_936
    assert (late.bytes - kernels) % (8 * 8_192 * 4_096) == 0, "slices add to the input's gradient"


def test_float16_is_predicted_as_its_gradient_is_made():
    """In backward, with the factor known: the kept rows are read twice; the head accumulates."""
    gpu = predict.Gpu("g", "g", bandwidth=1e12, half=1e14, single=1e13, source="none")
    logits = predict.predict(Case("logits", cases.QWEN_3, 8_192, 0.25, "float16"), gpu)
    assert logits.bytes == 1.5 * 8_192 * 151_936 * 2
    assert logits.total_ms == logits.reread_ms == pytest.approx(logits.bytes_ms + 2 * 0.005)
    half, bf16 = (
        predict.predict(Case("linear", cases.QWEN_3, 8_192, 0.25, dtype), gpu)
        for dtype in ("float16", "bfloat16")
    )
    assert half.bytes - bf16.bytes == 8 * 151_936 * 4_096


def test_predict_shows_what_was_measured(tmp_path, monkeypatch, capsys):
    newest = files.newest
    monkeypatch.setattr(files, "newest", lambda: newest(tmp_path))
    monkeypatch.setattr(sys, "argv", ["predict", "--gpu", "h200", "--only", "log-probs, Qwen3"])
    assert predict.main() == 0
    assert "there is no results file of this GPU" in " ".join(capsys.readouterr().out.split())
    case = next(c for c in cases.gpu_cases() if c.form == "log-probs")
    found = compare.record(case, 1.0, [measure.Measured("sgp", "ok", both_ms=12.34)])
    machine_of = {"name": "NVIDIA H200", "device": "cuda"}
    content = {"machine": machine_of, "cases": [found], "roofs": {}, "date": "2027-01-01"}
    (tmp_path / "nvidia-h200-2027-01-01.json").write_text(json.dumps(content))
    assert predict.main() == 0
    shown = capsys.readouterr().out
    assert "12.34" in shown
    assert "nvidia-h200-2027-01-01.json" in shown


@pytest.mark.parametrize(
    ("name", "task", "asked"),
    [
        ("sgp", "loss", (3.0, 1.5)),
        ("Liger", "loss", (3.0, 1.5)),
        ("flash-linear-attention", "loss", (3.0, 3.0)),
        ("sgp", "log-probs", (3.0, 1.5)),
        ("TRL", "log-probs", (3.0, 1.5)),
        # Of kept rows alone; the operators around Liger's kernel are not seen.
        *((name, "forward_kl", (5.0, 1.25)) for name in ("sgp", "TRL")),
        *((name, "jsd", (7.0, 1.75)) for name in ("sgp", "TRL")),
        ("Liger", "jsd", (4.0, 1.0)),
    ],
)
def test_what_row_kernels_ask_of_memory(name, task, asked, monkeypatch):
    """Those of other libraries are facts of the versions that are installed."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    (contestant,) = (c for c in rival_traffic.CONTESTANTS if (c.name, c.task) == (name, task))
    if contestant.package.version is None:
        pytest.skip(f"{contestant.package.distribution} is not installed")
    for kept_rows, expected in zip(rival_traffic.KEPT_ROWS, asked, strict=True):
        found = rival_traffic.count(contestant, 8_200, kept_rows)
        assert found.status == "ok"
        assert found.asked == pytest.approx(expected, abs=0.01)


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cases(monkeypatch):
    """Two small cases instead of the machine's."""
    found = [Case(form, TINY, 128, 0.25, "float32") for form in ("logits", "linear")]
    monkeypatch.setattr(cases, "cpu_cases", lambda: found)
    names = ["sgp", rivals.BASELINE, "Liger"]
    command = ["compare", "--time-budget", "900", "--rivals", *names]
    monkeypatch.setattr(compare, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(machine, "roofs", lambda _: machine.Roofs(1e10, 1e11, "float32"))
    return found


def test_compare_writes_what_it_shows(tiny_cases, tmp_path, capsys, monkeypatch):
    output = tmp_path / "2-cores-2027-01-01.json"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--output", str(output)])
    assert compare.main() == 0
    content = json.loads(output.read_text())
    assert [record["name"] for record in content["cases"]] == [case.name for case in tiny_cases]
    assert content["not_run"] == []
    assert content["versions"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    for record in content["cases"]:
        assert record["bound_ms"] > 0
        ours, plain, liger = record["rivals"]
        assert ours["both_ms"] > 0
        assert plain["both_ms"] > 0
        assert liger["both_ms"] is None
        assert liger["status"] in shown
        assert f"{tables.ms(ours['both_ms'])} ±" in shown
    block = report.render([(output, content)], tmp_path)
    assert "not measured" in block
    assert f"| {tables.ms(content['cases'][0]['rivals'][0]['both_ms'])} ms |" in block
    assert "Not in the table: Liger: " in block
    pictures = plots.draw(content, tmp_path / "2-cores-2027-01-01")
    assert [picture.exists() for picture in pictures] == [True]


def test_compare_names_the_cases_that_it_had_no_time_for(tiny_cases, tmp_path, capsys, monkeypatch):
    output = tmp_path / "r.json"
    command = [*sys.argv, "--output", str(output)]
    command[command.index("900")] = "-1"
    monkeypatch.setattr(sys, "argv", command)
    assert compare.main() == 0
    assert json.loads(output.read_text())["not_run"] == [case.name for case in tiny_cases]
    assert "not run, the time budget was spent" in capsys.readouterr().out


def test_compare_asks_before_it_measures(tiny_cases, tmp_path, capsys, monkeypatch):
    assert tiny_cases
    monkeypatch.setattr(measure, "measure", None)  # to call it fails
    (tmp_path / "file").write_text("")
    for words, expected in (
        (["--output", str(tmp_path / "file" / "r.json")], "results file .*r.json: .*--output"),
        (["--output", str(tmp_path)], "results file .*: Is a directory"),
        (["--rivals", "Ligr"], "'Ligr': nobody has this name; known are .*'Liger'"),
        (["--rivals", "sgp", "--continue"], "without --rivals"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        assert re.search(expected, f"{stopped.value.code} {capsys.readouterr().err}")


@pytest.mark.parametrize("words", [["--only", "logits"], ["--rivals", "sgp"]], ids=str)
def test_a_part_does_not_take_the_place_of_the_results(
    words, tiny_cases, tmp_path, capsys, monkeypatch
):
    assert tiny_cases
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    assert compare.main() == 0
    assert "logits, tiny" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_who_interrupts_compare_keeps_what_is_done(tiny_cases, tmp_path, capsys, monkeypatch):
    output = tmp_path / "r.json"
    command = [*sys.argv, "--output", str(output)]
    measured = measure.measure

    def interrupted(case, *positional, **named):
        if case == tiny_cases[1]:
            raise KeyboardInterrupt
        return measured(case, *positional, **named)

    monkeypatch.setattr(measure, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", command)
    assert compare.main() == 130
    assert "interrupted" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert [record["name"] for record in content["cases"]] == [tiny_cases[0].name]
    assert content["not_run"] == [tiny_cases[1].name]
    monkeypatch.setattr(measure, "measure", measured)
    command = ["compare", "--continue", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    assert compare.main() == 0
    content = json.loads(output.read_text())
    assert [record["name"] for record in content["cases"]] == [case.name for case in tiny_cases]
    assert content["not_run"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_compare_fails_if_sgp_is_wrong(tiny_cases, tmp_path, capsys, monkeypatch):
    assert tiny_cases

    def wrong(p):
        return 2 * rivals.pytorch(p)

    field = (rivals.Rival("sgp", "logits", wrong), rivals.Rival("sgp", "linear", wrong))
    monkeypatch.setattr(rivals, "RIVALS", field)
    monkeypatch.setattr(sys, "argv", ["compare", "--output", str(tmp_path / "r.json")])
    assert compare.main() == 1
    assert "sgp: " in capsys.readouterr().out


def test_each_results_file_is_whole_and_has_its_pictures():
    for path, content in files.newest():
        for name in ("linear", "logits", "roofline"):
            assert (path.parent / f"{path.stem}-{name}.png").is_file()
        assert content["not_run"] == []
        assert all(r["status"] == "ok" for c in content["cases"] for r in c["rivals"][:1])


def test_the_traffic_command_holds_its_budgets(tmp_path):
    output = tmp_path / "traffic.json"
    command = [sys.executable, "-m", "bench", "traffic", "--quick", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(output.read_text())
    committed = json.loads((RESULTS / "traffic.json").read_text())
    quick = [r for r in committed["records"] if r["V"] < traffic.QUICK or r["kept"] == 0.25]
    assert found["records"] == quick, "counted, not measured"
    assert found["probabilities"] == committed["probabilities"], "counted, not measured"
    pairs = [p for p in committed["two_rows"] if p["V"] < traffic.QUICK or p in found["two_rows"]]
    assert found["two_rows"] == pairs, "counted, not measured"
    assert {p["V"] for p in pairs} == {V for V, _ in traffic.TWO_ROWS}
    known = {(c["name"], c["version"]) for c in committed["rivals"]}
    of_known = [c for c in found["rivals"] if (c["name"], c["version"]) in known]
    assert of_known == [c for c in committed["rivals"] if c in of_known]
    fine = traffic.Count(
        "resident", 8_192, "bf16", 0.25, asked=1.25, touched=1.25, least=1.25, other_bytes_per_row=9
    )
    assert fine.within_budget
    assert not fine._replace(asked=1.5).within_budget
    assert not fine._replace(touched=1.3).within_budget
    assert fine._replace(form="streaming", asked=1.5).within_budget
    pair = traffic.Compared(
        "jsd", 8_192, "bf16", 0.25, gradient=True, asked=2.5, touched=1.5, least=1.5,
        other_bytes_per_row=9,
    )  # fmt: skip
    assert pair.within_budget
    assert not pair._replace(divergence="forward_kl").within_budget, "twice, not three times"
    assert not pair._replace(gradient=False).within_budget
    assert pair._replace(divergence="reverse_kl", asked=2.0).within_budget


def test_pytest_benchmark_collects_the_same_cases(tmp_path):
    """`pytest bench`: one small case is run, JSON written."""
    output = tmp_path / "b.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:xdist"]
    command += ["-k", "logits and N64 and V32000 and (sgp or Liger)"]
    command += ["--benchmark-json", str(output)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_I"))}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(output.read_text())["benchmarks"]
    assert {b["extra_info"]["rival"] for b in found} == {"sgp", "sgp, in place", "sgp, kept rows"}
    assert "1 skipped" in run.stdout or torch.cuda.is_available()


def test_the_machine_may_have_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    found = machine.versions()
    assert found["triton"] is None
    assert found["torch"] == torch.__version__


@pytest.mark.parametrize("module", ["shown.report", "studies.recall"])
def test_without_matplotlib_nothing_is_begun(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", [module])
    found = importlib.import_module(f"bench.{module}")
    with pytest.raises(SystemExit, match=r"matplotlib .* pip install"):
        found.main()
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.main() == 0


@pytest.mark.parametrize("name", [*bench_main.COMMANDS, "all"])
def test_help_is_help(name, monkeypatch, capsys):
    """And begins nothing; the lines of an example are lines."""
    monkeypatch.setattr(sys, "argv", ["bench", name, "--help"])
    with pytest.raises(SystemExit) as caught:
        bench_main.main()
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m bench {name}")
    assert name == "all" or re.search(rf"^    python -m bench {name}", shown, re.MULTILINE)


def test_the_command_lists_what_there_is():
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for command in ("all", *bench_main.COMMANDS):
        assert f"  {command} " in run.stdout


def test_ctrl_c_in_all_is_the_running_commands(monkeypatch):
    """It ends with what it has and 130, is not killed on the way, and nothing comes after it."""
    code = (
        "import os, signal, sys\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "sys.exit(130 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 3)\n"
    )
    ended = []
    run, handler = bench_main._run, signal.getsignal(signal.SIGINT)

    def pressed(command):
        assert command
        ended.append(run([sys.executable, "-c", code]))
        return ended[-1]

    monkeypatch.setattr(bench_main, "_run", pressed)
    monkeypatch.setattr(sys, "argv", ["bench", "all"])
    with pytest.raises(SystemExit) as caught:
        bench_main.main()
    assert caught.value.code == 130
    assert ended == [130], "waited for, and the last one"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_a_command_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_main.importlib, "import_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["bench", "compare"])
    with pytest.raises(SystemExit) as caught:
        bench_main.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "python -m bench compare: interrupted\n"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_all_fits_ten_minutes(on_gpu, monkeypatch):
    """A GPU gets its own command, whose limits are eight minutes together."""
    begun = []

    def record(command, **_):
        begun.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(sys, "argv", ["all"])
    assert bench_main.everything() == 0
    names = [words[1] for words in begun]
    assert names == (["gpu"] if on_gpu else ["compare", "traffic", "resources"]) + [
        "predict",
        "report",
    ]
