"""The machine: what the bits depend on besides the config, and how it asks a run to stop."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError


class Machine:
    """Threads, device, processes. `facts` is the machine class: same facts, same config, same bits."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no GPU here; set device=cpu or auto")
        if name == "cpu" and cfg.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ConfigError("compile=true needs a C++ compiler on the CPU and there is none; install g++, or set compile=false")
        if cfg.batch_size % (cfg.grad_accum * self.world):
            pieces = f"{self.world} processes x grad_accum={cfg.grad_accum}"
            raise ConfigError(f"batch_size={cfg.batch_size} does not split over {pieces}; change one of them")
        self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        self.threads = cfg.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # torch's default costs a pass over every buffer and guards nothing here
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        if self.world > 1 and not dist.is_initialized():
            if name == "cuda":
                torch.cuda.set_device(self.device)
            # the others wait while the leader tokenises or scores, which may take long
            dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=6))
        self.facts = {
            "device": torch.cuda.get_device_name(self.device) if name == "cuda" else cpu_model(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "threads": self.threads,
            "processes": self.world,
            "dtype": cfg.dtype,
            "compile": cfg.compile,
        }

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

    def mean(self, value: Tensor) -> float:
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return float(value)


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no /proc on this system: the name below is all there is
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that computes: Python, the libraries, and mainrun by the hash of its own files that do."""
    import numpy
    import safetensors
    import sentencepiece
    import tokenizers

    source = hashlib.sha256()
    for name in ("config", "corpus", "machine", "scoring", "synthetic", "tokens", "train"):
        source.update(hashlib.sha256(Path(__file__).with_name(f"{name}.py").read_bytes()).digest())
    found = {m.__name__: str(m.__version__) for m in (torch, numpy, tokenizers, sentencepiece, safetensors)}
    return {"python": platform.python_version(), "mainrun": source.hexdigest(), **found}


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
