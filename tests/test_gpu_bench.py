"""`python -m bench gpu` without a GPU: every phase, tiny; crashes, limits, what is not right."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import files
from bench.against import measure, right, rivals
from bench.against.cases import Case, Model
from bench.gpu import gpu, lines
from bench.gpu import phases as gpu_phases
from bench.gpu import tables as gpu_tables
from bench.gpu.order import PHASES
from bench.gpu.phases import Phase
from sgp.kernels import launch, table
from sgp.kernels.table import Line, Target

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
H100 = Target("cuda", 90, 132, (3, 9))
A100 = Target("cuda", 80, 108, (3, 9))
HEAD = {
    "machine": {"name": "a GPU"}, "date": "2026-01-01", "commit": "abc", "versions": {},
    "sgp": {}, "dry_run": True,
}  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def begin(path):
    path.write_text(json.dumps(HEAD) + "\n")
    return path


# -- phases ----------------------------------------------------------------------------------------


def test_the_limits_of_all_phases_are_eight_minutes():
    assert sum(plan.seconds for plan in PHASES.values()) <= 8 * 60


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_runs_dry(name, tmp_path, monkeypatch):
    """What the process of a phase does, in this one: tests run the kernels interpreted anyway."""
    monkeypatch.setenv("SGP_BACKEND", "auto")
    path = begin(tmp_path / "r.jsonl")
    PHASES[name].run(Phase(name, path, seconds=200, dry=True))
    records = read(path)[1:]
    assert {r["phase"] for r in records} == {name}
    assert not [r for r in records if r["ok"] is False]
    assert [r for r in records if r["ok"]], "something was checked"
    shown = gpu_tables.tables_of(records)
    assert all(len(row) == len(t.left + t.right) for t in shown for row in t.rows)
    others = {row[1] for row in gpu_tables.others(records).rows}
    assert "sgp" not in others
    if name == "host":
        first = [r["name"].startswith(gpu_phases.QUICK_TO_START) for r in records]
        assert first == sorted(first, reverse=True)
        assert not all(first)
    if name in ("rows", "sweep"):
        timed = [r for r in records if "ms" in r]
        assert {r["data"] for r in timed} == {"bf16", "head"}
        assert all(r["of_copy"] > 0 and r["status"] == "ok" for r in timed)


def test_the_command_runs_dry_from_the_shell(tmp_path):
    """One phase, in its own process, from another folder, without the package installed."""
    path = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--only", "env"]
    command += ["--seconds", "300"]  # its own limit is a GPU's, and this machine may be busy
    outside = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SGP_BACKEND")}
    found = subprocess.run(
        [*command, "--output", str(path)], cwd=tmp_path, capture_output=True, text=True,
        env=outside | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    head, *records = read(path)
    assert head["dry_run"]
    assert head["versions"]["torch"] == torch.__version__
    assert [r["name"] for r in records] == ["machine", "roofs", gpu.END]
    assert "0 not right" in found.stdout


# -- the processes ---------------------------------------------------------------------------------

STAND_INS = {
    "env": "write('first', True)",
    "smoke": "write('first', True); import os; os.abort()",
    "rows": "write('first', True); import time; time.sleep(600)",
    "sweep": "write('first', False); raise RuntimeError('a last line')",
    "calls": "write('first', True); write('second', None)",
}


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Phases that do something quick, and are counted."""
    begun = []

    def command(name, path, **_):
        begun.append(name)
        write = (
            "import json\ndef write(name, ok):\n    line = json.dumps({'phase': %r, 'name': name,"
        )
        write += " 'ok': ok})\n    with open(%r, 'a') as file: file.write(line + '\\n')\n"
        return [sys.executable, "-c", write % (name, str(path)) + STAND_INS[name]]

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu, "header", lambda **_: HEAD)
    limits = {
        name: PHASES[name]._replace(seconds=1.5 if name == "rows" else 20) for name in STAND_INS
    }
    monkeypatch.setattr(gpu, "PHASES", limits)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--output", str(tmp_path / "r.jsonl")])
    return begun


def test_a_phase_that_crashes_or_hangs_is_recorded_and_the_next_goes_on(stand_ins, tmp_path, capfd):
    start = time.monotonic()
    assert gpu.main() == 1
    assert time.monotonic() - start < 15
    assert stand_ins == list(STAND_INS)
    _, *records = read(tmp_path / "r.jsonl")
    ends = {r["phase"]: r for r in records if r["name"] == gpu.END}
    assert {name: r["status"] for name, r in ends.items()} == {
        "env": "ok",
        "smoke": f"ended by {signal.SIGABRT.name}",
        "rows": "ended at its limit of 1.5 s",
        "sweep": "exit code 1",
        "calls": "ok",
    }
    assert ends["sweep"]["errors"] == "RuntimeError: a last line"
    assert len([r for r in records if r["name"] == "first"]) == 5, "what was written stays"
    shown = capfd.readouterr().out
    assert "4 not right" in shown, "three phases, and one record"
    assert "NOT RIGHT sweep    first" in shown


def test_only_what_did_not_end_well_is_run_again(stand_ins, tmp_path, monkeypatch, capsys):
    assert gpu.main() == 1
    path = tmp_path / "r.jsonl"
    with path.open("a") as file:
        file.write('{"phase": "calls", "na')  # cut off
    stand_ins.clear()
    monkeypatch.setitem(STAND_INS, "smoke", "write('first', True)")
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--resume", str(path)])
    assert gpu.main() == 1
    assert stand_ins == ["smoke", "rows", "sweep"]
    _, records = gpu_tables.load(path)
    ends = [r["phase"] for r in records if r["name"] == gpu.END]
    assert sorted(ends) == sorted(STAND_INS), "no phase twice"
    monkeypatch.setattr(gpu, "header", lambda **_: HEAD | {"commit": "another"})
    with pytest.raises(SystemExit, match="commit was abc, is another"):
        gpu.main()
    path.write_text("{}\n{}\n")
    with pytest.raises(SystemExit, match=r"--resume .*first line is no header"):
        gpu.main()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "heads"], "--only 'heads': there is no such phase; there are env, smoke"),
        (["--cubins", "nowhere", "--dry-run"], "--cubins nowhere: no such folder"),
        (["--resume", "a", "--output", "b", "--dry-run"], "--resume adds to its own file"),
        (["--target", "sm_80", "--build", "x"], "invalid choice: 'sm_80'"),
        ([], "no GPU is visible; --dry-run tries every phase on a CPU, --build DIR"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(launch, "runs_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_file_is_asked_for_before_anything_is_begun(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"results file .*: Is a directory"):
        gpu.main()
    assert stand_ins == []


# -- what is not right -----------------------------------------------------------------------------


@pytest.fixture
def trial():
    problem = lines.problem(8, 96, "bf16", 0.5, "cpu")
    on = table.target_of(CPU)
    line = table.choose(lines.row_of(96, "bf16"), on, "auto")
    return lines.Trial(problem, interpreted=True), lines.runner(line, problem, on, "bf16")


def test_a_kernel_that_writes_nothing_or_a_nan_is_not_right(trial):
    """`max` loses a NaN in second place, and a NaN loss is no missing kernel."""
    known, run = trial
    assert known.check(run).ok
    nothing = known.check(lambda: None)
    assert nothing.status == "wrong: NaN, or not written, in the loss and the gradient"

    p = known.p
    run()
    good = p.loss.clone(), p.gradient.clone()

    def spoiled(change):
        def both():
            p.loss.copy_(good[0])
            p.gradient.copy_(good[1])
            change()

        return known.check(both)

    assert spoiled(lambda: None).ok
    everywhere = [(i, j) for i in range(8) for j in (0, 95)]
    for place in everywhere:
        found = spoiled(lambda at=place: p.gradient[at].fill_(torch.nan))
        assert "not written, in the gradient" in found.status, place
        assert not found.ok
    assert "in the loss" in spoiled(lambda: p.loss[7].fill_(torch.nan)).status
    assert "ignored rows" in spoiled(lambda: p.gradient[3, 5].fill_(1e-30)).status
    assert "error of the gradient" in spoiled(lambda: p.gradient.mul_(1.01)).status
    assert "error of the loss" in spoiled(lambda: p.loss.mul_(1.0001)).status


def test_what_is_not_right_is_never_timed(tmp_path, monkeypatch, capsys):
    path = begin(tmp_path / "r.jsonl")
    monkeypatch.setattr(lines, "runner", lambda *_: lambda: None)
    monkeypatch.setattr(Phase, "timed", None)  # to call it fails
    PHASES["sweep"].run(Phase("sweep", path, seconds=200, dry=True))
    found = [r for r in read(path)[1:] if r["name"] != "copy"]
    assert found
    assert all(r["ok"] is False and "ms" not in r for r in found)
    shown = capsys.readouterr().out
    assert shown.count("NOT RIGHT") == len(found)


@pytest.mark.parametrize("name", ["rows", "sweep"])
def test_a_launch_that_fails_is_guarded(name, tmp_path, monkeypatch):
    """The table's line fails: not right. Others may be impossible."""
    path = begin(tmp_path / "r.jsonl")
    runner, turns = lines.runner, []

    def first_fails(*arguments):
        turns.append(arguments[0])
        if len(turns) < 3:
            raise RuntimeError("PassManager::run failed")
        return runner(*arguments)

    monkeypatch.setattr(lines, "runner", first_fails)
    PHASES[name].run(Phase(name, path, seconds=200, dry=True))
    _, _, first, second, *rest = read(path)
    assert first["status"] == second["status"] == "fails: RuntimeError: PassManager::run failed"
    assert [first["ok"], second["ok"]] == [False, False if name == "rows" else None]
    assert any(r["ok"] for r in rest)


def test_a_rival_is_checked_with_nan_in_new_memory(monkeypatch):
    """What it does not write is seen; afterwards memory is as before."""

    def forgets(p):
        kept = torch.empty_like(p.logits)  # and the last row is never written
        kept[:-1] = p.logits[:-1]
        return rivals.F.cross_entropy(kept.float(), p.labels)

    monkeypatch.setattr(rivals, "RIVALS", (rivals.Rival("forgets", "logits", forgets),))
    case = Case("logits", Model("tiny", 64, 8), 32, 1.0, "float32")
    _, (found,) = measure.measure(case, CPU, seconds=0.1)
    assert found.status.startswith("wrong: error nan of the loss")
    assert found.both_ms is None
    assert not torch.are_deterministic_algorithms_enabled()
    with right.unwritten_is_nan():
        assert bool(torch.empty(3).isnan().all())


def test_sgp_is_held_to_the_error_of_pytorch():
    """What a library may have is too much for ours."""

    def one_percent(p):
        loss = rivals.pytorch(p)
        return loss + 0.01 * (loss - loss.detach())

    field = (
        rivals.Rival("sgp", "logits", one_percent, rivals.SGP),
        rivals.Rival("a library", "logits", one_percent),
    )
    case = Case("logits", Model("tiny", 64, 8), 32, 1.0, "bfloat16")
    found = measure.check(case, list(field), CPU)
    assert found["a library"].status == "ok"
    assert re.match(r"wrong: error \S+ of the gradient, 3.9e-03 is allowed", found["sgp"].status)


def test_a_nan_anywhere_in_a_large_gradient_is_seen():
    case = Case("linear", Model("tiny", 64, 8), 256, 0.5, "float32")
    problem = gpu_phases.cases.make(case, CPU)
    sample, found = right.sample(problem), right.truth(problem)
    assert sample.errors(found).worst < 1e-6
    for number in (1, 2):
        broken = [x.clone() for x in found]
        broken[number][37, 3] = torch.nan  # in no row that is compared
        assert sample.errors(broken).gradient != sample.errors(broken).gradient
    assert right.worst([1.0, float("nan"), 2.0]) != right.worst([1.0, float("nan"), 2.0])


def test_the_phase_ends_where_the_gpu_answers_nothing(tmp_path, monkeypatch):
    phase = Phase("smoke", begin(tmp_path / "r.jsonl"), seconds=9, dry=True)
    monkeypatch.setattr(gpu_phases.verify, "answers", lambda _: False)
    with pytest.raises(SystemExit, match="one: afterwards the GPU answers nothing; smoke ends"):
        phase.attempt("one", dict)


def test_a_late_phase_begins_nothing(tmp_path):
    phase = Phase("calls", begin(tmp_path / "r.jsonl"), seconds=-1, dry=True)
    phase.attempt("one", None, V=7)
    phase.compare(Case("logits", gpu_phases.TINY, 8, 1.0), ("sgp",), 1.0)
    found = read(phase.path)[1:]
    assert [r["status"] for r in found] == ["not run: the phase's time was spent"] * 2
    assert all(r["ok"] is None for r in found)


# -- lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", lines.DATA)
def test_candidates_begin_with_the_table_and_vary_streaming(data):
    for V in lines.VOCABULARIES:
        row = lines.row_of(V, data)
        field = lines.candidates(row, H100)
        assert field[0] == table.choose(row, H100)
        streamed = {line for line in field if line.form != "resident"}
        assert len(streamed) >= 6, "blocks, threads and programs a multiprocessor"
        assert len({line.threads for line in streamed}) >= 3
        assert len({line.per_multiprocessor for line in streamed}) >= 2
        assert all(line.BV_2 != line.BV for line in field), "or a line is there twice"
        resident = [line for line in field if line.form == "resident"]
        assert all(line.columns >= V for line in resident)
        assert len({lines.file_of(line, V, data) for line in field}) == len(field)
        assert any(line.stays for line in field)
        assert any(line.descends for line in field) or V < 100_000
        assert any(line.programs > 1 for line in field) == (data == "head")
    alone = lines.candidates(lines.row_of(151_936, data), A100)
    assert all(line.programs == 1 for line in alone)


@pytest.mark.parametrize(("V", "data"), [*gpu_phases.TRIALS, (96, "bf16"), (57, "fp32")])
def test_a_row_is_what_its_launch_finds(V, data):
    p = lines.problem(4, V, data, 1.0, "meta")
    options = launch.Options(scale=p.scale)
    found = launch._row(V, options, lines.matrix(p.logits), lines.matrix(p.gradient))
    assert lines.row_of(V, data) == found


def test_a_line_can_be_pasted():
    for line in lines.candidates(lines.row_of(151_936, "bf16"), H100):
        assert eval(lines.source(line), {"Line": Line}) == line  # noqa: S307
    assert lines.source(Line("streaming", 16_384, 512, per_multiprocessor=2)) == (
        "Line('streaming', 16384, 512, per_multiprocessor=2)"
    )


def test_the_fastest_line_of_each_size_is_named():
    slow, quick = lines.candidates(lines.row_of(32_000, "bf16"), H100)[1:3]
    size = {"phase": "sweep", "V": 32_000, "data": "bf16", "kept": 1.0, "ok": True}
    records = [
        size | {"name": line.form, "source": lines.source(line), "line": line._asdict()}
        | {"ms": ms, "of_copy": 0.4 / ms}
        for line, ms in ((slow, 1.0), (quick, 0.5))
    ]  # fmt: skip
    (found,) = gpu_tables.fastest(HEAD | {"dry_run": False}, records)
    assert found == (
        f"{lines.source(quick)},  # timed 0.500 ms, 80 % of a copy, V = 32 000, bf16, a GPU, "
        "2026-01-01"
    )


def test_the_newest_commit_of_a_card_comes_first(tmp_path):
    """An older one stands beside it, and its records say whose they are."""
    record = {"phase": "host", "name": "sgp", "ok": True, "form": "logits"}
    for file, card, commit, date, us in (
        ("b", "B", "2", "2026-01-02", 5.0),
        ("a-old", "A", "1", "2026-01-01", 7.0),
        ("a-again", "A", "2", "2026-01-02", 8.0),
        ("a", "A", "2", "2026-01-03", 9.0),
    ):
        head = HEAD | {"machine": {"name": card}, "commit": commit, "dry_run": False}
        lines_of_file = (head, record | {"both_us": us})
        text = "".join(json.dumps(line) + "\n" for line in lines_of_file)
        (tmp_path / f"gpu-{file}-{date}.jsonl").write_text(text)
    found = gpu_tables.newest(tmp_path)
    named = ["gpu-a-2026-01-03", "gpu-a-old-2026-01-01", "gpu-b-2026-01-02"]
    assert [path.stem for path, _, _ in found] == named
    (_, records), (_, others) = gpu_tables.by_card(found)
    rows = [("logits", "sgp", "", "9"), ("logits", "sgp, commit 1", "", "7")]
    assert gpu_tables.of_host(records).rows == rows
    assert [row[0] for row in gpu_tables.of_checks(records).rows] == ["host", "host, commit 1"]
    assert gpu_tables.of_host(others).rows == [("logits", "sgp", "", "5")]


# -- kernels for an older Triton -------------------------------------------------------------------

# A driver that records what it is told, in place of libcuda.
LAUNCH = """
import ctypes, json, sys
import torch, triton
from pathlib import Path
from bench.gpu import lines
from bench.proof import binary, cubin, kernel_cases

calls = []
class Driver:
    def __getattr__(self, name):
        def called(*arguments):
            if name == "cuLaunchKernel":
                pointers = arguments[9]
                calls.append([*arguments[1:8], len(pointers)])
            else:
                calls.append(name)
            return 700 if name == sys.argv[2] else 0
        return called

ctypes.CDLL = lambda _: Driver()
class Stream:
    cuda_stream = 5
torch.cuda.current_stream = Stream

on = kernel_cases.target_of("sm_90")
triton.runtime.driver.set_active(binary.NamedTarget(kernel_cases.TARGETS["sm_90"]))
folder = Path(sys.argv[1])
for V, data in ((40_000, "head"), (151_936, "head")):
    line = next(x for x in lines.candidates(lines.row_of(V, data), on) if x.programs > 1)
    path = folder / lines.file_of(line, V, data)
    cubin.build(lines.call_of(line, lines.problem(64, V, data, 1.0, "meta"), on)).save(path)
    loaded = cubin.Cubin.load(path)
    p = lines.problem(3, V, data, 1.0, "cpu")
    call = lines.call_of(line, p, on)
    values = [v.value for v in cubin.pack(loaded, call)]
    assert values[0] == p.logits.data_ptr(), values
    assert values.count(p.loss.data_ptr()) == 1
    assert values[-3:] == [V, None, None], "the vocabulary, and Triton's scratch"
    lines.runner(line, p, on, data, folder)()
    print(json.dumps([loaded.programs, loaded.threads, loaded.shared, len(values), calls.pop()]))
try:
    lines.runner(line, p, on, data, Path("nowhere"))
except FileNotFoundError as error:
    print(json.dumps(str(error)))
"""


def run(*command, **environment):
    outside = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SGP_BACKEND")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=outside | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_built_kernel_is_launched_with_its_cluster(tmp_path):
    """Rows times programs in the grid, and as many arguments as the binary takes."""
    result = run("-c", LAUNCH, str(tmp_path), "")
    assert result.returncode == 0, result.stderr
    *found, missing = [json.loads(line) for line in result.stdout.splitlines()]
    for programs, threads, shared, count, launched in found:
        assert programs > 1
        assert launched == [3 * programs, 1, 1, threads, 1, 1, shared, count]
    assert "was not built; --build makes it" in missing


def test_an_error_of_the_driver_is_raised(tmp_path):
    result = run("-c", LAUNCH, str(tmp_path), "cuLaunchKernel")
    assert "sgp: cuLaunchKernel of row_resident failed with CUDA error 700" in result.stderr


def test_records_are_on_disk_at_once(tmp_path):
    """Each is a line of JSON, whatever the numbers."""
    path = begin(tmp_path / "r.jsonl")
    phase = Phase("rows", path, seconds=9, dry=True)
    for value in (1.0, float("nan"), float("inf")):
        phase.record("one", ok=True, value=value, of=torch.bfloat16)
    assert [r["value"] for r in read(path)[1:]] == [1.0, "nan", "inf"]
    gpu.forget(path, "rows")
    assert read(path) == [HEAD]
    assert files.RESULTS.is_dir()
