"""examples/losses.py against others' code: TRL's own trainers, and plain PyTorch on whole logits.

`GRPOTrainer._compute_loss` and those of DPO and KTO are TRL's, called on a stand-in for `self` and
a model that gives what they ask of one: log-probabilities from `log_softmax` of all logits. PPO,
REINFORCE, SimPO and weighted fine-tuning are written here from their formulas. Loss and gradients
are compared in float64, whatever the chunks.
"""

import ast
import importlib.util
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import sgp

EXAMPLES = Path(__file__).parent.parent / "examples"


def of_examples(name):
    """A module of the folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


losses = of_examples("losses")
# chunks that are shorter than a sequence are meant
pytestmark = pytest.mark.filterwarnings("ignore:.*made twice")
B, P, C, V, D = 6, 3, 7, 13, 5  # sequences of a prompt of 3 tokens and up to 7 of an answer
LENGTHS = (7, 3, 5, 1, 6, 2)
CHUNKS = (None, 1, 4, 100)


@pytest.fixture
def batch():
    """Hidden states, a head, tokens with padding, and what other policies say of them."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, dtype=torch.float64, generator=draw)

    ids = torch.randint(V, (B, P + C), generator=draw)
    mask = torch.zeros(B, P + C, dtype=torch.int64)
    for i, length in enumerate(LENGTHS):
        mask[i, P : P + length] = 1
    labels = ids.masked_fill(mask == 0, -100)
    hidden, head = normal(B, P + C, D).requires_grad_(), normal(V, D).requires_grad_()
    found = SimpleNamespace(
        ids=ids, mask=mask, hidden=hidden, head=head, advantages=normal(B),
        selection=sgp.Selection.from_labels(labels, shift=True),
    )  # fmt: skip
    with torch.no_grad():
        log_prob = plain(found).log_prob
        # some ratios are outside every clip, on both sides; none is on an edge
        found.old, found.reference = (
            F.pad(log_prob + normal(*log_prob.shape, scale=scale), (0, 1)) for scale in (0.4, 0.8)
        )
        found.other, found.other_reference = normal(B) - 8, normal(B) - 9
    return found


def plain(batch):
    """What TRL asks a model for: (B, T - 1) of the next token, from all logits; zero if masked."""
    log_p = F.linear(batch.hidden, batch.head).log_softmax(-1)[:, :-1]
    picked = log_p.gather(2, batch.ids[:, 1:, None]).squeeze(2)
    kept = batch.mask[:, 1:]
    zeros = torch.zeros_like(picked)
    return SimpleNamespace(
        log_prob=picked * kept, log_probs=picked * kept,
        entropy=-(log_p.exp() * log_p).sum(2) * kept,
        mean_logits=zeros, is_top1=zeros.bool(),
    )  # fmt: skip


def same(batch, loss_fn, expected, *also, **by):
    """Loss and gradients, at several sizes of a chunk."""
    inputs = [batch.hidden, batch.head, *also]
    wanted = torch.autograd.grad(expected, inputs, retain_graph=True)
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted), "there is something to compare"
    for chunk_rows in CHUNKS:
        found = sgp.linear_loss(
            batch.hidden, batch.head, batch.selection, loss_fn, chunk_rows=chunk_rows, **by
        )
        loss = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-10)


# -- TRL's trainers --------------------------------------------------------------------------------


def accelerator():
    """Of one process."""

    def alone(x, **_):
        return x

    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=alone, gather_for_metrics=alone,
        reduce=alone, sync_gradients=True,
    )  # fmt: skip


def grpo_of_trl(batch, loss_type, level, beta, entropy, delta, high):
    """`GRPOTrainer._compute_loss`, of a batch that is one optimizer step."""
    GRPOTrainer = pytest.importorskip("trl").GRPOTrainer

    model = plain(batch)

    def from_logits(*_, **__):
        return model.log_prob[:, P - 1 :], model.entropy[:, P - 1 :], None

    args = SimpleNamespace(
        use_bias_correction_kl=False, delta=delta, steps_per_generation=1,
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.25,  # exact in float32, as TRL has it
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=from_logits,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        model=SimpleNamespace(training=True), accelerator=accelerator(), args=args,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta, loss_type=loss_type, use_vllm=False,
        epsilon_low=0.2, epsilon_high=high, current_gradient_accumulation_steps=1,
        max_completion_length=C, _entropy_bonus_enabled=entropy != 0, entropy_coef=entropy,
        use_adaptive_entropy=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs = {
        "prompt_ids": batch.ids[:, :P], "prompt_mask": torch.ones(B, P, dtype=torch.int64),
        "completion_ids": batch.ids[:, P:], "completion_mask": batch.mask[:, P:],
        "advantages": batch.advantages, "num_items_in_batch": batch.mask.sum(),
        "old_per_token_logps": batch.old[:, P - 1 : -1],
        "ref_per_token_logps": batch.reference[:, P - 1 : -1],
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, trainer._metrics["train"]


SEQUENCES, TOKENS, LENGTH = "over_sequences", "over_tokens", "over_length"
GRPO = {  # of TRL -> surrogate, divisor, ratio, what TRL calls the bound above
    "grpo": (losses.clipped(0.2, 0.28), SEQUENCES, "token", 0.28),
    "bnpo": (losses.clipped(0.2, 0.28), TOKENS, "token", 0.28),
    "dr_grpo": (losses.clipped(0.2, 0.28), LENGTH, "token", 0.28),
    "dapo": (losses.clipped(0.2, 0.28), TOKENS, "token", 0.28),
    "luspo": (losses.clipped(0.2, 0.28), B, "mean", 0.28),
    "cispo": (losses.cispo(1.3), TOKENS, "token", 1.3),
    "sapo": (losses.sapo(1.0, 1.25), SEQUENCES, "token", 0.28),
    "vespo": (losses.vespo(), TOKENS, "sum", 0.28),
    "gspo": (losses.clipped(0.2, 0.28), SEQUENCES, "mean", 0.28),
    "luspo, token": (losses.clipped(0.2, 0.28), B, "token", 0.28),
    "delta": (losses.clipped(0.2, 0.28, delta=1.4), SEQUENCES, "token", 0.28),
}


@pytest.mark.parametrize(("beta", "entropy"), [(0.0, 0.0), (0.3, 0.2)], ids=["", "kl, entropy"])
@pytest.mark.parametrize("name", GRPO)
def test_grpo_is_trls(name, beta, entropy, batch):
    surrogate, divisor, ratio, high = GRPO[name]
    loss_type = {"gspo": "grpo", "delta": "grpo"}.get(name, name.partition(",")[0])
    level = "sequence" if ratio == "mean" else "token"
    delta = 1.4 if name == "delta" else None
    expected, metrics = grpo_of_trl(batch, loss_type, level, beta, entropy, delta, high)
    if divisor == LENGTH:
        divisor = losses.over_length(batch.selection, C)
    elif isinstance(divisor, str):
        divisor = getattr(losses, divisor)(batch.selection)
    loss_fn = losses.grpo(
        batch.selection, batch.old, batch.advantages, surrogate, divisor, ratio=ratio,
        reference=batch.reference, beta=beta, entropy=entropy,
    )  # fmt: skip
    by = "row" if ratio == "token" else "sequence"
    same(batch, loss_fn, expected, by=by)
    _, found = sgp.linear_loss(batch.hidden, batch.head, batch.selection, loss_fn, by=by)
    assert found["ratio"].shape == ((B, P + C) if by == "row" else (B,))
    assert ("kl" in found) == (beta != 0)
    if beta and by == "row":
        mean = found["kl"].sum() / batch.selection.num_kept
        assert mean.item() == pytest.approx(metrics["kl"][0], abs=1e-6)


def test_some_ratios_are_clipped_and_some_are_not(batch):
    """Else a recipe without a clip would pass."""
    ratio = (plain(batch).log_prob - batch.old[:, :-1]).exp()[batch.mask[:, 1:] == 1]
    advantage = batch.advantages[:, None].expand(B, P + C - 1)[batch.mask[:, 1:] == 1]
    assert ((ratio < 0.8) & (advantage < 0)).any()
    assert ((ratio > 1.4) & (advantage > 0)).any()
    assert ((ratio > 1.4) & (advantage < 0)).any(), "for delta"
    assert ((ratio > 0.8) & (ratio < 1.28)).any()


def test_dpo_is_trls(batch):
    """TRL has all chosen before all rejected; a group has its two next to each other."""
    DPOTrainer = pytest.importorskip("trl").DPOTrainer

    order = torch.tensor([0, 2, 4, 1, 3, 5])
    all_of = plain(batch)
    model = SimpleNamespace(**{k: v[order] for k, v in vars(all_of).items()})
    reference = batch.reference[:, :-1].mul(batch.mask[:, 1:]).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator(), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=0.3,
        loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False, label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": batch.ids[order], "completion_mask": batch.mask[order],
        "ref_chosen_logps": reference[order[:3]], "ref_rejected_logps": reference[order[3:]],
    }  # fmt: skip
    expected = DPOTrainer._compute_loss(trainer, lambda **_: model, inputs, return_outputs=False)
    loss_fn = losses.dpo(batch.selection, reference, beta=0.3)
    same(batch, loss_fn, expected, by="group", groups=losses.pairs(B))
    _, found = sgp.linear_loss(
        batch.hidden, batch.head, batch.selection, loss_fn, by="group", groups=losses.pairs(B)
    )
    said = trainer._metrics["eval"]
    assert found["margin"].mean().item() == pytest.approx(said["rewards/margins"][0], abs=1e-6)
    assert found["correct"].mean().item() == pytest.approx(said["rewards/accuracies"][0])


def test_dpo_with_smoothed_labels_is_the_formula(batch):
    """TRL has them in other losses only; cDPO, equation 3 of https://ericmitchell.ai/cdpo.pdf."""
    reference = batch.reference.sum(1)
    margin = 0.3 * (plain(batch).log_prob.sum(1) - reference).view(3, 2)
    away = margin[:, 0] - margin[:, 1]
    expected = -(0.9 * away.sigmoid().log() + 0.1 * (1 - away.sigmoid()).log()).mean()
    loss_fn = losses.dpo(batch.selection, reference, beta=0.3, label_smoothing=0.1)
    same(batch, loss_fn, expected, by="group", groups=losses.pairs(B))


def test_kto_is_trls(batch):
    KTOTrainer = pytest.importorskip("trl").KTOTrainer

    desirable = torch.tensor([True, False, False, True, True, False])
    reference = batch.reference[:, :-1].mul(batch.mask[:, 1:]).sum(1)
    model = plain(batch)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator(), aux_loss_enabled=False,
        calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=0.3,
        desirable_weight=1.1, undesirable_weight=0.7, _compute_kl_logps=lambda *_: batch.other,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": batch.ids, "completion_mask": batch.mask, "label": desirable,
        "ref_logps": reference, "ref_KL_logps": batch.other_reference,
    }  # fmt: skip
    expected = KTOTrainer._compute_loss(trainer, lambda **_: model, inputs, return_outputs=False)
    z0 = losses.kto_z0(batch.other, batch.other_reference)
    assert z0 > 0
    loss_fn = losses.kto(
        batch.selection, reference, desirable, z0, beta=0.3,
        desirable_weight=1.1, undesirable_weight=0.7,
    )  # fmt: skip
    same(batch, loss_fn, expected, by="sequence")
    assert losses.kto_z0(batch.other_reference - 9, batch.other) == 0


# -- plain PyTorch ---------------------------------------------------------------------------------


def test_ppo_is_the_formula_and_its_value_head_learns(batch):
    advantages, returns = batch.reference + 2, batch.old + 1
    value_head = torch.randn(D, dtype=torch.float64, requires_grad=True)
    values = batch.hidden.detach() @ value_head
    kept = batch.mask[:, 1:] == 1
    total, model = int(kept.sum()), plain(batch)
    ratio = (model.log_prob - batch.old[:, :-1]).exp()[kept]
    advantage = advantages[:, :-1][kept]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    value_loss = 0.5 * (values - returns)[:, :-1][kept].square().mean()
    expected = value_loss - gain.mean() - 0.1 * model.entropy[kept].mean()
    loss_fn = losses.ppo(batch.old, advantages, total, entropy=0.1, values=values, returns=returns)
    same(batch, loss_fn, expected, value_head)


def test_reinforce_is_the_formula(batch):
    rewards = batch.advantages
    log_probs = plain(batch).log_prob.sum(1)
    expected = -((rewards - rewards.mean()) * log_probs).mean()
    same(batch, losses.reinforce(batch.selection, rewards, rewards.mean()), expected)


def test_weighted_nll_is_the_formula(batch):
    weights = batch.reference.abs()
    kept = batch.mask[:, 1:] * weights[:, :-1]
    expected = -(kept * plain(batch).log_prob).sum() / kept.sum()
    same(batch, losses.weighted_nll(weights, kept.sum()), expected)


def test_simpo_is_the_formula(batch):
    mean = plain(batch).log_prob.sum(1) / torch.tensor(LENGTHS)
    expected = -(2 * (mean[0::2] - mean[1::2]) - 1).sigmoid().log().mean()
    same(batch, losses.simpo(batch.selection), expected, by="group", groups=losses.pairs(B))


@pytest.mark.parametrize("ratio", ["token", "mean"])
def test_a_packed_batch_has_the_same_loss(ratio, batch):
    """One row of all tokens, of which a Selection knows the sequences."""
    starts = torch.arange(0, (B + 1) * (P + C), P + C)
    labels = batch.ids.masked_fill(batch.mask == 0, -100).view(1, -1)
    packed = sgp.Selection.from_labels(labels, shift=True, cu_seqlens=starts)
    hidden = batch.hidden.view(1, -1, D)
    by = "row" if ratio == "token" else "sequence"
    found = []
    for selection, x in ((batch.selection, batch.hidden), (packed, hidden)):
        loss_fn = losses.grpo(
            selection, batch.old, batch.advantages, losses.clipped(),
            losses.over_sequences(selection), ratio=ratio,
        )  # fmt: skip
        found.append(sgp.linear_loss(x, batch.head, selection, loss_fn, by=by)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_sequence_without_loss_counts_as_one_without_gain(batch):
    """As TRL has it: it is in the mean, and adds nothing."""
    batch.mask[3] = 0
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    batch.selection = sgp.Selection.from_labels(labels, shift=True)
    expected, _ = grpo_of_trl(batch, "grpo", "sequence", 0.0, 0.0, None, 0.2)
    loss_fn = losses.grpo(
        batch.selection, batch.old, batch.advantages, losses.clipped(),
        losses.over_sequences(batch.selection), ratio="mean",
    )  # fmt: skip
    same(batch, loss_fn, expected, by="sequence")


# -- the page --------------------------------------------------------------------------------------


def functions_of(text):
    """Name -> source, without what a page leaves out: annotations and docstrings."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    inner.returns = None
                    for argument in (*inner.args.args, *inner.args.kwonlyargs):
                        argument.annotation = None
                    if ast.get_docstring(inner) is not None:
                        inner.body = inner.body[1:]
            found[node.name] = ast.unparse(node)
    return found


def test_the_pages_recipes_are_those_of_the_file():
    page = (EXAMPLES.parent / "docs" / "how-to" / "own-loss.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown = {name: code for block in blocks for name, code in functions_of(block).items()}
    ours = functions_of((EXAMPLES / "losses.py").read_text())
    both = shown.keys() & ours.keys()
    assert both >= {"grpo", "clipped", "over_tokens", "ppo", "dpo", "pairs", "kto", "kto_z0"}
    for name in both:
        assert shown[name] == ours[name], name
