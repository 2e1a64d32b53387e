"""Fine-tune with a head that is split over processes: each holds some rows of the vocabulary.

torchrun --nproc-per-node 2 examples/tensor_parallel.py --steps 20

With one process the losses are the same. Every rank has the backbone and sees the same batch; the
gradient of the hidden states is summed over the ranks, so the backbones stay alike.
"""

from __future__ import annotations

import argparse
import os

import torch
from common import WINDOW, make_data, make_model
from torch import distributed, nn
from torch.utils.data import DataLoader

import sgp


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as above")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    torch.manual_seed(0)  # all ranks draw the same batches
    rows, tokenizer = make_data()
    model = make_model(tokenizer).to(device).train()
    backbone = model.model
    # Rank order is vocabulary order; a vocabulary that does not divide gives uneven shards.
    head = nn.Parameter(model.lm_head.weight.detach().tensor_split(ranks)[rank].clone())
    collate = sgp.Collator(tokenizer, packed=True, max_length=WINDOW)
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW([*backbone.parameters(), head], lr=1e-3)

    for step, batch in zip(range(steps), loader, strict=False):
        hidden = backbone(
            input_ids=batch["input_ids"].to(device),
            position_ids=batch["position_ids"].to(device),
            use_cache=False,  # with a cache, packed sequences would attend to each other
        ).last_hidden_state
        selection = batch["selection"].to(device, non_blocking=True)
        loss = sgp.parallel.linear_cross_entropy(hidden, head, selection)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.6f}, {len(head)} of {len(tokenizer)} rows")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
