"""The script that times the row kernel: what it builds and passes on, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import forms
from sgp.kernels import table
from sgp.kernels.table import Target

ROOT = Path(__file__).parent.parent
H100 = Target("cuda", 90, 132, (3, 9))
A100 = Target("cuda", 80, 108, (3, 9))


def run(*command, **environment):
    outside = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SGP_BACKEND")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=outside | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# A driver that records what it is told, in place of libcuda.
LAUNCH = """
import ctypes, json, sys
import torch, triton
from pathlib import Path
from bench import binary, cubin, forms, kernel_cases

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
for V, data in ((32_000, "bf16"), (151_936, "head")):
    contestant = list(forms.contestants(V, data, on, tune=False))[1]  # after streaming
    path = Path(sys.argv[1]) / contestant.file
    cubin.build(forms.call_of(contestant, forms.problem(64, V, data, 1.0, "meta"), on)).save(path)
    loaded = cubin.Cubin.load(path)
    p = forms.problem(3, V, data, 1.0, "cpu")
    call = forms.call_of(contestant, p, on)
    values = [v.value for v in cubin.pack(loaded, call)]
    assert values[0] == p.logits.data_ptr(), values
    assert values.count(p.loss.data_ptr()) == 1
    assert values[-3:] == [V, None, None], "the vocabulary, and Triton's scratch"
    cubin.Launcher(loaded)(call)
    print(json.dumps([loaded.programs, loaded.threads, loaded.shared, len(values), calls.pop()]))
"""


def test_a_built_kernel_is_launched_with_its_cluster(tmp_path):
    """Rows times programs in the grid, and as many arguments as the binary takes."""
    result = run("-c", LAUNCH, str(tmp_path), "")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [4, 8]
    for programs, threads, shared, count, launched in lines:
        assert launched == [3 * programs, 1, 1, threads, 1, 1, shared, count]


def test_an_error_of_the_driver_is_raised(tmp_path):
    result = run("-c", LAUNCH, str(tmp_path), "cuLaunchKernel")
    assert "sgp: cuLaunchKernel of row_resident failed with CUDA error 700" in result.stderr


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("data", forms.DATA)
def test_contestants_hold_the_row(data, tune):
    for V in forms.VOCABULARIES:
        field = list(forms.contestants(V, data, H100, tune=tune))
        assert field[0].line.form == "streaming", "what the others are compared with"
        assert len(field) == len(set(field)) >= (6 if tune else 2)
        assert all(c.line.columns >= V for c in field[1:])
        assert len({c.file for c in field}) == len(field)
    only = list(forms.contestants(151_936, data, A100, tune=False))
    assert [c.line.form for c in only] == ["streaming"]


def test_the_report_names_the_fastest_line(capsys):
    streaming, resident, other = list(forms.contestants(151_936, "bf16", H100, tune=True))[:3]
    records = [
        {"V": 151_936, "data": "bf16", "kept": kept, "line": c.line._asdict(), "words": c.words}
        | {"ms": ms, "of_copy": 1 / ms}
        for kept in forms.KEPT
        for c, ms in ((streaming, 3.0), (resident, 1.25), (other, 2.0))
    ]
    forms.report(records, {"device": "a GPU", "date": "2026-01-01", "triton": "3.9.0"})
    printed = capsys.readouterr().out
    line = re.search(r"^(Line\(.*\)),  # V = 151936, bf16: (.*)$", printed, re.MULTILINE)
    assert line is not None, printed
    assert eval(line[1], {"Line": table.Line}) == resident.line, "it can be pasted"  # noqa: S307
    assert line[2] == "1.250 ms, 80% of copy, a GPU, 2026-01-01"
    assert "0.42" in printed, "the ratio to streaming"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU is visible; --build DIR compiles for one, elsewhere"),
        (["--cubins", "nowhere"], "no GPU is visible"),
        (["--target", "sm_80", "--build", "x"], "invalid choice: 'sm_80'"),
    ],
)
def test_without_a_gpu_it_says_so(arguments, message):
    result = run("-m", "bench", "forms", *arguments, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
