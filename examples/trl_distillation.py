"""TRL's DistillationTrainer with the divergence of `sgp`, as a subclass to copy.

    pip install "trl>=1.16"
    python examples/trl_distillation.py --steps 3 --beta 0.5

The student writes the completions, and is trained towards the teacher's distribution of each
token. Generation, arguments and metrics are TRL's; `_compute_loss` alone is replaced. TRL may
change that method from one version to the next: `tests/test_trl_distil_recipe.py` compares loss,
entropy and gradients with those of TRL 1.16.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import trl
from common import WINDOW, make_data, make_model
from datasets import Dataset
from torch import Tensor

import sgp
from sgp.train.model import tiny_llama

IMAGES = (  # what a model that sees takes besides
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class DistillationTrainer(trl.DistillationTrainer):
    """TRL's, with `sgp.linear_distillation`. It was not tried with FSDP or DeepSpeed."""

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, the sum of the student's entropies, how many tokens carry loss)."""
        mask = inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = ids, torch.cat([inputs["prompt_mask"], mask], 1), mask.shape[1]
        images = {key: inputs[key] for key in IMAGES if key in inputs}

        # (B, C, D): the row of a completion's token is the one that predicts it, so nothing shifts
        hidden = self._get_last_hidden_state(unwrapped_student, *seen, **images)
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            known = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, *seen, **images
            )

        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        labels = inputs["completion_ids"].masked_fill(mask == 0, -100)
        head, teacher_head = (x.get_output_embeddings() for x in (unwrapped_student, teacher))
        scale, softcap = after_head(unwrapped_student)
        teacher_scale, teacher_softcap = after_head(teacher)
        loss, tokens = sgp.linear_distillation(
            hidden, head.weight, labels, known, teacher_head.weight,
            linear_bias=head.bias, teacher_bias=teacher_head.bias,
            softcap=softcap, logit_scale=scale,
            teacher_softcap=teacher_softcap, teacher_logit_scale=teacher_scale,
            temperature=self.temperature, denominator=num_items_in_batch, return_stats=True,
            **divergence_of(self.beta),
        )  # fmt: skip
        return loss, tokens.entropy.sum(), mask.sum()


SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def divergence_of(beta: float) -> dict[str, Any]:
    """TRL's `beta` in our words: 0 is the forward KL, 1 the reverse one, a JSD lies between."""
    if beta in (0, 1):
        return {"divergence": "reverse_kl" if beta else "forward_kl"}
    return {"divergence": "jsd", "beta": beta}


def after_head(model: Any) -> tuple[float, float | None]:
    """The scale and the softcap of a model's logits, where TRL looks for them."""
    config = model.config.get_text_config()
    found = (getattr(config, x, None) for x in SCALES)
    scale = next((x for x in found if x is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        divides = config.model_type != "hyperclovax"
        scale = 1 / config.logits_scaling if divides else config.logits_scaling
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """`trl.experimental.gkd.GKDTrainer.generalized_jsd_loss`, for labels that are given.

    Put `generalized_jsd_loss = staticmethod(generalized_jsd_loss)` into a subclass of that trainer.
    """
    if labels is None or reduction != "batchmean":
        raise NotImplementedError("labels have to be given, and reduction='batchmean'")
    selection = sgp.Selection.from_labels(labels)
    return sgp.distillation(
        student_logits, teacher_logits, selection, temperature=temperature,
        denominator=num_items_in_batch, **divergence_of(beta),
    )  # fmt: skip


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--out", default="trl-out")
    options = parser.parse_args()

    rows, tokenizer = make_data()
    args = trl.DistillationConfig(
        output_dir=options.out,
        max_steps=options.steps,
        beta=options.beta,
        max_completion_length=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
    )
    trainer = DistillationTrainer(
        make_model(tokenizer),
        tiny_llama(len(tokenizer), WINDOW, seed=1, hidden=128),  # put your teacher here
        args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
