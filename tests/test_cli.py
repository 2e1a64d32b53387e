"""The command line: arguments, exit codes, and one whole run as a user starts it."""

import argparse
import contextlib
import doctest
import errno
import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sgp import cli, interrupt
from sgp.auditing.report import AuditReport
from sgp.huggingface import hub
from sgp.train.model import save, split_model, tiny_llama
from sgp.train.tokenizer import load_or_train, wrap

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model and tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = wrap(load_or_train(["What is plus?"], size=300, folder=None))
    save(split_model(tiny_llama(len(tokenizer), 64, seed=0, hidden=16)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n")
    return path


def stub(monkeypatch, name, outcome):
    """Replaces the `run` of a command's module by one that notes its arguments."""
    calls = []

    def run(*arguments, **keywords):
        calls.append(keywords or arguments)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(importlib.import_module(f"sgp.commands.{name}"), "run", run)
    return calls


# -- arguments --------------------------------------------------------------------------------


def test_defaults_reach_the_run(monkeypatch):
    from sgp.train import run
    from sgp.train.options import Options

    calls = []
    monkeypatch.setattr(run, "run", lambda options: calls.append(options) or 0)
    assert cli.main(["train"]) == 0
    assert calls == [Options()], "the command line's defaults are those of Options"


def test_arguments_reach_the_run(monkeypatch):
    from sgp.train import run
    from sgp.train.options import Options

    calls = []
    monkeypatch.setattr(run, "run", lambda options: calls.append(options) or 0)
    words = "train --data d --model m --steps 7 --batch-size 3 --seed -1 --out o --max-length 9"
    assert cli.main([*words.split(), "--lr", "1e-3", "--loss", "sgp"]) == 0
    assert calls == [Options(Path("d"), "m", 7, 3, -1, Path("o"), 9, 1e-3, loss="sgp")]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "-3"),
        ("--steps", "1.5"),
        ("--batch-size", "0"),
        ("--batch-size", "many"),
        ("--max-length", "0"),
        ("--seed", "x"),
        ("--lr", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "fast"),
        ("--loss", "other"),
    ],
)
def test_bad_value_is_refused_and_repeated(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert repr(value) in error


@pytest.mark.parametrize("words", [["fly"], ["train", "--stepz", "3"]])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: sgp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"quick": False, "output": None}),
        (["--quick", "--output", "v.json"], {"quick": True, "output": Path("v.json")}),
    ],
)
def test_verify_passes_its_arguments_and_its_code(monkeypatch, words, expected):
    calls = stub(monkeypatch, "verify", 1)
    assert cli.main(["verify", *words]) == 1
    assert calls == [expected]


def test_verify_and_doctor_are_called_as_they_are_defined():
    """The stubs above accept anything; the real functions must accept the same."""
    import inspect

    from sgp.commands import doctor, verify

    inspect.signature(verify.run).bind(quick=True, output=None)
    inspect.signature(doctor.run).bind()


def test_doctor_passes_its_code(monkeypatch):
    stub(monkeypatch, "doctor", 0)
    assert cli.main(["doctor"]) == 0


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    try:
        version = metadata.version("sgp-kernels")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    assert capsys.readouterr().out == f"sgp {version}\n"


def test_alone_it_prints_its_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sgp"])
    assert cli.main() == cli.main([]) == 0
    shown = capsys.readouterr()
    assert shown.out == 2 * cli._parser().format_help()
    assert all(name in shown.out for name in ("train", "audit", "plan", "verify", "doctor"))
    assert shown.err == ""


def test_every_option_has_help():
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == {"train", "audit", "plan", "verify", "doctor"}
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)
        text = " ".join(command.format_help().split())  # a stray % in a help text is an error
        assert "None" not in text
        for action in command._actions:
            if action.default not in (None, False, argparse.SUPPRESS):
                assert f"(default: {action.default})" in text, action.dest


def test_help_imports_nothing_heavy():
    """`import sgp` brings torch; the command line adds nothing to it."""
    code = (
        "import signal, sys; handler = signal.getsignal(signal.SIGINT)\n"
        "import sgp; before = set(sys.modules); from sgp import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'tokenizers', 'matplotlib', 'rich', 'triton'}, new\n"
        "assert not [name for name in sys.modules if name.startswith('sgp.train')]\n"
        "assert signal.getsignal(signal.SIGINT) is handler, 'Ctrl-C is left to other programs'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# -- errors -----------------------------------------------------------------------------------


def refused(capsys, *words):
    assert cli.main(["train", *map(str, words)]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1, "one line, no traceback"
    assert lines[0].startswith("sgp train: ")
    return lines[0]


def test_unusable_input_is_one_line_and_code_2(tmp_path, model, capsys):
    out = tmp_path / "out"
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.write_text("")
    file = tmp_path / "file"
    file.write_text("")
    words = "--out", out, "--model", model
    assert f"--data {missing}: no such file" in refused(capsys, *words, "--data", missing)
    assert f"--data {empty}: the file is empty" in refused(capsys, *words, "--data", empty)
    assert f"--data {tmp_path}: " in refused(capsys, *words, "--data", tmp_path)
    assert f"--out {file}: {file} is a file" in refused(capsys, "--out", file)
    assert not out.exists(), "nothing is left behind"
    (tmp_path / "half" / "loss.png").mkdir(parents=True)
    (tmp_path / "model").write_text("")
    half = tmp_path / "half"
    assert f"{half / 'loss.png'} is a folder, where a file" in refused(capsys, "--out", half)
    assert f"{tmp_path / 'model'} is a file, where a folder" in refused(capsys, "--out", tmp_path)


def test_an_audits_unusable_folder_is_one_line_and_code_2(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}) + "\n")

    def said(out):
        assert cli.main(["audit", str(data), "--out", str(out)]) == 2
        found = capsys.readouterr()
        assert not found.out, "said before the work"
        assert found.err.count("\n") == 1
        return found.err

    assert f"sgp audit: --out {data}: {data} is a file, not a folder" in said(data)
    assert f"--out {data / 'deeper'}: {data} is a file" in said(data / "deeper")
    (tmp_path / "audit.png").mkdir()
    assert f"{tmp_path / 'audit.png'} is a folder, where a file" in said(tmp_path)


def test_what_the_system_refuses_is_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}) + "\n")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AuditReport, "to_html", full)
    assert cli.main(["audit", str(data), "--out", str(tmp_path / "out")]) == 2
    out = tmp_path / "out"
    assert f"--out {out}: cannot write {out}: No space left" in capsys.readouterr().err
    usual = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *x, **y: (full if self == data else usual)(self, *x, **y)
    )
    assert cli.main(["audit", str(data)]) == 2
    assert f"sgp audit: {data}: no space left on device" in capsys.readouterr().err


def test_a_full_disk_at_the_end_of_a_training_is_one_line(
    model, data, tmp_path, monkeypatch, capsys
):
    from sgp.train import run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    monkeypatch.setattr(run, "save", full)
    out = tmp_path / "out"
    words = ["--out", out, "--model", model, "--data", data, "--steps", 1, "--max-length", 32]
    assert cli.main(["train", *map(str, words)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"sgp train: --out {out}: cannot write weights: No space left on device"


def test_a_hub_folder_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(sys, "argv", ["hub", str(file)])
    with pytest.raises(SystemExit) as caught:
        hub.main()
    assert caught.value.code == 2
    assert f"folder {file}: cannot write {file}" in capsys.readouterr().err


# -- Ctrl-C -----------------------------------------------------------------------------------

PRESS = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == os.environ["CTRL_C_AT"]:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""
SCRIPT = "import sys\nfrom sgp.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.mark.parametrize(
    ("as_script", "command", "module"),
    [
        (True, "train", "torch"),
        (False, "audit", "numpy"),  # begun in C, where a KeyboardInterrupt is dropped
        (True, "verify", "sgp.commands.verify"),
        (False, "doctor", "sgp.commands.doctor"),
    ],
)
def test_ctrl_c_during_an_import_is_one_line(as_script, command, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PRESS)  # Python imports it before all else
    script = tmp_path / "sgp"
    script.write_text(SCRIPT)
    words = [str(script)] if as_script else ["-W", "error", "-m", "sgp"]
    words += [command, *["x.jsonl"] * (command == "audit")]
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "CTRL_C_AT": module},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = f"sgp {command}: interrupted while it started; nothing was written\n"
    assert (found.returncode, found.stdout, found.stderr) == (130, "", line)


def test_ctrl_c_raises_while_a_command_works_and_is_silent_after_it(monkeypatch):
    left = []
    monkeypatch.setattr(interrupt.os, "_exit", left.append)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sgp", "train"])
    before = signal.getsignal(signal.SIGINT)
    try:
        interrupt.watch_start()
        with pytest.raises(KeyboardInterrupt), interrupt.raising():
            signal.raise_signal(signal.SIGINT)
        assert left == []
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["doctor", "verify"])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (
            interrupt.Interrupted("after 3 steps; saved in x"),
            "interrupted after 3 steps; saved in x",
        ),
    ],
    ids=["plain", "with what stands"],
)
def test_ctrl_c_has_its_own_code_and_line(name, error, line, monkeypatch, capsys):
    stub(monkeypatch, name, error)
    assert cli.main([name]) == 130
    assert capsys.readouterr().err == f"sgp {name}: {line}\n"


SAVED = "after 1 of 1 steps; saved in {out}: model/, loss.png, summary.json"


def press():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("sgp.train.run.prepare", "before the first step; nothing was saved"),
        ("sgp.train.report.held_out_table", SAVED),
    ],
)
def test_ctrl_c_in_train_says_what_stands(where, line, model, data, tmp_path, monkeypatch, capsys):
    module, _, name = where.rpartition(".")
    module = importlib.import_module(module)
    original = getattr(module, name)

    def pressed(*arguments, **keywords):
        press()
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, pressed)
    out = tmp_path / "out"
    words = ["train", "--model", model, "--data", data, "--out", out, "--steps", 1]
    assert cli.main([str(word) for word in words]) == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"sgp train: interrupted {line.format(out=out)}"
    files = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert files == ([] if "nothing" in line else ["loss.png", "model", "summary.json"])
    assert ("saved in" in shown.out) == bool(files), "the last table was printed to its end"


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("print", "before it wrote anything"),
        ("plot", "after it wrote audit.html, audit.json, audit.png in {out}"),
    ],
)
def test_ctrl_c_in_audit_says_what_stands(method, line, tmp_path, monkeypatch, capsys):
    from sgp.auditing.report import AuditReport

    original = getattr(AuditReport, method)

    def pressed(*arguments, **keywords):
        press()
        return original(*arguments, **keywords)

    monkeypatch.setattr(AuditReport, method, pressed)
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text(json.dumps({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}) + "\n")
    assert cli.main(["audit", str(file), "--out", str(out)]) == 130
    expected = f"sgp audit: interrupted {line.format(out=out)}"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert len(list(out.glob("audit.*"))) == (3 if method == "plot" else 0)


def test_docstring_examples_of_interrupt():
    assert doctest.testmod(interrupt, optionflags=doctest.ELLIPSIS).failed == 0


# -- as a user starts it ----------------------------------------------------------------------


def start(model, data, out, *words, stderr=subprocess.PIPE):
    command = [sys.executable, "-W", "error", "-m", "sgp", "train", "--model", model]
    command += ["--data", data, "--out", out, *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_whole_run(model, data, tmp_path):
    process = start(model, data, tmp_path / "out", "--steps", "3")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "1 line skipped: broken JSON (line 41)" in out
    for text in ("kept)", "PyTorch, all rows", "sgp, linear head", "held-out loss", "saved in"):
        assert text in out
    assert "3/3" in err, "the progress bar"
    assert len(err.splitlines()) == 1, "nothing but the progress bar"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model",
        "loss.png",
        "summary.json",
    }


def test_ctrl_c_from_outside(model, data, tmp_path):
    """It is pressed when the progress bar shows a step; the run ends with 130 and whole files."""
    screen, terminal = pty.openpty()
    process = start(model, data, tmp_path / "out", "--steps", "99999", stderr=terminal)
    os.close(terminal)
    shown = ""
    while not re.search(r"[1-9]\d*/99999", shown):
        shown += os.read(screen, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the process has closed it
        while True:
            shown += os.read(screen, 4096).decode(errors="replace")
    out, _ = process.communicate(timeout=60)
    os.close(screen)
    assert process.returncode == 130, shown
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ended"] == "interrupted"
    steps = summary["steps"]
    assert steps == len(summary["losses"]["sgp"]) > 0
    assert "stopping after this step" in shown
    assert f"sgp train: interrupted after {steps} of 99999 steps; saved in" in shown
    assert f"interrupted after {steps} of" in out
    assert (tmp_path / "out" / "model" / "config.json").exists()
