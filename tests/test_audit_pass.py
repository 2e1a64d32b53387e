"""The audit's pass is the training's own: its mode, checkpoints, frozen and virtual parts."""

import functools
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sgp
from tests.audited import B, T, Tokenizer, codes, make, make_batch
from tests.test_audit import adapted

pytestmark = [
    pytest.mark.filterwarnings(  # of PEFT, which asks transformers
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


@pytest.fixture
def batch():
    return make_batch()


def bad(report):
    return {f.code for f in report.findings if f.severity != "note"}


# -- mode ------------------------------------------------------------------------------------------


def dropping(p):
    model = make("llama").train()
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda m, _, out: torch.nn.functional.dropout(out, p, m.training)
        )
    return model


def test_the_loss_is_that_of_training(batch):
    """With its dropout, from the random state that training would go on from."""
    model = dropping(0.3)
    torch.manual_seed(3)
    expected = model(**batch).loss.item()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = sgp.audit(model, batch, tokenizer=Tokenizer())
    assert report.loss == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.findings == []
    torch.manual_seed(3)
    assert sgp.audit(model.eval(), batch).loss == pytest.approx(expected, rel=1e-6)
    assert not any(m.training for m in model.modules()), "as it was"
    assert report.loss != pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_modules_that_training_keeps_in_evaluation_mode_stay_there(batch):
    model, seen = dropping(0.3), []
    model.model.layers[0].eval()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, *_: seen.append(m.training))
    sgp.audit(model, batch)
    assert seen == [False, True]


def test_buffers_that_training_moves_are_as_before(batch):
    model = make("llama")
    norm = torch.nn.BatchNorm1d(32)
    model.norm_of_batch = norm
    model.model.layers[0].register_forward_hook(
        lambda _, __, out: norm(out.flatten(0, 1)).view(out.shape)
    )
    before = {name: b.clone() for name, b in model.named_buffers()}
    report = sgp.audit(model, batch)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model.train()(**batch)
    assert not torch.equal(norm.running_mean, torch.zeros(32)), "a pass does move them"
    assert bad(report) == set()


def test_autocast(batch):
    model = make("llama")
    exact = sgp.audit(model, batch)
    report = sgp.audit(model, batch, autocast=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.train()(**batch).loss.item()
    assert report.loss == pytest.approx(expected, rel=1e-6)
    assert report.loss != pytest.approx(exact.loss, rel=1e-6)
    assert report.context_share == pytest.approx(exact.context_share, rel=3e-2)
    assert report.findings == []


@pytest.mark.parametrize("autocast", ["bf16", torch.int8, torch.zeros(1), False])
def test_an_autocast_that_is_no_dtype_is_refused(autocast, batch):
    """Before anything runs; torch takes a dtype of integers for none, with a warning."""
    with pytest.raises(TypeError) as error:
        sgp.audit(make("llama"), batch, autocast=autocast)
    assert str(error.value) == (
        f"sgp.audit: autocast is {autocast!r}; expected a torch.dtype such as torch.bfloat16, or "
        "None"
    )


@pytest.mark.parametrize("mode", ["rows", "fused"])
def test_a_patched_model_trains_as_it_did(mode, batch):
    """It makes no logits in training; its layers drop out all the same."""
    model, seen = dropping(0.3), []
    torch.manual_seed(3)
    expected = sgp.audit(model, batch)
    patched = sgp.huggingface.patch(model, mode=mode)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, *_: seen.append(m.training))
    torch.manual_seed(3)
    report = sgp.audit(model, batch)
    assert seen == [True, True]
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    assert bad(report) == set()
    assert all(m.training for m in model.modules())
    del patched


# -- activation checkpoints ------------------------------------------------------------------------


def within(layer, reentrant):
    """The hooks of the layer run within the checkpoint, as in earlier versions of transformers."""

    class Within(type(layer)):
        def __call__(self, hidden, *args, **kwargs):
            call = functools.partial(torch.nn.Module.__call__, self, **kwargs)
            return checkpoint(call, hidden, *args, use_reentrant=reentrant)

    layer.__class__ = Within


def around(layer, reentrant):
    """They run outside of it."""
    inner = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: checkpoint(
        lambda h: inner(h, *args, **kwargs), hidden, use_reentrant=reentrant
    )


@pytest.mark.parametrize("way", [within, around])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_activation_checkpoints_change_nothing(name, trained, reentrant, way, batch):
    def made():
        model = make(name).train()
        if trained == "lora":
            model = adapted(model, init_lora_weights=False)
            model.enable_input_require_grads()
        return model

    expected, model = sgp.audit(made(), batch), made()
    runs = []
    for layer in model.get_base_model().model.layers if trained == "lora" else model.model.layers:
        way(layer, reentrant)
        layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    report = sgp.audit(model, batch)
    assert len(runs) == 4, "each layer ran twice"
    assert report.findings == expected.findings == []
    torch.testing.assert_close(report.grad_norm, expected.grad_norm)
    assert report.context_share == pytest.approx(expected.context_share, rel=1e-6)
    assert report.cosine_detached == pytest.approx(expected.cosine_detached, rel=1e-6)


@pytest.mark.parametrize("way", [within, around])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trained", ["lora", "frozen embeddings"])
def test_adapters_that_get_no_gradient_in_training(trained, reentrant, way, batch):
    """Reentrant checkpoints of inputs that require no gradient make none."""
    model = make("llama").train()
    if trained == "lora":
        model = adapted(model, "q_proj", init_lora_weights=False, modules_to_save=["lm_head"])
        layers = model.get_base_model().model.layers
    else:
        model.get_input_embeddings().requires_grad_(False)
        layers = model.model.layers
    for layer in layers:
        way(layer, reentrant)
    report = sgp.audit(model, batch)
    model(**batch, use_cache=False).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(without) == reentrant
    assert bad(report) == ({"missing-gradient"} if reentrant else set())
    assert list(report.view.without_gradient) == without
    if reentrant:
        assert report.context_share is None
        assert report.grad_norm[:-1].isnan().all()


def test_a_layer_that_runs_twice_under_a_checkpoint_has_no_parts(batch):
    model = make("llama").train()
    model.model.layers[1] = model.model.layers[0]
    within(model.model.layers[0], reentrant=True)
    assert sgp.audit(model, batch).context_share is None


# -- what no token of the batch needs --------------------------------------------------------------


def test_a_tower_and_experts_that_did_not_run_are_noted(batch):
    model = make("llama")
    model.visual = torch.nn.Linear(3, 3)
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    report = sgp.audit(model, batch)
    assert [(f.code, f.severity) for f in report.findings] == [("module-not-run", "note")]
    assert report.view.not_run == (
        "model.layers.0.mlp.experts.0.weight", "model.layers.0.mlp.experts.0.bias",
        "visual.weight", "visual.bias",
    )  # fmt: skip
    for words, left in (
        (["*.experts.*", "visual"], set()),
        (["*.experts.*"], {"module-not-run"}),
        (["module-not-run"], set()),
    ):
        assert codes(sgp.audit(model, batch, ignore=words)) == left


def test_words_to_ignore_that_mean_nothing_are_refused(batch):
    model = make("llama")
    with pytest.raises(ValueError, match=r"ignore has 'no-end'.*codes are labels-shifted-twice, "):
        sgp.audit(model, batch, ignore=["no-end"])
    with pytest.raises(ValueError, match=r"ignore has '\*\.visual\.\*'.* fits no parameter"):
        sgp.audit(model, batch, ignore=["*.visual.*"])
    with pytest.raises(TypeError, match="ignore is 'no-eos'; expected a list"):
        sgp.audit(model, batch, ignore="no-eos")
    with pytest.raises(ValueError, match="ignore has 'no-end'"):
        sgp.auditing.look(batch, ignore=["no-end"])
    assert sgp.auditing.look(batch, ignore=["*.visual.*"]) == [], "there is no model to ask"


def test_severities_are_chosen(batch):
    batch["labels"][2] = -100
    look = functools.partial(sgp.auditing.look, batch)
    assert [(f.code, f.severity) for f in look()] == [("no-targets", "error")]
    assert [f.severity for f in look(severity={"no-targets": "note"})] == ["note"]
    assert look(ignore=["no-targets"]) == []
    report = sgp.audit(make("llama"), batch, severity={"no-targets": "warning"})
    assert report.errors == []
    assert [f.severity for f in report.findings] == ["warning"]
    with pytest.raises(ValueError, match="severity of 'no-target'; the codes are labels-"):
        look(severity={"no-target": "note"})
    with pytest.raises(ValueError, match="severity 'fatal' of no-eos; expected error, warning"):
        look(severity={"no-eos": "fatal"})


# -- PEFT's virtual tokens -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder", "PrefixTuning", "IA3"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_virtual_tokens_are_no_tokens_of_the_report(name, kind, packed, batch):
    options = {} if kind == "IA3" else {"num_virtual_tokens": 3}
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(make(name), config).train()
    if packed:
        batch["position_ids"] = torch.arange(T).repeat(B, 1)
        batch["position_ids"][0, 9:] = torch.arange(T - 9)
        batch["labels"][0, 9] = -100
    out = model(**batch, use_cache=False)
    report = sgp.audit(model, batch)
    assert report.loss == pytest.approx(out.loss.item(), rel=1e-6)
    assert bad(report) == ({"attends-across-boundary"} if packed else set()), "ones beside it"
    logits = out.logits[:, -T:].log_softmax(-1)
    for row in report.tokens:
        assert len(row) == T
        for token in row:
            if token.target_id is not None:
                expected = -logits[token.row, token.position, token.target_id].item()
                assert token.loss == pytest.approx(expected, rel=1e-4)
    assert report.grad_norm.shape == (3, B, T)


def test_longer_logits_are_named(batch):
    model = make("llama")

    def longer(_module, _args, result):
        result.logits = torch.cat([result.logits[:, :2], result.logits], 1)
        return result

    model.register_forward_hook(longer)
    with pytest.raises(ValueError, match=r"logits of 19 positions for 17 tokens.*virtual tokens"):
        sgp.audit(model, batch)
    model.active_peft_config = SimpleNamespace(num_virtual_tokens=3)
    with pytest.raises(ValueError, match="expected as many, or 3 more for virtual tokens"):
        sgp.audit(model, batch)
