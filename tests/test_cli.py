"""The command line: arguments, exit codes, and one whole run as a user starts it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

import sgp
from sgp import cli
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
    """Replaces a module that a command imports by one whose `run` notes its arguments."""
    calls = []

    def run(*arguments, **keywords):
        calls.append(keywords or arguments)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = types.SimpleNamespace(run=run)
    monkeypatch.setattr(sgp, name, module, raising=False)
    monkeypatch.setitem(sys.modules, f"sgp.{name}", module)
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


@pytest.mark.parametrize("words", [[], ["fly"], ["train", "--stepz", "3"]])
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

    from sgp import doctor, verify

    inspect.signature(verify.run).bind(quick=True, output=None)
    inspect.signature(doctor.run).bind()


def test_doctor_passes_its_code(monkeypatch):
    stub(monkeypatch, "doctor", 0)
    assert cli.main(["doctor"]) == 0


def test_ctrl_c_has_its_own_code(monkeypatch, capsys):
    stub(monkeypatch, "doctor", KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "sgp doctor: interrupted\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    try:
        version = metadata.version("sgp-kernels")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    assert capsys.readouterr().out == f"sgp {version}\n"


def test_every_option_has_help():
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == {"train", "audit", "verify", "doctor"}
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)
        command.format_help()  # a stray % in a help text is an error here


def test_help_imports_nothing_heavy():
    """`import sgp` brings torch; the command line adds nothing to it."""
    code = (
        "import sgp, sys; before = set(sys.modules); from sgp import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'tokenizers', 'matplotlib', 'rich', 'triton'}, new\n"
        "assert not [name for name in sys.modules if name.startswith('sgp.train')]\n"
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


def test_interrupt_before_the_first_step(monkeypatch, capsys):
    from sgp.train import run

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert cli.main(["train"]) == 130
    assert "nothing was saved" in capsys.readouterr().err


# -- as a user starts it ----------------------------------------------------------------------


def start(model, data, out, *words, **keywords):
    command = [sys.executable, "-W", "error", "-m", "sgp", "train", "--model", model]
    command += ["--data", data, "--out", out, *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        **keywords,
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
    """The signal comes at a time of its own choosing; the run ends with 130 and whole files."""
    process = start(model, data, tmp_path / "out", "--steps", "1000000")
    for line in process.stdout:
        if line.startswith(" sgp, linear head"):
            break  # the table of heads: what follows is the training
    try:
        process.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ended"] == "interrupted"
    assert summary["steps"] == len(summary["losses"]["sgp"]) > 0
    assert "interrupted after" in out
    assert (tmp_path / "out" / "model" / "config.json").exists()
