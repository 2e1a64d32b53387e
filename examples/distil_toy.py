"""Distillation that can be watched: a student that is too small for all that its teacher knows.

    pip install -e ".[train]"
    python examples/distil_toy.py --picture distil.png

There are 100 places, and from each lead four roads, drawn at random. A walk starts somewhere and
takes one of the four roads, each as likely as the others, so that four answers are right at every
token. The teacher, a Llama of width 64, learns all roads from walks. The students have a width of
8, which is too small for that. They see the same walks from the same weights, and differ in their
loss alone: cross-entropy of the walks, or the forward KL, the JSD or the reverse KL from the
teacher. The first place is a prompt and carries no loss.

Two things are measured on walks that nobody has seen: the held-out loss, which is small for a
student that expects every road, and the share of its own steps that follow a road.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sgp
from sgp.train.model import tiny_llama

FIRST, PLACES, ROADS = 2, 100, 4  # place p is token p + 2; 0 and 1 pad and end, and are never right
LENGTH = 12  # steps of a walk after its first place
TEACHER, STUDENT = 64, 8  # widths
WALKS, HELD_OUT = 64, 256  # in a step of training, and for each measurement
RATES = {TEACHER: 3e-3, STUDENT: 1e-2}
EVERY = 25  # steps between measurements
LABELS = "labels alone"
LOSSES = {  # name -> what linear_distillation is asked for
    LABELS: None,
    "forward KL": {"divergence": "forward_kl"},
    "JSD": {"divergence": "jsd", "beta": 0.5},
    "reverse KL": {"divergence": "reverse_kl"},
}
COLORS = {
    "teacher": "#404040", LABELS: "#949494", "forward KL": "#0173b2", "JSD": "#029e73",
    "reverse KL": "#d55e00",
}  # fmt: skip

Loss = Callable[[Any, Tensor, sgp.Selection], Tensor]


class Measured(NamedTuple):
    """A model on walks that it has not seen."""

    held_out: float  # nats a token
    right: float  # share of its own steps that follow a road
    shares: list[float]  # probability of the likeliest road, the second, ..., and of all but roads


def make_roads() -> Tensor:
    """(PLACES, ROADS): where the roads from each place lead."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(PLACES, generator=generator)[:ROADS] for _ in range(PLACES)])


def make_walks(roads: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """(number, 1 + LENGTH) tokens."""
    place = torch.randint(PLACES, (number,), generator=generator)
    places = [place]
    for _ in range(LENGTH):
        place = roads[place, torch.randint(ROADS, (number,), generator=generator)]
        places.append(place)
    return torch.stack(places, 1) + FIRST


def selected(walks: Tensor) -> sgp.Selection:
    """The tokens after the first place."""
    labels = walks.clone()
    labels[:, 0] = -100
    return sgp.Selection.from_labels(labels, shift=True)


def hidden_of(model: Any, tokens: Tensor) -> Tensor:
    """(B, T, D)."""
    hidden: Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def cross_entropy(model: Any, walks: Tensor, selection: sgp.Selection) -> Tensor:
    """Of the walks alone."""
    return sgp.linear_cross_entropy(hidden_of(model, walks), model.lm_head.weight, selection)


def distillation_from(teacher: Any, **options: Any) -> Loss:
    """The divergence from a teacher, at the same tokens."""

    def loss_of(model: Any, walks: Tensor, selection: sgp.Selection) -> Tensor:
        with torch.no_grad():
            known = hidden_of(teacher, walks)
        return sgp.linear_distillation(
            hidden_of(model, walks), model.lm_head.weight, selection,
            known, teacher.lm_head.weight, **options,
        )  # fmt: skip

    return loss_of


@torch.no_grad()
def measure(model: Any, roads: Tensor) -> Measured:
    """The same walks and the same random numbers for every model."""
    generator = torch.Generator().manual_seed(1)
    walks = make_walks(roads, HELD_OUT, generator)
    held_out = float(cross_entropy(model, walks, selected(walks)))
    p = model.lm_head(hidden_of(model, walks)[:, :-1]).softmax(-1)
    of_roads = p.gather(2, roads[walks[:, :-1] - FIRST] + FIRST).sort(-1, descending=True).values
    shares = of_roads.mean((0, 1)).tolist()

    said = walks[:, :1]
    for _ in range(LENGTH):
        following = model.lm_head(hidden_of(model, said)[:, -1]).softmax(-1)
        said = torch.cat([said, torch.multinomial(following, 1, generator=generator)], 1)
    before, after = said[:, :-1] - FIRST, said[:, 1:] - FIRST
    right = (roads[before.clamp(min=0)] == after[..., None]).any(-1) & (before >= 0)
    return Measured(held_out, float(right.float().mean()), [*shares, 1 - sum(shares)])


def train(width: int, loss_of: Loss, roads: Tensor, steps: int) -> tuple[Any, dict[int, Measured]]:
    """The model, and what was measured after how many steps."""
    model = tiny_llama(FIRST + PLACES, 1 + LENGTH, seed=width, hidden=width).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[width], weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
    )
    generator = torch.Generator().manual_seed(2)
    found = {0: measure(model, roads)}
    for step in range(1, 1 + steps):
        walks = make_walks(roads, WALKS, generator)
        loss_of(model, walks, selected(walks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % EVERY == 0 or step == steps:
            found[step] = measure(model, roads)
    return model.eval().requires_grad_(False), found


def draw(content: dict[str, Any], path: Path) -> None:
    """Held-out loss and right steps against steps of training, and where the probability went."""
    import matplotlib as mpl  # noqa: PLC0415  (optional)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    teacher, students = content["teacher"], content["students"]
    for name, curve in students.items():
        steps = [point["step"] for point in curve]
        style: dict[str, Any] = {
            "color": COLORS[name],
            "linestyle": "--" if name == LABELS else "-",
        }
        left.plot(steps, [point["held_out"] for point in curve], label=name, **style)
        middle.plot(steps, [100 * point["right"] for point in curve], **style)
    style = {"color": "black", "linestyle": ":", "linewidth": 1}
    left.axhline(teacher["held_out"], label="teacher", **style)
    middle.axhline(100 * teacher["right"], **style)
    left.set_title("Held-out loss, nats (lower is better)", fontsize=10)
    middle.set_title("Own steps that follow a road, %", fontsize=10)
    middle.set_ylim(0, 103)
    for axes in (left, middle):
        axes.set_xlabel("training step")

    bars = {"teacher": teacher} | {k: v[-1] for k, v in students.items() if k != LABELS}
    width = 0.8 / len(bars)
    for i, (name, last) in enumerate(bars.items()):
        places = [x + (i - (len(bars) - 1) / 2) * width for x in range(ROADS + 1)]
        right.bar(places, [100 * x for x in last["shares"]], width, color=COLORS[name], label=name)
    names = ["likeliest\nroad", "2nd", "3rd", "4th", "not a\nroad"]
    right.set_xticks(range(ROADS + 1), names)
    right.set_title("Where the probability is in the end, %", fontsize=10)
    for axes in (left, middle, right):
        axes.grid(visible=True, axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(b=False)
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Train the teacher and all students, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--picture", type=Path, help="PNG; a JSON of the numbers stands beside it")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: expected at least 1")
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")

    torch.set_num_threads(1)  # models this small only wait for each other's threads
    start = time.process_time()
    roads = make_roads()
    teacher, found = train(TEACHER, cross_entropy, roads, options.steps)
    of_teacher = found[options.steps]
    print(f"teacher: held-out loss {of_teacher.held_out:.3f}, right {of_teacher.right:.3f}")
    students = {}
    for name, asked in LOSSES.items():
        loss_of = cross_entropy if asked is None else distillation_from(teacher, **asked)
        _, found = train(STUDENT, loss_of, roads, options.steps)
        students[name] = [{"step": step} | x._asdict() for step, x in found.items()]
        before, after = found[0], found[options.steps]
        print(
            f"{name}: held-out loss {before.held_out:.3f} before, {after.held_out:.3f} after; "
            f"right {before.right:.3f} before, {after.right:.3f} after"
        )
    if options.picture:
        content = {
            "machine": {"name": f"{os.cpu_count()} cores", "platform": platform.machine()},
            "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
            "versions": {x: metadata.version(x) for x in ("torch", "transformers", "sgp-kernels")},
            "cpu_seconds": time.process_time() - start,
            "steps": options.steps,
            "widths": {"teacher": TEACHER, "student": STUDENT},
            "teacher": of_teacher._asdict(),
            "students": students,
        }
        options.picture.with_suffix(".json").write_text(json.dumps(content) + "\n")
        draw(content, options.picture)


if __name__ == "__main__":
    main()
