"""Running a function in several processes that know of each other, over gloo on the CPU."""

import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_fgsgd import fused

# A server that has imported what takes seconds, and nothing else, starts the processes of all tests. Imported in each of
# them by itself it takes longer than most tests do.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_SLOW_IMPORTS = ["timm", "pytorch_lightning", "lightning_fgsgd", "torch.distributed.fsdp", "torch.distributed.tensor"]


def run(folder: Path, function, processes: int = 2, *args):
    """What ``function(rank, folder, *args)`` returns, by rank. It is to be defined in a module, and so are its results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(_SLOW_IMPORTS)
    mp.start_processes(_start, (processes, port, folder, function, args), processes, start_method=_METHOD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _start(rank, processes, port, folder, function, args):
    # As torchrun sets them: Lightning then takes these processes for its own.
    os.environ |= {
        **{"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"},
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)),
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fused._FLAGS = (*fused._FLAGS, "-O0")  # small weights in many settings: quickly compiled
    dist.init_process_group("gloo")
    torch.save(function(rank, folder, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
