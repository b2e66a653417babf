"""The worker process of one rival: `python -m mainrun.bench.worker '{"rival": ...}'`.

bench/step.py starts this process. At the start, the worker runs the warm-up steps and prints {"ready": ...}.
Then the parent process sends one command per line on stdin. The worker answers each command with one JSON
object per line on stdout:

    step            the time of one training step
    end             the peak memory and, if requested, an evaluation and a profile; the worker then exits

Each rival has its own process, because the memory allocator and the peak memory belong to a whole process.
All other output of the worker goes to stderr.
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

WARMUP = 2  # the number of warm-up steps; the first step compiles and allocates memory
TOKENS_PER_TITLE = 14  # the approximate number of tokens per title, which affects compile=auto
SCORE_REPEATS = 3

Answer = dict[str, Any]  # an answer that is sent to the parent process as JSON


class Rival(Protocol):
    def step(self) -> Answer:
        """Run one step. The answer contains at least the key `seconds`."""

    def describe(self) -> Answer:
        """Return the properties of the rival. This method is called after the warm-up steps."""

    def finish(self) -> Answer:
        """Run the measurements that follow the last step, after the peak memory has been read."""


class PlainRival:
    """The plain training loop of bench/plain.py."""

    def __init__(self, cfg: TrainConfig, request: dict[str, Any]) -> None:
        self.allocator = tune_allocator()  # tune the allocator before torch allocates any memory
        import torch

        from mainrun.bench.plain import PlainGPT

        torch.set_num_threads(cfg.threads or cores())
        torch.manual_seed(cfg.seed)
        cuda = cfg.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.clip = cfg.clip
        self.model = PlainGPT(cfg, cfg.vocab_size).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.x, self.y = random_batch(cfg, self.device)

    def step(self) -> Answer:
        from mainrun.bench.parts import wait
        from mainrun.bench.plain import plain_step

        start = time.perf_counter()
        loss = plain_step(self.model, self.optimizer, self.x, self.y, self.clip)
        wait(self.device)
        return {"seconds": time.perf_counter() - start, "loss": loss}

    def describe(self) -> Answer:
        return {
            "allocator": self.allocator,
            "dtype": "float32",
            "compile": False,
            "params": sum(p.numel() for p in self.model.parameters()),
        }

    def finish(self) -> Answer:
        return {}


class MainrunRival:
    """The training step of mainrun."""

    def __init__(self, cfg: TrainConfig, request: dict[str, Any]) -> None:
        from mainrun.core.device import Device
        from mainrun.ui.estimate import StepProbe

        self.cfg = cfg
        self.request = request
        self.device = Device(cfg)
        tokens = max(TOKENS_PER_TITLE * cfg.num_titles, 2 * cfg.batch_size * cfg.block_size + 1)
        plan = Plan(cfg, tokens)
        self.device.settle(cfg, plan)
        self.probe = StepProbe(cfg, self.device, plan, cfg.vocab_size)
        self.x, self.y = random_batch(cfg, self.device.torch_device)

    def step(self) -> Answer:
        count = self.request.get("burst", 1)
        start = time.perf_counter()
        loss = self.probe.step(self.x, self.y, count)
        return {"seconds": (time.perf_counter() - start) / count, "loss": loss}

    def describe(self) -> Answer:
        from mainrun.plan.cost import costs
        from mainrun.ui.estimate import estimate_memory

        cfg = self.cfg
        tokens = cfg.batch_size * cfg.block_size * cfg.passes
        return {
            "allocator": self.device.allocator,
            "attention": self.device.attention,
            "dtype": cfg.dtype,
            "compile": self.device.compile,
            "params": sum(p.numel() for p in self.probe.state.model.parameters()),
            "flops": tokens * costs(cfg, cfg.vocab_size)["flops_per_token"],
            "memory_estimate": estimate_memory(self.probe.plan, self.device, cfg.vocab_size),
            "machine_class": self.device.machine_class,
        }

    def finish(self) -> Answer:
        from mainrun.bench.parts import shares

        answer: Answer = {}
        if self.request.get("evaluate"):
            answer["evaluation"] = self.evaluation()
        if self.request.get("profile"):
            train_step = self.probe.train_step
            # The profiler cannot see the parts of a recorded CUDA graph, so the graph is switched off.
            train_step.forward_backward.forget()
            train_step.forward_backward.on = False
            answer["profile"] = shares(self.step, train_step.runners)
        return answer

    def evaluation(self) -> Answer:
        """Measure the speed of an evaluation. With dtype=bfloat16, also compute the loss in float32."""
        from mainrun.data.scoring import evaluate
        from mainrun.train import build

        cfg = self.cfg
        model = self.probe.state.model
        rows, length = cfg.geometry
        span = rows * length
        tokens = random_tokens(cfg, max(4 * cfg.batch_size * cfg.block_size, span + 1))
        # The total number of targets in the full score and the official score.
        targets = len(tokens) + len(tokens) // (span + 1) * span
        sizes: dict[str, Any] = {
            "chars": len(tokens),
            "nbytes": len(tokens),
            "block_size": cfg.block_size,
            "geometry": cfg.geometry,
        }
        seconds = []
        for _ in range(SCORE_REPEATS):
            start = time.perf_counter()
            score = evaluate(model, tokens, **sizes)
            seconds.append(time.perf_counter() - start)
        answer: Answer = {"tokens_per_s": targets / statistics.median(seconds), "loss": score.loss}
        if cfg.dtype == "bfloat16":
            float32 = cfg.model_copy(update={"dtype": "float32"})
            exact = build(float32, cfg.vocab_size).to(self.device.torch_device)
            exact.load_state_dict(model.state_dict())
            answer["loss_float32"] = evaluate(exact, tokens, **sizes).loss
        return answer


class FloorRival:
    """A rival that computes only the matrix products of the linear layers.

    No training step with these linear layers can be faster.
    """

    def __init__(self, cfg: TrainConfig, request: dict[str, Any]) -> None:
        from mainrun.bench.parts import Floor
        from mainrun.core.device import Device

        self.device = Device(cfg)
        self.floor = Floor(cfg, cfg.vocab_size, self.device.torch_device)

    def step(self) -> Answer:
        seconds = self.floor.step()
        return {"seconds": sum(seconds.values()), **seconds}

    def describe(self) -> Answer:
        return {"flops": self.floor.flops}

    def finish(self) -> Answer:
        return {}


RIVALS: dict[str, Any] = {"plain": PlainRival, "ours": MainrunRival, "floor": FloorRival}


def random_tokens(cfg: TrainConfig, count: int) -> Any:
    import numpy as np

    # The token ids 0, 1 and 2 are special tokens.
    return np.random.default_rng(0).integers(3, cfg.vocab_size, count, dtype=np.int64)


def random_batch(cfg: TrainConfig, device: Any) -> Any:
    import torch

    tokens = torch.from_numpy(random_tokens(cfg, cfg.batch_size * cfg.block_size + 1)).to(device)
    return tokens[:-1].view(-1, cfg.block_size), tokens[1:].view(-1, cfg.block_size)


def peak(cuda: bool) -> int:
    """Return the peak memory of the process in bytes. If `cuda` is set, return the peak GPU memory."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    return peak_memory()


def serve(request: dict[str, Any], words: queue.Queue[str], channel: TextIO) -> None:
    """Run the rival and answer the command words of the parent process."""

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=channel, flush=True)

    start = time.perf_counter()
    cfg = from_dict(request["config"])
    rival: Rival = RIVALS[request["rival"]](cfg, request)
    for _ in range(WARMUP):
        rival.step()
    answer(ready=True, warmup_seconds=time.perf_counter() - start, **rival.describe())
    word = words.get()
    while word == "step":
        answer(**rival.step())
        word = words.get()
    if word != "end":
        raise UsageError(f"the worker got the command {word!r}, but accepts only step and end")
    import torch

    peak_bytes = peak(torch.cuda.is_available() and cfg.device != "cpu")
    answer(peak=peak_bytes, **rival.finish())


def main() -> int:
    tune_allocator()  # tune the allocator before torch allocates any memory
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirect the output of libraries to stderr
    words: queue.Queue[str] = queue.Queue()

    def read_words() -> None:
        for line in sys.stdin:
            words.put(line.strip())
        os._exit(1)  # exit at once when the parent process has ended, even during a step

    threading.Thread(target=read_words, daemon=True).start()
    try:
        serve(json.loads(sys.argv[1]), words, channel)
    except MainrunError as e:
        print(json.dumps({"error": str(e), "exit_code": e.exit_code}), file=channel, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
