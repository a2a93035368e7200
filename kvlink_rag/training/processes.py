"""The processes that train one model together on one machine, as torchrun and `accelerate launch` start them.

Each has a device of its own and takes its share of a step's contexts; Hugging Face's Trainer averages the gradients
(DistributedDataParallel), so that W processes learn what one learns with W times `accumulate`. The first of them
writes: the run's folder, what is saved, the checkpoint, and what a person sees.
"""

from __future__ import annotations

import os

import torch

from kvlink_rag.errors import BadInput


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    return num_processes() == 1 or int(os.environ["RANK"]) == 0


def own_device(device: str) -> str:
    """Where this process loads its model: of several GPUs each takes its own. Raises BadInput for one named for all."""
    if num_processes() == 1 or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if device not in ("auto", "cuda"):
        raise BadInput(f"{num_processes()} processes cannot all train on {device}; leave --device out")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def join_in(device: torch.device) -> None:
    """Meet the other processes, if there are some; before the first `wait_for_all`."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


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
