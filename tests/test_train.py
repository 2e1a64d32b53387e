"""`sgp train` from its model to its files, on a model and data small enough for a test."""

import copy
import doctest
import importlib
import io
import json
import math
import signal
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sgp.train
from sgp.interrupt import Interrupted, StopRequest
from sgp.train import run as run_module
from sgp.train.batch import Example, collate
from sgp.train.compare import Comparison, Row, compare
from sgp.train.errors import UserError
from sgp.train.loop import LOSSES, Curves, make_learners, pytorch_loss, schedule, train
from sgp.train.memory import cpu_peak
from sgp.train.model import check_head, load, save, split_model, tiny_llama
from sgp.train.options import Options
from sgp.train.report import comparison_heading, comparison_table, write_summary
from sgp.train.run import run
from sgp.train.threads import FreeCores, at_most
from sgp.train.tokenizer import load_or_train, wrap
from tests.families import make

V = 270
MODULES = sorted(path.stem for path in Path(sgp.train.__file__).parent.glob("*.py"))

FUNCTION = """def {name}(x):
    "Return x {word} {number}."
    return x {sign} {number}

"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tests run beside one another; PyTorch's threads would wait for one another by spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder like the standard library's: 80 documented functions, one of them too long."""
    folder = tmp_path_factory.mktemp("library")
    for word, sign in (("plus", "+"), ("times", "*")):
        text = "".join(
            FUNCTION.format(name=f"{word}_{number}", word=word, number=number, sign=sign)
            for number in range(40)
        )
        (folder / f"{word}.py").write_text(text)
    (folder / "long.py").write_text(f'def long():\n    "{"very " * 300}"\n    return 1\n')
    return folder


@pytest.fixture
def options(library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Options(library=library, vocabulary=V, hidden=16, steps=4, out=tmp_path / "out")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(V, 32, seed=0, hidden=16)


@pytest.fixture(scope="module")
def batch(device):
    examples = [
        Example([5, 6, 7], [8, 9, 10, 1], ""),
        Example([5], [11], ""),
        Example([12, 13, 14, 15], [16, 1], ""),
    ]
    return collate(examples).to(torch.device(device))


def summary(options):
    return json.loads((options.out / "summary.json").read_text())


# -- the model --------------------------------------------------------------------------------


def test_weights_follow_from_the_seed_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, again, other = (tiny_llama(V, 32, seed=s, hidden=16).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_head_on_hidden_states_is_the_models_own(model, batch, device):
    check_head(split_model(model.to(device)), batch)


def test_model_that_changes_its_logits_is_refused(device):
    """By more than a scale and a softcap, which are found."""
    capped = make("gemma2").to(device)
    parts = split_model(capped)
    assert (parts.logit_scale, parts.softcap) == (1.0, 3.0)

    def shift(_, __, out):
        out.logits = out.logits + 1
        return out

    capped.register_forward_hook(shift)
    with pytest.raises(UserError, match="by more than a scale and a softcap"):
        split_model(capped)


def test_head_that_does_not_give_the_models_logits_is_refused(batch, device):
    """The parts are tried on the first batch: another cap, and a head that does more."""
    parts = split_model(make("gemma2").to(device).eval())
    check_head(parts, batch)
    with pytest.raises(UserError, match=r"logits differ by up to .* scale 1 and softcap 4\.0"):
        check_head(parts._replace(softcap=4.0), batch)
    parts.head.register_forward_hook(lambda _, __, logits: logits + 1)
    with pytest.raises(UserError, match="logits differ by up to"):
        check_head(parts, batch)


def test_tokenizer_larger_than_the_model_is_refused(model, device):
    batch = collate([Example([5], [V], "")]).to(torch.device(device))
    with pytest.raises(UserError, match=f"token {V} is outside"):
        check_head(split_model(model.to(device)), batch)


def test_model_without_a_plain_head_is_refused(model):
    with pytest.raises(UserError, match=r"no plain nn.Linear as its head \(found: none\)"):
        split_model(model.base_model)
    other = copy.deepcopy(model)
    other.set_output_embeddings(torch.nn.Sequential(other.get_output_embeddings()))
    with pytest.raises(UserError, match=r"\(found: torch.nn.modules.container.Sequential\)"):
        split_model(other)


# -- the two losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "cohere", "granite", "gemma2"])
def test_every_loss_is_the_mean_over_output_tokens(family, batch, device):
    """Of the model's own logits: plain, with a bias, scaled, scaled and capped."""
    parts = split_model(make(family).to(device).eval())
    check_head(parts, batch)
    log_prob = parts.logits(batch).double().log_softmax(-1)
    outputs = [
        (row, column)
        for row in range(len(batch.lengths))
        for column in range(int(batch.context_lengths[row]), int(batch.lengths[row]))
    ]
    each = torch.stack([-log_prob[r, c - 1, batch.input_ids[r, c]] for r, c in outputs])
    total, count = float(each.detach().sum()), len(each)
    weights = list(parts.model.parameters())
    true = torch.autograd.grad(each.mean(), weights, retain_graph=True, allow_unused=True)
    for loss, _ in LOSSES.values():
        assert float(loss(parts, batch, "sum").detach()) == pytest.approx(total, 1e-5)
        mean = loss(parts, batch, "mean")
        assert float(mean.detach()) == pytest.approx(total / count, 1e-5)
        gradients = torch.autograd.grad(mean, weights, allow_unused=True)
        for found, expected in zip(gradients, true, strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize("loss", LOSSES)
def test_lockstep_trains_two_copies_alike(loss, model, batch):
    learners = make_learners(model, lr=1e-2, steps=10, loss=loss)
    assert learners["sgp"].loss is LOSSES[loss][0]
    assert learners["sgp"].parts.model is model
    assert learners["pytorch"].parts.model is not model
    before = learners["sgp"].evaluate([batch])
    with StopRequest(print) as stop:
        curves = train(learners, iter([batch] * 20), steps=10, stop=stop)
    assert len(curves) == 10
    assert max(curves.differences) < 1e-4
    assert loss != "pytorch" or max(curves.differences) == 0, "the control has no difference"
    assert curves.sgp[0] == pytest.approx(before, rel=1e-6)
    assert curves.sgp[-1] < before - 0.5, "did not learn"
    after = {name: learner.evaluate([batch]) for name, learner in learners.items()}
    assert after["sgp"] == pytest.approx(after["pytorch"], abs=1e-4)
    assert after["sgp"] < before - 0.5


def test_a_step_is_clipped_adamw_on_this_batch_alone(model, batch, device):
    one = collate([Example([7], [8, 9, 10], "")]).to(torch.device(device))
    learner = make_learners(model.to(device), lr=1e-2, steps=20)["pytorch"]
    twin = copy.deepcopy(learner.parts.model)
    parts, weights = split_model(twin), list(twin.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    for number, each in enumerate((batch, one, batch)):
        learner.step(each)
        gradients = torch.autograd.grad(pytorch_loss(parts, each), weights)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * min(1.0, 1.0 / float(norm))
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(number, 20)
        optimizer.step()
    for mine, true in zip(learner.parts.model.parameters(), weights, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=2e-5)


def test_evaluation_weighs_tokens_not_batches(model, device):
    learner = make_learners(model, lr=1e-3, steps=1)["sgp"]
    one = collate([Example([5], [6], "")]).to(torch.device(device))
    five = collate([Example([7], [8, 9, 10, 11, 12], "")]).to(torch.device(device))
    a, b = learner.evaluate([one]), learner.evaluate([five])
    assert learner.evaluate([one, five]) == pytest.approx((a + 5 * b) / 6, rel=1e-6)
    assert abs(a - b) > 1e-4, "equal losses would prove nothing"


def test_schedule_warms_up_and_cools_down():
    factors = [schedule(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors.index(max(factors)) in (9, 10)
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert schedule(0, 1) == 1.0


def test_first_loss_that_is_not_finite_is_found():
    assert Curves([1.0, 2.0], [1.0, 2.0]).first_not_finite is None
    assert Curves([1.0, math.nan, math.nan], [1.0, 1.0, math.inf]).first_not_finite == 2


# -- the comparison ---------------------------------------------------------------------------


def test_comparison_measures_three_heads(model, batch, device):
    result = compare(split_model(model.to(device).eval()), batch)
    assert (result.num_tokens, result.num_kept, result.num_padding) == (21, 7, 6)
    assert (result.vocabulary, result.width) == (V, 16)
    all_rows, kept_rows, of_sgp, linear = result.rows
    for row in result.rows:
        assert row.loss == pytest.approx(all_rows.loss, rel=1e-5)
        assert 0 <= row.loss_error < 1e-5
        assert 0 < row.gradient_error < 1e-4
        assert row.seconds > 0
    assert linear.peak_bytes < all_rows.peak_bytes
    assert of_sgp.peak_bytes < all_rows.peak_bytes
    assert kept_rows.peak_bytes < all_rows.peak_bytes


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_comparison_has_the_models_scale_and_cap(family, batch, device):
    parts = split_model(make(family).to(device).eval())
    own = float(pytorch_loss(parts, batch).detach())
    for row in compare(parts, batch).rows:
        assert row.loss == pytest.approx(own, rel=1e-5)
        assert row.loss_error < 1e-5
        assert row.gradient_error < 1e-5


def test_comparison_sees_a_wrong_gradient_and_a_wrong_loss(model, batch, device, monkeypatch):
    from sgp.train import compare as module

    heads = dict(module.HEADS)
    heads["doubled"] = lambda x: 2 * module.all_rows(x)
    heads["first row lost"] = lambda x: module.all_rows(
        x._replace(labels=x.labels.clone().index_fill_(1, torch.tensor(2, device=device), -100))
    )
    monkeypatch.setattr(module, "HEADS", heads)
    rows = {row.name: row for row in compare(split_model(model.to(device).eval()), batch).rows}
    assert rows["doubled"].loss_error == pytest.approx(1.0, rel=1e-4)
    assert rows["doubled"].gradient_error == pytest.approx(1.0, rel=1e-4)
    assert rows["first row lost"].gradient_error > 1e-2


def test_cpu_peak_is_the_most_held_at_one_time(capfd):
    with cpu_peak() as held:
        first = torch.zeros(1 << 20, dtype=torch.uint8)
        del first
        second = torch.zeros(3 << 20, dtype=torch.uint8)
        third = second.clone()
        del second, third
    assert held.peak_bytes == 6 << 20
    assert capfd.readouterr().err == "", "the profiler's library wrote to standard error"


def test_free_cores_are_idle_ones_and_our_own(monkeypatch):
    clock = iter([(100.0, 5.0, 40.0), (110.0, 12.0, 44.0), (100.5, 5.0, 40.5)])
    monkeypatch.setattr(FreeCores, "_now", staticmethod(lambda: next(clock)))
    cores = FreeCores()
    assert cores.count() == pytest.approx((7 + 4) / 10)
    assert cores.count() is None, "half a second is too short to tell"
    monkeypatch.setattr(FreeCores, "_now", staticmethod(lambda: None))
    assert FreeCores().count() is None, "not Linux"


def test_a_core_that_waits_for_a_disk_is_idle(tmp_path, monkeypatch):
    """The fields of /proc/stat: user, nice, system, idle, iowait, irq; in hundredths."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  900 10 90 4000 2000 5 5 0 0 0\ncpu0 1 1 1 1 1 1 1 0 0 0\n")
    monkeypatch.setattr("sgp.train.threads.Path", lambda _: stat)
    monkeypatch.setattr("sgp.train.threads.os.sysconf", lambda _: 100)
    assert FreeCores._now()[2] == pytest.approx((4000 + 2000) / 100)


@pytest.mark.parametrize(("free", "count"), [(None, 3), (0.0, 1), (1.9, 2), (9.0, 3)])
def test_threads_are_at_most_the_free_cores_and_restored(free, count):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with at_most(free) as given:
            assert given == torch.get_num_threads() == count
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("free", "said"), [(0.4, True), (None, False), (9.0, False)])
def test_fewer_threads_are_explained(free, said, options, monkeypatch, capsys):
    monkeypatch.setattr(FreeCores, "count", lambda _: free)
    monkeypatch.setattr(run_module, "_start", raise_interrupt)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(Interrupted):
            run(options)
    finally:
        torch.set_num_threads(before)
    line = "threads: 1 in place of 2: other programs leave about 0.4 cores free"
    assert (line in capsys.readouterr().out) == said


def test_table_fits_a_narrow_terminal():
    from rich.console import Console

    names = ("PyTorch, all rows", "PyTorch, kept rows", "sgp, kept rows", "sgp, linear head")
    rows = [Row(name, 10.123456, 1.2e-7, 3.4e-7, 1.2345, 123_456_789_012) for name in names]
    rows[1] = rows[1]._replace(peak_bytes=None)
    comparison = Comparison(rows, 1000, 250, 100, 262_144, 4096)
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = console.file.getvalue()
    assert "…" not in text
    assert "117738" in text
    assert "1234 " in text
    assert "n/a" in text
    assert "25.0% kept" in comparison_heading(comparison)
    assert "650 are context and 100 padding" in comparison_heading(comparison)


# -- the run ----------------------------------------------------------------------------------


def test_run_learns_and_writes_every_file(options, capsys):
    options = Options(**vars(options) | {"steps": 25, "lr": 1e-2})
    assert run(options) == 0
    out = capsys.readouterr().out
    assert "80 functions" not in out
    assert "81 functions of the Python standard library" in out
    assert "1 pair with a context that fills the window of 128: skipped" in out
    for text in ("% kept)", "sgp, linear head", "held-out loss", "largest difference", "saved in"):
        assert text in out
    written = summary(options)
    assert written["ended"] == "complete"
    assert written["steps"] == len(written["losses"]["sgp"]) == 25
    assert written["losses"]["largest_difference"] < 1e-4
    before, after = written["held_out"]["before"], written["held_out"]["after"]
    assert after["sgp"] < before["sgp"] - 1, "did not learn"
    assert after["sgp"] == pytest.approx(after["pytorch"], abs=1e-3)
    assert written["data"]["context_fills_window"] == 1
    assert written["data"]["train"] + written["data"]["held_out"] == 80
    assert [row["name"] for row in written["head"]["rows"]][-1] == "sgp, linear head"
    assert written["arguments"]["lr"] == 1e-2
    assert written["environment"]["versions"]["torch"] == metadata.version("torch")
    image = (options.out / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    assert not list(options.out.glob("*.tmp"))


def test_saved_model_reloads_and_trains_on(options, tmp_path):
    assert run(options) == 0
    model, tokenizer = load(str(options.out / "model"))
    assert len(tokenizer) == V
    text = 'def f(x):\n    "😀"\n'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([tokenizer("def plus_1(x):\n")["input_ids"]])
    assert model(ids).logits.shape == (1, ids.shape[1], V)
    first = summary(options)
    data = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"def f{i}(x):", "completion": f" return {i}"} for i in range(20)]
    data.write_text("\n".join(map(json.dumps, lines)))
    again = Options(data=data, model=str(options.out / "model"), steps=2, out=tmp_path / "2")
    assert run(again) == 0
    assert summary(again)["arguments"]["lr"] == 5e-5
    assert summary(again)["held_out"]["before"]["sgp"] < first["held_out"]["before"]["sgp"]


def test_same_seed_same_losses_and_any_seed_the_same_data(options, tmp_path):
    written = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        one = Options(**vars(options) | {"out": tmp_path / name, "seed": seed})
        assert run(one) == 0
        written[name] = summary(one)
    losses = {name: content["losses"]["sgp"] for name, content in written.items()}
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-5)
    assert losses["a"] != pytest.approx(losses["c"], rel=1e-5)
    assert written["a"]["data"] == written["c"]["data"]


# -- interruption -----------------------------------------------------------------------------


def interrupting(monkeypatch, action, at):
    """Makes `action` happen in sgp's training step number `at`, before it is done."""
    from sgp.train import loop

    calls = []
    original, name = loop.LOSSES["sgp-linear"]

    def loss(parts, batch, reduction="mean"):
        if reduction == "mean":
            calls.append(1)
            if len(calls) == at:
                action()
        return original(parts, batch, reduction)

    monkeypatch.setitem(loop.LOSSES, "sgp-linear", (loss, name))


def press():
    signal.raise_signal(signal.SIGINT)


def press_twice():
    press()
    press()


def raise_interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "steps"),
    [(press, 3), (press_twice, 2), (raise_interrupt, 2)],
    ids=["Ctrl-C finishes the step", "twice stops at once", "exception stops at once"],
)
def test_interrupted_run_keeps_what_it_had(options, monkeypatch, capsys, action, steps):
    interrupting(monkeypatch, action, at=3)
    handler = signal.getsignal(signal.SIGINT)
    saved = rf"^after {steps} of 1000 steps; saved in .*: model/, loss.png, summary.json$"
    with pytest.raises(Interrupted, match=saved):
        run(Options(**vars(options) | {"steps": 1000}))
    assert signal.getsignal(signal.SIGINT) is handler
    written = summary(options)
    assert (written["ended"], written["steps"]) == ("interrupted", steps)
    assert written["held_out"]["after"]["sgp"] > 0
    assert (options.out / "loss.png").exists()
    load(str(options.out / "model"))
    output = capsys.readouterr()
    assert f"interrupted after {steps} of 1000 steps" in output.out
    assert ("stopping after this step" in output.err) == (action is not raise_interrupt)


def test_interrupt_before_the_first_step_saves_nothing(options, monkeypatch):
    interrupting(monkeypatch, raise_interrupt, at=1)
    with pytest.raises(Interrupted, match=r"^before the first step; nothing was saved$"):
        run(options)
    assert list(options.out.iterdir()) == []


def test_ctrl_c_while_the_held_out_loss_is_measured_keeps_the_rest(options, monkeypatch, capsys):
    calls = []
    original = run_module._evaluate

    def evaluate(job):
        calls.append(1)
        if len(calls) == 2:
            press()
        return original(job)

    monkeypatch.setattr(run_module, "_evaluate", evaluate)
    with pytest.raises(Interrupted, match=r"model/, loss.png, summary.json$"):
        run(options)
    assert summary(options)["held_out"]["after"] is None
    assert summary(options)["steps"] == options.steps
    assert "not measured" in capsys.readouterr().out
    load(str(options.out / "model"))


def test_ctrl_c_while_saving_waits_for_the_files(options, monkeypatch, capsys):
    original = run_module.save

    def slow_save(*arguments):
        press()
        original(*arguments)

    monkeypatch.setattr(run_module, "save", slow_save)
    with pytest.raises(Interrupted, match=r"model/, loss.png, summary.json$"):
        run(options)
    assert "saving; one moment" in capsys.readouterr().err
    load(str(options.out / "model"))
    assert summary(options)["steps"] == options.steps


def test_the_handler_of_before_is_put_back():
    """In a notebook, say, where Ctrl-C stops a cell and not the process."""
    before = signal.getsignal(signal.SIGINT)

    def of_the_caller(*_):
        """Stops a cell."""

    signal.signal(signal.SIGINT, of_the_caller)
    try:
        with StopRequest(print):
            assert signal.getsignal(signal.SIGINT) is not of_the_caller
        assert signal.getsignal(signal.SIGINT) is of_the_caller
    finally:
        signal.signal(signal.SIGINT, before)


def test_ignored_interrupts_stay_ignored():
    """A script's background jobs are to live when somebody stops the script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(print) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_outside_the_main_thread(options):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run(options)))
    thread.start()
    thread.join()
    assert codes == [0]


# -- what cannot be used ----------------------------------------------------------------------


def jsonl(path, *pairs):
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in pairs))
    return path


def refused(options, **changes):
    with pytest.raises(UserError) as caught:
        run(Options(**vars(options) | changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_contexts_that_all_fill_the_window_are_an_error(options, tmp_path):
    data = jsonl(tmp_path / "d.jsonl", ("x" * 5000, "y"), ("z" * 5000, "y"))
    message = refused(options, data=data)
    assert f"{data}: 0 usable of 2 pairs" in message
    assert "2 have a context that fills the window of 128 tokens: raise --max-length" in message


def test_one_context_that_fills_the_window_has_it(options, tmp_path):
    data = jsonl(tmp_path / "d.jsonl", ("x" * 5000, "y"), ("z", "y"))
    message = refused(options, data=data)
    assert "1 usable of 2 pairs, but one to train on and one to hold out are needed; 1 has a" in (
        message
    )


def test_one_pair_is_too_few(options, tmp_path):
    data = jsonl(tmp_path / "d.jsonl", ("a", "b"), ("a", "b"))
    assert "1 usable of 2 pairs, but one to train on and one to hold out" in refused(
        options, data=data
    )


def test_skipped_lines_are_reported(options, tmp_path, capsys):
    data = jsonl(tmp_path / "d.jsonl", ("a", "b"), ("c", ""), ("d", "e"))
    assert run(Options(**vars(options) | {"data": data})) == 0
    assert "1 line skipped: empty completion (line 2)" in capsys.readouterr().out
    assert summary(options)["data"]["unusable_lines"] == 1


def test_output_folder_is_checked_before_the_work(options, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "prepare", None)  # calling it would be a TypeError
    file = tmp_path / "file"
    file.write_text("")
    assert f"--out {file}: {file} is a file" in refused(options, out=file)
    assert f"--out {file / 'x'}: {file} is a file" in refused(options, out=file / "x")
    new = tmp_path / "new" / "deep"
    with pytest.raises(TypeError):
        run(Options(**vars(options) | {"out": new}))
    assert not (tmp_path / "new").exists(), "nothing is left of the trial"

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied", str(new))

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    message = f"--out {new}: cannot write {new}: Permission denied"
    assert message in refused(options, out=new)
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = refused(options)
    assert "needs tokenizers; in your clone of sgp, run" in message
    assert "pip install -e '.[train]'" in message


def test_empty_library_is_an_error(options, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "no Python source" in refused(options, library=tmp_path / "nothing")


@pytest.mark.parametrize("name", ["./missing", "a/b/c", "~/missing"])
def test_missing_model_folder(options, name):
    assert f"--model {name}: no such folder" in refused(options, model=name)


def test_model_folder_without_a_model(options, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--model {tmp_path / 'empty'}: " in refused(options, model=str(tmp_path / "empty"))


def test_a_model_folder_in_the_home_folder(options, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no such folder" not in refused(options, model="~/empty"), "it is there"


def test_window_of_a_given_model(options, model, tmp_path, capsys):
    tokenizer = wrap(load_or_train(["def f(): pass"], size=V, folder=None))
    folder = tmp_path / "model"
    save(split_model(model), tokenizer, folder)
    message = refused(options, model=str(folder), max_length=33)
    assert message == f"--max-length 33 is more than the 32 positions of --model {folder}"
    data = jsonl(tmp_path / "d.jsonl", ("a", "b" * 50), ("x" * 50, "y"), ("c", "d"))
    assert run(Options(**vars(options) | {"model": str(folder), "data": data})) == 0
    out = capsys.readouterr().out
    assert "1 pair with a completion that passes the window of 32: cut there" in out
    assert "1 pair with a context that fills the window of 32: skipped" in out


def test_scaled_and_capped_models_are_trained(options, tmp_path):
    """`--model` takes what `patch` takes."""
    tokenizer = wrap(load_or_train(["def f(): pass"], size=V, folder=None))
    data = jsonl(tmp_path / "d.jsonl", *((f"{i}=", str(i)) for i in range(8)))
    for family, expected in (("cohere", (0.25, None)), ("gemma2", (1.0, 3.0))):
        folder = tmp_path / family
        parts = split_model(make(family, vocab_size=V).eval())
        assert (parts.logit_scale, parts.softcap) == expected
        save(parts, tokenizer, folder)
        one = Options(**vars(options) | {"model": str(folder), "data": data, "steps": 2})
        assert run(one) == 0
        assert summary(one)["losses"]["largest_difference"] < 1e-4
        assert max(row["gradient_error"] for row in summary(one)["head"]["rows"]) < 1e-5


# -- small things -----------------------------------------------------------------------------


def test_summary_is_strict_json(tmp_path):
    path = tmp_path / "s.json"
    write_summary(path, {"a": [math.nan, {"b": -math.inf}], "c": (1.5,)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [None, {"b": None}],
        "c": [1.5],
    }


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "sgp.train" if module == "__init__" else f"sgp.train.{module}"
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0
