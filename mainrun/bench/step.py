"""A training step beside its rivals, interleaved step by step: `mainrun bench step`. No torch in here: it would be in nobody's figure."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, UsageError

# name: which worker, and whether its allocator is tuned
RIVALS = {
    "plain, default allocator": ("plain", False),
    "plain, tuned allocator": ("plain", True),
    "mainrun, default allocator": ("ours", False),
}
OURS, FLOOR = "mainrun", "GEMM floor"
WORKER = [sys.executable, "-m", "mainrun.bench.worker"]
CLOSE_BF16 = 1e-3  # how far the loss in bfloat16 may be from that in float32, on the same weights


class Worker:
    """One rival's process, as the parent sees it."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.name, self.process, self.log = name, process, log
        self.ready: dict[str, Any] = {}

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone: listen() says why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.listen()

    def listen(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise MainrunError(self.obituary())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (UsageError if answer["exit_code"] == UsageError.exit_code else MainrunError)(
                answer["error"]
            )
        return answer

    def obituary(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        last = next(
            (line.strip() for line in reversed(self.log.readlines()) if line.strip()), "it said nothing"
        )
        if code == -signal.SIGKILL:
            return f"the worker of {self.name!r} was killed, most likely for want of memory; free some, or lower batch_size"
        return f"the worker of {self.name!r} ended with code {code}: {last}"


@contextmanager
def start(name: str, rival: str, tuned: bool, cfg: TrainConfig, **more: Any) -> Iterator[Worker]:
    """A worker that does not outlive this block, however it is left."""
    request = json.dumps({"rival": rival, "config": cfg.model_dump(), **more})
    env = {k: v for k, v in os.environ.items() if k != "MAINRUN_ALLOCATOR"} | (
        {} if tuned else {"MAINRUN_ALLOCATOR": "default"}
    )
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # a session of its own: a Ctrl-C is ours alone, and what a compiler has started goes with its worker
        process = subprocess.Popen(
            [*WORKER, request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
            start_new_session=True,
        )
        try:
            yield Worker(name, process, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with suppress(OSError):  # it may still hold a word for the dead
                        pipe.close()


def measure(
    cfg: TrainConfig, *, rivals: bool, repeats: int, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The medians of `repeats` steps of each, one after the other in turn, and what our own step is made of."""
    chosen: dict[str, tuple[str, bool, dict[str, bool]]] = {
        name: (*how, {}) for name, how in RIVALS.items() if rivals
    }
    chosen |= {OURS: ("ours", True, {"evaluate": True, "profile": True}), FLOOR: ("floor", True, {})}
    with ExitStack() as stack:
        workers = []
        for name, (
            rival,
            tuned,
            more,
        ) in chosen.items():  # one warms up at a time: they would only slow each other
            note(f"{name}: warming up")
            worker = stack.enter_context(start(name, rival, tuned, cfg, **more))
            worker.ready = worker.listen()
            workers.append(worker)
        took: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for i in range(repeats):
            note(f"round {i + 1} of {repeats}")
            for worker in (
                workers[i % len(workers) :] + workers[: i % len(workers)]
            ):  # nobody always comes after the same one
                took[worker.name].append(worker.ask("step"))
        note("peaks, evaluation and profile")
        ends = {worker.name: worker.ask("end") for worker in workers}
        ready = {worker.name: worker.ready for worker in workers}
    return result(cfg, took, ready, ends)


def result(
    cfg: TrainConfig, took: dict[str, list[dict[str, Any]]], ready: dict[str, Any], ends: dict[str, Any]
) -> dict[str, Any]:
    tokens = cfg.batch_size * cfg.block_size
    floor = {
        part: statistics.median(answer[part] for answer in took[FLOOR])
        for part in ("seconds", "layers", "head")
    }
    rows = []
    for name, answers in took.items():
        seconds = [answer["seconds"] for answer in answers]
        middle = statistics.median(seconds)
        row = {
            "rival": name,
            "tokens_per_s": tokens / middle,
            "seconds": middle,
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "floor_share": floor["seconds"] / middle,
            "peak": None if name == FLOOR else ends[name]["peak"],
            "warmup_seconds": ready[name]["warmup_seconds"],
        }
        rows.append(
            row
            | {
                key: ready[name][key]
                for key in ("allocator", "attention", "dtype", "compile")
                if key in ready[name]
            }
        )
    ours = next(row for row in rows if row["rival"] == OURS)
    for row in rows:
        row["ours_is"] = row["seconds"] / ours["seconds"]  # how many times as fast
    found = {
        "preset": cfg.preset,
        "dtype": cfg.dtype,
        "optimizer": cfg.optimizer,
        "params": ready[OURS]["params"],
        "tokens_per_step": tokens,
        "repeats": len(took[OURS]),
        "rivals": rows,
        "floor": floor
        | {"flops": ready[FLOOR]["flops"], "flops_per_s": ready[FLOOR]["flops"] / floor["seconds"]},
        "step_flops_per_s": ready[OURS]["flops"] / ours["seconds"],
        "profile": ends[OURS]["profile"],
        "memory": {"peak": ours["peak"], "estimate": ready[OURS]["memory_estimate"]},
        "evaluation": ends[OURS]["evaluation"],
        "machine_class": ready[OURS]["machine_class"],
    }
    memory, evaluation = found["memory"], found["evaluation"]
    memory["ratio"] = memory["peak"] / memory["estimate"]
    # a forward is a third of a step's work; 1: an evaluation costs just that
    evaluation["of_forward_share"] = 3 * ours["tokens_per_s"] * cfg.passes / evaluation["tokens_per_s"]
    if "loss_float32" in evaluation:
        evaluation["bf16_error"] = abs(evaluation["loss"] - evaluation["loss_float32"])
        evaluation["bf16_close"] = evaluation["bf16_error"] <= CLOSE_BF16
    return found


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The rivals, best last: head and lines."""
    head = ["", "tokens/s", "s/step", "min-max", "mainrun is", "GEMM floor", "peak", "warm-up"]
    lines = []
    for row in found["rivals"]:
        lines.append(
            [
                row["rival"],
                f"{row['tokens_per_s']:,.0f}",
                seconds(row["seconds"]),
                f"{seconds(row['seconds_min'])}-{seconds(row['seconds_max'])}",
                f"x{row['ours_is']:.2f}",
                f"{row['floor_share']:.0%}",
                "" if row["peak"] is None else gigabytes(row["peak"]),
                f"{row['warmup_seconds']:.0f} s" + (", compiled" if row.get("compile") else ""),
            ]
        )
    return head, lines


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What stands below the table."""
    floor, memory, evaluation = found["floor"], found["memory"], found["evaluation"]
    yield (
        f"{found['preset']}: {found['params'] / 1e6:.1f}M parameters, {found['tokens_per_step']:,} tokens a step, {found['dtype']}, "
        f"{found['optimizer']}; medians of {found['repeats']}"
    )
    yield (
        f"floor: layers {floor['layers']:.3f} s, head {floor['head']:.3f} s, {floor['flops_per_s'] / 1e12:.2f} TFLOP/s; "
        f"the step: {found['step_flops_per_s'] / 1e12:.2f} TFLOP/s"
    )
    yield "time: " + ", ".join(f"{part} {share:.1%}" for part, share in found["profile"].items())
    yield f"memory: peak {gigabytes(memory['peak'])}, --dry-run says {gigabytes(memory['estimate'])}: x{memory['ratio']:.2f}"
    cost = f"x{evaluation['of_forward_share']:.2f} the time of a step's forward, taken as a third of it"
    yield f"evaluation: {evaluation['tokens_per_s']:,.0f} tokens/s, {cost}"
    if "bf16_error" in evaluation:
        verdict = "within" if evaluation["bf16_close"] else "NOT within"
        yield f"bfloat16: the loss is {evaluation['bf16_error']:.1e} from float32's on the same weights, {verdict} {CLOSE_BF16:g}"


def seconds(found: float) -> str:
    return f"{found:.3f}" if found >= 0.1 else f"{found:.5f}"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
