"""A patched model: the loss and gradients it had, a head on kept rows only, and reasons."""

import copy
import functools
import io
import pickle
import re
import threading
import warnings

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import sgp
from sgp.huggingface import UnsupportedModelError, callers, patch, patched
from sgp.huggingface.late_logits import LateLogits
from tests.families import FAMILIES, V, make, make_batch

KEPT = int((make_batch()["labels"][:, 1:] != -100).sum())
NEAR = 2e-5


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def model():
    return make("llama")


def step(model, batch, **more):
    """Loss and gradients of one call."""
    model.zero_grad()
    out = model(**batch, **more)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    (out, gradients), (stock, true) = found, expected
    assert out.loss.item() == pytest.approx(stock.loss.item(), rel=NEAR)
    assert set(gradients) == set(true)
    largest = max(g.abs().max() for g in true.values())
    for name, gradient in true.items():
        size = gradient.abs().max().clamp(min=1e-3 * largest)  # OPT's key biases have only noise
        assert (gradients[name] - gradient).abs().max() <= NEAR * size, name


class Rows:
    """How many rows of logits a head made."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.get_output_embeddings().register_forward_hook(self)

    def __call__(self, head, _, logits):
        self.count += logits.numel() // head.out_features


@pytest.mark.core
@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_stock_model(family, mode, batch):
    model = make(family)
    stock, divided = step(model, batch), step(model, batch, num_items_in_batch=37)
    assert stock[0].loss.item() != pytest.approx(divided[0].loss.item(), rel=1e-2)
    handle = patch(model, mode=mode)
    assert handle.mode == mode
    rows = Rows(model)
    found = step(model, batch)
    assert_same(found, stock)
    assert_same(step(model, batch, num_items_in_batch=torch.tensor(37)), divided)
    assert_same(step(model, batch, num_items_in_batch=37), divided)
    if mode == "rows":
        assert found[0].logits.shape == (KEPT, V)
        assert rows.count == 3 * KEPT
    else:
        assert found[0].logits is None
        assert "logits" not in found[0]
        assert rows.count == 0
    rows.handle.remove()
    with torch.no_grad():
        evaluated = model.eval()(**batch)
        late = model(**batch)
    model.train()
    assert late.loss.item() == pytest.approx(stock[0].loss.item(), rel=NEAR)
    assert late.logits._made is None, "no logits where nobody has looked at them"
    assert late.logits.shape == stock[0].logits.shape
    assert torch.equal(late.logits, stock[0].logits), "computed as without the patch"
    assert torch.equal(evaluated.logits, late.logits)
    handle.remove()
    again = step(model, batch)
    assert again[0].loss.item() == stock[0].loss.item()
    assert again[0].logits.shape == (*batch["labels"].shape, V)


def everything(model):
    """All that a patch could leave on a model."""
    return [
        (
            {k for k in vars(m) if not k.startswith("_output_capturing")},
            [len(h) for h in (m._forward_pre_hooks, m._forward_hooks)],
            m.training,
        )
        for m in model.modules()
    ]


@pytest.mark.parametrize("mode", ["auto", "rows", "fused"])
def test_remove_leaves_nothing(model, mode):
    before, state = everything(model), torch.get_rng_state()
    handle = patch(model, mode=mode)
    assert everything(model) != before
    handle.remove()
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()


def test_a_second_patch_is_the_first_or_changes_its_mode(model, batch):
    assert repr(patch(model)) == "Handle(LlamaForCausalLM, mode='fused')"
    assert patch(model).mode == "fused"
    assert patch(model, mode="rows").mode == "rows"
    assert patch(model).mode == "rows"
    assert len(model._forward_pre_hooks) == 1
    assert model(**batch).logits.shape == (KEPT, V)


def test_a_budget_reaches_the_head_and_changes_nothing(model, batch, budgets):
    stock = step(model, batch)
    with torch.no_grad():
        evaluated = model.eval()(**batch).loss.item()
    patch(model.train(), memory_budget=1)
    with pytest.raises(ValueError, match="memory_budget = 1; the least that") as said:
        model(**batch)
    least = int(re.search(r"take is (\d+) bytes", str(said.value))[1])
    handle = patch(model, memory_budget=least)
    assert handle.mode == "fused"
    budgets.clear()
    assert_same(step(model, batch), stock)
    assert {*budgets} == {least}
    budgets.clear()
    assert_same(step(copy.deepcopy(model), batch), stock)
    assert_same(step(pickle.loads(pickle.dumps(model)), batch), stock)  # noqa: S301  (our own)
    assert {*budgets} == {least}
    patch(model, memory_budget=10_000)
    budgets.clear()
    with torch.no_grad():
        out = model.eval()(**batch)
    assert out.loss.item() == pytest.approx(evaluated, rel=NEAR)
    assert {*budgets} == {10_000}


def test_a_second_patch_keeps_the_budget_or_takes_another(model, batch, budgets):
    patch(model, memory_budget=50_000)
    budgets.clear()
    for again, expected in (({}, 50_000), ({"memory_budget": 60_000}, 60_000), ({}, 60_000)):
        assert patch(model, **again).mode == "fused"
        budgets.clear()
        model(**batch).loss.backward()
        assert {*budgets} == {expected}
    patch(model, mode="rows")
    assert patch(model, memory_budget=70_000).mode == "fused", "the only mode that has one"
    budgets.clear()
    patch(model).remove()
    patch(model)
    model(**batch).loss.backward()
    assert 70_000 not in budgets


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_budget_without_effect_is_refused(model, batch):
    before = everything(model)
    with pytest.raises(ValueError, match=r"memory_budget = 999 has no effect in mode 'rows'"):
        patch(model, mode="rows", memory_budget=999)
    for budget in (0, -1, True, 1.5, "1 GiB"):
        with pytest.raises((ValueError, TypeError), match=r"patch: memory_budget = .*; expected"):
            patch(model, memory_budget=budget)
    assert everything(model) == before
    loss = model(**batch).loss.item()
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"])
    adapted = peft.get_peft_model(model, lora)
    assert patch(adapted).mode == "rows"
    with pytest.raises(UnsupportedModelError, match=r"memory_budget = 999 needs mode 'fused'"):
        patch(adapted, memory_budget=999)
    assert adapted(**batch).loss.item() == pytest.approx(loss, rel=NEAR)
    assert adapted(**batch).logits.shape == (KEPT, V), "still patched as it was"


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_what_is_not_training_is_as_before(model, batch, mode, tmp_path):
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
        words = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    names = set(model.state_dict())
    patch(model, mode=mode)
    with torch.no_grad():
        found = model(**batch)
        assert torch.equal(found.logits, expected.logits), "all logits in evaluation"
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=NEAR)
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, found.logits)
        again = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(again, words)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, expected.logits)


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_a_copy_is_patched_and_its_own(model, batch, mode):
    stock = step(model, batch)
    patch(model, mode=mode)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(step(twin, batch), stock)
    patch(twin).remove()
    assert twin(**batch).logits.shape == (*batch["labels"].shape, V)
    logits = model(**batch).logits
    assert logits is None or len(logits) == KEPT, "the first is still patched"


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_a_pickled_model_is_patched(model, batch, mode):
    stock = step(model, batch)
    patch(model, mode=mode)
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301  (our own)
    found = step(twin, batch)
    assert_same(found, stock)
    assert found[0].logits is None or len(found[0].logits) == KEPT
    patch(twin).remove()
    assert_same(step(twin, batch), stock)


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_a_loss_function_set_later_is_no_zero(model, batch, mode):
    """It would get what the patch makes of logits: of some rows, or none at all."""
    before = everything(model)
    handle = patch(model, mode=mode)
    other_loss(model)
    with pytest.raises(RuntimeError, match="the loss function of LlamaForCausalLM was replaced"):
        model(**batch)
    with pytest.raises(UnsupportedModelError, match="has a loss function of its own"):
        patch(model)
    handle.remove()
    del model._loss_function
    assert everything(model) == before


def test_a_compiled_model_is_looked_into(model, batch):
    stock = step(model, batch)
    handle = patch(torch.compile(model, backend="eager"))
    assert handle.model is model
    assert_same(step(model, batch), stock)
    handle.remove()
    assert step(model, batch)[0].logits is not None


@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_apart_or_refused(family, mode, batch):
    """Even where a call says nothing of a cache, with which transformers sees one sequence."""
    model = make(family)
    auxiliary = getattr(model.config, "router_aux_loss_coef", 0)  # of padding too
    examples = [
        {"input_ids": ids[: 12 - b], "labels": labels[: 12 - b]}
        for b, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True))
    ]
    packed = sgp.Collator(packed=True)(examples)
    stock = sum(
        model(input_ids=x["input_ids"][None], labels=x["labels"][None], num_items_in_batch=1).loss
        for x in examples
    )
    patch(model, mode=mode)
    if family in ("bloom", "falcon_h1", "gpt_oss", "opt"):
        with pytest.raises(ValueError, match="does not keep the 3 sequences of a packed row apart"):
            model(**packed)
        packed = sgp.Collator(packed=True)(examples[:1])
        stock = model(**{k: v[None] for k, v in examples[0].items()}).loss
        assert model(**packed).loss.item() == pytest.approx(stock.item(), rel=NEAR)
    elif not auxiliary:
        assert model(**packed, num_items_in_batch=1).loss.item() == pytest.approx(
            stock.item(), rel=NEAR
        )


@pytest.mark.parametrize("mode", ["rows", "fused"])
class TestSelections:
    """In the place of labels."""

    def test_of_a_flat_batch_beside_embeddings(self, model, batch, mode):
        stock = step(model, batch)
        patch(model, mode=mode)
        shifted = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
        selection = sgp.Selection.from_labels(shifted.flatten())
        assert_same(step(model, batch, selection=selection), stock)
        embedded = model.get_input_embeddings()(batch.pop("input_ids"))
        assert_same(step(model, batch, inputs_embeds=embedded, selection=selection), stock)

    def test_what_is_refused(self, model, batch, mode):
        patch(model, mode=mode)
        labels = batch.pop("labels")
        with pytest.raises(TypeError, match="selection is a Tensor; expected a Selection"):
            model(**batch, selection=labels)
        selection = sgp.Selection.from_labels(labels[:, :5], shift=True)
        with pytest.raises(ValueError, match=r"shape \(3, 12\), which is not .*shape=\(3, 5\)"):
            model(**batch, selection=selection)
        with pytest.raises(ValueError, match="without input_ids or inputs_embeds"):
            model(selection=selection)

    @pytest.mark.parametrize("evaluating", [False, True])
    def test_weights_count(self, model, batch, mode, evaluating):
        """In training, in evaluation, and in evaluation without a graph."""
        weights = torch.linspace(0.1, 3, 36).view(3, 12)
        selection = sgp.Selection.from_labels(batch["labels"], shift=True, token_weight=weights)
        logits = model(**batch).logits.flatten(0, 1)
        expected = sgp.reference.cross_entropy(logits, selection)
        divided = sgp.reference.cross_entropy(logits, selection, denominator=7)
        assert expected.item() != pytest.approx(model(**batch).loss.item(), rel=1e-2)
        patch(model, mode=mode)
        model.train(not evaluating)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = model(**batch, selection=selection).loss
                assert found.item() == pytest.approx(expected.item(), rel=NEAR)
                found = model(**batch, selection=selection, num_items_in_batch=7).loss
            assert found.item() == pytest.approx(divided.item(), rel=NEAR)


@pytest.mark.parametrize("mode", ["rows", "fused"])
class TestEvaluation:
    """The loss and the logits of transformers; no logits where nobody looks at them."""

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("divisor", [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": 5}])
    @pytest.mark.parametrize("targets", [0, 3])
    def test_the_loss_of_no_target(self, model, batch, mode, grad, divisor, targets):
        """0 / 0 is NaN, which Trainer leaves out of its mean."""
        batch["labels"].flatten()[3 + targets :] = -100
        model.eval()
        expected = model(**batch, **divisor).loss
        assert targets or divisor.get("num_items_in_batch") or expected.isnan()
        patch(model, mode=mode)
        with torch.set_grad_enabled(grad):
            found = model(**batch, **divisor).loss
            selection = sgp.Selection.from_labels(batch["labels"], shift=True)
            selected = model(batch["input_ids"], selection=selection, **divisor).loss
        torch.testing.assert_close(found, expected, equal_nan=True)
        torch.testing.assert_close(selected.isnan(), expected.isnan())

    def test_weights_of_zero_are_no_target(self, model, batch, mode):
        patch(model.eval(), mode=mode)
        zeros = torch.zeros(3, 12)
        selection = sgp.Selection.from_labels(batch["labels"], shift=True, token_weight=zeros)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert model(**batch, selection=selection).loss.isnan()
        assert model.train()(**batch, selection=selection).loss.item() == 0

    def test_logits_are_for_every_use(self, model, batch, mode):
        stock = model.eval()(**batch).logits.detach()
        patch(model, mode=mode)

        def saved(x):
            file = io.BytesIO()
            torch.save(x, file)
            file.seek(0)
            return torch.load(file)

        def set_to_zero(x):
            x[:, 0] = 0
            return x + 0

        uses = {
            "detach": lambda x: x.detach(),
            "numpy": lambda x: torch.from_numpy(x.numpy()),
            "list": lambda x: torch.tensor(x.tolist()),
            "rows": lambda x: torch.stack(list(x)),
            "a list of tensors": lambda x: torch.cat([x, x]),
            "argmax": lambda x: x.argmax(-1),
            "out": lambda x: torch.empty(3, 12, V).copy_(x),
            "assignment": set_to_zero,
            "pickle": lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301  (our own)
            "save": saved,
            "copy": copy.deepcopy,
            "repr": repr,
            "bfloat16": lambda x: x.to(torch.bfloat16),
            "scaled": lambda x: (x.float() / 2 * 3).exp(),
            "operator": torch.ops.aten.sum.default,
            "pointer": lambda x: x.data_ptr() != 0,
            "loss": lambda x: torch.nn.functional.cross_entropy(x.view(-1, V), torch.arange(36)),
            "sgp": lambda x: sgp.cross_entropy(x.flatten(0, 1), torch.arange(36)),
            "compiled": torch.compile(lambda x: x.sum(), backend="eager"),
        }
        for name, use in uses.items():
            with torch.no_grad():
                logits = model(**batch).logits
            assert isinstance(logits, torch.Tensor)
            assert (logits.shape, logits.dtype) == (stock.shape, stock.dtype), name
            found, expected = use(logits), use(stock.clone())
            if isinstance(expected, torch.Tensor):
                assert torch.equal(found, expected), name
            else:
                assert found == expected, name

    def test_ways_to_the_logits(self, model, batch, mode):
        stock = model.eval()(**batch).logits
        patch(model, mode=mode)
        ways = {
            "key": lambda out: out["logits"],
            "get": lambda out: out.get("logits"),
            "slice": lambda out: out[1:][0],
            "tuple": lambda out: out.to_tuple()[1],
            "dict": lambda out: dict(out)["logits"],
            "unpacked": lambda out: {**out}["logits"],
            "items": lambda out: next(v for k, v in out.items() if k == "logits"),
            "pickle": lambda out: pickle.loads(pickle.dumps(out)).logits,  # noqa: S301  (our own)
        }
        for name, way in ways.items():
            with torch.no_grad():
                assert torch.equal(way(model(**batch)), stock), name
                logits = model(**batch, return_dict=False)[1]
            assert torch.equal(logits, stock)

    def test_inference_mode_and_autocast(self, model, batch, mode):
        def run():
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                return model(**batch)

        model.eval()
        stock = run()
        patch(model, mode=mode)
        found = run()
        assert found.logits.dtype == torch.bfloat16
        assert torch.equal(found.logits, stock.logits), "with the casts of the forward pass"
        assert found.loss.item() == pytest.approx(stock.loss.item(), rel=1e-2)

    def test_logits_of_other_weights_are_refused(self, model, batch, mode):
        """As after an optimizer's step, or where averaged weights are put back."""
        patch(model.eval(), mode=mode)
        with torch.no_grad():
            out, used = model(**batch), model(**batch)
            before = used.logits.argmax(-1)
            model.get_output_embeddings().weight.data.mul_(1.5)
            with pytest.raises(RuntimeError, match="weights of the model's head have changed"):
                out.logits.argmax(-1)
        assert torch.equal(used.logits.argmax(-1), before), "they were used in time"

    def test_with_a_graph_logits_have_gradients(self, model, batch, mode):
        model.eval()
        (stock,) = torch.autograd.grad(model(**batch).logits.sin().sum(), model.lm_head.weight)
        patch(model, mode=mode)
        out = model(**batch)
        (found,) = torch.autograd.grad(out.logits.sin().sum(), model.lm_head.weight)
        assert torch.equal(found, stock)

    def test_a_model_that_looks_at_its_logits(self, model, batch, mode):
        """Wherever it does: it sees them."""
        patch(model.eval(), mode=mode)
        inner, seen = model.loss_function, []

        def forward(self, **kwargs):
            out = type(model).forward(self, **kwargs)
            seen.append(out.logits.argmax(-1))
            return out

        model.forward = forward.__get__(model)
        assert model.loss_function == inner
        with torch.no_grad():
            out = model(**batch)
        assert torch.equal(seen[0], out.logits.argmax(-1))
        assert seen[0].shape == (3, 12)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    def test_an_adapter_on_the_head_later(self, model, batch, mode):
        patch(model, mode=mode)
        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            found = adapted(**batch)
            stock = adapted.base_model.model.model(batch["input_ids"], batch["attention_mask"])
            expected = model.get_output_embeddings()(stock.last_hidden_state)
        assert torch.equal(found.logits, expected)


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_threads_do_not_share_a_request(model, batch, mode):
    """Two forward passes of one model that wait for each other before the head."""
    batches = [batch, {k: v.flip(0)[:2] for k, v in batch.items()}]
    batches[1]["labels"] = batches[1]["labels"].roll(2)  # by 1 whoever looks first would warn
    stock = [model(**each).loss.item() for each in batches]
    patch(model, mode=mode)
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_):
        meeting.wait()

    model.model.register_forward_hook(meet)

    def call(each):
        with torch.set_grad_enabled(model.training):
            return model(**each)

    for training in (True, False):
        model.train(training)
        found = together(call, batches)
        assert [out.loss.item() for out in found] == pytest.approx(stock, rel=NEAR)
        if training:
            sizes = [None if x.logits is None else len(x.logits) for x in found]
            kept = [int((each["labels"][:, 1:] != -100).sum()) for each in batches]
            assert sizes == (kept if mode == "rows" else [None, None])


def together(call, batches):
    """What calls in a thread each return."""
    found = [None] * len(batches)

    def run(i):
        found[i] = call(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def replica_of(model):
    """As DataParallel makes one: the same attributes, copies of the weights that have a graph."""
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    copies = {p: p * 1 for p in model.parameters()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            setattr(replica, key, replicas[child])
        for key, p in module._parameters.items():
            if p is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, copies[p])
        for key, buffer in module._buffers.items():
            setattr(replica, key, buffer)
    return replicas[model], {n: copies[p] for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_replicas_of_data_parallel_use_their_own_weights(model, batch, mode):
    stock = step(model, batch)
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
    patch(model, mode=mode)
    model.zero_grad()
    replica, copies = replica_of(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # on another device, were there one
        copies["lm_head.weight"].add_(0)
    out = replica(**batch)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert_same((out, gradients), stock)
    with torch.no_grad():
        assert torch.equal(replica.eval()(batch["input_ids"]).logits, expected)
        found = replica(**batch)
    assert torch.equal(found.logits, stock[0].logits)
    assert found.loss.item() == pytest.approx(stock[0].loss.item(), rel=NEAR)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_virtual_tokens(batch, mode):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(3)
    model = peft.get_peft_model(make("llama"), config)
    stock = step(model, batch)
    patch(model, mode=mode)
    assert_same(step(model, batch), stock)
    selection = sgp.Selection.from_labels(batch["labels"], shift=True)
    with pytest.raises(ValueError, match="Virtual tokens of PEFT need labels"):
        model(**batch, selection=selection)


@pytest.mark.parametrize("mode", ["rows", "fused"])
class TestCalls:
    def test_shifted_labels(self, model, batch, mode):
        stock = step(model, batch)
        shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        patch(model, mode=mode)
        assert_same(step(model, batch, shift_labels=shifted), stock)

    def test_ignore_index(self, model, batch, mode):
        stock = step(model, batch)
        patch(model, mode=mode)
        ignored = V - 1
        assert not (batch["labels"] == ignored).any()
        batch["labels"] = batch["labels"].where(batch["labels"] != -100, ignored)
        assert_same(step(model, batch, ignore_index=ignored), stock)

    def test_what_the_loss_of_transformers_ignores(self, model, batch, mode):
        more = {"label_smoothing": 0.1, "token_weight": torch.zeros(3, 12), "reduction": "none"}
        for training in (True, False):
            stock = model.train(training)(**batch, **more).loss
            assert stock.item() == model(**batch).loss.item()
            patch(model, mode=mode)
            assert model(**batch, **more).loss.item() == pytest.approx(stock.item(), rel=NEAR)
            with torch.no_grad():
                assert model(**batch, **more).loss.item() == pytest.approx(stock.item(), rel=NEAR)
            patch(model).remove()

    def test_flat_shifted_labels(self, model, batch, mode):
        stock = step(model, batch)
        shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        patch(model, mode=mode)
        assert_same(step(model, batch, shift_labels=shifted.flatten()), stock)
        with torch.no_grad():
            found = model.eval()(**batch, shift_labels=shifted.flatten()).loss
        assert found.item() == pytest.approx(stock[0].loss.item(), rel=NEAR)
        model.train()
        with pytest.raises(ValueError, match=r"shift_labels have the shape \(30,\) and input_ids"):
            model(**batch, shift_labels=shifted.flatten()[6:])

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_a_divisor_of_one_element(self, model, batch, mode, shape):
        """Trainer gives each replica of DataParallel a row of a column."""
        stock = step(model, batch, num_items_in_batch=torch.tensor(11))
        count = torch.full(shape, 11)
        patch(model, mode=mode)
        found = step(model, batch, num_items_in_batch=count)
        assert found[0].loss.shape == ()
        assert_same(found, stock)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                loss = model.eval()(**batch, num_items_in_batch=count).loss
            assert loss.item() == pytest.approx(stock[0].loss.item(), rel=NEAR)
        with pytest.raises(ValueError, match=r"is \(2,\); expected a number or a tensor of one"):
            model.train()(**batch, num_items_in_batch=torch.tensor([11, 11]))

    def test_positional_arguments_and_tuples(self, model, batch, mode):
        stock = model(**batch)
        patch(model, mode=mode)
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        found = model(ids, mask, None, None, None, labels, return_dict=False)
        assert found[0].item() == pytest.approx(stock.loss.item(), rel=NEAR)
        assert found[1] is None or found[1].shape == (KEPT, V)

    def test_nothing_to_learn(self, model, batch, mode):
        patch(model, mode=mode)
        batch["labels"].fill_(-100)
        out, gradients = step(model, batch)
        assert out.loss.item() == 0
        assert not any(g.any() for g in gradients.values())
        assert "lm_head.weight" in gradients, "connected, as gradient synchronisation needs it"

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is:FutureWarning")
    def test_gradient_checkpointing(self, model, batch, mode):
        stock = step(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        patch(model, mode=mode)
        assert_same(step(model, batch), stock)

    def test_autocast(self, model, batch, mode):
        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return step(model, batch)

        stock = run()
        patch(model, mode=mode)
        out, gradients = run()
        assert out.loss.item() == pytest.approx(stock[0].loss.item(), rel=2e-2)
        for name, gradient in stock[1].items():
            error = (gradients[name] - gradient).norm() / gradient.norm()
            assert error < 5e-2, (name, error)

    def test_hidden_states_and_an_error_on_the_way(self, model, batch, mode):
        patch(model, mode=mode)
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
        with pytest.raises((ValueError, IndexError), match="shape"):
            model(batch["input_ids"], labels=batch["labels"][:, :5])
        assert model.eval()(batch["input_ids"]).logits.shape[1] == 12, "no request is left"

    def test_an_error_on_the_way_leaves_the_head_alone(self, model, batch, mode):
        patch(model, mode=mode)

        def fail(*_):
            raise RuntimeError("on the way")

        handle = model.model.register_forward_hook(fail)
        hidden = torch.randn(2, 32)
        for training in (True, False):
            with torch.no_grad(), pytest.raises(RuntimeError, match="on the way"):
                model.train(training)(**batch)
            assert type(model.lm_head(hidden)) is torch.Tensor
            assert model.lm_head(hidden).shape == (2, V)
        handle.remove()

    def test_logits_to_keep_of_the_caller(self, model, batch, mode):
        patch(model, mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert model(batch["input_ids"], logits_to_keep=2).logits.shape == (3, 2, V)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters(batch):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = peft.get_peft_model(make("llama"), config)
    stock = step(model, batch)
    for mode in ("rows", "fused"):
        handle = patch(model, mode=mode)
        assert_same(step(model, batch), stock)
        handle.remove()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_on_the_head(batch):
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(make("llama"), config)
    stock = step(model, batch)
    with pytest.raises(
        UnsupportedModelError, match=r"fused: its head is peft\..*a plain nn.Linear"
    ):
        patch(model, mode="fused")
    assert patch(model).mode == "rows"
    found = step(model, batch)
    assert_same(found, stock)
    assert found[0].logits.shape == (KEPT, V)
    bare = make("llama")
    patch(bare)
    adapted = peft.get_peft_model(bare, config)
    with pytest.raises(RuntimeError, match="was replaced after it was patched; patch it again"):
        step(adapted, batch)
    handle = patch(adapted)
    assert handle.mode == "rows"
    assert step(adapted, batch)[0].logits.shape == (KEPT, V)
    handle.remove()
    assert not any("sgp_head" in vars(m) or "forward" in vars(m) for m in adapted.modules())


def test_training_without_labels_is_said_once(model, batch, monkeypatch):
    monkeypatch.setattr(callers, "SAID", set())
    patch(model)
    with pytest.warns(UserWarning, match="trained without labels"):
        model(batch["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch["input_ids"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("selection of labels", "its own token: selection must be shifted"),
        ("shift_labels of labels", "its own token: shift_labels must be shifted"),
        ("shifted labels", "after the next: labels were shifted twice"),
        ("labels", None),
        ("selection", None),
        ("one token repeated", None),
        ("no loss", None),
    ],
)
def test_targets_at_the_wrong_position_are_said_at_the_first_step(
    model, batch, given, said, monkeypatch
):
    """Each gives a plausible loss."""
    monkeypatch.setattr(callers, "SAID", set())
    patch(model)
    ids, labels = batch["input_ids"], batch["labels"]
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    if given == "selection of labels":
        call = {"input_ids": ids, "selection": sgp.Selection.from_labels(labels)}
    elif given == "selection":
        call = {"input_ids": ids, "selection": sgp.Selection.from_labels(labels, shift=True)}
    elif given == "shift_labels of labels":
        call = {**batch, "shift_labels": labels}
    elif given == "shifted labels":
        call = {**batch, "labels": moved}
    elif given == "one token repeated":
        same = torch.full_like(ids, 5)
        call = {"input_ids": same, "labels": same, "shift_labels": same}
    elif given == "no loss":
        call = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    else:
        call = batch
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model(**call)
    assert bool(found) == bool(said)
    if said:
        assert said in str(found[0].message)
        assert found[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**call)


def test_a_head_that_runs_twice_is_no_wrong_loss(model, batch):
    """The second would get the loss of other hidden states."""
    patch(model, mode="fused")

    def look(_, __, out):
        model.lm_head(out)

    model.model.layers[0].register_forward_hook(look)
    with pytest.raises(RuntimeError, match="the head ran twice in one forward pass"):
        model(**batch)


def test_a_probe_draws_no_random_numbers(model):
    model.model.register_forward_hook(lambda *_: torch.rand(3) is None or None)
    before = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_loss_of_the_caller_needs_logits(monkeypatch):
    """PEFT's CPT takes labels, and then a loss of its own from all logits."""
    monkeypatch.setattr(callers, "SAID", set())
    batch = make_batch()
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 6, 7, 8],
        cpt_mask=[1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4],
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(make("llama"), config)
    stock = step(model, batch)
    patch(model, mode="fused")
    with pytest.raises(RuntimeError, match=r"PEFT's CPT computes the loss .* mode='rows'"):
        model(**batch)
    with torch.no_grad():
        evaluated = model.eval()(**batch).loss
    assert evaluated.item() == pytest.approx(stock[0].loss.item(), rel=NEAR)
    model.train()
    patch(model, mode="rows")
    with pytest.warns(UserWarning, match="its caller computes the loss"):
        assert_same(step(model, batch), stock)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_has_no_graph_break(model, batch, training):
    """In mode "fused", whatever the mask."""
    other = {**batch, "labels": batch["labels"].roll(2, -1)}
    stock, expected = step(model.train(training), batch), step(model, other)
    patch(model, mode="fused")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = compiled(**batch)
    assert (found.logits is None) == training
    count = len(graphs)
    assert count >= 1
    model.zero_grad()
    found.loss.backward()
    assert_same((found, {n: p.grad.clone() for n, p in model.named_parameters()}), stock)
    assert compiled(**other).loss.item() == pytest.approx(expected[0].loss.item(), rel=NEAR)
    assert len(graphs) == count, "another mask is no other graph"


# -- what is refused -------------------------------------------------------------------------------


def other_loss(model):
    model.loss_function = lambda logits, **_: logits.sum()


def liger(model):
    def forward(self):
        """Not called."""

    forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = forward


def masked_logits(model):
    def hide(_, __, out):
        out.logits = out.logits.index_fill(-1, torch.tensor([3]), -1e4)

    model.register_forward_hook(hide)


def nearly_scaled(model):
    def bend(_, __, out):
        out.logits = out.logits * (1 + 1e-3 * torch.sin(out.logits))

    model.register_forward_hook(bend)


def no_mask(model):
    inner = type(model).forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        kwargs.pop("logits_to_keep", None)
        return inner(self, input_ids, attention_mask, labels=labels, **kwargs)

    model.forward = forward.__get__(model)


def own_cross_entropy(model):
    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **_):
        del logits_to_keep
        logits = self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model.forward = forward.__get__(model)


def numbers_only(model):
    """As before transformers 5.21."""
    inner = type(model).forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **more):
        rows = logits_to_keep if isinstance(logits_to_keep, int) else logits_to_keep.unsqueeze(-2)
        more |= {"labels": labels, "logits_to_keep": rows}
        return inner(self, input_ids, attention_mask, **more)

    model.forward = forward.__get__(model)


def hooked_head(model):
    model.lm_head.forward = functools.partial(type(model.lm_head).forward, model.lm_head)


def needs_more(model):
    def forward(self, input_ids=None, *, pixels, **_):
        """Not called."""

    model.forward = forward.__get__(model)


def headless(model):
    model.set_output_embeddings(None)


REFUSED = {
    "needs more": (needs_more, "auto", "cannot be run on input_ids and labels alone: TypeError"),
    "headless": (headless, "auto", "LlamaForCausalLM has no output embeddings"),
    "own loss, fused": (own_cross_entropy, "fused", "it makes no loss of what its head returns"),
    "own loss, rows": (
        own_cross_entropy,
        "rows",
        "logits of 16 rows of a probe, of which 9 carry loss",
    ),
    "old": (numbers_only, "rows", r"takes no mask in logits_to_keep \(transformers 5\.21"),
    "hooked": (hooked_head, "fused", "Linear with a forward of its own; expected a plain"),
    "other loss": (other_loss, "auto", "has a loss function of its own"),
    "liger": (liger, "auto", "forward is liger_kernel's; use one or the other"),
    "masked": (masked_logits, "fused", "its logits are more than scaled and softcapped"),
    "nearly": (nearly_scaled, "fused", "its logits are more than scaled and softcapped"),
    "no mask": (no_mask, "rows", "its forward takes no logits_to_keep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_has_a_reason(model, case):
    change, mode, message = REFUSED[case]
    change(model)
    before = everything(model)
    with pytest.raises(UnsupportedModelError, match=message):
        patch(model, mode=mode)
    assert everything(model) == before


@pytest.mark.parametrize(("mode", "expected"), [("rows", 9), ("fused", 0)])
def test_a_patch_that_changes_nothing_is_refused(model, mode, expected, monkeypatch):
    before = everything(model)
    monkeypatch.setattr(patched.Patch, "_acts", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match=f"logits of 16 rows .*; expected {expected}"):
        patch(model, mode=mode)
    assert everything(model) == before


def test_a_patch_that_changes_the_loss_is_refused(model, monkeypatch):
    """The reason is both losses."""
    monkeypatch.setattr(patched, "causal_lm_loss", lambda logits, *_, **__: logits.float().sum())
    with pytest.raises(
        UnsupportedModelError, match=r"the loss of a probe is .*, without the patch"
    ):
        patch(model, mode="rows")


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.001), (torch.float64, 1.00001)])
def test_a_loss_that_is_a_little_off_is_refused(model, dtype, factor, monkeypatch):
    inner = patched.causal_lm_loss
    monkeypatch.setattr(patched, "causal_lm_loss", lambda *a, **k: factor * inner(*a, **k))
    with pytest.raises(UnsupportedModelError, match="the loss of a probe is"):
        patch(model.to(dtype), mode="rows")


def test_models_of_another_kind_are_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is no model of transformers"):
        patch(torch.nn.Linear(2, 2))
    config = transformers.T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="is an encoder and a decoder"):
        patch(transformers.T5ForConditionalGeneration(config))
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(UnsupportedModelError, match="has the loss ForMaskedLMLoss"):
        patch(transformers.BertForMaskedLM(config))
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match="meta device"):
        patch(AutoModelForCausalLM.from_config(transformers.LlamaConfig(num_hidden_layers=1)))
    with pytest.raises(ValueError, match="mode = 'all'; expected one of"):
        patch(make("llama"), mode="all")


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_labels_of_another_length_are_refused_by_shape(mode):
    model, batch = make("llama"), make_batch()
    patch(model, mode=mode)
    batch["labels"] = batch["labels"][:, :-1]
    with pytest.raises(ValueError, match=r"labels have the shape \(\d, \d+\) and input_ids \("):
        model(**batch)


# -- logits that wait ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rows", "fused"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_forward_hook_on_the_head_sees_all_logits_of_an_evaluation(
    mode, everywhere, model, batch
):
    with torch.no_grad():
        stock = model.eval()(**batch)
    patch(model, mode=mode)
    seen, head = [], model.get_output_embeddings()

    def look(module, _, logits):
        if module is head:
            seen.append(logits)

    register = torch.nn.modules.module.register_module_forward_hook
    hook = register(look) if everywhere else head.register_forward_hook(look)
    try:
        with torch.no_grad():
            out = model(**batch)
    finally:
        hook.remove()
    (logits,) = seen
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, stock.logits)
    assert torch.equal(out.logits, stock.logits)
    assert out.loss.item() == pytest.approx(stock.loss.item(), rel=NEAR)
    with torch.no_grad():
        assert type(model(**batch).logits) is LateLogits, "once the hook is gone"


def late_and_true(*, bias=True):
    """Logits that wait, the logits, and the tensors that they are made of."""
    given = [torch.randn(2, 3, 4), torch.randn(9, 4), torch.randn(9) if bias else None]
    with torch.no_grad():
        return LateLogits.of(*given).whole(), torch.nn.functional.linear(*given), given


def test_late_logits_scaled_by_keyword():
    late, true, _ = late_and_true()
    assert torch.equal(torch.mul(input=late, other=2).clone(), 2 * true)


def test_late_logits_that_a_cast_leaves_alone_are_the_same_tensor():
    """As of any tensor: what is written to one is seen in the other."""
    late, true, _ = late_and_true()
    for same in (late.float(), late.to("cpu"), late.contiguous(), late.to(torch.float32)):
        assert same is late
    late.float()[0] = 0
    assert torch.equal(late.clone(), torch.cat([0 * true[:1], true[1:]]))
    wide = late_and_true()[0].to(torch.float64)
    assert type(wide) is LateLogits, "still waits"
    assert wide.dtype == torch.float64


def test_late_logits_are_what_was_done_to_them():
    late, true, _ = late_and_true()
    late.requires_grad_()
    assert late.requires_grad
    late.square().sum().backward()
    assert torch.allclose(late.grad, 2 * true)
    late, _, _ = late_and_true()
    late.unsqueeze_(0)
    assert late.shape == (1, *true.shape)


def test_late_logits_first_used_in_inference_mode_are_an_ordinary_tensor():
    late, true, _ = late_and_true()
    with torch.inference_mode():
        late.sum()
    factor = torch.ones(9, requires_grad=True)
    (late * factor).sum().backward()
    assert torch.allclose(factor.grad, true.sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize("what", range(3), ids=["hidden states", "weight", "bias"])
def test_a_single_value_that_changes_is_noticed(what):
    """As where a step trains the embeddings of a few new tokens, or biases alone."""
    late, _, given = late_and_true()
    given[what].view(-1)[-1] += 1
    with pytest.raises(RuntimeError, match=r"hidden states or the weights .* have changed"):
        late.clone()


@pytest.mark.parametrize("bias", [False, True])
def test_late_logits_of_a_head_that_moved_are_those_of_then(bias):
    head = torch.nn.Linear(4, 9, bias=bias)
    hidden = torch.randn(2, 3, 4)
    with torch.no_grad():
        late, true = LateLogits.of(hidden, head.weight, head.bias).whole(), head(hidden)
    head.double()
    assert torch.equal(late.clone(), true)
