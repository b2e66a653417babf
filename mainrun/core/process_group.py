"""Communication between the processes that train one run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mainrun.errors import ConfigError

PROCESS_NUMBER = re.compile("[0-9]{1,6}")


def read_rank() -> tuple[int, int]:
    """Read this process's rank and the number of processes from the environment variables of torchrun."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    got = f"got RANK={rank!r} and WORLD_SIZE={world!r}"
    # A batch system may have set RANK and WORLD_SIZE for other purposes.
    fix = "start mainrun with torchrun, or unset both variables"
    numbers = PROCESS_NUMBER.fullmatch(rank) and PROCESS_NUMBER.fullmatch(world)
    if not numbers or int(rank) >= int(world):
        raise ConfigError(f"{got}, but RANK must be a number below WORLD_SIZE; {fix}")
    if int(world) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(f"{got}, but MASTER_ADDR or MASTER_PORT is not set; {fix}")
    return int(rank), int(world)


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not PROCESS_NUMBER.fullmatch(number):
        return 1
    return max(1, int(number))


class ProcessGroup:
    """The processes that train one run together. Only the leader, which is process 0, writes files."""

    def __init__(self) -> None:
        self.rank, self.world = read_rank()
        self.torch_device = torch.device("cpu")
        self.sharded = False  # whether the processes divide the model among themselves

    def join(self) -> None:
        """Connect this process to the other processes of the run."""
        if self.world == 1 or dist.is_initialized():
            return
        backend = "nccl" if self.torch_device.type == "cuda" else "gloo"
        # The timeout is long, because the other processes wait while the leader tokenizes the corpus or
        # scores the model.
        dist.init_process_group(backend, timeout=timedelta(hours=6))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def takes_part(self) -> bool:
        """Whether this process scores the model and collects its weights.

        The leader does so alone, unless it holds only a part of the model. The leader alone writes results.
        """
        return self.leads or self.sharded

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run a `with` block in the leader process first, and then in all other processes."""
        if not self.leads:
            dist.barrier()
        yield
        if self.leads and self.world > 1:
            dist.barrier()

    def any_process(self, flag: bool) -> bool:
        """Return True in every process if the flag is True in at least one process."""
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.torch_device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def broadcast(self, *numbers: int) -> tuple[int, ...]:
        """Send the leader's numbers to every process, and return these numbers."""
        if self.world == 1:
            return numbers
        leaders = torch.tensor(numbers, device=self.torch_device)
        dist.broadcast(leaders, src=0)
        return tuple(leaders.tolist())

    def smallest(self, number: int) -> int:
        """Return the smallest number of all processes."""
        if self.world == 1:
            return number
        numbers = torch.tensor([number], device=self.torch_device)
        dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers.item())

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.world == 1:
            return value
        dist.all_reduce(value)
        return value / self.world
