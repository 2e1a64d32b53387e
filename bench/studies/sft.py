"""TRL's SFTTrainer and sgp's: the same steps, the same losses, and the time of both.

    python -m bench sft           # minutes on two CPU cores; table and results file

Both train the same small Llama with 32 768 tokens on the same rows, of which the last 15 % carry
loss (`completion_only_loss=True`), from the same weights. A turn is a run of one and then of the
other; the first turn is not counted. On a CPU TRL scores every row, on a GPU the scored ones.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import files, tables
from bench.against import machine

RESULTS = files.RESULTS
SIZE = {"V": 32_768, "D": 256, "layers": 2, "B": 2, "T": 512, "kept": 0.15, "steps": 8}


def make_model() -> Any:
    """Small, so that the head is what it is in large ones: most of the work."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (takes seconds)

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZE["V"],
            hidden_size=SIZE["D"],
            intermediate_size=2 * SIZE["D"],
            num_hidden_layers=SIZE["layers"],
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            pad_token_id=0,
        )
    )


def make_rows() -> Any:
    """Random tokens with a completion mask."""
    from datasets import Dataset  # noqa: PLC0415  (takes seconds)

    generator = torch.Generator().manual_seed(0)
    shape = (SIZE["B"] * SIZE["steps"], SIZE["T"])
    context = round(SIZE["T"] * (1 - SIZE["kept"]))
    mask = [0] * context + [1] * (SIZE["T"] - context)
    ids = torch.randint(3, SIZE["V"], shape, generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "completion_mask": mask} for row in ids])


def make_tokenizer() -> Any:
    """Not used for tokens; the trainers want one."""
    from tokenizers import Tokenizer, models  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    inner = Tokenizer(models.WordLevel({"0": 0, "1": 1, "2": 2}, unk_token="0"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0", eos_token="2")  # noqa: S106


def run(kind: Any, rows: Any, tokenizer: Any) -> tuple[float, list[float]]:
    """Seconds of training, and the loss of each step."""
    import trl  # noqa: PLC0415  (takes many seconds)

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=int(SIZE["B"]),
            max_steps=int(SIZE["steps"]),
            completion_only_loss=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            disable_tqdm=True,
            seed=1,
        )
        trainer = kind(make_model(), arguments, train_dataset=rows, processing_class=tokenizer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return seconds, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def main() -> int:
    """Train in turns, print, write; 1 if the losses differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench sft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--output", type=Path, help="results file")
    arguments = parser.parse_args()
    found = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    output = arguments.output or RESULTS / f"sft-{found.slug}-{today}.json"
    files.must_be_writable(output)
    warnings.simplefilter("ignore")
    import transformers  # noqa: PLC0415
    import trl  # noqa: PLC0415

    import sgp.trl  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds = {"TRL": trl.SFTTrainer, "sgp": sgp.trl.SFTTrainer}
    rows, tokenizer = make_rows(), make_tokenizer()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    losses: dict[str, list[float]] = {}
    for turn in range(arguments.turns + 1):
        for name, kind in kinds.items():
            taken, losses[name] = run(kind, rows, tokenizer)
            if turn:
                seconds[name].append(taken)
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    ratios = [ours / theirs for ours, theirs in zip(seconds["sgp"], seconds["TRL"], strict=True)]
    table = tables.make(f"{SIZE['steps']} steps", ["trainer"], ["seconds", "of TRL's"])
    for name, ratio in (("TRL", 1.0), ("sgp", statistics.median(ratios))):
        table.add_row(name, f"{statistics.median(seconds[name]):.2f}", f"{ratio:.2f}")
    Console().print(table)
    print(f"losses differ by {apart:.1e} at most")
    content = {
        "machine": found._asdict(),
        "date": today,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "size": SIZE,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "losses": losses,
        "apart": apart,
    }
    output.write_text(json.dumps(content) + "\n")
    return 0 if apart < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
