"""Fine-tune with a loop of your own: `Collator`, and the loss from hidden states.

    python examples/plain_pytorch.py --steps 20

No logits of context tokens are ever made, and none of the others is kept.
"""

from __future__ import annotations

import argparse

import torch
from common import WINDOW, make_data, make_model
from torch.utils.data import DataLoader

import sgp


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps

    rows, tokenizer = make_data()
    model = make_model(tokenizer).train()
    collate = sgp.Collator(tokenizer, packed=True, max_length=WINDOW)
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    for step, batch in zip(range(steps), loader, strict=False):
        hidden = model.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,  # with a cache, packed sequences would attend to each other
        ).last_hidden_state
        selection = batch["selection"]
        loss = sgp.linear_cross_entropy(hidden, model.lm_head.weight, selection)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}, {selection}")


if __name__ == "__main__":
    main()
