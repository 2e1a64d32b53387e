"""A patched model under transformers.Trainer: the losses of the stock model."""

from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import sgp
from sgp.huggingface import AuditCallback, AuditError, patch
from sgp.huggingface.callback import _first_rows as first_rows
from sgp.huggingface.late_logits import LateLogits
from tests.audited import Tokenizer, codes
from tests.families import V, make


class Rows(torch.utils.data.Dataset):
    """Sixteen rows with different numbers of targets."""

    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(3, V, (16, 12), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: 2 + i % 7] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def train(model, folder, *, data=None, callbacks=(), collator=None, compute_loss_func=None, **more):
    """The loss of each optimizer step, and that of an evaluation."""
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=5,
        disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data or Rows(), eval_dataset=Rows(),
        callbacks=list(callbacks), data_collator=collator, compute_loss_func=compute_loss_func,
    )  # fmt: skip
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], evaluated


@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_losses_of_a_run(family, mode, accumulation, tmp_path):
    options = {"gradient_accumulation_steps": accumulation}
    stock, evaluated = train(make(family), tmp_path, **options)
    model = make(family)
    patch(model, mode=mode)
    losses, loss = train(model, tmp_path, **options)
    assert len(losses) == 4
    assert losses == pytest.approx(stock, rel=1e-4)
    assert loss == pytest.approx(evaluated, rel=1e-4)


def test_label_smoothing_of_the_trainer_is_stock_and_said(tmp_path, monkeypatch):
    """The trainer takes the labels away and smooths over all logits."""
    monkeypatch.setattr("sgp.huggingface.callers.SAID", set())
    stock, _ = train(make("llama"), tmp_path, label_smoothing_factor=0.1)
    model = make("llama")
    patch(model)
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        losses, _ = train(model, tmp_path, label_smoothing_factor=0.1)
    assert losses == pytest.approx(stock, rel=1e-6)


def caller_loss(outputs, labels, num_items_in_batch=None):
    logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("who", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_with_a_loss_of_its_own_needs_logits(who, tmp_path, monkeypatch):
    """It takes the labels away, but not the collator's selection, and then wants all logits."""
    monkeypatch.setattr("sgp.huggingface.callers.SAID", set())
    options = {"collator": sgp.Collator(), "remove_unused_columns": False}
    options |= {who: 0.1 if who == "label_smoothing_factor" else caller_loss}
    stock, evaluated = train(make("llama"), tmp_path, **options | {"collator": None})
    model = make("llama")
    patch(model, mode="fused")
    with pytest.raises(RuntimeError, match=rf"Trainer's {who} computes the loss .* mode='rows'"):
        train(model, tmp_path, **options)
    patch(model, mode="rows")
    with pytest.warns(UserWarning, match="the patch does nothing"):
        losses, loss = train(model, tmp_path, **options)
    assert losses == pytest.approx(stock, rel=1e-4)
    assert loss == pytest.approx(evaluated, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("adapted", [False, True])
def test_an_evaluation_makes_the_logits_that_are_used(mode, adapted, tmp_path, monkeypatch):
    """Under bfloat16 accelerate casts them, and PEFT stands between: they wait all the same."""

    waiting, made = [], []
    whole, now = LateLogits.whole, LateLogits._now
    monkeypatch.setattr(LateLogits, "whole", lambda late: waiting.append(late) or whole(late))
    monkeypatch.setattr(LateLogits, "_now", lambda late: made.append(late) or now(late))

    def run(patched, **more):
        model = make("llama")
        if adapted:
            torch.manual_seed(3)
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
        if patched:
            patch(model, mode=mode)
        seen = []

        def metrics(found):
            seen.append(torch.from_numpy(found.predictions))
            return {}

        if not more:
            more = {"compute_metrics": metrics}
        loss = evaluate(model, tmp_path, **more)
        return loss, seen

    loss, _ = run(True, prediction_loss_only=True)
    assert len(waiting) == 4
    assert not made
    stock, logits = run(False)
    found, used = run(True)
    assert made
    assert loss == pytest.approx(stock, rel=1e-2)
    assert found == loss
    assert torch.equal(used[0], logits[0])


def evaluate(model, folder, *, data=None, compute_metrics=None, **more):
    """Trainer's loss of an evaluation."""
    arguments = TrainingArguments(
        output_dir=folder, per_device_eval_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, **{"bf16": True} | more,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, eval_dataset=data or Rows(), compute_metrics=compute_metrics
    )
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_batches_without_targets_are_left_out_of_the_mean(mode, tmp_path):
    rows = [Rows()[i] for i in range(8)]
    for row in rows[4:]:
        row["labels"].fill_(-100)
    model = make("llama")
    stock = evaluate(model, tmp_path, data=rows, bf16=False)
    patch(model, mode=mode)
    assert evaluate(model, tmp_path, data=rows, bf16=False) == pytest.approx(stock, rel=1e-5)


class ShiftedTwice(Rows):
    """Labels that the model moves once more."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        row["labels"] = torch.cat([row["labels"][1:], torch.tensor([-100])])
        return row


@pytest.mark.parametrize("patched", [False, True])
def test_the_callback_audits_the_first_batch(patched, tmp_path, caplog):
    stock, _ = train(make("llama"), tmp_path)
    model = make("llama")
    if patched:
        patch(model)
    callback = AuditCallback()
    hooks = len(model._forward_pre_hooks)
    losses, _ = train(model, tmp_path, callbacks=[callback])
    assert losses == pytest.approx(stock, rel=1e-4), "the run is the same"
    assert len(model._forward_pre_hooks) == hooks
    assert callback.report.errors == []
    assert len(callback.report.tokens) == 2
    assert "Where the gradient went" in (tmp_path / "audit.html").read_text()
    callback = AuditCallback(page=tmp_path / "new" / "page.html", rows=1)
    with caplog.at_level("ERROR", "sgp.huggingface"):
        train(make("llama"), tmp_path, data=ShiftedTwice(), callbacks=[callback])
    assert "error: labels-shifted-twice (row 0" in caplog.text
    assert len(callback.report.tokens) == 1
    assert (tmp_path / "new" / "page.html").exists()


def test_what_many_rows_share_is_one_line(tmp_path, caplog):
    callback = AuditCallback(page=tmp_path / "audit.html")
    with caplog.at_level("ERROR", "sgp.huggingface"):
        train(make("llama"), tmp_path, data=ShiftedTwice(), callbacks=[callback])
    (line,) = [r.getMessage() for r in caplog.records if "labels-shifted-twice" in r.getMessage()]
    assert line.startswith("error: labels-shifted-twice (2 rows, 0 to 1): ")
    with pytest.raises(AuditError) as error:
        train(model=make("llama"), folder=tmp_path, data=ShiftedTwice(),
              callbacks=[AuditCallback(stop_on_errors=True)])  # fmt: skip
    assert str(error.value).count("labels-shifted-twice") == 1
    assert line in str(error.value)


def test_the_callback_passes_its_options_on(tmp_path):
    """Codes and parameters that are ignored, severities, and the dtype of the pass."""
    asked = {"severity": {"no-eos": "error"}}
    for options, said in (({}, "warning"), (asked, "error"), ({"ignore": ["no-eos"]}, None)):
        callback = AuditCallback(Tokenizer(), **options)
        Run(tmp_path, callback).forward()
        assert [f.severity for f in callback.report.findings] == ([said] if said else [])
    with pytest.raises(AuditError, match="error: no-eos"):
        Run(tmp_path, AuditCallback(Tokenizer(), stop_on_errors=True, **asked)).forward()
    with pytest.raises(ValueError, match="'no-oes'"):
        AuditCallback(severity={"no-oes": "note"})
    with pytest.raises(ValueError, match="'no-oes', which is no finding"):
        AuditCallback(ignore=["no-oes"])
    with pytest.raises(TypeError, match="ignore is 'no-eos'"):
        AuditCallback(ignore="no-eos")
    for autocast in ("bf16", torch.int8):
        with pytest.raises(TypeError, match=r"expected a torch\.dtype"):
            AuditCallback(autocast=autocast)
    for length, said in ((12, "warning"), (13, "error"), (None, "warning")):
        callback = AuditCallback(Tokenizer(), max_length=length)
        Run(tmp_path, callback).forward()
        assert [f.severity for f in callback.report.findings] == [said]
    seen = []
    callback = AuditCallback(autocast=torch.bfloat16)
    run = Run(tmp_path, callback)
    layer = run.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    run.forward()
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("word", ["noeos", "*.visual.*", "model.layer"])
def test_a_word_to_ignore_that_fits_nothing_stops_a_run_before_its_first_batch(tmp_path, word):
    """It would silence the audit, which then only says that it could not be made."""
    for fits in ("lm_head", "*.layers.0.*", "no-eos"):
        Run(tmp_path, AuditCallback(ignore=[fits]))
    callback = AuditCallback(ignore=["lm_head", word])
    with pytest.raises(ValueError, match="which is no finding and fits no parameter") as error:
        Run(tmp_path, callback)
    assert repr(word) in str(error.value)


@pytest.mark.parametrize("shape", [(3, 4, 9), (4, 4, 9), (4, 9), (1, 9)])
def test_of_positions_the_first_rows_are_taken_whatever_their_axes(shape):
    ids = torch.arange(36).view(4, 9)
    images = {"pixel_values": torch.zeros(7, 5)}
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.zeros(shape), "note": "x"}
    found = first_rows(batch, 2)
    assert torch.equal(found["input_ids"], ids[:2])
    B = shape[-2]
    assert found["position_ids"].shape == (*shape[:-2], min(2, B), 9)
    assert found["note"] == "x"
    whole = first_rows(batch | images, 2)
    assert torch.equal(whole["input_ids"], ids), "no one knows whose image it is"
    assert first_rows(batch, 5)["labels"] is ids


def test_the_callback_stops_a_run(tmp_path):
    model = make("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(AuditError, match="the first batch has errors: error: labels-shifted-twice"):
        train(model, tmp_path, data=ShiftedTwice(), callbacks=[AuditCallback(stop_on_errors=True)])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model._forward_pre_hooks


class Run:
    """The beginning and the end of a training run as a callback sees it, without a Trainer."""

    def __init__(self, folder, callback, *, first_process=True, tokenizer=None):
        self.model, self.callback = make("llama"), callback
        state = SimpleNamespace(is_world_process_zero=first_process)
        self.given = SimpleNamespace(output_dir=str(folder)), state, None
        callback.on_train_begin(*self.given, model=self.model, processing_class=tokenizer)

    def forward(self, **changes):
        row = Rows()[0]
        batch = {"input_ids": row["input_ids"][None], "labels": row["labels"][None]}
        return self.model(**{**batch, **changes})

    def end(self):
        self.callback.on_train_end(*self.given, model=self.model)


def test_the_callback_audits_once_and_on_the_first_process_only(tmp_path):
    callback = AuditCallback()
    run = Run(tmp_path, callback)
    run.forward()
    first = callback.report
    assert first is not None
    run.forward()
    assert callback.report is first
    other = AuditCallback(page=tmp_path / "other.html")
    Run(tmp_path, other, first_process=False).forward()
    assert other.report is None
    assert not (tmp_path / "other.html").exists()


def test_the_callback_of_a_run_without_a_batch_leaves_no_hook(tmp_path):
    callback = AuditCallback()
    run = Run(tmp_path, callback)
    run.end()
    assert not run.model._forward_pre_hooks
    run.forward()
    assert callback.report is None


@pytest.mark.parametrize("stop", [False, True])
def test_a_batch_that_cannot_be_audited_stops_a_run_only_where_that_was_asked(
    stop, tmp_path, caplog
):
    run = Run(tmp_path, AuditCallback(stop_on_errors=stop))
    if stop:
        with pytest.raises(AuditError, match=r"could not be audited: .*expected labels"):
            run.forward(labels=None)
    else:
        with caplog.at_level("WARNING", "sgp.huggingface"):
            run.forward(labels=None)
        assert "could not be audited: " in caplog.text


def test_the_callback_asks_the_trainers_tokenizer(tmp_path):
    """Without one it would not know where a text should end."""
    for own, given in ((None, Tokenizer()), (Tokenizer(), None)):
        callback = AuditCallback(own)
        Run(tmp_path, callback, tokenizer=given).forward()
        assert codes(callback.report) == {"no-eos"}
    callback = AuditCallback()
    Run(tmp_path, callback).forward()
    assert codes(callback.report) == set()


def test_a_mask_that_the_trainer_removes_is_missed(tmp_path):
    """Without it every token would carry loss."""
    data = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}] * 8
    with pytest.raises(ValueError, match=r"which tokens carry loss\?.*remove_unused_columns=False"):
        train(make("llama"), tmp_path, data=data, collator=sgp.Collator())


@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_collator_under_the_trainer(mode, packed, tmp_path):
    """Its batches, with the selection, train as the default collator's do."""
    stock, evaluated = train(make("llama"), tmp_path)
    model = make("llama")
    patch(model, mode=mode)
    audit = AuditCallback(stop_on_errors=True)
    options = {"collator": sgp.Collator(packed=packed), "remove_unused_columns": False}
    losses, loss = train(model, tmp_path, callbacks=[audit], **options)
    assert losses == pytest.approx(stock, rel=1e-4)
    assert loss == pytest.approx(evaluated, rel=1e-4)
    assert audit.report.errors == []
