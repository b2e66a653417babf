"""The machine: what the bits depend on besides the config, and how it asks a run to stop."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.core.cuda_graph import Recorded
from mainrun.core.hardware import cores, cpu_flags, cpu_limits, cpu_name, cxx, tune_allocator
from mainrun.core.machine_class import compile_balance, compiler, triton_works
from mainrun.core.native import cpu as native
from mainrun.errors import ConfigError
from mainrun.plan.plan import Plan


def _place() -> tuple[int, int]:
    """The number of this process and how many there are, from the variables that torchrun sets. A batch system may leave others."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    got, fix = f"got RANK={rank!r} and WORLD_SIZE={world!r}", "start with torchrun, or unset both"
    whole = re.compile("[0-9]{1,6}")
    if not (whole.fullmatch(rank) and whole.fullmatch(world) and int(rank) < int(world)):
        raise ConfigError(f"{got}; RANK must be a number below WORLD_SIZE: {fix}")
    if int(world) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(f"{got}, but no MASTER_ADDR and MASTER_PORT; {fix}")
    return int(rank), int(world)


class Machine:
    """Threads, device, processes. `facts` is the machine class: same facts, same config, same bits."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.rank, self.world = _place()
        name = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no GPU here; set device=cpu or auto")
        if cfg.compile == "on" and not compiler(name):
            needs = (
                "triton, which comes with torch"
                if name == "cuda"
                else f"a C++ compiler and Python's headers on a CPU ({cxx()[1]})"
            )
            raise ConfigError(f"compile=on needs {needs}; install what is missing, or set compile=off")
        for phase in cfg.segment_configs:
            if phase.batch_size % (phase.grad_accum * self.world):
                pieces = f"{self.world} processes x grad_accum={phase.grad_accum}"
                raise ConfigError(
                    f"batch_size={phase.batch_size} does not split over {pieces}; change one of them"
                )
        self.device = (
            torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        )
        self.threads = cfg.threads or cores()
        torch.set_num_threads(self.threads)
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # another might choose other kernels
        torch.use_deterministic_algorithms(True)
        # torch's default costs a pass over every buffer and guards nothing here
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        if name == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # the others wait while the leader tokenises or scores, which may take long
            dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=6))
        self.allocator = tune_allocator()
        self.attention = cfg.attention if cfg.attention != "auto" else best_attention(cfg, name)
        # on a GPU nothing waits for a step's numbers until this many steps have theirs
        self.lag = 32 if name == "cuda" else 1
        self.seeds: list[int] = []
        self.generators: list[torch.Generator] = []  # a GPU's, one a micro-batch
        self.compile = cfg.compile == "on"
        self.facts = {
            "device": torch.cuda.get_device_name(self.device) if name == "cuda" else cpu_name(),
            "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *cpu_flags()]),
            "torch": torch.__version__,
            "threads": self.threads,
            "processes": self.world,
            "dtype": cfg.dtype,
            "attention": self.attention,
            "compile": self.compile,
        }
        self.facts |= {"limits": cpu_limits()} if cpu_limits() else {}
        self.half = cfg.dtype == "bfloat16"
        self.triton, self.why = triton_works(self.device) if name == "cuda" and self.half else ("", "")
        self.facts |= {"native": self.triton} if self.triton else {}
        if self.compile:
            self.why = "compiling, which may take some minutes; a stop waits for it"
            self.facts |= self._compiled()

    def settle(self, cfg: TrainConfig, plan: Plan) -> None:
        """Settle compile=auto for the run that is planned. By its length, not by a stopwatch: that would give other bits on another day."""
        if cfg.compile == "auto":
            costs, saves = compile_balance(cfg, plan, self.device.type, self.threads)
            self.compile = saves > costs and bool(compiler(self.device.type))
            if self.compile:
                self.facts |= self._compiled()
                self.why = f"compiling: about {costs:.0f} s, to save about {saves:.0f} s (--set compile=off: without); a stop waits for it"

    @property
    def native(self) -> bool:
        """The loss of a step in kernels of our own: on a GPU in Triton; on a CPU in C++, if it is compiled, and attention too."""
        return bool(self.triton) or (
            self.compile and self.half and self.device.type == "cpu" and native.library() is not None
        )

    def _compiled(self) -> dict[str, Any]:
        return {"compile": True, "compiler": compiler(self.device.type)} | (
            {"native": True} if self.native and not self.triton else {}
        )

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What torch.compile says when it fails, as an error with a way out."""
        try:
            yield
        except Exception as e:
            if type(e).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise ConfigError(
                    f"torch.compile failed ({str(e).strip().splitlines()[0]}); --set compile=off trains without it"
                ) from e
            raise

    def put(self, array: np.ndarray) -> Tensor:
        """On the device; to a GPU without waiting for it."""
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
        )

    def recorded(self, cfg: TrainConfig) -> Recorded:
        """Recorded where that pays and works: on one GPU, unless a router decides what is computed."""
        return Recorded(
            self.generators, on=self.device.type == "cuda" and self.world == 1 and not cfg.experts
        )

    def seed(self, seeds: list[int]) -> None:
        """Of a step's micro-batches: what they draw is decided here."""
        self.seeds = seeds
        if self.device.type == "cuda":
            torch.manual_seed(seeds[0])  # for the one dropout that draws its own: that of fused attention
            self.generators += [torch.Generator(self.device) for _ in seeds[len(self.generators) :]]
            for generator, seed in zip(
                self.generators, seeds, strict=False
            ):  # an earlier step may have had more micro-batches
                generator.manual_seed(seed)

    def masks(self, places: list[tuple[int, float]], micro: int) -> Tensor | None:
        """Dropout's masks, one behind the other: a random byte a number, 1 where it is at least 256 p. None where nothing drops."""
        compare: Any = np.greater_equal  # ten times faster than torch's on a CPU
        total = sum(size for size, _ in places)
        if self.device.type == "cpu":
            torch.manual_seed(self.seeds[micro])  # for fused attention's own, here too
        if not total:
            return None
        if self.device.type == "cuda":
            compare = torch.greater_equal
            noise: Any = torch.randint(
                0, 256, (total,), dtype=torch.uint8, device=self.device, generator=self.generators[micro]
            )
        else:
            words = np.random.Generator(np.random.SFC64(self.seeds[micro])).integers(
                0, 2**64, -(-total // 8), dtype=np.uint64
            )
            noise = words.view(np.uint8)[:total]
        start = 0
        for p, run in groupby(places, key=lambda place: place[1]):
            size = sum(size for size, _ in run)
            part = noise[start : start + size]
            compare(part, round(256 * p), out=part)
            start += size
        return noise if self.device.type == "cuda" else torch.from_numpy(noise)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The other processes come here when the leader is done here."""
        if not self.leads:
            dist.barrier()
        yield
        if self.leads and self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every process as soon as it is on one."""
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def share(self, *numbers: int) -> tuple[int, ...]:
        """The leader's, on every process."""
        if self.world == 1:
            return numbers
        told = torch.tensor(numbers, device=self.device)
        dist.broadcast(told, src=0)
        return tuple(told.tolist())

    def mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value


def best_attention(cfg: TrainConfig, device: str) -> str:
    """Four plain lines, or torch's fused kernels: as they were measured (docs/log.md). On a CPU those have no byte masks."""
    if device == "cuda":
        return "sdpa"
    pays = 1024 if cfg.dtype == "bfloat16" else 128
    return "sdpa" if cfg.block_size >= pays and not cfg.dropouts[1] else "plain"
