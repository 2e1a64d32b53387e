"""The tables of the pages in docs, from the newest results of the commands that have a page.

Each block takes `up`, which leads from its page to the root of the repository: "../../".
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import files, tables
from bench.against import cases
from bench.gpu import tables as gpu_tables

ROOT = files.ROOT
RESULTS = files.RESULTS
MIB = 1 << 20


def newest(kind: str) -> tuple[Path, dict[str, Any]]:
    """The newest results file of a command."""
    path = max(RESULTS.glob(f"{kind}-*.json"), key=lambda p: p.stem[-10:])
    return path, json.loads(path.read_text())


def recall(up: str) -> str:
    """Held-out accuracy, first, middle and last, and the picture."""
    path, found = newest("recall")
    exact, detach = found["curves"]["exact"], found["curves"]["detach"]
    lines = ["| step | exact | detached |", "|---|---|---|"]
    for i in (0, len(exact) // 2, len(exact) - 1):
        cells = (f"{100 * curve[i]['accuracy']:.1f} %" for curve in (exact, detach))
        lines.append(f"| {exact[i]['step']} | {' | '.join(cells)} |")
    guessing = 100 * found["guessing"]
    source = (
        f"Held-out accuracy; guessing has {guessing:.1f} %. `python -m bench recall`, "
        f"{found['seconds']:.0f} s on {found['machine']['name']} "
        f"([results]({up}bench/results/{path.name}))."
    )
    picture = f"![Accuracy on the recall task]({up}bench/results/{path.stem}.png)"
    return "\n".join([*lines, "", source, "", picture])


def toy(up: str) -> str:
    """Rewards of the toy with sgp.linear_loss and in plain PyTorch, and the picture."""
    path, found = newest("own-loss-toy")
    curves = found["rewards"]
    lines = [f"| steps | {' | '.join(curves)} |", "|---|---|---|"]
    for first, last in ((1, 25), (26, 50), (51, 100), (101, 200), (201, found["steps"])):
        means = (statistics.mean(curve[first - 1 : last]) for curve in curves.values())
        lines.append(f"| {first} to {last} | {' | '.join(f'{100 * x:.1f} %' for x in means)} |")
    apart = next((i for i, (a, b) in enumerate(zip(*curves.values(), strict=True)) if a != b), None)
    equal = (
        "all steps have equal ones" if apart is None else f"the first {apart} steps have equal ones"
    )
    source = (
        f"Mean reward; {equal}, and chance is {100 * found['chance']:.1f} %. "
        f"Both took {found['seconds']:.0f} s on {found['machine']['name']}, torch "
        f"{found['versions']['torch']}, {found['date']} ([results]({up}bench/results/{path.name}))."
    )
    picture = f"![Reward of both loops]({up}bench/results/{path.stem}.png)"
    return "\n".join([*lines, "", source, "", picture])


def distil(up: str) -> str:
    """What the students of each loss learnt in the toy, and the picture."""
    path, found = newest("distil-toy")
    students = found["students"]
    rows = {"a student before training": next(iter(students.values()))[0]}
    rows |= {f"a student, {name}": curve[-1] for name, curve in students.items()}
    lines = [
        "| | held-out loss, nats | own steps that follow a road | the likeliest road | no road |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, last in (rows | {"the teacher": found["teacher"]}).items():
        shares = (last["right"], last["shares"][0], last["shares"][-1])
        cells = " | ".join(f"{100 * x:.0f} %" for x in shares)
        lines.append(f"| {name} | {last['held_out']:.2f} | {cells} |")
    source = (
        "The last two columns are mean probabilities. With four roads that are equally likely, "
        f"the least possible loss is log 4, {math.log(4):.2f} nats. Every model was trained for "
        f"{found['steps']} steps, in {found['cpu_seconds']:.0f} s of one thread together, on "
        f"{found['machine']['name']}, torch {found['versions']['torch']}, {found['date']} "
        f"([results]({up}bench/results/{path.name}))."
    )
    picture = f"![Loss, right steps and probabilities]({up}bench/results/{path.stem}.png)"
    return "\n".join([*lines, "", source, "", picture])


def own_loss(up: str) -> str:
    """Time and memory of a loss of one's own, beside others."""
    path = max(RESULTS.glob("*-own-loss.json"))
    return _beside_others(path, "own loss", "CISPO's loss with its gradients", WAYS_OF_OWN_LOSS, up)


def distillation(up: str) -> str:
    """Time and memory of a teacher's head beside a student's, and of others."""
    path = max(RESULTS.glob("*-distillation.json"))
    what = "Divergence from a teacher of the same width, with the student's gradients"
    return _beside_others(path, "distillation", what, WAYS_TO_DISTIL, up)


def _beside_others(path: Path, only: str, what: str, names: dict[str, str], up: str) -> str:
    """A file of `compare` about one subject."""
    found = json.loads(path.read_text())
    titles = {cases.KL: "forward KL, ", cases.JSD: "JSD, "}
    lines = ["| kept | way | time | of sgp's | MiB |", "|---|---|---|---|---|"]
    for record in found["cases"]:
        timed = sorted((r for r in record["rivals"] if r["both_ms"]), key=lambda r: r["both_ms"])
        ours = next(r["both_ms"] for r in timed if r["rival"] == "sgp")
        for r in timed:
            name = names.get(r["rival"], r["rival"])
            kept = f"{titles.get(record['form'], '')}{100 * record['kept']:.0f} %"
            lines.append(
                f"| {kept} | {name} | {tables.ms(r['both_ms'])} ms | "
                f"{r['both_ms'] / ours:.2f} | {r['memory_bytes'] / MIB:.0f} |"
            )
    case, machine = found["cases"][0], found["machine"]
    source = (
        f"{what}: {case['N']} tokens, V = {case['model']['V']}, "
        f"D = {case['model']['D']}, {case['dtype']}, {machine['name']} ({machine['cpu']}), "
        f"torch {found['versions']['torch']}, {found['date']}. MiB are beyond inputs and weight "
        "gradients. "
        f'`python -m bench compare --only "{only}"` ([results]({up}bench/results/{path.name})).'
    )
    return "\n".join([*lines, "", source])


WAYS_OF_OWN_LOSS = {
    "sgp": "`sgp.linear_loss`",
    "sgp, log-probs first": "`sgp.linear_token_log_probs`, and the loss after it",
    "PyTorch, kept rows": "`log_softmax` of whole logits of the kept rows, gathered by hand",
    "TRL": "TRL's chunked log-probabilities of the kept rows, and the loss after it",
    "Liger": "`LigerFusedLinearGRPOLoss`, on all rows",
}
WAYS_TO_DISTIL = {
    "sgp": "`sgp.linear_distillation`",
    "PyTorch, kept rows": "`log_softmax` and `F.kl_div` of whole logits of the kept rows, by hand",
    "TRL": "TRL's `ChunkedDivergenceFunction`, on the kept rows",
    "Liger, chunked": "Liger's chunked `LigerFusedLinearJSDLoss`, on all rows",
}


def context(up: str) -> str:
    """Time and memory of each way, beside one pass."""
    path, found = newest("context")
    size = found["size"]
    lines = ["| context | way | time | | memory | |", "|---|---|---|---|---|---|"]
    for r in found["records"]:
        one = next(
            o for o in found["records"] if (o["context"], o["way"]) == (r["context"], "one pass")
        )
        lines.append(
            f"| {100 * r['context']:.0f} % | {r['way']} | {tables.ms(r['ms'])} ms | "
            f"{r['ms'] / one['ms']:.2f} | {r['peak_bytes'] / MIB:.0f} MiB | "
            f"{r['peak_bytes'] / one['peak_bytes']:.2f} |"
        )
    source = (
        f"A Llama of {size['layers']} layers, D = {size['D']}, {size['B']} x {size['T']} tokens, "
        f"float32, {found['machine']['name']} ({found['machine']['cpu']}); ratios are to one pass. "
        f"`python -m bench context` ([results]({up}bench/results/{path.name}))."
    )
    return "\n".join([*lines, "", source])


def sft(up: str) -> str:
    """TRL's trainer beside sgp's."""
    path, found = newest("sft")
    size = found["size"]
    lines = ["| trainer | 8 steps | of TRL's time |", "|---|---|---|"]
    for name, ratio in (("TRL", 1.0), ("sgp", found["ratio"])):
        seconds = statistics.median(found["seconds"][name])
        module = "trl" if name == "TRL" else "sgp.trl"
        lines.append(f"| `{module}.SFTTrainer` | {seconds:.1f} s | {ratio:.2f} |")
    source = (
        f"A Llama of {size['layers']} layers, D = {size['D']}, V = {size['V']}, "
        f"{size['B']} x {size['T']} tokens, {100 * size['kept']:.0f} % kept, float32, "
        f"{found['machine']['name']} ({found['machine']['cpu']}), TRL {found['versions']['trl']}; "
        f"the losses differ by {found['apart']:.0e} at most. `python -m bench sft` "
        f"([results]({up}bench/results/{path.name}))."
    )
    return "\n".join([*lines, "", source])


def gpu(up: str) -> str:
    """What was measured on GPUs."""
    return gpu_tables.page(gpu_tables.newest(), up)


def traffic(up: str) -> str:
    """Elements asked for, in units of N V, by form; the largest of all widths and dtypes."""
    found = json.loads((RESULTS / "traffic.json").read_text())
    lines = [
        "| | touched: f = 1 | f = 0.25 | asked for: f = 1 | f = 0.25 |",
        "|---|--:|--:|--:|--:|",
    ]
    for form in ("resident", "streaming", "staying"):
        mine = [r for r in found["records"] if r["form"] == form]
        cells = [
            f"{max(r[key] for r in mine if r['kept'] == kept):.2f}"
            for key in ("touched", "asked")
            for kept in (1.0, 0.25)
        ]
        lines.append(f"| sgp, {form} | {' | '.join(cells)} |")
    rivals = [r for r in found["rivals"] if r["task"] == "loss"]
    for name, version in dict.fromkeys((r["name"], r["version"]) for r in rivals):
        mine = [r for r in rivals if (r["name"], r["version"]) == (name, version)]
        if name != "sgp" and all(r["status"] == "ok" for r in mine):
            cells = [
                f"{max(r['asked'] for r in mine if r['kept'] == kept):.2f}" for kept in (1.0, 0.25)
            ]
            lines.append(f"| {name} {version} | | | {' | '.join(cells)} |")
    source = f"`python -m bench traffic` ([results]({up}bench/results/traffic.json))."
    return "\n".join([*lines, "", source])


def two_rows(up: str) -> str:
    """The same of a student's rows and a teacher's; the largest of all widths and dtypes."""
    found = json.loads((RESULTS / "traffic.json").read_text())
    lines = [
        "| | touched: f = 1 | f = 0.25 | asked for: f = 1 | f = 0.25 |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, kinds in (("a KL", ("forward_kl", "reverse_kl")), ("a JSD", ("jsd",))):
        for gradient, words in ((True, "loss and gradient"), (False, "loss alone")):
            mine = [
                r
                for r in found["two_rows"]
                if r["divergence"] in kinds and r["gradient"] == gradient
            ]
            cells = [
                f"{max(r[key] for r in mine if r['kept'] == kept):.2f}"
                for key in ("touched", "asked")
                for kept in (1.0, 0.25)
            ]
            lines.append(f"| {name}, {words} | {' | '.join(cells)} |")
    source = f"`python -m bench traffic` ([results]({up}bench/results/traffic.json))."
    return "\n".join([*lines, "", source])


def loops(up: str) -> str:
    """Instructions an element of the streaming kernel and of Liger's."""
    path = RESULTS / "loops-sm_90-triton-3.6.0.json"
    found = json.loads(path.read_text())
    lines = [
        "| kernel | first loop | second loop | barriers and shuffles in the first loop |",
        "|---|--:|--:|--:|",
    ]
    for kernel, name in (
        ("sgp, streaming", "sgp"),
        ("Liger", f"Liger's kernel, {found['liger']}"),
    ):
        (r,) = (
            r
            for r in found["records"]
            if (r["kernel"], r["V"], r["data"]) == (kernel, 151_936, "bf16")
        )
        lines.append(f"| {name} | {r['first']:.2f} | {r['second']:.2f} | {r['meetings']} |")
    source = (
        f"bf16, V = 151 936, {found['target']}, Triton {found['triton']}. `python -m bench loops` "
        f"([results]({up}bench/results/{path.name}))."
    )
    return "\n".join([*lines, "", source])


HEADS = {  # of `sgp train`, in words
    "PyTorch, all rows": "PyTorch, all rows",
    "PyTorch, kept rows": "PyTorch, kept rows gathered by hand",
    "sgp, kept rows": "sgp, kept rows",
    "sgp, linear head": "sgp, linear head",
}


def train(up: str) -> str:
    """What `sgp train` says of the heads, and of its run."""
    path, found = newest("train-2-cores")
    head, run = found["head"], found["environment"]
    first = head["rows"][0]
    lines = [
        "| head | gradient error | time | ratio | peak memory | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for r in head["rows"]:
        error = f"{r['gradient_error']:.0e}".replace("e-0", "e-")
        lines.append(
            f"| {HEADS[r['name']]} | {error} | {1e3 * r['seconds']:.0f} ms | "
            f"{r['seconds'] / first['seconds']:.2f} | {r['peak_bytes'] / MIB:.0f} MiB | "
            f"{r['peak_bytes'] / first['peak_bytes']:.2f} |"
        )
    apart = f"{found['losses']['largest_difference']:.1e}".replace("e-0", "e-")
    before, after = found["held_out"]["before"]["sgp"], found["held_out"]["after"]["sgp"]
    source = (
        f"V = {gpu_tables.spaced(head['vocabulary'])}, D = {head['width']}, float32, "
        f"{head['num_tokens']} rows of which {100 * head['kept_fraction']:.0f} % carry loss; "
        f"{run['threads']} cores, torch {run['versions']['torch']}, {path.stem[-10:]} "
        f"([results]({up}bench/results/{path.name})). The whole run took {found['seconds']:.0f} s "
        f"with the tokenizer cached. The losses of its {found['steps']} steps differ by {apart} "
        f"nats at most, and the held-out loss falls from {before:.2f} to {after:.2f}."
    )
    picture = f"![Both loss curves]({up}bench/results/{path.stem}.png)"
    return "\n".join([*lines, "", source, "", picture])


def gallery(up: str) -> str:
    """The pictures of the commands, the newest of each."""
    train, recall = newest("train-2-cores")[0].stem, newest("recall")[0].stem
    compared = files.newest()[-1][0].stem
    shown = (
        ("Both losses of a training run", train,
         "`sgp train` trains the same model with PyTorch's loss and with ours."),
        ("Time and memory of the head", f"{compared}-linear",
         "`python -m bench compare`: against kept fraction, vocabulary and number of tokens."),
        ("Time and memory from logits", f"{compared}-logits", "From the same command."),
        ("Roofline", f"{compared}-roofline",
         "How near each comes to the bounds of memory and arithmetic on the same machine."),
        ("What a detached context does not learn", recall,
         "`python -m bench recall`: accuracy on a task that needs reading."),
        ("A policy that learns", newest("own-loss-toy")[0].stem,
         "`python examples/reinforce_toy.py --picture reward.png`: GRPO in both ways."),
        ("Students that are too small for their teacher", newest("distil-toy")[0].stem,
         "`python examples/distil_toy.py --picture distil.png`: one student for each divergence."),
    )  # fmt: skip
    return "\n\n".join(
        f"## {title}\n\n{text}\n\n![{title}]({up}bench/results/{stem}.png)"
        for title, stem, text in shown
    )


BLOCKS: dict[str, Callable[[str], str]] = {
    "recall": recall, "toy": toy, "distil": distil, "own": own_loss, "context": context,
    "sft": sft, "gpu": gpu, "traffic": traffic, "two-rows": two_rows, "distillation": distillation,
    "loops": loops, "train": train, "gallery": gallery,
}  # fmt: skip
