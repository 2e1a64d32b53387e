"""`sgp verify` and `sgp doctor`: what they print, and that verify can fail."""

import json
import os

import pytest
import torch

from sgp import losses
from sgp.commands import doctor, verify, verify_cases, verify_teachers
from sgp.interrupt import Interrupted
from sgp.rows import backend


def test_verify_passes_here_and_records_every_case(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_cases, "QUICK", (7, 8_193))  # one vocabulary for each form
    output = tmp_path / "verify.json"
    assert verify.run(quick=True, output=output) == 0
    shown = capsys.readouterr().out
    assert "all passed" in shown
    record = json.loads(output.read_text())
    assert record["machine"]
    seen = {(c["path"], c["dtype"], c["V"], c["options"]) for c in record["cases"]}
    assert len(seen) == len(verify_cases.PATHS) * len(verify_cases.DTYPES) * 2 * len(
        verify_cases.OPTIONS
    )
    assert all(case["passed"] for case in record["cases"])


@pytest.mark.parametrize("fault", ["gradient 1 % off", "loss 0.05 % off", "entropy 0.01 % off"])
def test_verify_fails_when_a_kernel_is_wrong(fault, capsys, monkeypatch):
    monkeypatch.setattr(verify_cases, "QUICK", (7,))
    right = losses.cross_entropy

    def slightly_off(logits, target, **options):
        result = right(logits, target, **options)
        if options.get("return_stats"):
            loss, stats = result
            factor = 1.0001 if fault.startswith("entropy") else 1.0
            return loss, stats._replace(entropy=factor * stats.entropy)
        if fault.startswith("gradient"):
            return result + 0.01 * (result - result.detach())
        return 1.0005 * result if fault.startswith("loss") else result

    monkeypatch.setattr(verify_cases, "cross_entropy", slightly_off)
    assert verify.run(quick=True) == 1
    assert "FAILED" in capsys.readouterr().out


def check(path, V=7):
    case = verify_cases.Case(path, torch.float32, V, 0.25, "plain")
    return verify_cases.check(case, torch.device("cpu"))


def test_a_loss_off_by_ten_parts_in_a_million_fails(monkeypatch):
    path = "loss and gradient in one launch"
    assert check(path).passed
    right = verify_cases.cross_entropy

    def off(*arguments, **options):
        result = right(*arguments, **options)
        if options.get("return_stats"):
            return result
        return result + 1e-5 * result.detach()

    monkeypatch.setattr(verify_cases, "cross_entropy", off)
    outcome = check(path)
    assert not outcome.passed
    assert outcome.loss == pytest.approx(1e-5, rel=0.1)


def test_a_gradient_of_an_ignored_row_fails_however_small(monkeypatch):
    right = verify_cases.cross_entropy

    def off(logits, target, **options):
        result = right(logits, target, **options)
        if options.get("return_stats"):
            return result
        ignored = logits[target == -100].sum()
        return result + 1e-12 * (ignored - ignored.detach())

    monkeypatch.setattr(verify_cases, "cross_entropy", off)
    assert not check("loss and gradient in one launch").passed


def test_a_top1_that_is_wrong_fails(monkeypatch):
    right = verify_cases.cross_entropy

    def off(*arguments, **options):
        result = right(*arguments, **options)
        if options.get("return_stats"):
            return result[0], result[1]._replace(is_top1=~result[1].is_top1)
        return result

    monkeypatch.setattr(verify_cases, "cross_entropy", off)
    assert not check("loss and gradient in one launch").passed


def test_a_weights_gradient_that_is_wrong_fails(monkeypatch):
    assert check("linear head").passed
    right = verify_cases.linear_cross_entropy

    def off(hidden, head, *arguments, **options):
        more = head + 1e-4 * (head - head.detach())
        return right(hidden, more, *arguments, **options)

    monkeypatch.setattr(verify_cases, "linear_cross_entropy", off)
    assert not check("linear head").passed


@pytest.mark.parametrize("kind", ["loss", "gradient", "ignored"])
def test_a_distillation_that_is_wrong_fails(kind, monkeypatch):
    path, right = "distillation, JSD", verify_teachers.distillation
    case = verify_cases.Case(path, torch.float32, 7, 0.5, "all")
    assert verify_cases.check(case, torch.device("cpu")).passed

    def off(logits, teacher, target, **options):
        loss = right(logits, teacher, target, **options)
        kept = logits[target != -100].sum()
        if kind == "loss":
            return loss + 1e-4 * loss.detach()
        if kind == "gradient":
            return loss + 1e-3 * (kept - kept.detach())
        return (
            loss + 1e-12 * torch.where(target[:, None] == -100, logits - logits.detach(), 0).sum()
        )

    monkeypatch.setattr(verify_teachers, "distillation", off)
    assert not verify_cases.check(case, torch.device("cpu")).passed


def test_verify_says_where_it_cannot_run(capsys, monkeypatch, tmp_path):
    assert verify.run(quick=True, output=tmp_path / "missing" / "x.json") == 2
    assert "is no folder" in capsys.readouterr().out
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert verify.run(quick=True) == 2
    assert "Triton is not installed" in capsys.readouterr().out


def test_verify_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setattr(verify_cases, "QUICK", (7,))
    for before in (None, "torch"):
        if before is None:
            monkeypatch.delenv("SGP_BACKEND", raising=False)
        else:
            monkeypatch.setenv("SGP_BACKEND", before)
        verify.run(quick=True)
        assert os.environ.get("SGP_BACKEND") == before


def test_doctor_names_versions_backends_and_reasons(capsys, monkeypatch):
    monkeypatch.delenv("SGP_BACKEND", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    versions = {"torch": torch.__version__}

    def version(name):
        if name == "datasets":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions.setdefault(name, f"1.{len(versions)}")

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.splitlines()]
    for name in ("torch", "triton", "numpy", "transformers", "accelerate", "peft", "trl"):
        assert [name, versions[name]] in rows
    assert ["datasets", "not installed"] in rows
    for name in doctor.VARIABLES:
        assert name in shown
    _, why = backend.explain(torch.device("cpu"), torch.float32)
    assert why in shown


def test_doctor_fails_where_a_forced_backend_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert doctor.run() == 1
    assert "Triton is not installed" in capsys.readouterr().out


def test_doctor_knows_that_no_kernel_takes_float64_and_no_row_form_is_made_up(capsys, monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    assert doctor.run() == 0, "float64 cannot run, and that is no illness"
    monkeypatch.setenv("SGP_ROW_FORM", "diagonal")
    assert doctor.run() == 1
    assert "SGP_ROW_FORM = 'diagonal'; expected one of auto, resident" in capsys.readouterr().out


def test_verify_survives_a_case_that_raises_and_one_that_is_nan(tmp_path, capsys, monkeypatch):
    """The others are run, and each is in the file before the next begins."""
    monkeypatch.setattr(verify_cases, "QUICK", (7,))
    output = tmp_path / "verify.json"
    seen = []

    def checked(case, _):
        cases = json.loads(output.read_text())["cases"]  # whole at any time
        assert len(cases) == len(seen)
        seen.append(case)
        if len(seen) == 2:
            raise RuntimeError("PassManager::run failed\nand a second line")
        good = len(seen) != 3
        gradient = 1e-7 if good else float("nan")
        return verify_cases.Outcome(case, 0.0, 0.0, gradient, 1e-7, 1e-6, passed=good)

    monkeypatch.setattr(verify_cases, "check", checked)
    assert verify.run(quick=True, output=output) == 1
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == len(seen) == len(list(verify_cases.cases(quick=True)))
    assert [c["passed"] for c in cases].count(False) == 2
    assert cases[1]["raised"] == "RuntimeError: PassManager::run failed"
    assert cases[1]["gradient"] is None
    shown = capsys.readouterr().out
    assert "2 FAILED" in shown
    assert "PassManager::run failed" in shown
    assert "nan" in shown, "the table does not lose it"


def test_verify_ends_where_the_gpu_answers_nothing_more(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_cases, "QUICK", (7,))
    monkeypatch.setattr(verify, "answers", lambda _: False)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(verify_cases, "check", broken)
    output = tmp_path / "verify.json"
    assert verify.run(quick=True, output=output) == 1
    assert len(json.loads(output.read_text())["cases"]) == 1
    assert "cases were not run: after this failure" in " ".join(capsys.readouterr().out.split())


def passes(case, _):
    return verify_cases.Outcome(case, 0.0, 0.0, 1e-7, 1e-7, 1e-6, passed=True)


def test_verify_says_each_group_before_the_next_begins(capsys, monkeypatch):
    """Who pipes it sees it go on, and keeps what was done when it is cut."""
    groups, seen = [], []

    def checked(case, device):
        group = (case.V, case.dtype)
        if group not in groups:
            groups.append(group)
            seen.append(capsys.readouterr().out)
        return passes(case, device)._replace(passed=case.V != 32_000 or case.kept != 1)

    monkeypatch.setattr(verify_cases, "check", checked)
    assert verify.run(quick=True) == 1
    seen.append(capsys.readouterr().out)
    assert f"sgp verify: {len(list(verify_cases.cases(quick=True)))} cases; " in seen[0]
    for (V, dtype), text in zip(groups, seen[1:], strict=True):
        name = f"V = {V:,}, ".replace(",", " ", V > 999) + str(dtype).removeprefix("torch.")
        lines = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
        assert len(lines) == 1
        assert lines[0].endswith("FAILED" if V == 32_000 else ": ok")
    assert "failed: in place, V = 32 000, float32, 100% of the rows kept: loss 0.0e+00" in seen[-3]
    assert "\n\n" not in "".join(seen), "no empty lines where the bar is not shown"


def test_results_are_json_that_every_reader_reads():
    """An error is infinite where a NaN or an infinity stands in the wrong place."""
    case = verify_cases.Case("upstream factor 3", torch.float32, 7, 0.25, "plain")
    inf, nan = float("inf"), float("nan")
    row = verify.as_record(verify_cases.Outcome(case, inf, 0.0, nan, 0.0, 1e-6, passed=False))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["loss"], row["plain_loss"], row["gradient"]) == (None, 0.0, None)


@pytest.mark.parametrize("saved", [True, False])
def test_who_interrupts_verify_is_told_what_stands(saved, tmp_path, monkeypatch):
    output = tmp_path / "verify.json"
    count = iter(range(100))

    def checked(case, device):
        number = next(count)
        if number == 5:
            raise KeyboardInterrupt
        return passes(case, device)._replace(passed=number != 2)

    monkeypatch.setattr(verify_cases, "check", checked)
    monkeypatch.delenv("SGP_BACKEND", raising=False)
    total = len(list(verify_cases.cases(quick=True)))
    stands = f"their results are in {output}" if saved else "nothing was written (--output FILE"
    with pytest.raises(Interrupted) as caught:
        verify.run(quick=True, output=output if saved else None)
    said = str(caught.value)
    assert said.startswith(f"after 5 of {total} cases, 1 of which failed; {stands}")
    assert "SGP_BACKEND" not in os.environ
    assert not saved or len(json.loads(output.read_text())["cases"]) == 5


def test_verify_needs_no_installed_package_and_asks_for_its_file_first(
    tmp_path, capsys, monkeypatch
):
    """From a checkout on PYTHONPATH there is no distribution to ask for a version."""
    one = verify_cases.Case("upstream factor 3", torch.float32, 7, 0.25, "plain")
    monkeypatch.setattr(verify, "cases", lambda **_: [one])
    version = verify.importlib.metadata.version

    def not_installed(name):
        if name == "sgp-kernels":
            raise verify.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(verify.importlib.metadata, "version", not_installed)
    output = tmp_path / "verify.json"
    assert verify.run(quick=True, output=output) == 0
    assert json.loads(output.read_text())["versions"]["sgp-kernels"] is None
    monkeypatch.setattr(verify_cases, "check", None)  # to call it fails
    assert verify.run(quick=True, output=tmp_path) == 2
    assert "Is a directory" in capsys.readouterr().out
