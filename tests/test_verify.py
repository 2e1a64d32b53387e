"""`sgp verify` and `sgp doctor`: what they print, and that verify can fail."""

import json
import os

import torch

from sgp import backend, doctor, losses, verify


def test_verify_passes_here_and_records_every_case(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "QUICK", (7, 8_193))  # one vocabulary for each form
    output = tmp_path / "verify.json"
    assert verify.run(quick=True, output=output) == 0
    shown = capsys.readouterr().out
    assert "all passed" in shown
    record = json.loads(output.read_text())
    assert record["machine"]
    seen = {(c["path"], c["dtype"], c["V"], c["options"]) for c in record["cases"]}
    assert len(seen) == len(verify.PATHS) * len(verify.DTYPES) * 2 * len(verify.OPTIONS)
    assert all(case["passed"] for case in record["cases"])


def test_verify_fails_when_a_kernel_is_wrong(capsys, monkeypatch):
    """A gradient 1 % off, and a gradient on a context row, are both found."""
    monkeypatch.setattr(verify, "QUICK", (7,))
    right = losses.cross_entropy

    def slightly_off(logits, target, **options):
        return right(logits, target, **options) + 0.01 * (logits - logits.detach()).sum()

    monkeypatch.setattr(verify, "cross_entropy", slightly_off)
    assert verify.run(quick=True) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setattr(verify, "QUICK", (7,))
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
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    for name in doctor.VARIABLES:
        assert name in shown
    _, why = backend.explain(torch.device("cpu"), torch.float32)
    assert why in shown


def test_doctor_fails_where_a_forced_backend_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert doctor.run() == 1
    assert "Triton is not installed" in capsys.readouterr().out
