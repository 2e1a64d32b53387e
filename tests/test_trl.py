"""sgp in TRL: the log-probabilities, metrics and losses of TRL's own functions."""

import copy
import functools
import re
import runpy

import peft
import pytest
import torch
import trl
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

import sgp.trl
from sgp.huggingface import UnsupportedModelError, callers, patch
from tests.families import V, make, make_batch
from tests.toy_trl import COMMON, numbers_as_text, quiet

RUNS = ({}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 64})
FIELDS = ("log_probs", "entropy", "is_top1")


def run(model, batch, **more):
    """A fused output, and the gradients of a loss of its log-probabilities and entropies."""
    model.zero_grad()
    out = model(**batch, fused_lm_head=True, **more)
    (out.loss + 0.1 * (out.log_probs.exp() * out.entropy).sum()).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.core
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "granite", "falcon_h1", "mixtral", "gpt2", "phi"]
)
def test_the_fused_head_is_trls(family, temperature):
    model, batch = make(family), make_batch()
    if model.get_output_embeddings().bias is not None:  # zeros when it is made
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    fields = FIELDS if family == "gemma2" else (*FIELDS, "mean_logits")
    add_fused_lm_head(model, temperature, outputs=fields)
    expected, true = run(model, batch)
    divided, _ = run(model, batch, num_items_in_batch=50)
    sgp.trl.add_fused_lm_head(model, temperature, outputs=fields)
    found, gradients = run(model, batch)
    for name in (*fields, "label_mask", "loss"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=2e-5, atol=1e-5
        )
    assert run(model, batch, num_items_in_batch=50)[0].loss.item() == pytest.approx(
        divided.loss.item(), rel=2e-5
    )
    largest = max(g.abs().max() for g in true.values())
    for name, gradient in true.items():
        error = (gradients[name] - gradient).abs().max()
        assert error <= 5e-5 * gradient.abs().max().clamp(min=1e-2 * largest), name
    assert model(**batch).logits.shape[-1] == V, "without fused_lm_head it is the model's own"


def test_only_scored_rows_reach_the_head(monkeypatch):
    model, batch = make("llama"), make_batch()
    sgp.trl.add_fused_lm_head(model)
    rows = []
    inner = sgp.trl.linear_token_log_probs

    def spy(hidden, weight, target, **options):
        hidden = hidden.clone()
        hidden.data[target == -100] = float("nan")  # a row that is read would show
        rows.append(int((target != -100).sum()))
        return inner(hidden, weight, target, **options)

    monkeypatch.setattr(sgp.trl, "linear_token_log_probs", spy)
    out = model(**batch, fused_lm_head=True)
    assert out.loss.isfinite()
    assert rows == [int(out.label_mask.sum())]


def test_a_budget_reaches_the_head_and_changes_nothing(budgets):
    model, batch = make("llama"), make_batch()
    sgp.trl.add_fused_lm_head(model, outputs=FIELDS)
    expected, true = run(model, batch)
    sgp.trl.add_fused_lm_head(model, outputs=FIELDS, memory_budget=1)
    with pytest.raises(ValueError, match="memory_budget = 1; the least that") as said:
        run(model, batch)
    least = int(re.search(r"take is (\d+) bytes", str(said.value))[1])
    sgp.trl.add_fused_lm_head(model, outputs=FIELDS, memory_budget=least)
    budgets.clear()
    found, gradients = run(model, batch)
    assert {*budgets} == {least}
    for name in (*FIELDS, "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    for name, gradient in true.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    for budget in (0, True, 1.5, "1 GiB"):
        with pytest.raises((ValueError, TypeError), match=r"head: memory_budget = .*; expected"):
            sgp.trl.add_fused_lm_head(model, memory_budget=budget)


@pytest.fixture(scope="module")
def data():
    """Prompts and completions of numbers, and a tokenizer for them."""
    return numbers_as_text()


def train(kind, model, data, folder, **more):
    """The logs of a run."""
    tokenizer, rows = data
    arguments = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", seed=3,
        completion_only_loss=True, disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = kind(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_a_trainers_budget_reaches_the_head(data, tmp_path, budgets):
    expected = quiet(lambda: train(sgp.trl.SFTTrainer, make("llama"), data, tmp_path))
    budgets.clear()
    kind = functools.partial(sgp.trl.SFTTrainer, memory_budget=60_000)
    found = quiet(lambda: train(kind, make("llama"), data, tmp_path))
    assert {*budgets} == {60_000}
    assert [log["loss"] for log in found] == pytest.approx([log["loss"] for log in expected])
    with pytest.raises(TypeError, match=r"sgp\.trl\.SFTTrainer: memory_budget = '1 GiB'; expected"):
        sgp.trl.SFTTrainer(memory_budget="1 GiB")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_sft_logs_what_trls_trainer_logs(family, options, data, tmp_path):
    expected = quiet(lambda: train(trl.SFTTrainer, make(family), data, tmp_path, **options))
    found = quiet(lambda: train(sgp.trl.SFTTrainer, make(family), data, tmp_path, **options))
    assert len(found) == len(expected) >= 2
    for log, true in zip(found, expected, strict=True):
        assert set(log) == set(true)
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert log[name] == pytest.approx(true[name], rel=1e-4), name


def fused(model, batch):
    """A fused output, and the gradients of what is trained."""
    model.zero_grad()
    out = model(**batch, fused_lm_head=True)
    if out.loss.requires_grad:
        (out.loss + 0.1 * (out.log_probs.exp() * out.entropy).sum()).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("modules", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_a_head_that_peft_trains_whole(modules):
    """The copy of the adapter in use, or, without adapters, the head that was."""
    batch = make_batch()
    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    found = {}
    for add in (add_fused_lm_head, sgp.trl.add_fused_lm_head):
        config = peft.LoraConfig(**lora, modules_to_save=modules)
        model = quiet(lambda config=config: peft.get_peft_model(make("llama"), config))
        add(model.get_base_model(), outputs=(*FIELDS, "mean_logits"))
        model.add_adapter("late", config)
        head = model.get_base_model().get_output_embeddings()
        with torch.no_grad():
            for number, copy_of in enumerate(head.modules_to_save.values()):
                copy_of.weight.mul_(0.5 + 0.2 * number)
        outputs = found[add] = [fused(model, batch)]
        with model.disable_adapter():
            outputs.append(fused(model, batch))
        model.set_adapter("late")
        outputs.append(fused(model, batch))
    assert len({round(out.loss.item(), 3) for out, _ in found[add]}) == 3
    for (out, gradients), (expected, true) in zip(*reversed(found.values()), strict=True):
        for name in (*FIELDS, "mean_logits", "loss"):
            torch.testing.assert_close(
                getattr(out, name), getattr(expected, name), rtol=2e-5, atol=1e-5
            )
        assert gradients.keys() == true.keys()
        for name, gradient in true.items():
            error = (gradients[name] - gradient).abs().max()
            assert error <= 5e-5 * gradient.abs().max(), name
    assert any("modules_to_save.late" in name and "lm_head" in name for name in gradients)


def test_sft_with_a_saved_head(data, tmp_path):
    def losses(kind):
        tokenizer, rows = data
        arguments = trl.SFTConfig(output_dir=str(tmp_path), **COMMON)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"])
        return logs_of(
            kind(make("llama"), arguments, train_dataset=rows, processing_class=tokenizer,
                 peft_config=lora)
        )  # fmt: skip

    expected, found = (quiet(lambda k=k: losses(k)) for k in (trl.SFTTrainer, sgp.trl.SFTTrainer))
    assert [log["loss"] for log in found] == pytest.approx([log["loss"] for log in expected])
    assert found[1]["loss"] != found[0]["loss"]


def test_a_patched_model_is_no_hindrance_and_no_help(data, tmp_path, monkeypatch):
    monkeypatch.setattr(callers, "SAID", set())
    expected = quiet(lambda: train(trl.SFTTrainer, make("llama"), data, tmp_path))
    for kind, said in ((sgp.trl.SFTTrainer, False), (trl.SFTTrainer, True)):
        model = make("llama")
        patch(model)
        found = quiet(lambda kind=kind, model=model: train(kind, model, data, tmp_path))
        for log, true in zip(found, expected, strict=True):
            assert log["loss"] == pytest.approx(true["loss"], rel=1e-4)
        assert bool(callers.SAID) == said


def logs_of(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("bf16", [False, True])
def test_dpo(bf16, data, tmp_path):
    tokenizer, rows = data
    pairs = Dataset.from_list(
        [
            {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
            for a, b in zip(rows, rows.select(range(1, len(rows))), strict=False)
        ]
    )

    def make_trainer():
        arguments = trl.DPOConfig(output_dir=str(tmp_path), **COMMON | {"bf16": bf16})
        return trl.DPOTrainer(
            make("llama"), make("llama"), args=arguments, train_dataset=pairs,
            processing_class=tokenizer,
        )  # fmt: skip

    expected = quiet(lambda: logs_of(make_trainer()))
    trainer = quiet(make_trainer)
    asked = ("log_probs", "entropy", "mean_logits", "is_top1")
    sgp.trl.add_fused_lm_head(trainer.model, outputs=asked)
    sgp.trl.add_fused_lm_head(trainer.ref_model)
    found = quiet(lambda: logs_of(trainer))
    assert len(found) == 2
    assert found[0]["rewards/chosen"] == 0, "policy and reference in the same precision"
    steps = 1 if bf16 else 2  # after which TRL's rounding leads elsewhere
    near = 5e-3 if bf16 else 1e-4  # TRL rounds its logits to bf16
    for log, true in zip(found[:steps], expected[:steps], strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "logits/chosen", "entropy"):
            assert log[name] == pytest.approx(true[name], rel=near, abs=near / 10), name


def test_a_copy_has_its_own_weights():
    model, batch = make("llama"), make_batch()
    add_fused_lm_head(model)
    sgp.trl.add_fused_lm_head(model, outputs=FIELDS)
    logits, loss = model(**batch).logits, run(model, batch)[0].loss.item()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(**batch).logits, logits)
    assert run(twin, batch)[0].loss.item() == loss


def test_it_and_a_patch_come_and_go_in_any_order():
    batch = make_batch()
    loss = make("llama")(**batch).loss.item()
    for patched_first in (True, False):
        model = make("llama")
        handle = patch(model, mode="fused") if patched_first else None
        sgp.trl.add_fused_lm_head(model, outputs=FIELDS)
        handle = handle or patch(model, mode="fused")
        out = model(**batch)
        assert out.logits is None
        assert out.loss.item() == pytest.approx(loss, rel=2e-5)
        handle.remove()
        assert model(**batch).logits is not None
        assert run(model, batch)[0].loss.item() == pytest.approx(loss, rel=2e-5)
    model.resize_token_embeddings(V + 1)
    with pytest.raises(RuntimeError, match="the head of LlamaForCausalLM was replaced after"):
        run(model, batch)


def test_a_trl_without_the_fused_output_is_said(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.0.0")
    monkeypatch.delattr(trl.trainer.utils, "FusedCausalLMOutput")
    with pytest.raises(ImportError, match=r"sgp\.trl needs TRL 1\.16 or later; this is 1\.0\.0"):
        runpy.run_path(sgp.trl.__file__)


def test_what_is_refused(monkeypatch):
    model = make("llama")
    with pytest.raises(ValueError, match=r"outputs = .*log_sum_sq_probs.*; expected"):
        sgp.trl.add_fused_lm_head(model, outputs=("log_probs", "log_sum_sq_probs"))
    with pytest.raises(
        UnsupportedModelError, match=r"has a softcap of 3\.0: the mean of its logits"
    ):
        sgp.trl.add_fused_lm_head(make("gemma2"), outputs=("log_probs", "mean_logits"))
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 = True"):
        sgp.trl.add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    with pytest.raises(RuntimeError, match=r"needs TRL 1\.16 or later; this is 1\.15\.2"):
        sgp.trl.add_fused_lm_head(model)
    monkeypatch.setattr(trl, "__version__", "2.0.0")
    with pytest.warns(UserWarning, match=r"is tested with TRL from 1\.16 to before 1\.17") as said:
        sgp.trl.add_fused_lm_head(model)
    assert said[0].filename == __file__
    monkeypatch.undo()
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match=r"is torch.*Sequential; expected a plain"):
        sgp.trl.add_fused_lm_head(model)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    model = quiet(lambda: peft.get_peft_model(make("llama"), lora))
    with pytest.raises(UnsupportedModelError, match=r"is peft.*lora.*Linear; expected a plain"):
        sgp.trl.add_fused_lm_head(model)
