"""A data set that is streamed to several processes by accelerate, which reads it in the first."""

import os

from torch.utils.data import DataLoader, IterableDataset

import sgp
from tests.ranks import caught


class Stream(IterableDataset):
    """Ten rows of five tokens: row r begins with token 10 r."""

    def __iter__(self):
        for row in range(10):
            ids = list(range(10 * row, 10 * row + 5))
            yield {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}


def batches(rank, ways):
    """What a process gets: (keys, first tokens, kept tokens) of each batch, for each way to load.

    And, of the first process, what packed rows raise.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # asked for, though they are joined
    from accelerate import Accelerator, DataLoaderConfiguration

    def load(collate, workers, dispatch):
        loader = DataLoader(
            Stream(),
            batch_size=2,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        split = DataLoaderConfiguration(dispatch_batches=dispatch)
        return Accelerator(cpu=True, dataloader_config=split).prepare(loader)

    found = []
    for workers, dispatch in ways:
        found.append([])
        for batch in load(sgp.Collator(), workers, dispatch):
            kept = batch["selection"].num_kept if "selection" in batch else None
            found[-1].append((set(batch), batch["input_ids"][:, 0].tolist(), kept))
    packed = sgp.Collator(packed=True)
    error = "" if rank else caught(lambda: next(iter(load(packed, 0, None))))
    return found, error
