"""The audit: roles, norms and both parts of the gradient are brute force's; nothing is left."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers.pytorch_utils
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sgp
from sgp.context import _takes_cache
from tests import families
from tests.audited import (
    CONFIGS,
    CONTEXTS,
    EOS,
    LENGTHS,
    SIZE,
    B,
    T,
    Tokenizer,
    V,
    codes,
    make,
    make_batch,
)  # fmt: skip
from tests.test_context import DetachedContext

pytestmark = pytest.mark.filterwarnings(  # of PEFT, which asks transformers
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@pytest.fixture
def model():
    return make("llama").train()


@pytest.fixture
def batch():
    return make_batch()


def linear_gradient(model, loss):
    """Of all linear layers; GPT-2's are Conv1D."""
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    weights = [m.weight for m in model.modules() if isinstance(m, linear)]
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    return torch.cat([g.flatten() for g in found])


# -- what is measured ------------------------------------------------------------------------------


def test_a_correct_batch_has_no_finding(model, batch):
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert report.findings == []
    assert report.errors == []
    shown = f"AuditReport(LlamaForCausalLM, 3 rows, loss={report.loss:.4f}, no findings)"
    assert repr(report) == shown
    roles = [[token.role for token in row] for row in report.tokens]
    for b, (context, length) in enumerate(zip(CONTEXTS, LENGTHS, strict=True)):
        expected = ["context"] * (context - 1) + ["predictor"] + ["output"] * (length - context)
        assert roles[b] == expected + ["padding"] * (T - length)
    token = report.tokens[0][5]
    assert (token.text, token.target_id) == (f"<{token.token_id}>", int(batch["input_ids"][0, 6]))


@pytest.mark.core
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_norms_are_those_of_the_model(name, batch):
    model = make(name)
    report = sgp.audit(model, batch)
    out = model(**batch, output_hidden_states=True)
    assert report.loss == pytest.approx(out.loss.item(), rel=1e-6)
    found = torch.autograd.grad(out.loss, [*out.hidden_states, out.logits])
    expected = torch.stack([g.norm(dim=-1) for g in found[:-1]])
    torch.testing.assert_close(report.grad_norm, expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(report.dead, expected == 0)
    assert report.dead[-1, 0, :5].all(), "no loss starts at context"
    assert not report.dead[0, 0, :5].any(), "but it reaches the context's embeddings"
    logits = torch.tensor([[t.gradient for t in row] for row in report.tokens])
    torch.testing.assert_close(logits, found[-1].norm(dim=-1), rtol=1e-5, atol=1e-9)
    losses = [t.loss for row in report.tokens for t in row if t.loss is not None]
    assert sum(losses) / len(losses) == pytest.approx(report.loss, rel=1e-5)
    first = report.tokens[0][5]
    assert first.probability == pytest.approx(math.exp(-first.loss))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_two_parts_of_the_gradient_are_brute_forces(name, batch):
    model = make(name)
    report = sgp.audit(model, batch)
    exact = linear_gradient(model, model(**batch).loss)
    constant = torch.arange(T) < (torch.tensor(CONTEXTS) - 1)[:, None]
    cache = DetachedContext(model, constant)
    outputs = linear_gradient(
        model, model(**batch, **{_takes_cache(model)[0]: cache}, use_cache=True).loss
    )
    share = (exact - outputs).norm() / exact.norm()
    cosine = torch.nn.functional.cosine_similarity(exact, outputs, dim=0)
    assert report.context_share == pytest.approx(share.item(), rel=1e-3)
    assert report.cosine_detached == pytest.approx(cosine.item(), rel=1e-3)
    assert report.context_share > 1e-3, "there is something to see"


def test_the_parts_are_not_defined_for_masks_with_holes(model, batch):
    batch["labels"][0, 9] = -100
    report = sgp.audit(model, batch)
    assert report.context_share is None
    assert report.cosine_detached is None


def test_tokens_after_the_output_carry_nothing(model, batch):
    """What a template writes after the end of a turn has no loss, and no gradient."""
    batch["labels"][0, -2:] = -100
    report = sgp.audit(model, batch)
    constant = torch.arange(T) < (torch.tensor(CONTEXTS) - 1)[:, None]
    exact = linear_gradient(model, model.eval()(**batch).loss)
    cache = {_takes_cache(model)[0]: DetachedContext(model, constant), "use_cache": True}
    outputs = linear_gradient(model, model(**batch, **cache).loss)
    assert report.context_share == pytest.approx(
        (exact - outputs).norm().item() / exact.norm().item(), rel=1e-3
    )
    cosine = torch.cosine_similarity(exact, outputs, dim=0).item()
    assert report.cosine_detached == pytest.approx(cosine, rel=1e-3)


def test_the_parts_are_not_defined_where_not_every_layer_is_seen(batch):
    """A layer that runs twice; a weight that is used outside its module too."""
    model = make("llama")
    model.model.layers[1] = model.model.layers[0]
    assert sgp.audit(model, batch).context_share is None
    for much in (0.5, 1e-3):  # half a percent of the squared norm
        model = make("llama")
        up = model.model.layers[0].mlp.up_proj
        model.model.layers[0].mlp.register_forward_hook(
            lambda _, args, result, up=up, much=much: (
                result + much * args[0] @ up.weight.t()[:, :32]
            )
        )
        assert sgp.audit(model, batch).context_share is None


@pytest.mark.parametrize(("much", "defined"), [(0.0, True), (0.003, False)])
def test_the_parts_in_bfloat16_allow_for_its_rounding_and_no_more(batch, much, defined):
    """A weight used outside its module: a tenth of its squared norm, which is no rounding."""
    model = make("llama").bfloat16()
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.register_forward_hook(
        lambda _, args, result: result + much * args[0] @ up.weight.t()[:, :32]
    )
    assert (sgp.audit(model, batch).context_share is not None) == defined


def test_the_parts_of_a_tied_head_that_has_a_gradient_at_context_too(batch):
    """A z-loss over every position: the sum over positions is made by hand, weight by weight."""
    model = make("tied")

    def z_loss(_module, _args, result):
        result.loss = result.loss + 0.05 * result.logits.logsumexp(-1).square().mean()
        return result

    model.register_forward_hook(z_loss)
    report = sgp.audit(model, batch)
    seen = []  # (weight, inputs, gradient of outputs) of every use of a weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
    loss = model(**batch).loss
    deltas = torch.autograd.grad(loss, [out for *_, out in seen])
    outputs = torch.arange(T) >= (torch.tensor(CONTEXTS) - 1)[:, None]
    parts = {}
    for (module, x, _), delta in zip(seen, deltas, strict=True):
        for at, mask in enumerate((outputs, ~outputs)):
            if isinstance(module, torch.nn.Embedding):
                ids = x.masked_select(mask)
                kept = (ids != module.padding_idx)[:, None]
                part = torch.zeros_like(module.weight).index_add_(0, ids, delta[mask] * kept)
            else:
                part = delta[mask].t() @ x[mask]
            found = parts.setdefault(id(module.weight), [0, 0])
            found[at] = found[at] + part
    linear = {id(m.weight) for m, *_ in seen if isinstance(m, torch.nn.Linear)}
    of_outputs = torch.cat([parts[k][0].flatten() for k in parts if k in linear])
    of_context = torch.cat([parts[k][1].flatten() for k in parts if k in linear])
    whole = of_outputs + of_context
    share = (of_context.norm() / whole.norm()).item()
    assert report.context_share == pytest.approx(share, rel=1e-3)
    cosine = torch.cosine_similarity(whole, of_outputs, dim=0).item()
    assert report.cosine_detached == pytest.approx(cosine, rel=1e-3)


def test_everything_is_left_as_it_was(model, batch):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.lm_head.eval()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    state = torch.get_rng_state()
    sgp.audit(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])
        assert not p._post_accumulate_grad_hooks
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    hooks = [len(m._forward_hooks) for m in model.modules()]  # transformers' own, which stay
    sgp.audit(model, batch)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_rotary_embeddings_that_grow_are_as_before(fails, batch):
    """They put another buffer in its place, and count beside it how far they have grown."""
    more = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZE | {"max_position_embeddings": 8}, rope_parameters=more)
    model = LlamaForCausalLM(config)
    rotary = model.model.rotary_emb
    known, buffers = dict(vars(rotary)), dict(rotary.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}
    if fails:
        model.lm_head.forward = None
    with pytest.raises(TypeError) if fails else nullcontext():
        sgp.audit(model, batch, generate=0 if fails else 1)
    assert {k: v for k, v in vars(rotary).items() if isinstance(v, int | float)} == {
        k: v for k, v in known.items() if isinstance(v, int | float)
    }
    for name, buffer in rotary.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, before[name])


def test_the_norm_of_several_streams_is_that_of_all(batch):
    """Hidden states (B, T, streams, D), as models with hyper-connections have them."""

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

        def forward(self, input_ids, output_hidden_states):
            assert output_hidden_states
            first = self.embed(input_ids)
            streams = torch.stack([first, 2 * first], 2)
            last = streams.sum(2)
            hidden = (first, streams, last)
            return SimpleNamespace(logits=self.head(last), hidden_states=hidden)

    report = sgp.audit(Streams(), batch)
    assert report.findings == []
    assert report.grad_norm.shape == (3, B, T)
    assert torch.allclose(report.grad_norm[1], 2**0.5 * report.grad_norm[2])


@pytest.mark.parametrize("kind", ["raises", "has none"])
def test_a_tokenizer_that_cannot_decode_is_no_reason_to_stop(kind, model, batch):
    class Mute:
        eos_token_id = EOS
        all_special_ids = (0, 1, EOS)

    class Raising(Mute):
        def decode(self, ids):
            raise IndexError(ids[0])

    mute = Raising() if kind == "raises" else Mute()
    shifted = torch.cat([batch["labels"][:, 1:], batch["labels"][:, :1]], 1)
    report = sgp.audit(model, {**batch, "labels": shifted}, tokenizer=mute, generate=1)
    assert report.tokens[0][3].text == str(int(batch["input_ids"][0, 3]))
    assert report.answers[0].expected.split()[0].isdigit()
    found = report.repair()
    assert found.changes["labels-shifted-twice"] == len(found.rows) == len(shifted)
    assert found.samples[0].after


def test_everything_is_left_as_it_was_after_an_error(model, batch):
    def fails(*_):
        raise RuntimeError("of the model")

    hooks = [len(m._forward_hooks) for m in model.modules()]
    handle = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="of the model"):
        sgp.audit(model, batch)
    handle.remove()
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert sgp.audit(model, batch).findings == []


def test_an_optimizer_that_steps_in_backward_does_not_step(model, batch):
    steps = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p.grad is not None))
    sgp.audit(model, batch)
    assert steps == []
    model(**batch).loss.backward()
    assert steps == [True] * len(list(model.parameters())), "it does afterwards"


def test_a_selection_in_place_of_labels(model, batch):
    labels = batch.pop("labels")
    selection = sgp.Selection.from_labels(labels, shift=True)
    report = sgp.audit(model, batch, selection=selection)
    batch["labels"] = labels
    expected = sgp.audit(model, batch)
    assert [[t.role for t in row] for row in report.tokens] == [
        [t.role for t in row] for row in expected.tokens
    ]
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)
    assert report.findings == []


def test_what_is_refused(model, batch):
    with pytest.raises(TypeError, match="batch is Tensor; expected a dict"):
        sgp.audit(model, batch["input_ids"])
    with pytest.raises(TypeError, match=r"Linear\.forward takes .*; expected a causal"):
        sgp.audit(torch.nn.Linear(2, 2), batch)
    wrong = batch["labels"].clone()
    wrong[0, 9] = -1
    with pytest.raises(ValueError, match=r"labels\[0, 9\] = -1 is outside"):
        sgp.audit(model, batch | {"labels": wrong})
    wrong = batch["input_ids"].clone()
    for token in (99, 61):
        wrong[1, 2] = token
        with pytest.raises(ValueError, match=rf"input_ids\[1, 2\] = {token} is outside \[0, 61\)"):
            sgp.audit(model, batch | {"input_ids": wrong})
    with pytest.raises(TypeError, match="input_ids is list; expected a tensor"):
        sgp.audit(model, {k: v.tolist() for k, v in batch.items()})
    with pytest.raises(TypeError, match=r"labels is torch\.float32; expected a tensor"):
        sgp.audit(model, batch | {"labels": batch["labels"].float()})
    with pytest.raises(ValueError, match="expected input_ids"):
        sgp.audit(model, {"labels": batch["labels"]})
    with pytest.raises(ValueError, match="expected labels, or selection="):
        sgp.audit(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"labels is \(3, 5\), input_ids \(3, 17\)"):
        sgp.audit(model, {**batch, "labels": batch["labels"][:, :5]})
    with pytest.raises(ValueError, match="the selection is of 17 tokens, input_ids of 51"):
        sgp.audit(model, batch, selection=sgp.Selection.from_labels(batch["labels"][0]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("trained", ["float32", "bfloat16", "lora", "frozen"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_correct_batch_has_no_error_in_any_family(family, trained):
    model, batch = families.make(family), families.make_batch()
    noted = {"worse-than-uniform", "another-loss"}  # of random heads; of MoE
    if trained == "bfloat16":
        model = model.to(torch.bfloat16)
    elif trained == "lora":
        targets = ["q_proj", "k_proj"] if family == "falcon_h1" else "all-linear"
        kind = peft.LoraConfig(
            target_modules=targets, r=2, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, kind).train()
    elif trained == "frozen":
        model.get_input_embeddings().requires_grad_(False)
    report = sgp.audit(model, batch)
    assert [f for f in report.findings if f.severity != "note"] == []
    if trained in ("lora", "frozen"):
        noted |= {"not-measured"}
        assert report.grad_norm[1:].isfinite().all()
    else:
        assert report.grad_norm.isfinite().all()
    assert codes(report) <= noted


# -- models in their wrappers, and partly frozen ---------------------------------------------------


def same(report, expected):
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)
    torch.testing.assert_close(report.grad_norm, expected.grad_norm, rtol=1e-5, atol=1e-9)
    assert report.context_share == pytest.approx(expected.context_share, rel=1e-5)
    assert report.findings == expected.findings


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_wrappers_are_taken_off(model, batch):
    expected = sgp.audit(model, batch)
    same(sgp.audit(torch.nn.DataParallel(model), batch), expected)
    same(sgp.audit(torch.compile(model), batch), expected)
    with torch.no_grad():
        same(sgp.audit(model, batch), expected)
    with torch.inference_mode():
        same(sgp.audit(model, batch), expected)


def test_the_parts_are_added_in_float32_under_autocast(model, batch):
    exact = sgp.audit(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sgp.audit(model, batch)
    assert found.context_share == pytest.approx(exact.context_share, rel=3e-2)


def adapted(model, *targets, **options):
    kind = peft.LoraConfig(
        target_modules=list(targets) or "all-linear", r=2, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, kind).train()


def test_adapters_and_packed_rows(batch):
    """PEFT's forward does not name position_ids; its base is frozen, the embeddings too."""
    del batch["attention_mask"]  # with one, transformers does not look at the positions
    batch["position_ids"] = torch.arange(T).repeat(B, 1)
    batch["position_ids"][0, 9:] = torch.arange(T - 9)
    batch["labels"][0, 9] = -100
    expected = sgp.audit(make("llama"), batch)
    model = adapted(make("llama"), "q_proj", "v_proj")
    report = sgp.audit(model, batch)
    assert report.loss == pytest.approx(expected.loss, rel=1e-6), "position_ids were passed on"
    torch.testing.assert_close(report.grad_norm[1:], expected.grad_norm[1:], rtol=1e-5, atol=1e-9)
    assert codes(report) == {"zero-gradient", "not-measured"}, "A has none while B is zero"
    assert report.errors == []
    del batch["position_ids"]
    other = sgp.audit(model, batch).grad_norm[1:]
    assert not torch.allclose(other, expected.grad_norm[1:], rtol=1e-3), "they matter"


def test_frozen_embeddings_are_not_made_to_require_a_gradient(batch):
    model = make("llama")
    expected = sgp.audit(model, batch)
    model.get_input_embeddings().requires_grad_(False)
    report = sgp.audit(model, batch)
    assert report.grad_norm[0].isnan().all()
    torch.testing.assert_close(report.grad_norm[1:], expected.grad_norm[1:], rtol=1e-5, atol=1e-9)
    (found,) = report.findings
    assert (found.code, found.severity) == ("not-measured", "note")
    assert "the hidden states of layers 0 are" in found.message
    model.requires_grad_(False)
    report = sgp.audit(model, batch)
    assert report.grad_norm.isnan().all()
    assert report.context_share is None, "no linear layer has a gradient"
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


def test_sharded_parameters_are_refused(model, batch):
    model.lm_head.weight.ds_id = 3
    with pytest.raises(TypeError, match=r"lm_head\.weight is sharded over processes"):
        sgp.audit(model, batch)


# -- selections ------------------------------------------------------------------------------------


def test_the_loss_of_a_selection_is_weighted(model, batch):
    labels = batch.pop("labels")
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(5))
    weighted = sgp.Selection.from_labels(labels, shift=True, token_weight=weight)
    report = sgp.audit(model, batch, selection=weighted)
    logits = model.eval()(**batch).logits
    expected = sgp.cross_entropy(logits, weighted)
    assert report.loss == pytest.approx(expected.item(), rel=1e-6)
    norms = torch.autograd.grad(expected, logits)[0].norm(dim=-1)
    found = torch.tensor([[t.gradient for t in row] for row in report.tokens])
    torch.testing.assert_close(found, norms, rtol=1e-5, atol=1e-9)
    assert report.findings == []
    advantages = sgp.Selection.from_labels(labels, shift=True, token_weight=weight - 0.5)
    expected = sgp.cross_entropy(logits, advantages, denominator=advantages.num_kept)
    found = sgp.audit(model, batch, selection=advantages)
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_selection_knows_its_boundaries(model, batch):
    ids = batch["input_ids"][:1]
    labels = ids.clone()
    positions = torch.cat([torch.arange(9), torch.arange(T - 9)])[None]
    packed = {"input_ids": ids, "position_ids": positions}
    seams = torch.tensor([0, 9, 17])
    whole = sgp.Selection.from_labels(labels, shift=True, cu_seqlens=seams)
    report = sgp.audit(model, packed, selection=whole)
    assert report.tokens[0][8].target is None
    assert report.errors == []
    assert codes(report) == {"all-scored"}
    across = sgp.Selection.from_labels(labels, shift=True)
    report = sgp.audit(model, packed, selection=across)
    assert codes(report) == {"all-scored", "crosses-boundary"}
    report = sgp.audit(model, {"input_ids": ids}, selection=whole)  # which the model is not told of
    assert codes(report) == {"all-scored", "attends-across-boundary"}


def test_roles_begin_anew_with_each_packed_sequence(model, batch):
    """Context before an output, and tokens after it that carry nothing, of each sequence."""
    ids = batch["input_ids"][:1]
    labels = torch.full_like(ids, -100)
    labels[0, 4:6], labels[0, 12:14] = ids[0, 4:6], ids[0, 12:14]
    positions = torch.cat([torch.arange(8), torch.arange(T - 8)])[None]
    report = sgp.audit(model, {"input_ids": ids, "labels": labels, "position_ids": positions})
    assert [token.role for token in report.tokens[0]] == [
        *["context"] * 3, "predictor", *["output"] * 2, *["ignored"] * 2,
        *["context"] * 3, "predictor", *["output"] * 2, *["ignored"] * 3,
    ]  # fmt: skip


def test_a_target_that_is_no_input(model, batch):
    """Inputs without the last token, targets without the first: shift=False."""
    ids = batch["input_ids"][:1]
    targets = torch.full_like(ids[:, 1:], -100)
    targets[:, 5:] = ids[:, 6:]
    selection = sgp.Selection.from_labels(targets, shift=False)
    batch = {"input_ids": ids[:, :-1]}
    report = sgp.audit(model, batch, selection=selection, tokenizer=Tokenizer())
    assert report.findings == []
    assert report.tokens[0][-1].target_id == EOS
    assert report.context_share > 0
    shifted = {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "shift_labels": targets}
    assert sgp.audit(model, shifted).loss == pytest.approx(report.loss, rel=1e-6)
