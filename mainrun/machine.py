"""The machine: what the bits depend on besides the config, and how it asks a run to stop."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mainrun import native
from mainrun.config import Plan, TrainConfig
from mainrun.errors import ConfigError
from mainrun.host import cores, cpu_flags, cpu_limits, cpu_name, cxx, tune_allocator
from mainrun.kernels import TILES
from mainrun.recorded import Recorded


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
            needs = "triton, which comes with torch" if name == "cuda" else f"a C++ compiler and Python's headers on a CPU ({cxx()[1]})"
            raise ConfigError(f"compile=on needs {needs}; install what is missing, or set compile=off")
        for phase in cfg.phases:
            if phase.batch_size % (phase.grad_accum * self.world):
                pieces = f"{self.world} processes x grad_accum={phase.grad_accum}"
                raise ConfigError(f"batch_size={phase.batch_size} does not split over {pieces}; change one of them")
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
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
            costs, saves = compile_balance(cfg, plan, self)
            self.compile = saves > costs and bool(compiler(self.device.type))
            if self.compile:
                self.facts |= self._compiled()
                self.why = f"compiling: about {costs:.0f} s, to save about {saves:.0f} s (--set compile=off: without); a stop waits for it"

    @property
    def native(self) -> bool:
        """The loss of a step in kernels of our own: on a GPU in Triton; on a CPU in C++, if it is compiled, and attention too."""
        return bool(self.triton) or (self.compile and self.half and self.device.type == "cpu" and native.library() is not None)

    def _compiled(self) -> dict[str, Any]:
        return {"compile": True, "compiler": compiler(self.device.type)} | ({"native": True} if self.native and not self.triton else {})

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What torch.compile says when it fails, as an error with a way out."""
        try:
            yield
        except Exception as e:
            if type(e).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise ConfigError(f"torch.compile failed ({str(e).strip().splitlines()[0]}); --set compile=off trains without it") from e
            raise

    def put(self, array: np.ndarray) -> Tensor:
        """On the device; to a GPU without waiting for it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def recorded(self, cfg: TrainConfig) -> Recorded:
        """Recorded where that pays and works: on one GPU, unless a router decides what is computed."""
        return Recorded(self.generators, on=self.device.type == "cuda" and self.world == 1 and not cfg.experts)

    def seed(self, seeds: list[int]) -> None:
        """Of a step's micro-batches: what they draw is decided here."""
        self.seeds = seeds
        if self.device.type == "cuda":
            torch.manual_seed(seeds[0])  # for the one dropout that draws its own: that of fused attention
            self.generators += [torch.Generator(self.device) for _ in seeds[len(self.generators) :]]
            for generator, seed in zip(self.generators, seeds, strict=False):  # an earlier step may have had more micro-batches
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
            noise: Any = torch.randint(0, 256, (total,), dtype=torch.uint8, device=self.device, generator=self.generators[micro])
        else:
            words = np.random.Generator(np.random.SFC64(self.seeds[micro])).integers(0, 2**64, -(-total // 8), dtype=np.uint64)
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


def compiler(device: str) -> str:
    """The first line of what the C++ compiler says of itself; for a GPU the one that comes with torch. Empty: none that works."""
    if device == "cuda":
        try:
            import triton
        except Exception:  # there is none, or one that was built for something else
            return ""
        return f"triton {triton.__version__}"
    found, problem = cxx()
    return "" if problem else subprocess.run([found, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


@cache
def triton_works(device: torch.device) -> tuple[str, str]:
    """Its version, if kernels of our own can be made and run there; else why a run goes without."""
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("a GPU of this age has no bfloat16")
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise RuntimeError("TRITON_INTERPRET has it run on the CPU")
        from mainrun import native_gpu

        logits, target = torch.zeros(1, 2, dtype=torch.bfloat16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        loss, log_sum = native_gpu.cross_entropy(logits, target)
        native_gpu.cross_entropy_backward(logits, target, log_sum, loss[0])
        torch.cuda.synchronize(device)
    except Exception as e:  # not there, of another version, without a C compiler, without the driver's library: torch's own operations do
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        return "", f"the loss takes torch's own operations, which are slower: Triton does not work here ({reason})"
    return compiler("cuda"), ""


def compile_balance(cfg: TrainConfig, plan: Plan, machine: Machine) -> tuple[float, float]:
    """Seconds that compiling costs, and that it saves over the run, by rule of thumb (the figures are in docs/log.md)."""
    attention = cfg.d_model * (2 * cfg.n_head + 2 * cfg.kv_heads) * cfg.head_width
    mlp = (3 if cfg.mlp == "swiglu" else 2) * cfg.d_model * cfg.ff_width
    weights = cfg.n_layer * (attention + mlp) + cfg.vocab_size * cfg.d_model
    flops = 6 * weights * plan.tokens(plan.steps) * cfg.passes
    if machine.device.type == "cuda":
        return 10 + 3 * cfg.n_layer, max(3e-4 * cfg.n_layer * plan.steps, 0.3 * flops / 2e14)
    half, rms = cfg.dtype == "bfloat16", cfg.norm == "rmsnorm"
    speed = machine.threads * (4.7e11 if half and TILES else 1.5e11 if half else 6e10)
    # what there is to fuse, most of it in RMSNorm; beside AMX's products it weighs more, beside those in float32 nothing
    share = (0.3 if rms else 0.06) if half and TILES else 0.1 if half and rms else 0.0
    return 15 + 8 * cfg.n_layer, share * flops / speed


def _source() -> str:
    found = hashlib.sha256()
    here = Path(__file__).parent
    names = ["config", "host", "corpus", "kernels", "machine", "native", "native_gpu"]
    names += ["recorded", "scoring", "sitting", "synthetic", "tokens", "train"]
    names += [f"growth/{name}" for name in ("schedule", "live", "operators", "moments", "verify")]
    for path in (*(here / f"{name}.py" for name in names), *sorted(here.glob("layers/*.py"))):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    found.update(native.SOURCE.read_bytes())
    return found.hexdigest()


SOURCE = _source()  # once, at the start: an edit while this process lives is not what it computes with


def versions() -> dict[str, str]:
    """Of everything that computes: Python, the libraries, and mainrun by the hash of its own files that do."""
    import numpy
    import safetensors
    import sentencepiece
    import tokenizers

    found = {m.__name__: str(m.__version__) for m in (torch, numpy, tokenizers, sentencepiece, safetensors)}
    return {"python": platform.python_version(), "mainrun": SOURCE, **found}


class StopFlag:
    """The first SIGTERM or SIGINT asks for a stop between two steps; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's; a caller with threads of its own stops us its own way
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._on)
        return self

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *exc: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
