"""Run a function in several real processes that talk through gloo."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any, seconds: int = 120
) -> list[Any]:
    """Call ``function(rank, world_size, *arguments)`` on every rank; what each returned.

    Raises:
        AssertionError: a rank raised, with its traceback.
    """
    # One at a time on a machine: `benchmarks.distributed` reads counters of what all of them send.
    with FileLock(Path(tempfile.gettempdir()) / "varcon-loss-ranks.lock"):
        mp.spawn(
            _main, args=(world_size, str(folder), seconds, function, arguments), nprocs=world_size
        )
    results = [
        torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)
    ]
    for rank, (error, _) in enumerate(results):
        assert error is None, f"rank {rank}: {error}"
    return [value for _, value in results]


def leave_group() -> None:
    """Destroy the process group, when its threads have freed what they held.

    torch 2.6 waits for them with the interpreter locked, which they need to free a tensor.
    """
    if torch.__version__ < "2.7":
        time.sleep(0.3)
    dist.destroy_process_group()


def _main(
    rank: int, world_size: int, folder: str, seconds: int, function: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    try:
        result = (None, function(rank, world_size, *arguments))
    except Exception:
        result = (traceback.format_exc(), None)
    torch.save(result, f"{folder}/rank{rank}.pt")
    leave_group()
    # DDP may still hold threads of the group, and an interpreter that ends under them can abort
    # after all work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
