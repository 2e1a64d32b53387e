"""A patched model under transformers.Trainer: the losses of the stock model."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sgp.huggingface import patch
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


def train(model, folder, **more):
    """The loss of each optimizer step."""
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=5,
        disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
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
    monkeypatch.setattr("sgp.huggingface.patching._warned", False)
    stock, _ = train(make("llama"), tmp_path, label_smoothing_factor=0.1)
    model = make("llama")
    patch(model)
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        losses, _ = train(model, tmp_path, label_smoothing_factor=0.1)
    assert losses == pytest.approx(stock, rel=1e-6)
