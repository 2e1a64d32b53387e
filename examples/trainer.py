"""Fine-tune with `transformers.Trainer`: patch the model, audit the first batch.

python examples/trainer.py --steps 20
"""

from __future__ import annotations

import argparse

from common import WINDOW, make_data, make_model
from transformers import Trainer, TrainingArguments

import sgp


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trainer-out")
    options = parser.parse_args()

    rows, tokenizer = make_data()
    model = make_model(tokenizer)
    print(sgp.huggingface.patch(model))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,  # the collator reads prompts and completions
        ),
        train_dataset=rows,
        data_collator=sgp.Collator(tokenizer, max_length=WINDOW),
        callbacks=[sgp.huggingface.AuditCallback(tokenizer, stop_on_errors=True)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
