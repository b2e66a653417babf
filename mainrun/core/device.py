"""Set up the CPU or GPU that trains a run, and generate the random numbers for dropout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.cuda_graph import CudaGraph
from mainrun.core.dropout import Site, random_bytes, threshold
from mainrun.core.hardware import (
    available_memory,
    cores,
    cpp_compiler,
    cpu_flags,
    cpu_limits,
    cpu_name,
    resident_memory,
    total_memory,
    tune_allocator,
)
from mainrun.core.machine_class import compile_balance, compiler, triton_works
from mainrun.core.native import cpu as native
from mainrun.core.process_group import ProcessGroup, local_processes
from mainrun.core.sharding import shard
from mainrun.errors import ConfigError
from mainrun.plan.plan import Plan


class Device(ProcessGroup):
    """The CPU or GPU that one process of a run uses, and its settings.

    `machine_class` contains the properties of the machine that affect the results of a run. Two machines with
    the same `machine_class` give bit-identical results for the same config.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        name = choose_device(cfg)
        self.sharded = cfg.shard and self.world > 1
        self._check(cfg, name)
        self.torch_device = torch.device(name)
        if name == "cuda":
            self.torch_device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        self.threads = cfg.threads or cores()
        make_deterministic(self.threads)
        if name == "cuda":
            torch.cuda.set_device(self.torch_device)
        self.join()
        # A sharded run gathers and frees whole blocks. The freed memory would soon exceed the model's size.
        self.allocator = tune_allocator(keep_freed=not self.sharded)
        self.attention = best_attention(cfg, name) if cfg.attention == "auto" else cfg.attention
        # The losses are read from a GPU once every 32 steps, because reading a loss waits for the GPU.
        self.read_every = 32 if name == "cuda" else 1
        self.seeds: list[int] = []
        self.generators: list[torch.Generator] = []  # on a GPU, one random generator per micro-batch
        self.compile = cfg.compile == "on"
        self.half = cfg.dtype == "bfloat16"
        self.triton = ""  # Triton's version if a Triton kernel computes the loss, else ""
        self.note = ""  # a message to the user about this device
        if name == "cuda" and self.half:
            self.triton, self.note = triton_works(self.torch_device)
        self.machine_class = self._facts(cfg)
        if self.compile:
            self.note = "compiling may take some minutes; a stop takes effect afterwards"
            self.machine_class |= self._compiler_facts()

    def _check(self, cfg: TrainConfig, name: str) -> None:
        """Raise an error if this device cannot run the config."""
        if name == "cuda" and not torch.cuda.is_available():
            raise ConfigError("got device=cuda, but torch finds no GPU; set device=cpu or device=auto")
        if cfg.compile == "on" and not compiler(name):
            needs = f"a C++ compiler and Python's headers ({cpp_compiler()[1]})"
            if name == "cuda":
                needs = "triton, which comes with torch"
            raise ConfigError(f"compile=on needs {needs}; install the missing part, or set compile=off")
        for segment in cfg.segment_configs:
            if segment.batch_size % (segment.grad_accum * self.world):
                pieces = f"{self.world} processes x grad_accum={segment.grad_accum}"
                got = f"batch_size={segment.batch_size} is not divisible by {pieces}"
                raise ConfigError(f"{got}; change one of these numbers")

    def _facts(self, cfg: TrainConfig) -> dict[str, Any]:
        name = cpu_name()
        if self.torch_device.type == "cuda":
            name = torch.cuda.get_device_name(self.torch_device)
        facts = {
            "device": name,
            "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *cpu_flags()]),
            "torch": torch.__version__,
            "threads": self.threads,
            "processes": self.world,
            "dtype": cfg.dtype,
            "attention": self.attention,
            "compile": self.compile,
        }
        limits = cpu_limits()
        if limits:
            facts["limits"] = limits
        if self.triton:
            facts["native"] = self.triton
        if self.sharded:
            facts["shard"] = True
        return facts

    @property
    def memory(self) -> int:
        """The memory in bytes that this process may use on its device, or 0 if it is unknown."""
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        return total_memory() // local_processes()

    @property
    def free_memory(self) -> int:
        """The memory in bytes that a run of this process may use now, or 0 if it is unknown.

        On a CPU, memory that this process already uses counts as free, because the estimate of a run includes
        it.
        """
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self.torch_device)[0]
        available = available_memory()
        if not available:
            return 0
        return available // local_processes() + resident_memory()

    def settle(self, cfg: TrainConfig, plan: Plan) -> None:
        """If compile=auto is set, decide whether to compile the model.

        The decision depends on the length of the run, and not on measured times, which differ from day to
        day.
        """
        if cfg.compile != "auto" or self.sharded:
            return
        costs, saves = compile_balance(cfg, plan, self.torch_device.type, self.threads)
        self.compile = saves > costs and bool(compiler(self.torch_device.type))
        if not self.compile:
            return
        self.machine_class |= self._compiler_facts()
        gain = f"takes about {costs:.0f} s and saves about {saves:.0f} s"
        self.note = f"compiling {gain}; a stop takes effect afterwards; --set compile=off skips compiling"

    @property
    def native(self) -> bool:
        """True if mainrun's own kernels compute the loss.

        On a GPU, these kernels are written in Triton. On a CPU, the kernels are written in C++, and mainrun
        uses them only if the model is compiled and computes in bfloat16.
        """
        if self.triton:
            return True
        on_cpu = self.torch_device.type == "cpu"
        return self.compile and self.half and on_cpu and native.library() is not None

    def _compiler_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"compile": True, "compiler": compiler(self.torch_device.type)}
        if self.native and not self.triton:
            facts["native"] = True
        return facts

    def place(self, model: Any) -> Any:
        """Move a model to this device. In a sharded run, keep only this process's part of the model."""
        if self.sharded:
            return shard(model, self.torch_device)
        return model.to(self.torch_device)

    def runner(self, model: nn.Module) -> nn.Module:
        """Return the model, wrapped in torch.compile and DistributedDataParallel if the run uses them."""
        if self.sharded:
            return model
        runner: nn.Module = model
        if self.compile:
            # make_deterministic affects only eager code. use_deterministic_algorithms also affects compiled
            # code.
            torch.use_deterministic_algorithms(True)
            # Compile for fixed shapes, even if this process has already compiled the model for other shapes.
            runner = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return nn.parallel.DistributedDataParallel(runner) if self.world > 1 else runner

    def gradient_exchange(self, runner: Any, last: bool) -> AbstractContextManager[None]:
        """Return a context in which the processes exchange gradients, but only after the last micro-batch.

        A sharded run exchanges them after each micro-batch, because no process has the memory for the
        gradients of the whole model.
        """
        if last or self.world == 1 or self.sharded:
            return nullcontext()
        context: AbstractContextManager[None] = runner.no_sync()
        return context

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Convert an error in torch.compile to a ConfigError that says how to train without compiling."""
        try:
            yield
        except Exception as e:
            if not type(e).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise
            reason = str(e).strip().splitlines()[0]
            fix = "use --set compile=off to train without it"
            raise ConfigError(f"torch.compile failed ({reason}); {fix}") from e

    def put(self, array: np.ndarray) -> Tensor:
        """Return an array as a tensor on the device. Copying an array to a GPU is asynchronous."""
        tensor = torch.from_numpy(array)
        if self.torch_device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def cuda_graph(self, cfg: TrainConfig) -> CudaGraph:
        """Return a CUDA graph. The graph is enabled if the run uses one GPU and no mixture of experts."""
        on = self.torch_device.type == "cuda" and self.world == 1 and not cfg.experts
        return CudaGraph(self.generators, on=on)

    # -- random numbers of a step

    def seed(self, seeds: list[int]) -> None:
        """Seed the random number generators of a step. `seeds` contains one seed per micro-batch."""
        self.seeds = seeds
        if self.torch_device.type != "cuda":
            return
        torch.manual_seed(seeds[0])  # fused attention uses torch's global generator for dropout
        missing = len(seeds) - len(self.generators)
        self.generators += [torch.Generator(self.torch_device) for _ in range(missing)]
        # There may be more generators than seeds, because an earlier step may have had more micro-batches
        # than this step.
        for generator, seed in zip(self.generators, seeds, strict=False):
            generator.manual_seed(seed)

    def masks(self, sites: list[Site], micro: int) -> Tensor | None:
        """Return the dropout masks of a micro-batch, or None if no masks are needed."""
        on_cpu = self.torch_device.type == "cpu"
        if on_cpu:
            # Fused attention uses torch's global generator for dropout.
            torch.manual_seed(self.seeds[micro])
        total = sum(size for size, _ in sites)
        if not total:
            return None
        if on_cpu:
            noise = random_bytes(total, self.seeds[micro])
            threshold(noise, sites)
            return torch.from_numpy(noise)
        generator = self.generators[micro]
        pool = torch.randint(
            0, 256, (total,), dtype=torch.uint8, device=self.torch_device, generator=generator
        )
        threshold(pool, sites)
        return pool


def choose_device(cfg: TrainConfig) -> str:
    """Return the device that a config selects, either "cpu" or "cuda"."""
    if cfg.device != "auto":
        return cfg.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_deterministic(threads: int) -> None:
    """Configure torch so that repeating a computation gives bit-identical results."""
    torch.set_num_threads(threads)
    # With a fixed workspace size, cuBLAS always chooses the same kernels.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # In eager mode, set_deterministic_debug_mode has the same effect as use_deterministic_algorithms. Calling
    # use_deterministic_algorithms would also import torch's compiler, and this import takes 0.9 s.
    torch.set_deterministic_debug_mode("error")
    # Filling each new tensor would take an extra pass over its memory. The filling is not needed, because no
    # kernel of mainrun reads uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False


def best_attention(cfg: TrainConfig, device: str) -> str:
    """Return the faster implementation of attention, "plain" or "sdpa".

    The choice is based on the measurements in docs/log/speed.md. On a CPU, torch's fused attention cannot use
    mainrun's dropout masks, which have one byte per element.
    """
    if device == "cuda":
        return "sdpa"
    pays_from = 1024 if cfg.dtype == "bfloat16" else 128
    drops_weights = bool(cfg.dropouts[1])
    return "sdpa" if cfg.block_size >= pays_from and not drops_weights else "plain"
