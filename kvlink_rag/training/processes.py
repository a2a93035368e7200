"""The processes that train one model together on one machine, as torchrun and `accelerate launch` start them.

Each has a device of its own and takes its share of a step's contexts; Hugging Face's Trainer averages the gradients
(DistributedDataParallel), so that W processes learn what one learns with W times `accumulate`. The first of them
writes: the run's folder, what is saved, the checkpoint, and what a person sees.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from kvlink_rag.errors import BadInput

_PATIENCE = timedelta(hours=2)  # while the first process writes a checkpoint, the others wait


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    return num_processes() == 1 or int(os.environ["RANK"]) == 0


def own_device(device: str) -> str:
    """Where this process loads its model: of several GPUs each takes its own. Raises BadInput for one named for all."""
    if num_processes() == 1:
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput(f"{num_processes()} processes cannot all train on {device}; leave the device out")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    here = int(os.environ["LOCAL_RANK"])
    if here >= torch.cuda.device_count():
        raise BadInput(
            f"{num_processes()} processes and {torch.cuda.device_count()} GPUs; start one process for each GPU"
        )
    return f"cuda:{here}"


def join_in(device: torch.device) -> None:
    """Meet the other processes, if there are some. Raises BadInput where the model is not where this one trains."""
    if num_processes() == 1:
        if device.type == "cuda" and device.index:
            raise BadInput(
                f"the model is on {device}, and one process trains on cuda:0; choose a GPU by CUDA_VISIBLE_DEVICES"
            )
        return
    own = device if device.type == "cpu" else torch.device(own_device("cuda"))
    if (device.type, device.index or 0) != (own.type, own.index or 0):
        raise BadInput(
            f"the model is on {device}, and of {num_processes()} processes this one trains on {own}; load it there: "
            f"LanguageModel.load(..., device=training.processes.own_device('auto'))"
        )
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    wait_for_all()  # so that none looks at a folder in which another has begun already


def wait_for_all() -> None:
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_of(value: bool) -> bool:
    """Whether it is so in any of the processes, which all ask at the same point."""
    if num_processes() == 1:
        return value
    from accelerate.utils import gather_object

    return any(gather_object([value]))
