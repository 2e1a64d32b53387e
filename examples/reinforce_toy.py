"""Reinforcement learning that can be watched: a tiny Llama learns to count in steps.

    pip install -e ".[train]"
    python examples/reinforce_toy.py --steps 300 --picture reward.png

The prompt is a step of 1 to 3 and a digit. The reward is the share of sampled tokens that are the
token before plus the step, modulo ten: after 3 7 comes 0 3 6 9 2 5 8 1. GRPO runs twice from the
same weights and seeds: with `sgp.linear_loss`, and in plain PyTorch, with `log_softmax` of all
logits. Both draw the same samples until the rounding of a probability decides one of them
differently.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from losses import clipped, grpo, over_tokens
from torch import Tensor

import sgp
from sgp.train.model import tiny_llama

FIRST, DIGITS = 2, 10  # digit d is token d + 2; 0 and 1 pad and end, and are never right
STEPS, PROMPT = 3, 2  # a prompt is a step and a digit
PROMPTS, GROUP, LENGTH = 16, 8, 8  # an update samples 8 completions for each of 16 prompts
EPOCHS, LOW, HIGH, BETA, ENTROPY = 2, 0.2, 0.28, 0.001, 0.08

Loss = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def rewards_of(samples: Tensor) -> Tensor:
    """(B,): the share of sampled tokens that are right."""
    found = []
    for tokens in samples.tolist():
        step, *said = (token - FIRST for token in tokens)
        right = [after == (before + step) % DIGITS for before, after in pairwise(said)]
        found.append(sum(right) / LENGTH)
    return torch.tensor(found)


def hidden_of(model: Any, samples: Tensor) -> Tensor:
    """(B, T, D)."""
    hidden: Tensor = model.model(input_ids=samples, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def sample(model: Any, generator: torch.Generator) -> Tensor:
    """(B, PROMPT + LENGTH) tokens: each prompt GROUP times, and what the model says after it."""
    step = torch.randint(1, 1 + STEPS, (PROMPTS, 1), generator=generator)
    digit = torch.randint(DIGITS, (PROMPTS, 1), generator=generator)
    samples = (torch.cat([step, digit], 1) + FIRST).repeat_interleave(GROUP, 0)
    for _ in range(LENGTH):
        logits = model.lm_head(hidden_of(model, samples)[:, -1])
        following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        samples = torch.cat([samples, following], 1)
    return samples


def loss_of_sgp(
    model: Any, samples: Tensor, advantages: Tensor, old: Tensor, reference: Tensor
) -> Tensor:
    """GRPO with clip-higher, k3 and an entropy bonus; `old` and `reference` are (B, T)."""
    selection = selected(samples)
    surrogate, divisor = clipped(LOW, HIGH), over_tokens(selection)
    loss_fn = grpo(
        selection, old, advantages, surrogate, divisor,
        reference=reference, beta=BETA, entropy=ENTROPY,
    )  # fmt: skip
    hidden = hidden_of(model, samples)
    loss, _ = sgp.linear_loss(hidden, model.lm_head.weight, selection, loss_fn)
    return loss


def loss_of_pytorch(
    model: Any, samples: Tensor, advantages: Tensor, old: Tensor, reference: Tensor
) -> Tensor:
    """The same, written on all logits."""
    log_p = model.lm_head(hidden_of(model, samples)[:, PROMPT - 1 : -1]).log_softmax(-1)
    log_prob = log_p.gather(2, samples[:, PROMPT:, None]).squeeze(2)
    entropy = -(log_p.exp() * log_p).sum(2)
    ratio = (log_prob - old[:, PROMPT - 1 : -1]).exp()
    advantage = advantages[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    behind = reference[:, PROMPT - 1 : -1] - log_prob
    kl = behind.exp() - behind - 1
    return (-gain + BETA * kl - ENTROPY * entropy).mean()


def selected(samples: Tensor) -> sgp.Selection:
    """The tokens after the prompt."""
    labels = samples.clone()
    labels[:, :PROMPT] = -100
    return sgp.Selection.from_labels(labels, shift=True)


@torch.no_grad()
def log_probs(model: Any, samples: Tensor) -> Tensor:
    """(B, T), at the row that predicts the token."""
    hidden = hidden_of(model, samples)
    return sgp.linear_token_log_probs(hidden, model.lm_head.weight, selected(samples)).log_prob


def make_model() -> Any:
    """A Llama of two layers with random weights."""
    return tiny_llama(FIRST + DIGITS, PROMPT + LENGTH, seed=0).train()


def train(loss_of: Loss, steps: int) -> list[float]:
    """Mean reward of each step's samples."""
    model, frozen = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        samples = sample(model, generator)
        rewards = rewards_of(samples)
        of_prompt = rewards.view(PROMPTS, GROUP)
        spread = of_prompt.std(1, keepdim=True) + 1e-4
        advantages = ((of_prompt - of_prompt.mean(1, keepdim=True)) / spread).flatten()
        old, reference = log_probs(model, samples), log_probs(frozen, samples)
        for _ in range(EPOCHS):
            loss_of(model, samples, advantages, old, reference).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(rewards.mean()))
    return found


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Reward against steps."""
    import matplotlib as mpl  # noqa: PLC0415  (optional)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    styles = ({"color": "#de8f05", "linewidth": 4, "alpha": 0.55}, {"color": "#0173b2"})
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        axes.plot(range(1, 1 + len(curve)), [100 * x for x in curve], label=name, **style)
    axes.axhline(100 / (FIRST + DIGITS), color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward, % of tokens that are right")
    axes.set_ylim(0, 103)
    axes.grid(visible=True, color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(b=False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Train both, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, help="PNG; a JSON of the numbers stands beside it")
    options = parser.parse_args()
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")

    start = time.perf_counter()
    losses = {"plain PyTorch": loss_of_pytorch, "sgp.linear_loss": loss_of_sgp}
    curves = {name: train(loss_of, options.steps) for name, loss_of in losses.items()}
    seconds = time.perf_counter() - start
    for step in range(options.steps):
        if step < 3 or (step + 1) % 25 == 0:
            both = ", ".join(f"{name} {curve[step]:.3f}" for name, curve in curves.items())
            print(f"step {step + 1}: reward {both}")
    if options.picture:
        content = {
            "machine": {"name": f"{torch.get_num_threads()} cores", "platform": platform.machine()},
            "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
            "versions": {x: metadata.version(x) for x in ("torch", "transformers", "sgp-kernels")},
            "seconds": seconds,
            "steps": options.steps,
            "chance": 1 / (FIRST + DIGITS),
            "rewards": curves,
        }
        options.picture.with_suffix(".json").write_text(json.dumps(content) + "\n")
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
