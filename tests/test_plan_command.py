"""`sgp plan`: what it prints is the planner's, and what it cannot use it repeats."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sgp import cli
from sgp.commands import plan
from sgp.head import chunks, gpus

ROOT = Path(__file__).resolve().parents[1]
SIZE = "--tokens 8192 --kept 0.25 --vocab 128256 --width 4096"


@pytest.fixture
def ask(monkeypatch, capsys):
    """Exit code, and what is printed on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*options, size=SIZE):
        words = [*size.split(), *(x for option in options for x in option.split())]
        code = cli.main(["plan", *words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def ways(out):
    """{way: [GiB, M V D, TFLOP, GB moved, ms]} of the table."""
    lines = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())
    rows = [line for line in lines if len(line) == 6 and line[0] != "way"]
    return {name: [float(x) for x in numbers] for name, *numbers in rows}


def chosen(out):
    (found,) = (name for name in ways(out) if name.endswith(" (chosen)"))
    return found.removesuffix(" (chosen)")


# -- what is printed -------------------------------------------------------------------------------


def test_the_chosen_way_is_the_planners(ask):
    shape = plan.shape_of(8192, 2048, 128_256, 4096)
    expected = chunks.plan("test", shape)
    code, out, err = ask()
    assert (code, err) == (0, "")
    assert chosen(out) == expected.words() == "gradient kept, chunks of 1024 rows"
    gib, mvd, tera, giga, ms = ways(out)[f"{chosen(out)} (chosen)"]
    assert gib == pytest.approx(expected.bytes / 2**30, rel=5e-3)
    assert (mvd, tera) == (6, pytest.approx(6 * 2048 * 128_256 * 4096 / 1e12, rel=5e-3))
    assert giga == pytest.approx(expected.traffic / 1e9, rel=5e-3)
    assert ms == pytest.approx(1e3 * expected.seconds(), rel=5e-3)
    assert f"({chunks.default_budget(shape)} bytes)" in out
    assert "arithmetic, not a measurement" in out


def test_the_table_is_a_frontier(ask):
    *found, last = ways(ask("--kept 1")[1]).values()
    assert len(found) >= 5
    assert found == sorted(found), "the smallest first"
    times = [row[-1] for row in found]
    assert times == sorted(times, reverse=True), "none is larger and slower"
    assert last[0] > found[-1][0], "plain PyTorch"


@pytest.mark.parametrize(
    ("budget", "way"),
    [
        ("0.5GiB", "slices of 8064 columns, after chunks of 2048 rows"),
        ("1GiB", "gradient kept, chunks of 1024 rows"),
        ("60000000", "slices of 8064 columns, after chunks of 2048 rows"),
    ],
)
def test_a_budget_changes_the_way(budget, way, ask):
    code, out, _ = ask(f"--budget {budget}")
    assert (code, chosen(out)) == (0, way)


def test_a_budget_that_nothing_fits_is_code_1_and_the_planners_message(ask):
    code, out, err = ask("--budget 1KiB")
    assert code == 1
    assert "(chosen)" not in out
    assert "none of these ways fits" in out
    with pytest.raises(ValueError, match="the least that 2048 kept rows") as caught:
        chunks.plan("sgp plan", plan.shape_of(8192, 2048, 128_256, 4096), memory_budget=1024)
    assert err == f"{caught.value}\n"
    least = re.search(r"take is (\d+) bytes", err)[1]
    assert ask(f"--budget {least}")[0] == 0


def test_options_reach_the_planner(ask):
    assert chosen(ask("--frozen-head")[1]) == "chunks of 1024 rows"
    assert chosen(ask("--own-loss 1")[1]) == "gradient kept, chunks of 1024 rows"
    assert chosen(ask("--frozen-head", "--own-loss 2000")[1]) == "chunks of 2047 rows"
    assert "a loss of one's own, 2000 tokens at once" in ask("--own-loss 2000")[1]
    assert chosen(ask("--per-token")[1]).startswith("slices of ")
    assert chosen(ask("--per-token", "--budget 2GiB")[1]) == "logits held for backward"
    half = ask("--dtype fp16", "--budget 300MiB")[1]
    assert ways(half)[f"{chosen(half)} (chosen)"][1] == 8, "its gradients wait for the factor"
    assert ways(ask("--dtype fp32")[1])[plan.PLAIN][-1] > 10 * ways(ask()[1])[plan.PLAIN][-1]
    slow, fast = (ways(ask(f"--gpu {gpu}")[1])["one chunk"][-1] for gpu in ("a100", "b200"))
    assert slow > 5 * fast
    assert "1500 of them with loss (planned as 1536)" in ask(size=SIZE.replace("0.25", "0.1831"))[1]


def test_a_teacher_reaches_the_planner(ask):
    """Two products more of its width, one of them where the logits are made again."""
    out = ask("--teacher-width 8192")[1]
    shape = plan.shape_of(8192, 2048, 128_256, 4096, teacher=8192)
    assert shape.teachers.width == 8192
    assert chosen(out) == chunks.plan("test", shape).words()
    assert "a teacher of D = 8192" in out
    assert ways(out)[f"{chosen(out)} (chosen)"][1] == 6 + 2 * 2
    plain = ways(ask()[1])[plan.PLAIN]
    assert ways(out)[plan.PLAIN_OF_BOTH][0] > 1.5 * plain[0], "and its logits"
    late = ask("--teacher-width 4096", "--per-token", "--budget 200MiB")[1]
    assert ways(late)[f"{chosen(late)} (chosen)"][1] == 8 + 4
    assert ask("--dtype autocast", "--teacher-width 4096")[0] == 0


def test_a_loss_of_ones_own_has_no_teacher(capsys):
    assert cli.main(["plan", *SIZE.split(), "--own-loss", "3", "--teacher-width", "64"]) == 2
    assert "--own-loss 3 and --teacher-width 64" in capsys.readouterr().err


def test_plain_pytorch_is_what_was_measured():
    """The records of an H100: 11 490 296 832 bytes, loss and divisor included."""
    held = plan.plain(plan.shape_of(8192, 8192, 128_256, 4096)).bytes
    assert held == pytest.approx(11_490_296_832, abs=2048)


def test_every_gpu_has_a_float32_rate():
    assert plan.FLOAT32.keys() == gpus.GPUS.keys()


@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_every_dtype_is_offered(dtype):
    assert cli._parser().parse_args(["plan", *SIZE.split(), "--dtype", dtype]).dtype == dtype


@pytest.mark.parametrize(
    "size",
    [
        "--tokens 1 --vocab 1 --width 1",
        "--tokens 17 --vocab 3 --width 5 --kept 0.001 --per-token",
        "--tokens 1099511627776 --vocab 1099511627776 --width 1099511627776",
        "--tokens 200000 --vocab 2000000 --width 16384 --dtype autocast",
    ],
)
def test_sizes_at_the_ends(size, ask):
    code, out, err = ask(size=size)
    assert (code, err) == (0, "")
    assert chosen(out)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--budget", "1G", "write 512MiB"),
        ("--budget", "0", "write 512MiB"),
        ("--budget", "-1GiB", "write 512MiB"),
        ("--budget", "lots", "write 512MiB"),
        ("--budget", "1e9", "write 512MiB"),
        ("--budget", "", "write 512MiB"),
        ("--kept", "0", "above 0"),
        ("--kept", "1.5", "more than 1"),
        ("--kept", "nan", "above 0"),
        ("--tokens", "0", "at least 1"),
        ("--tokens", "8k", "at least 1"),
        ("--vocab", "-5", "at least 1"),
        ("--width", "1" + "0" * 30, "is more than"),
        ("--dtype", "int8", "choose from"),
        ("--gpu", "abacus", "choose from"),
    ],
)
def test_nonsense_is_refused_and_repeated(option, value, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *SIZE.split(), f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in (option, repr(value), said))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123", 123),
        ("1KiB", 1 << 10),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2 gib", 2 << 30),
        ("0.1KiB", 102),
        ("3KB", 3000),
        ("3MB", 3 * 10**6),
        ("2GB", 2 * 10**9),
    ],
)
def test_budgets_are_read(text, size):
    assert cli._bytes(text) == size


# -- as a user starts it ---------------------------------------------------------------------------


def test_it_imports_nothing_heavy():
    """Beside PyTorch, which `import sgp` brings."""
    code = (
        "import sys; from sgp import cli\n"
        f"assert cli.main(['plan', *{SIZE.split()}]) == 0\n"
        "new = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not new & {'transformers', 'tokenizers', 'matplotlib', 'triton'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_docstring_examples():
    assert doctest.testmod(plan).failed == 0
