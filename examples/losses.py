"""Losses for `sgp.linear_loss`: each function makes a `loss_fn` from what is known before the step.

    selection = sgp.Selection.from_labels(labels, shift=True)
    with torch.no_grad():
        old = sgp.linear_token_log_probs(hidden, head.weight, selection).log_prob
    loss_fn = grpo(selection, old, advantages, clipped(0.2, 0.28), over_tokens(selection))
    loss, metrics = sgp.linear_loss(hidden, head.weight, selection, loss_fn)

Copy what you need. N tokens, S sequences, M rows that carry loss, of which m are in one call. What
has a number for each token has the shape of the labels and stands at the row that predicts the
token, as the results of `sgp.linear_token_log_probs` do. What has one for each sequence is (S,),
for padded and for packed batches. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import sgp

Result = tuple[Tensor, dict[str, Tensor]]
LossFunction = Callable[[sgp.TokenLogProbs, Tensor], "Tensor | Result"]
Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]  # log_prob, log_ratio, advantage -> gain


def lengths_of(selection: sgp.Selection) -> Tensor:
    """(S,): the tokens of each sequence that carry loss, and 1 where there is none."""
    ones = torch.ones_like(selection.rows, dtype=torch.float32)
    return ones.new_zeros(selection.num_sequences).index_add(0, selection.sequence, ones).clamp(1)


# -- GRPO and its relatives ------------------------------------------------------------------------


def grpo(
    selection: sgp.Selection,
    old: Tensor,
    advantages: Tensor,
    surrogate: Surrogate,
    divisor: Tensor | float,
    *,
    ratio: str = "token",
    reference: Tensor | None = None,
    beta: float = 0.0,
    entropy: float = 0.0,
) -> LossFunction:
    """GRPO, GSPO, DAPO, CISPO...: a gain for each token, a divisor, a KL term, an entropy bonus.

    Args:
        selection: What carries loss.
        old: Log-probabilities of the policy that sampled, like the labels, without gradient.
        advantages: (S,), or one for each token, like the labels.
        surrogate: `clipped`, `cispo`, `sapo` or `vespo`.
        divisor: What a token's loss is divided by: a number, or (S,); see `over_tokens`.
        ratio: Of what the ratio of probabilities is: "token"; "mean", the geometric mean of the
            sequence's (GSPO, LUSPO); "sum", of the whole sequence (VESPO). The last two need
            `by="sequence"`.
        reference: Log-probabilities of the reference policy, like the labels.
        beta: Weight of the divergence from it: k3 of http://joschu.net/blog/kl-approx.html.
        entropy: Weight of the mean entropy, which is added to the gain.
    """
    S, lengths = selection.num_sequences, lengths_of(selection)
    old_log_prob, num_tokens = old.flatten(), max(1, selection.num_kept)
    divisors = old.new_ones(S) * divisor

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Result:
        sequence = selection.sequence_of(rows)

        def sums(x: Tensor) -> Tensor:
            return x.new_zeros(S).index_add(0, sequence, x)

        advantage = advantages[sequence] if advantages.dim() == 1 else advantages.flatten()[rows]
        log_ratio = tokens.log_prob - old_log_prob[rows]
        metrics = {"ratio": log_ratio.exp()}
        if ratio == "mean":
            log_ratio = (sums(log_ratio) / lengths)[sequence]
        elif ratio == "sum":
            log_ratio = sums(log_ratio.clamp(-20, 20))[sequence]
        numbers = -surrogate(tokens.log_prob, log_ratio, advantage)
        if reference is not None and beta:
            behind = reference.flatten()[rows] - tokens.log_prob
            metrics["kl"] = behind.exp() - behind - 1
            numbers = numbers + beta * metrics["kl"]
        numbers = numbers / divisors[sequence] - entropy / num_tokens * tokens.entropy
        if ratio == "token":
            return numbers, metrics
        return sums(numbers), {key: sums(x) / lengths for key, x in metrics.items()}

    return loss_fn


def clipped(low: float = 0.2, high: float = 0.2, delta: float = math.inf) -> Surrogate:
    """PPO's; clip-higher (DAPO) is high > low; `delta` is an upper bound for any advantage."""

    def gain(_: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        bounded = ratio.clamp(1 - low, 1 + high)
        return torch.minimum(ratio.clamp(max=delta) * advantage, bounded * advantage)

    return gain


def cispo(largest: float = 5.0) -> Surrogate:
    """The ratio, bounded and held constant, times the log-probability: https://arxiv.org/abs/2506.13585."""

    def gain(log_prob: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return log_ratio.exp().clamp(max=largest).detach() * advantage * log_prob

    return gain


def sapo(positive: float = 1.0, negative: float = 1.05) -> Surrogate:
    """A smooth gate in the place of the clip: https://arxiv.org/abs/2511.20347."""

    def gain(_: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        temperature = torch.full_like(advantage, negative).masked_fill(advantage > 0, positive)
        return 4 / temperature * torch.sigmoid(temperature * (log_ratio.exp() - 1)) * advantage

    return gain


def vespo(
    positive: tuple[float, float] = (2.0, 3.0), negative: tuple[float, float] = (3.0, 2.0)
) -> Surrogate:
    """A gamma weight w^k exp(l - l w) of the sequence's ratio w; pairs are k and l.

    With `ratio="sum"` and `by="sequence"`.
    """

    def gain(log_prob: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        log_w = log_ratio.detach().clamp(math.log(1e-8), 20)
        k, scale = (
            torch.full_like(advantage, below).masked_fill(advantage >= 0, above)
            for above, below in zip(positive, negative, strict=True)
        )
        return (scale + k * log_w - scale * log_w.exp()).exp() * advantage * log_prob

    return gain


def over_sequences(selection: sgp.Selection) -> Tensor:
    """Divisor of a mean over each sequence, then over the sequences: GRPO, SAPO, GSPO."""
    return lengths_of(selection) * selection.num_sequences


def over_tokens(selection: sgp.Selection) -> float:
    """Divisor of a mean over all tokens: BNPO, and DAPO, CISPO, VESPO of one batch a step."""
    return max(1, selection.num_kept)


def over_length(selection: sgp.Selection, max_completion_length: int) -> float:
    """Divisor of Dr. GRPO: the same for every token, whatever was sampled."""
    return selection.num_sequences * max_completion_length


# -- one number for each token ---------------------------------------------------------------------


def ppo(
    old: Tensor,
    advantages: Tensor,
    total: float,
    *,
    clip: float = 0.2,
    entropy: float = 0.0,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    value_coef: float = 0.5,
) -> LossFunction:
    """PPO, with a value loss where `values` and `returns` are given; values are not clipped.

    `values` may come from a head of their own and gets its gradient. All tensors are like the
    labels; `total` is the number of tokens of the optimizer step.
    """

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Tensor:
        ratio = (tokens.log_prob - old.flatten()[rows]).exp()
        advantage = advantages.flatten()[rows]
        bounded = ratio.clamp(1 - clip, 1 + clip)
        numbers = -torch.minimum(ratio * advantage, bounded * advantage)
        numbers = numbers - entropy * tokens.entropy
        if values is not None and returns is not None:
            error = values.flatten()[rows] - returns.flatten()[rows]
            numbers = numbers + value_coef * error**2
        return numbers / total

    return loss_fn


def reinforce(
    selection: sgp.Selection, rewards: Tensor, baseline: Tensor | float = 0.0
) -> LossFunction:
    """REINFORCE: (reward - baseline) of its sequence times each log-probability; a mean over S."""
    advantages = (rewards - baseline) / selection.num_sequences

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Tensor:
        return -advantages[selection.sequence_of(rows)] * tokens.log_prob

    return loss_fn


def weighted_nll(weights: Tensor, total: Tensor | float) -> LossFunction:
    """Fine-tuning with a weight for each token; `total` is what their sum is divided by."""

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Tensor:
        return -weights.flatten()[rows] * tokens.log_prob / total

    return loss_fn


# -- one number for each sequence, or pair ---------------------------------------------------------


def dpo(
    selection: sgp.Selection, reference: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> LossFunction:
    """DPO of pairs, chosen before rejected; with `by="group"` and `groups=pairs(S)`.

    `reference` is (S,): what the reference policy says of each sequence, the sum of its tokens.
    """
    S = selection.num_sequences

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Result:
        sequence = selection.sequence_of(rows)
        log_probs = tokens.log_prob.new_zeros(S).index_add(0, sequence, tokens.log_prob)
        chosen, rejected = (beta * (log_probs - reference)).view(-1, 2).unbind(1)
        margin = chosen - rejected
        numbers = -(1 - label_smoothing) * F.logsigmoid(margin)
        numbers = numbers - label_smoothing * F.logsigmoid(-margin)
        return numbers / (S // 2), {"margin": margin, "correct": (margin > 0).to(margin.dtype)}

    return loss_fn


def simpo(selection: sgp.Selection, *, beta: float = 2.0, gamma: float = 1.0) -> LossFunction:
    """SimPO: DPO of mean log-probabilities, without a reference; pairs as in `dpo`."""
    S, lengths = selection.num_sequences, lengths_of(selection)

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Tensor:
        sequence = selection.sequence_of(rows)
        log_probs = tokens.log_prob.new_zeros(S).index_add(0, sequence, tokens.log_prob)
        chosen, rejected = (beta * log_probs / lengths).view(-1, 2).unbind(1)
        return -F.logsigmoid(chosen - rejected - gamma) / (S // 2)

    return loss_fn


def pairs(num_sequences: int) -> list[int]:
    """The `groups` of sequences that stand next to each other by twos: [0, 0, 1, 1, ...]."""
    return [i // 2 for i in range(num_sequences)]


def kto(
    selection: sgp.Selection,
    reference: Tensor,
    desirable: Tensor,
    z0: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossFunction:
    """KTO of single answers; with `by="sequence"`.

    `reference` is (S,), as in `dpo`; `desirable` (S,) bool. `z0` is a number of the whole batch,
    and so is computed before: see `kto_z0`.
    """
    S = selection.num_sequences
    sign = torch.full_like(reference, -1).masked_fill(desirable, 1)
    weight = torch.full_like(reference, undesirable_weight / S)
    weight = weight.masked_fill(desirable, desirable_weight / S)

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Result:
        sequence = selection.sequence_of(rows)
        log_probs = tokens.log_prob.new_zeros(S).index_add(0, sequence, tokens.log_prob)
        reward = beta * (log_probs - reference)
        return weight * torch.sigmoid(sign * (beta * z0 - reward)), {"reward": reward}

    return loss_fn


def kto_z0(log_probs: Tensor, reference: Tensor) -> Tensor:
    """z0 of `kto`, from answers that belong to other prompts; (S,) each, of which no gradient is.

    `log_probs` are `sgp.linear_token_log_probs(...).log_prob.sum(1)` under `torch.no_grad()`.
    """
    return (log_probs - reference).mean().clamp(min=0).detach()
