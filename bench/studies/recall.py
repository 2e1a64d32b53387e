"""What is lost when the context is held constant: a task that needs the context to be read.

    python -m bench recall        # minutes on two CPU cores; table, picture, results file

The context is four pairs of key and value and then one of the keys; the output is that key's value.
Without reading, the best guess is the most common value of the context. To find it, the position of
each value has to know the key before it, which is learned where the context is processed. The same
small Llama, from the same weights on the same batches, is trained with
`sgp.context_loss(..., context_grad="exact")` and with `"detach"`. Both losses are the same function
of the weights; only the gradients differ.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import sgp
from bench import files, tables
from bench.against import machine

RESULTS = files.RESULTS
KEYS, VALUES, PAIRS = 16, 4, 4
CONTEXT = 2 * PAIRS + 1
BATCH, HELD_OUT = 128, 4_096
MODES = ("exact", "detach")


def batch(rows: int, generator: torch.Generator) -> Tensor:
    """(rows, 2 PAIRS + 2) token ids: pairs, a key, its value."""
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (rows, PAIRS), generator=generator) + KEYS
    asked = torch.randint(PAIRS, (rows, 1), generator=generator)
    pairs = torch.stack([keys, values], 2).flatten(1)
    return torch.cat([pairs, keys.gather(1, asked), values.gather(1, asked)], 1)


def make_model() -> Any:
    """Two layers, the fewest that can do it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (takes seconds)

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=KEYS + VALUES,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            initializer_range=0.1,
        )
    )


@torch.no_grad()
def accuracy(model: Any, ids: Tensor) -> float:
    """Of the value, among all tokens."""
    guess = model(input_ids=ids[:, :CONTEXT]).logits[:, -1].argmax(1)
    return float((guess == ids[:, -1]).double().mean())


def guessing(ids: Tensor) -> float:
    """The accuracy of the most common value in the context."""
    values = ids[:, 1 : 2 * PAIRS : 2]
    return float((values == values.mode(1).values[:, None]).double().mean())


def train(mode: str, steps: int, every: int) -> list[dict[str, float]]:
    """Loss and held-out accuracy along the way."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    held_out = batch(HELD_OUT, torch.Generator().manual_seed(2))
    lengths = torch.full((BATCH,), CONTEXT)
    curve = []
    for step in range(steps + 1):
        ids = batch(BATCH, generator)
        loss = sgp.context_loss(model, ids, lengths, context_grad=mode)
        if step % every == 0:
            point = {"step": step, "loss": loss.item(), "accuracy": accuracy(model, held_out)}
            curve.append(point)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


def draw(curves: dict[str, list[dict[str, float]]], guess: float, path: Path) -> None:
    """Accuracy against steps."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (mode, curve), color in zip(curves.items(), ("#0173b2", "#de8f05"), strict=True):
        x, y = [p["step"] for p in curve], [100 * p["accuracy"] for p in curve]
        axes.plot(x, y, color=color, linewidth=2, label=f'context_grad="{mode}"')
    axes.axhline(100 * guess, color="black", linestyle=":", linewidth=1, label="guessing")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_ylim(0, 103)
    axes.grid(visible=True, color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(b=False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    """Train both, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench recall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--output", type=Path, help="results file; the picture stands beside it")
    arguments = parser.parse_args()
    files.must_have_matplotlib()
    found = machine.describe(torch.device("cpu"))
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    output = arguments.output or RESULTS / f"recall-{found.slug}-{today}.json"
    files.must_be_writable(output)
    warnings.filterwarnings("ignore", message=".*not the gradient of the loss")
    start = time.perf_counter()
    curves = {mode: train(mode, arguments.steps, arguments.every) for mode in MODES}
    seconds = time.perf_counter() - start
    guess = guessing(batch(HELD_OUT, torch.Generator().manual_seed(2)))
    table = tables.make(
        f"Accuracy, %; guessing {100 * guess:.1f}",
        ["step"],
        list(MODES),
    )
    for points in zip(*curves.values(), strict=True):
        table.add_row(f"{points[0]['step']}", *(f"{100 * p['accuracy']:.1f}" for p in points))
    console = Console()
    console.print(table)
    console.print(f"{arguments.steps} steps of {BATCH} samples each, {seconds:.0f} s for both")
    content = {
        "machine": found._asdict(),
        "date": today,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "seconds": seconds,
        "guessing": guess,
        "curves": curves,
    }
    output.write_text(json.dumps(content) + "\n")
    draw(curves, guess, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
