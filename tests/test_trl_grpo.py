"""sgp.trl.GRPOTrainer: the losses, gradients and metrics of TRL's own trainer."""

import inspect
import re
from contextlib import contextmanager

import peft
import pytest
import torch
import transformers
import trl
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

import sgp.trl
from sgp.huggingface import UnsupportedModelError
from tests.families import SIZE, V, make
from tests.toy_trl import COMMON, numbers_as_text, quiet

ASKED = ("log_probs", "entropy")
SOURCE = inspect.getsource(trl.trainer.grpo_trainer)
COMPARED = re.findall(r'self\.loss_type (?:==|in) (\[.*?\]|"\w+")', SOURCE)
LOSSES = sorted(set(re.findall(r'"(\w+)"', " ".join(COMPARED))))
B, PROMPT, T, D = 4, 5, 7, SIZE["hidden_size"]
OPTIONS = {  # attributes of a trainer, those of its arguments with a dot
    "as it comes": {},
    "sequence level": {"importance_sampling_level": "sequence"},
    "beta": {"beta": 0.3, ".use_bias_correction_kl": True},
    "entropy bonus": {"entropy_coef": 0.2, "_entropy_bonus_enabled": True},
    "two-sided clip": {".delta": 1.1},
    "off policy": {"off_policy_mask_threshold": 0.01},
    "high entropy": {"top_entropy_quantile": 0.5},
    "vllm": {"use_vllm": True},
}


@pytest.fixture(scope="module")
def data():
    """Prompts and completions of numbers, and a tokenizer for them."""
    return numbers_as_text()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where a model lies, from which trainers read their reference."""
    folder = tmp_path_factory.mktemp("model")
    quiet(lambda: make("llama").save_pretrained(folder))
    return str(folder)


def make_trainer(kind, model, data, folder, *, peft_config=None, budget=None, **more):
    """A trainer of either kind that likes large numbers."""
    tokenizer, rows = data
    if isinstance(model, str):
        model = transformers.AutoModelForCausalLM.from_pretrained(model).train()
    options = {
        "num_generations": 4, "max_completion_length": 6, "temperature": 0.8,
        "learning_rate": 2e-3, "per_device_eval_batch_size": 4, "gradient_checkpointing": False,
    }  # fmt: skip
    config = quiet(lambda: trl.GRPOConfig(output_dir=str(folder), **COMMON | options | more))
    prompts = rows.select_columns(["prompt"])
    return quiet(
        lambda: kind(
            model, reward, args=config, train_dataset=prompts, eval_dataset=prompts.select([0, 1]),
            processing_class=tokenizer, peft_config=peft_config,
            **({} if budget is None else {"memory_budget": budget}),
        )
    )  # fmt: skip


def reward(completions, **_):
    return [sum(map(int, text.split())) / 100 for text in completions]


@pytest.fixture(scope="module")
def pair(data, saved, tmp_path_factory):
    """TRL's trainer and ours, of equal models."""
    folder = tmp_path_factory.mktemp("out")
    return [make_trainer(k, saved, data, folder) for k in (trl.GRPOTrainer, sgp.trl.GRPOTrainer)]


def make_inputs(trainer, *, old=True, vllm=False, **more):
    """A batch as a trainer hands it to its loss: ragged, with a token of a tool in each row."""
    generator = torch.Generator().manual_seed(4)
    masks = torch.ones(B, PROMPT, dtype=torch.int64), torch.ones(B, T, dtype=torch.int64)
    for b in range(B):
        masks[0][b, :b] = 0  # padded on the left
        masks[1][b, T - b :] = 0  # and on the right
    noise = torch.randn(2, B, T, generator=generator)
    inputs = {
        "prompt_ids": torch.randint(3, V, (B, PROMPT), generator=generator),
        "prompt_mask": masks[0],
        "completion_ids": torch.randint(3, V, (B, T), generator=generator),
        "completion_mask": masks[1],
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.6]),
        "num_items_in_batch": torch.tensor(17.0),
        "tool_mask": torch.ones(B, T, dtype=torch.int64).index_fill(1, torch.tensor([2]), 0),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        out = trainer.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    near = out.log_probs[:, -T:] + 0.3 * noise  # a ratio that is clipped for some tokens
    inputs["ref_per_token_logps"] = near[0]
    if vllm:
        inputs["importance_sampling_ratio"] = (0.1 * noise[0]).exp()
    if old:
        inputs["old_per_token_logps"] = near[1]
    return inputs | more


@contextmanager
def options_of(trainer, options):
    """Attributes of a trainer for as long as this lasts."""
    owners = [(trainer.args, n[1:]) if n[0] == "." else (trainer, n) for n in options]
    before = [getattr(owner, name) for owner, name in owners]
    for (owner, name), value in zip(owners, options.values(), strict=True):
        setattr(owner, name, value)
    yield
    for (owner, name), value in zip(owners, before, strict=True):
        setattr(owner, name, value)


def loss_of(trainer, inputs, **options):
    """The loss of a batch, the gradients, and the metrics that TRL wrote down."""
    trainer.current_gradient_accumulation_steps = 2
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    with options_of(trainer, options):
        loss = trainer.compute_loss(trainer.model_wrapped, inputs)
    loss.backward()
    gradients = {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }
    return loss.detach(), gradients, {k: list(v) for k, v in trainer._metrics["train"].items()}


def assert_same(found, expected, near=5e-5):
    loss, gradients, metrics = found
    true_loss, true_gradients, true_metrics = expected
    torch.testing.assert_close(loss, true_loss, rtol=near, atol=near)
    assert metrics.keys() == true_metrics.keys()
    for name, values in true_metrics.items():
        assert metrics[name] == pytest.approx(values, rel=near, abs=near, nan_ok=True), name
    assert gradients.keys() == true_gradients.keys()
    largest = max(g.abs().max() for g in true_gradients.values())
    for name, gradient in true_gradients.items():
        error = (gradients[name] - gradient).abs().max()
        assert error <= near * gradient.abs().max().clamp(min=1e-2 * largest), name


@pytest.fixture
def heads(monkeypatch):
    """The targets that the losses in the head got, and NaN in every row that they must not read."""
    seen, inner = [], sgp.trl.linear_loss

    def spy(hidden, weight, target, loss_fn, **options):
        hidden = hidden.clone()
        hidden.data[target == -100] = float("nan")
        seen.append((target, options))
        return inner(hidden, weight, target, loss_fn, **options)

    monkeypatch.setattr(sgp.trl, "linear_loss", spy)
    return seen


def test_every_loss_is_known():
    assert set(LOSSES) >= {"bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"}


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradients_and_metrics_are_trls(loss_type, options, pair, heads):
    for old in (True, False):  # False: the first of its iterations
        inputs = make_inputs(pair[0], old=old, vllm="use_vllm" in options)
        expected, found = (loss_of(t, inputs, loss_type=loss_type, **options) for t in pair)
        assert_same(found, expected)
        assert expected[0] != 0
        assert expected[1]["lm_head.weight"].abs().max() > 0
    assert len(heads) == 2, "one of each batch, and none of TRL's"


def test_only_scored_rows_reach_the_head(pair, heads):
    inputs = make_inputs(pair[0])
    loss, gradients, _ = loss_of(pair[1], inputs)
    ((target, _),) = heads
    assert (target != -100).sum() == inputs["completion_mask"].sum()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


class Logits(TorchDispatchMode):
    """The most rows of logits among the tensors of V columns; the weight's transpose has D."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == V and len(x) != D:
                self.rows = max(self.rows, x.numel() // V)
        return out


def test_no_logits_of_all_rows_are_made(pair):
    inputs, made = make_inputs(pair[0]), []
    for trainer in pair:
        with Logits() as mode:
            loss_of(trainer, inputs)
        made.append(mode.rows)
    assert made == [B * (PROMPT + T - 1), inputs["completion_mask"].sum()]


def test_a_batch_without_a_scored_token(pair):
    inputs = make_inputs(pair[0], completion_mask=torch.zeros(B, T, dtype=torch.int64))
    expected, found = (loss_of(t, inputs, beta=0.1) for t in pair)
    assert_same(found, expected)
    assert found[0] == 0


def test_without_gradients_it_is_the_same_loss(pair):
    inputs = make_inputs(pair[0])
    with torch.no_grad():
        losses = [t.compute_loss(t.model, inputs) for t in pair]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert not losses[1].requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, pair, heads):
    found, ran = [], []
    for trainer in pair:
        model = trainer.model
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
        quiet(lambda m=model: m.gradient_checkpointing_enable({"use_reentrant": reentrant}))
        model.enable_input_require_grads()
        found.append(loss_of(trainer, make_inputs(pair[0]), loss_type="grpo"))
        model.disable_input_require_grads()
        quiet(model.gradient_checkpointing_disable)
        handle.remove()
    assert_same(found[1], found[0])
    assert len(ran) == 4 + 1, "twice in each, and once for the inputs"
    assert len(heads) == 1, "the head runs once"


RUNS = {
    "as it comes": {},
    "all at once": {
        "loss_type": "grpo", "beta": 0.04, "num_iterations": 2, "entropy_coef": 0.01,
        "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4,
    },
    "adaptive": {
        "loss_type": "cispo", "use_adaptive_entropy": True, "mask_truncated_completions": True,
        "gradient_checkpointing": True,
    },
    "lora": {"beta": 0.04, "peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=2)},
}  # fmt: skip


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_training_logs_what_trls_trainer_logs(options, data, saved, tmp_path):
    logs = []
    for kind in (trl.GRPOTrainer, sgp.trl.GRPOTrainer):
        trainer = make_trainer(kind, saved, data, tmp_path, max_steps=8, **options)
        quiet(trainer.train)
        logs.append([log for log in trainer.state.log_history if "train_runtime" not in log])
    assert len(logs[0]) == (10 if "eval_steps" in options else 8)
    for found, true in zip(logs[1], logs[0], strict=True):
        assert found.keys() == true.keys()
        for name in true.keys() - {"step_time"}:
            if "runtime" not in name and "per_second" not in name:
                assert found[name] == pytest.approx(true[name], rel=1e-3, abs=1e-4), name
    assert any(abs(log["loss"]) > 1e-3 for log in logs[0] if "loss" in log)


def test_bf16(data, saved, tmp_path):
    losses = {}
    for kind in (trl.GRPOTrainer, sgp.trl.GRPOTrainer):
        trainer = make_trainer(kind, saved, data, tmp_path, beta=0.04, bf16=True, num_iterations=2)
        quiet(trainer.train)
        losses[kind] = [log for log in trainer.state.log_history if "loss" in log]
    found, true = losses[sgp.trl.GRPOTrainer][0], losses[trl.GRPOTrainer][0]
    assert found["kl"] == 0, "policy and reference in the same precision"
    for name in ("loss", "entropy", "reward"):
        assert found[name] == pytest.approx(true[name], rel=1e-2, abs=1e-3), name
    assert len(losses[sgp.trl.GRPOTrainer]) == 2


def test_a_models_load_balancing_goes_trls_way(data, tmp_path, heads):
    found = []
    for kind in (trl.GRPOTrainer, sgp.trl.GRPOTrainer):
        trainer = make_trainer(kind, make("mixtral"), data, tmp_path)
        found.append(loss_of(trainer, make_inputs(trainer, old=False)))
    assert_same(found[1], found[0])
    assert "aux_loss" in found[1][2]
    assert not heads


def make_llava():
    torch.manual_seed(0)
    eyes = transformers.CLIPVisionConfig(
        hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=eyes, text_config=transformers.LlamaConfig(**SIZE), vision_feature_layer=-1,
        image_token_index=V - 1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).train()


def test_a_model_that_sees(data, tmp_path, heads):
    found = []
    for kind in (trl.GRPOTrainer, sgp.trl.GRPOTrainer):
        trainer = make_trainer(kind, make_llava(), data, tmp_path)
        ids = torch.arange(B * PROMPT).view(B, PROMPT) + 3
        ids[:, 1:] = V - 1  # four patches
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(B, 3, 16, 16, generator=generator)
        seen = {"pixel_values": images, "num_images": [1] * B}
        completions = ids.new_full((B, T), 7) + torch.arange(T)
        inputs = {
            "prompt_ids": ids, "prompt_mask": torch.ones_like(ids),
            "completion_ids": completions, "completion_mask": torch.ones_like(completions),
            "advantages": torch.tensor([1.0, -0.5, 0.3, -0.6]),
            "num_items_in_batch": torch.tensor(28.0),
        }  # fmt: skip
        found.append(loss_of(trainer, inputs | seen))
    assert_same(found[1], found[0])
    assert any("vision_tower" in name for name, g in found[1][1].items() if g.any())
    assert len(heads) == 1


def test_data_parallel_goes_trls_way(pair, heads):
    expected = loss_of(pair[1], make_inputs(pair[0]))
    with options_of(pair[1], {"model_wrapped": torch.nn.DataParallel(pair[1].model)}):
        assert_same(loss_of(pair[1], make_inputs(pair[0])), expected)
    assert len(heads) == 1


@pytest.mark.filterwarnings("ignore:sgp.linear_loss. there is no room")  # in the least
def test_a_budget_reaches_the_head_and_changes_nothing(pair, data, saved, tmp_path, heads, budgets):
    def with_budget(budget, **more):
        return make_trainer(sgp.trl.GRPOTrainer, saved, data, tmp_path, budget=budget, **more)

    quiet(with_budget(60_000, beta=0.1, num_iterations=2).train)
    assert {options["memory_budget"] for _, options in heads} == {60_000}
    assert {*budgets} == {60_000}, "those of the old and the reference's log-probabilities too"
    inputs = make_inputs(pair[0])
    with pytest.raises(ValueError, match="memory_budget = 1; the least that") as said:
        loss_of(with_budget(1), inputs)
    least = int(re.search(r"take is (\d+) bytes", str(said.value))[1])
    assert_same(loss_of(with_budget(least), inputs), loss_of(pair[0], inputs))


def test_what_is_refused(data, saved, pair, tmp_path, monkeypatch):
    ours = sgp.trl.GRPOTrainer
    with pytest.raises(TypeError, match=r"sgp\.trl\.GRPOTrainer: memory_budget = '1 GiB'; expecte"):
        ours(memory_budget="1 GiB")
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 = True"):
        make_trainer(ours, saved, data, tmp_path, cast_lm_head_to_fp32=True)
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.weight, model.lm_head.bias = model.lm_head[0].weight, None
    with pytest.raises(UnsupportedModelError, match=r"is torch.*Sequential; expected a plain"):
        make_trainer(ours, model, data, tmp_path)
    with pytest.raises(ValueError, match="does not support returning outputs"):
        pair[1].compute_loss(pair[1].model, make_inputs(pair[0]), return_outputs=True)

    trainer = make_trainer(ours, saved, data, tmp_path)
    add_fused_lm_head(trainer.model, outputs=ASKED)
    with pytest.raises(RuntimeError, match="the forward of LlamaForCausalLM was replaced after it"):
        loss_of(trainer, make_inputs(trainer))

    def by_twos(self, model, inputs):  # as TRL's old log-probabilities are made
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        return self._get_per_token_logps_and_entropies(model, ids, ids.ne(0), T, 2)[0].sum()

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", by_twos)
    with pytest.raises(RuntimeError, match="TRL called the model twice for one loss; expected onc"):
        pair[1].compute_loss(pair[1].model, make_inputs(pair[0]))
