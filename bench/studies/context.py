"""Time and memory of the ways to differentiate a sub-sequence's loss, side by side in one run.

    python -m bench context        # a minute or two on two CPU cores; table and results file

A Llama of eight layers, one batch, forward and backward: the whole sequence in one pass, with and
without checkpoints of every layer, and `sgp.context_loss` in its three modes, at three fractions of
context. They take turns; times are medians. Memory is the most bytes held at one time beyond the
weights, the weights' gradients included.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import sgp
from bench import files, tables
from bench.against import machine
from sgp.train.memory import cpu_peak

RESULTS = files.RESULTS
B, T, V, D, LAYERS = 2, 512, 4_096, 256, 8
FRACTIONS = (0.5, 0.8, 0.95)
WAYS = ("one pass", "one pass, checkpoints", "exact", "replay", "detach")
MIB = 1 << 20


def make_model() -> Any:
    """In float32, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (takes seconds)

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=3 * D,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=T,
        )
    ).train()


def step(way: str, model: Any, ids: Tensor, contexts: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    if way.startswith("one pass"):
        if "checkpoints" in way:
            model.activation_checkpointing_enable()
        selection = sgp.Selection.from_context_lengths(ids, contexts)
        loss = sgp.cross_entropy(model(input_ids=ids, use_cache=False).logits, selection)
    else:
        loss = sgp.context_loss(model, ids, contexts, context_grad=way)
    loss.backward()
    if "checkpoints" in way:
        model.activation_checkpointing_disable()
    model.zero_grad()
    return loss.detach()


def measure(fraction: float, turns: int) -> list[dict[str, Any]]:
    """Every way at one fraction of context."""
    model = make_model()
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    contexts = torch.full((B,), round(fraction * T))
    clock = machine.Clock(torch.device("cpu"))

    def run(way: str) -> Callable[[], Tensor]:
        return lambda: step(way, model, ids, contexts)

    losses = {way: run(way)() for way in WAYS}
    held = {}
    for way in WAYS:
        with cpu_peak() as peak:
            run(way)()
        held[way] = peak.peak_bytes
    laps: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(turns):
        for way in (*WAYS[turn % len(WAYS) :], *WAYS[: turn % len(WAYS)]):
            clock.start()
            run(way)()
            clock.lap()
            laps[way] += clock.laps()
    return [
        {
            "context": fraction,
            "way": way,
            "ms": statistics.median(laps[way]),
            "peak_bytes": held[way],
            "loss": float(losses[way]),
        }
        for way in WAYS
    ]


def main() -> int:
    """Measure, print, write; 1 if the losses differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*not the gradient of the loss")
    found = machine.describe(torch.device("cpu"))
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    output = arguments.output or RESULTS / f"context-{found.slug}-{today}.json"
    files.must_be_writable(output)
    records = [r for fraction in FRACTIONS for r in measure(fraction, arguments.turns)]
    header = {
        "machine": found._asdict(),
        "date": today,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "size": {"B": B, "T": T, "V": V, "D": D, "layers": LAYERS},
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    output.write_text(f'{json.dumps(header)[:-1]}, "records": [\n{lines}\n]}}\n')
    table = tables.make(
        f"Llama of {LAYERS} layers, D = {D}, V = {V}; {B} x {T} tokens, float32",
        ["context", "way"],
        ["ms", "to one pass", "memory MiB", "to one pass"],
    )
    for r in records:
        one = next(o for o in records if o["context"] == r["context"] and o["way"] == "one pass")
        table.add_row(
            f"{r['context']:g}",
            r["way"],
            tables.ms(r["ms"]),
            f"{r['ms'] / one['ms']:.2f}",
            f"{r['peak_bytes'] / MIB:.0f}",
            f"{r['peak_bytes'] / one['peak_bytes']:.2f}",
        )
    Console().print(table)
    losses = [[r["loss"] for r in records if r["context"] == f] for f in FRACTIONS]
    return 0 if all(max(x) - min(x) < 1e-4 for x in losses) else 1


if __name__ == "__main__":
    sys.exit(main())
