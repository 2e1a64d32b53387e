"""Several gloo processes that run one function.

They are forked from one process that has imported what they need and done nothing else: to import
PyTorch in each of them takes longer than most of the functions.
"""

import contextlib
import datetime as dt
import os
import socket
import sys
import traceback
from multiprocessing import forkserver

import pytest
import torch
from torch import distributed

from tests.quick_interpreter import patch_once

IMPORTED = (
    *("torch.distributed.tensor.parallel", "torch.distributed.fsdp", "triton", "sgp.parallel"),
    *("pytest", "tests.ranks", "tests.families", "transformers.models.llama.modeling_llama"),
)


def start(function, arguments, world):
    """Processes that call function(rank, *arguments) in this one's environment.

    Theirs to join, as after `torch.multiprocessing.spawn(..., join=False)`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # this package, and no installed one
        forkserver.set_forkserver_preload([*IMPORTED])
        forkserver.ensure_running()
    arguments = (dict(os.environ), function, arguments)
    return torch.multiprocessing.start_processes(
        _in_environment, arguments, world, join=False, start_method="forkserver"
    )


def _in_environment(rank, environment, function, arguments):
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *arguments)


def run_ranks(function, world, folder, *arguments, seconds=300):
    """[function(rank, *arguments) of each of `world` processes]; an exception in one is raised."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"tcp://localhost:{found.getsockname()[1]}"
    context = start(_start, (address, world, folder, seconds, function, arguments), world)
    for process in context.processes:
        process.join()
    found = [torch.load(path) if path.exists() else None for path in _paths(folder, world)]
    errors = [value["error"] for value in found if isinstance(value, dict) and "error" in value]
    # A rank that the others wait for has the cause; they say that one died.
    assert not errors, min(errors, key=lambda text: "a rank died" in text)
    return [None if value is None else value["result"] for value in found]


def _paths(folder, world):
    return [folder / f"{rank}.pt" for rank in range(world)]


def _start(rank, address, world, folder, seconds, function, arguments):
    torch.set_num_threads(1)
    patch_once()
    distributed.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=world,
        timeout=dt.timedelta(seconds=seconds),
    )
    try:
        found = {"result": function(rank, *arguments)}
    except Exception:  # noqa: BLE001  (the parent shows it)
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.pt")
    if "result" in found:  # who is done first must not leave the others in their last exchange
        with contextlib.suppress(RuntimeError):
            distributed.barrier()
    # A worker that leaves takes its connections along: the others get an error, not a time-out.
    os._exit(0)


def caught(call):
    """The text of the exception that a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  (the test looks at it)
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
