"""One rival in a process of its own: `python -m mainrun.bench.worker '{"rival": "ours", ...}'`, started and led by bench.step.

    it says              {"ready": ...}, after its warm-up steps
    it hears  step       does one step and says its seconds
    it hears  end        says its peak memory and, where it was asked to, evaluates and takes the profile; then it is gone

A process each: allocators do not mix, and a peak is one rival's alone. Whatever else is printed in here goes to stderr.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import sys
import threading
import time
from typing import Any, Protocol, TextIO

from mainrun.config import TrainConfig, from_dict
from mainrun.core.hardware import cores, peak_memory, tune_allocator
from mainrun.errors import MainrunError, UsageError
from mainrun.plan.plan import Plan

WARMUP = 2  # steps: the first compiles and maps the memory, the second finds all of it there
TOKENS_A_TITLE = 14  # about; the plan's length decides whether compile=auto compiles


class Rival(Protocol):
    def step(self) -> dict[str, Any]:
        """One step. At least its `seconds`."""

    def about(self) -> dict[str, Any]:
        """What is known once it is warm."""

    def end(self) -> dict[str, Any]:
        """What is found after the steps, when the peak has been read."""


class Plain:
    def __init__(self, cfg: TrainConfig, request: dict[str, Any]) -> None:
        self.allocator = tune_allocator()  # before torch takes any memory
        import torch

        from mainrun.bench.plain import PlainGPT

        torch.set_num_threads(cfg.threads or cores())
        torch.manual_seed(cfg.seed)
        cuda = cfg.device != "cpu" and torch.cuda.is_available()
        self.device, self.clip = torch.device("cuda" if cuda else "cpu"), cfg.clip
        self.model = PlainGPT(cfg, cfg.vocab_size).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.x, self.y = random_batch(cfg, self.device)

    def step(self) -> dict[str, Any]:
        from mainrun.bench.parts import wait
        from mainrun.bench.plain import plain_step

        clock = time.perf_counter()
        loss = plain_step(self.model, self.optimizer, self.x, self.y, self.clip)
        wait(self.device)
        return {"seconds": time.perf_counter() - clock, "loss": loss}

    def about(self) -> dict[str, Any]:
        return {
            "allocator": self.allocator,
            "dtype": "float32",
            "compile": False,
            "params": sum(p.numel() for p in self.model.parameters()),
        }

    def end(self) -> dict[str, Any]:
        return {}


class Ours:
    def __init__(self, cfg: TrainConfig, request: dict[str, Any]) -> None:
        from mainrun.core.device import Device
        from mainrun.ui.estimate import Trial

        self.machine = Device(cfg)
        tokens = max(TOKENS_A_TITLE * cfg.num_titles, 2 * cfg.batch_size * cfg.block_size + 1)
        plan = Plan(cfg, tokens)
        self.machine.settle(cfg, plan)
        self.cfg, self.request = cfg, request
        self.trial = Trial(cfg, self.machine, plan, cfg.vocab_size)
        self.x, self.y = random_batch(cfg, self.machine.torch_device)

    def step(self) -> dict[str, Any]:
        count = self.request.get("burst", 1)
        clock = time.perf_counter()
        loss = self.trial.step(self.x, self.y, count)
        return {"seconds": (time.perf_counter() - clock) / count, "loss": loss}

    def about(self) -> dict[str, Any]:
        from mainrun.plan.cost import costs
        from mainrun.ui.estimate import memory

        model = self.trial.state.model
        return {
            "allocator": self.machine.allocator,
            "attention": self.machine.attention,
            "dtype": self.cfg.dtype,
            "compile": self.machine.compile,
            "params": sum(p.numel() for p in model.parameters()),
            "flops": self.cfg.batch_size
            * self.cfg.block_size
            * self.cfg.passes
            * costs(self.cfg, self.cfg.vocab_size)["flops_per_token"],
            "memory_estimate": memory(self.trial.plan, self.machine, self.cfg.vocab_size),
            "machine_class": self.machine.machine_class,
        }

    def end(self) -> dict[str, Any]:
        from mainrun.bench.parts import shares

        found: dict[str, Any] = {}
        if self.request.get("evaluate"):
            found["evaluation"] = self.evaluation()
        if self.request.get("profile"):
            self.trial.stepper.forward_backward.forget()
            self.trial.stepper.forward_backward.on = (
                False  # kernel by kernel, or there is nothing to tell apart
            )
            found["profile"] = shares(self.step, self.trial.stepper.runner)
        return found

    def evaluation(self) -> dict[str, Any]:
        """What a score of a few batches costs, and how far bfloat16 is from float32 on the same weights."""
        from mainrun.data.scoring import evaluate
        from mainrun.train import GPT

        cfg, model = self.cfg, self.trial.state.model
        rows, length = cfg.geometry
        tokens = random_tokens(cfg, max(4 * cfg.batch_size * cfg.block_size, rows * length + 1))
        scored = (
            len(tokens) + len(tokens) // (rows * length + 1) * rows * length
        )  # by the full and by the official score
        sizes: dict[str, Any] = {
            "chars": len(tokens),
            "nbytes": len(tokens),
            "block_size": cfg.block_size,
            "geometry": cfg.geometry,
        }
        seconds = []
        for _ in range(3):
            clock = time.perf_counter()
            score = evaluate(model, tokens, **sizes)
            seconds.append(time.perf_counter() - clock)
        found: dict[str, Any] = {"tokens_per_s": scored / statistics.median(seconds), "loss": score.loss}
        if cfg.dtype == "bfloat16":
            exact = GPT(cfg.model_copy(update={"dtype": "float32"}), cfg.vocab_size).to(
                self.machine.torch_device
            )
            exact.load_state_dict(model.state_dict())
            found["loss_float32"] = evaluate(exact, tokens, **sizes).loss
        return found


class Floor:
    def __init__(self, cfg: TrainConfig, request: dict[str, Any]) -> None:
        from mainrun.bench import parts
        from mainrun.core.device import Device

        self.machine = Device(cfg)
        self.floor = parts.Floor(cfg, cfg.vocab_size, self.machine.torch_device)

    def step(self) -> dict[str, Any]:
        spent = self.floor.step()
        return {"seconds": sum(spent.values()), **spent}

    def about(self) -> dict[str, Any]:
        return {"flops": self.floor.flops}

    def end(self) -> dict[str, Any]:
        return {}


RIVALS: dict[str, Any] = {"plain": Plain, "ours": Ours, "floor": Floor}


def random_tokens(cfg: TrainConfig, count: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(
        3, cfg.vocab_size, count, dtype=np.int64
    )  # 0, 1 and 2 are no text


def random_batch(cfg: TrainConfig, device: Any) -> Any:
    import torch

    tokens = torch.from_numpy(random_tokens(cfg, cfg.batch_size * cfg.block_size + 1)).to(device)
    return tokens[:-1].view(-1, cfg.block_size), tokens[1:].view(-1, cfg.block_size)


def peak(cuda: bool) -> int:
    """The most memory that this process has had, in bytes: the GPU's where there is one."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    return peak_memory()


def serve(request: dict[str, Any], heard: queue.Queue[str], channel: TextIO) -> None:
    def say(**what: Any) -> None:
        print(json.dumps(what), file=channel, flush=True)

    clock = time.perf_counter()
    cfg = from_dict(request["config"])
    rival: Rival = RIVALS[request["rival"]](cfg, request)
    for _ in range(WARMUP):
        rival.step()
    say(ready=True, warmup_seconds=time.perf_counter() - clock, **rival.about())
    while (word := heard.get()) == "step":
        say(**rival.step())
    if word != "end":
        raise UsageError(f"the worker heard {word!r}; it knows step and end")
    import torch

    high = peak(torch.cuda.is_available() and cfg.device != "cpu")
    say(peak=high, **rival.end())


def main() -> int:
    tune_allocator()  # before torch takes any memory
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints would say what is no JSON
    heard: queue.Queue[str] = queue.Queue()

    def hear() -> None:
        for line in sys.stdin:
            heard.put(line.strip())
        os._exit(1)  # whoever asked is gone, in the middle of a step too

    threading.Thread(target=hear, daemon=True).start()
    try:
        serve(json.loads(sys.argv[1]), heard, channel)
    except MainrunError as e:
        print(json.dumps({"error": str(e), "exit_code": e.exit_code}), file=channel, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
