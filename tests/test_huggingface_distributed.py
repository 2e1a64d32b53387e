"""A patched model in two processes: the gradients of one, under DDP and FSDP2."""

import datetime as dt
import socket

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sgp.huggingface import patch
from tests.families import make, make_batch
from tests.ranks import run_ranks, start

WORLD = 2
CASES = [(mode, first) for mode in ("rows", "fused") for first in (True, False)]


def port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def rows_of(batch, rank):
    """Two rows for the first process, two for the second."""
    return {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}


def family_of(way):
    return "llama-tied" if "tied" in way else "llama"


def wrap(model, way):
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp, head its own":
        fully_shard(model.lm_head)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def worker(rank, address, way, folder):
    """Every mode, patched before and after wrapping: losses and gradients into a file."""
    torch.set_num_threads(1)
    wait = dt.timedelta(seconds=60)
    distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=WORLD, timeout=wait
    )
    found = {}
    for case in CASES:
        mode, first = case
        model, batch = make(family_of(way)), make_batch(B=2 * WORLD)
        if first:
            patch(model, mode=mode)
        wrapped = wrap(model, way)
        if not first:
            patch(wrapped, mode=mode)
        for _ in range(2):
            wrapped.zero_grad()
            out = wrapped(**rows_of(batch, rank))
            out.loss.backward()
        gradients = {n: whole(p.grad) for n, p in model.named_parameters()}
        found[case] = (out.loss.item(), out.logits is None, gradients)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize(
    "way", ["ddp", "fsdp, head in the root", "fsdp, head its own", "fsdp, tied"]
)
def test_two_processes(way, tmp_path):
    model, batch = make(family_of(way)), make_batch(B=2 * WORLD)
    losses = [model(**rows_of(batch, rank)).loss for rank in range(WORLD)]
    (sum(losses) / WORLD).backward()
    arguments = (f"tcp://localhost:{port()}", way, tmp_path)
    context = start(worker, arguments, WORLD)
    while not context.join():  # which raises what a worker did
        pass
    for rank, expected in enumerate(losses):
        for (mode, first), found in torch.load(tmp_path / f"{rank}.pt").items():
            loss, no_logits, gradients = found
            assert loss == pytest.approx(expected.item(), rel=2e-5), (mode, first)
            assert no_logits == (mode == "fused")
            for name, p in model.named_parameters():
                error = (gradients[name] - p.grad).abs().max() / p.grad.abs().max()
                assert error <= 2e-5, (mode, first, name)


def split_head(_):
    """A head split by columns that leaves its logits so: the loss by rows, the refusal of fused."""
    layout = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    found = {}
    for mode in ("rows", "fused"):
        model, batch = make("llama"), make_batch(B=2)
        patch(model, mode=mode)
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"lm_head": layout})
        try:
            loss = model(**batch).loss
            loss.backward()
        except RuntimeError as error:
            found[mode] = str(error)
        else:
            gradient = model.model.layers[0].self_attn.q_proj.weight.grad
            found[mode] = (whole(loss.detach()), gradient, whole(model.lm_head.weight.grad))
    return found


def test_tensor_parallelism_of_the_head_takes_rows(tmp_path):
    model, batch = make("llama"), make_batch(B=2)
    loss = model(**batch).loss
    loss.backward()
    q = model.model.layers[0].self_attn.q_proj.weight
    for found in run_ranks(split_head, 2, tmp_path):
        for value, exact in zip(
            found["rows"], (loss, q.grad, model.lm_head.weight.grad), strict=True
        ):
            assert (value - exact).abs().max() <= 2e-5 * exact.abs().max()
        assert "tensor parallelism" in found["fused"]
        assert "patch with mode='rows'" in found["fused"]
