"""Fine-tune with TRL: `sgp.trl.SFTTrainer` in the place of TRL's.

python examples/trl_sft.py --steps 20
"""

from __future__ import annotations

import argparse

import trl
from common import WINDOW, make_data, make_model
from datasets import Dataset

import sgp.trl


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trl-out")
    options = parser.parse_args()

    rows, tokenizer = make_data()
    trainer = sgp.trl.SFTTrainer(
        make_model(tokenizer),
        trl.SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            max_length=WINDOW,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            completion_only_loss=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
