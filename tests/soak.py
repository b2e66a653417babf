"""Train small random runs and studies, kill and resume them, and compare them with undisturbed ones.

    ./task soak -- --kills 200
    ./task soak -- --seed 1 --only 12

A test case is called a subject. Each subject is one run, two runs that share a store, or a study with
two workers. First, the subject is trained without disturbances. Then the same command is started again
and again, and its sessions are disturbed by a signal, a killed worker, a full disk, a clock that jumps,
or files with wrong dates. The signals are SIGKILL, SIGTERM, SIGINT, and SIGSTOP followed by SIGCONT.
In the end, a disturbed run must have the same rows, scores and weights as the undisturbed run. A disturbed
study must have the same trials, promotions and claims as the undisturbed study.

The seed determines the subjects, their disturbances, and the file operations that are disturbed. The effect
of a signal that is sent after some seconds also depends on the load of the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutate import whole_number  # noqa: E402
from soak_sessions import (  # noqa: E402
    Disturbance,
    Ending,
    Running,
    Session,
    adopt_orphans,
    wait_for_orphans,
    warm_up,
)

HOUR, DAY = 3600.0, 86_400.0
CLOCKS = (-400 * DAY, -3 * DAY, -2 * HOUR, -90.0, 90.0, 2 * HOUR, 3 * DAY, 400 * DAY)
BUSY = "is being written by process"  # the error message if another process uses the run
MOST_REFUSALS = 200
EVERY_STUDY, EVERY_PAIR = 30, 4
DISK = 64 << 20  # each subject gets a disk of this many bytes
MS_REMOUNT, MNT_DETACH = 32, 2


# -- comparing

# These fields may differ, because they depend on the clock, the machine or the number of sessions.
ROW_FREE = frozenset({"seconds", "reused"})
SUMMARY_FREE = frozenset(
    {
        "seconds",
        "tokens_per_s",
        "spent",
        "ledger",
        "peak_memory",
        "resumed",
        "machine_class",
        "machine_classes",
        "versions",
        "all_versions",
    }
)
STUDY_FREE = frozenset(
    {
        "seconds",
        "asked",
        "trained",
        "reused",
        "wasted",
        "branch",
        "tokens",
        "flops",
        "ledger",
        "started",
        "ended",
    }
)


def compare_runs(expected: Path, actual: Path) -> list[str]:
    """Return the differences between a disturbed run and the undisturbed run."""
    differences = []
    for name in ("metrics.jsonl", "growth.jsonl"):
        differences += compare_rows(name, read_rows(expected / name), read_rows(actual / name))
    try:
        summaries = [json.loads((folder / "summary.json").read_bytes()) for folder in (expected, actual)]
        state = json.loads((actual / "status.json").read_bytes()).get("state")
    except (OSError, ValueError) as e:
        return [*differences, f"a file is missing or damaged: {e}"]
    for key in sorted(summaries[0].keys() | summaries[1].keys() - SUMMARY_FREE):
        values = [summary.get(key) for summary in summaries]
        if key not in SUMMARY_FREE and values[0] != values[1]:
            differences.append(
                f"summary.json: {key} is {shorten(values[1])}, undisturbed {shorten(values[0])}"
            )
    if state != "done":
        differences.append(f"status.json: state is {state!r}, undisturbed 'done'")
    left = sorted(str(path.relative_to(actual)) for path in actual.rglob("*.tmp*"))
    if left:
        differences.append(f"left behind: {', '.join(left)}")
    return differences


def read_rows(path: Path) -> list[Any]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def compare_rows(
    name: str, expected: Sequence[dict[str, Any]], actual: Sequence[dict[str, Any]]
) -> list[str]:
    """Describe up to three differences between the rows, including a different number of rows."""
    differences = []
    if len(expected) != len(actual):
        differences.append(f"{name}: {len(actual)} rows, undisturbed {len(expected)}")
    for number, (a, b) in enumerate(zip(expected, actual, strict=False), 1):
        a, b = ({key: value for key, value in row.items() if key not in ROW_FREE} for row in (a, b))
        if a != b:
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            what = ", ".join(
                f"{key} is {shorten(b.get(key))}, undisturbed {shorten(a.get(key))}" for key in keys[:3]
            )
            differences.append(f"{name}, row {number}: {what}")
            if len(differences) == 3:
                break
    return differences


def compare_studies(expected: Path, actual: Path) -> list[str]:
    """Return the differences between the exports of a disturbed study and the undisturbed study."""
    try:
        a, b = (
            without_costs(json.loads((folder / "export.json").read_bytes())) for folder in (expected, actual)
        )
    except (OSError, ValueError) as e:
        return [f"a file is missing or damaged: {e}"]
    return list(compare_values("export.json", a, b))[:5]


def without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_costs(part) for key, part in value.items() if key not in STUDY_FREE}
    return [without_costs(part) for part in value] if isinstance(value, list) else value


def compare_values(place: str, expected: Any, actual: Any) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in {**expected, **actual}:
            yield from compare_values(f"{place}.{key}", expected.get(key), actual.get(key))
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
            yield from compare_values(f"{place}[{i}]", a, b)
    elif expected != actual and not (expected != expected and actual != actual):  # two NaNs count as equal
        yield f"{place} is {shorten(actual)}, undisturbed {shorten(expected)}"


def shorten(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 100 else f"{text[:97]}..."


# -- drawing runs

BASE: dict[str, Any] = {
    "num_titles": 90,
    "vocab_size": 320,
    "block_size": 12,
    "batch_size": 4,
    "epochs": 1,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
    "threads": 1,
    "device": "cpu",
    "compile": "off",
    "lr": 0.01,
    "eval_per_epoch": 3,
    "checkpoint_every": 5,
}
FEATURES = (
    "growth",
    "ema",
    "experts",
    "rdrop",
    "accumulation",
    "swa",
    "low rank",
    "growth",
    "dropout",
    "mix",
    "modern",
    "wsd",
    "growth",
    "shuffled",
    "unigram",
    "bfloat16",
    "decay",
)
OPS: tuple[dict[str, Any], ...] = (
    {"name": "stack_layers", "value": [0, 1, 1]},
    {"name": "stack_layers", "value": [0, 0, 1], "init": "identity"},
    {"name": "widen_mlp", "value": 96},
    {"name": "widen_model", "value": {"factor": 2}},
    {"name": "add_heads", "value": 4},
    {"name": "upcycle_moe", "value": {"experts": 3, "top_k": 2}},
    {"name": "set_attn_lora_rank", "value": 2},
    {"name": "set_mlp_lora_rank", "value": 2},
    {"name": "set_embedding_lora_rank", "value": 2},
    {"name": "merge_lora_weights"},
    {"name": "freeze_layer", "value": [0]},
    {"name": "unfreeze_layer", "value": [0]},
    {"name": "resize_vocabulary", "value": 330},
    {"name": "set_lr", "value": 0.004},
    {"name": "set_batch_size", "value": 6},
    {"name": "set_grad_accum", "value": 2},
    {"name": "set_warmup_iters", "value": 3},
    {"name": "set_eval_interval", "value": 4},
    {"name": "set_weight_decay", "value": 0.05},
    {"name": "set_dropout", "value": 0.2},
    {"name": "reset_lr_schedule"},
)


def optimizers() -> tuple[str, ...]:
    from mainrun.config import TrainConfig

    return get_args(TrainConfig.model_fields["optimizer"].annotation)


def draw_run(chance: random.Random, index: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Draw a valid config. Return the config and the names of its features.

    The index determines the optimizer and one of the features.
    """
    from mainrun.errors import ConfigError
    from mainrun.plan.recipes import load

    optimizer = optimizers()[index % len(optimizers())]
    while True:
        wanted = [FEATURES[index % len(FEATURES)]]
        wanted += [name for name in dict.fromkeys(FEATURES) if name not in wanted and chance.random() < 0.15]
        fields = BASE | {
            "optimizer": optimizer,
            "seed": chance.randrange(1000),
            "weight_decay": chance.choice([0.0, 0.1]),
        }
        fields |= {
            "momentum": chance.choice([0.0, 0.9]),
            "checkpoint_every": chance.choice([2, 5, 9]),
            "log_every": chance.choice([1, 1, 3]),
        }
        fields |= {
            "schedule": chance.choice(["constant", "cosine", "wsd"]),
            "warmup_iters": chance.choice([0, 4]),
        }
        fields |= {
            "dev_frac": chance.choice([0.0, 0.15]),
            "epochs": chance.choice([1, 1, 2]),
            "eval_per_epoch": chance.choice([2, 4]),
        }
        for name in wanted:
            fields |= draw_feature(chance, name, folder)
        try:
            load("baseline", [f"{key}={to_toml(value)}" for key, value in fields.items()])
        except ConfigError:  # two of the features exclude each other
            continue
        special = [optimizer, *dict.fromkeys(wanted)]
        if "growth" in wanted:
            special.append("+".join(op["name"] for op in fields["growth"]["ops"]))
        return fields, special


def draw_feature(chance: random.Random, name: str, folder: Path) -> dict[str, Any]:
    if name == "growth":
        return {"growth": draw_growth(chance)}
    if name == "mix":
        return {"corpus": f"mix:{write_mix(chance, folder)}"}
    choices: dict[str, list[dict[str, Any]]] = {
        "ema": [{"ema": 0.9}],
        "swa": [{"swa": 0.4}],
        "experts": [{"experts": 3, "top_k": 2}, {"experts": 2, "top_k": 1, "router_weights": "softmax"}],
        "rdrop": [{"rdrop": 0.5, "dropout": 0.1}, {"rdrop": 1.0, "dropout": 0.2, "label_smoothing": 0.1}],
        "accumulation": [{"grad_accum": 2}, {"grad_accum": 4}],
        "low rank": [
            {"attn_lora_rank": 2, "embed_lora_rank": 2, "lora_alpha": 2.0},
            {"attn_lora_rank": 2, "frozen": [0]},
            {"mlp_lora_rank": 2, "lr_lora": 0.01},
        ],
        "dropout": [
            {"dropout": 0.1},
            {"attn_dropout": 0.1},
            {"resid_dropout": 0.2},
            {"dropout": 0.2, "attn_dropout": 0.0},
            {"stochastic_depth": 0.3},
        ],
        "modern": [
            {
                "norm": "rmsnorm",
                "position": "rope",
                "mlp": "swiglu",
                "bias": False,
                "qk_norm": True,
                "attn_gate": True,
                "layer_scale": 0.3,
                "value_residual": True,
                "tie_head": False,
                "softcap": 8.0,
                "n_kv_head": 1,
                "title_mask": True,
                "init": "kaiming",
            }
        ],
        "wsd": [
            {
                "schedule": "wsd",
                "decay_frac": 0.4,
                "decay_shape": "sqrt",
                "min_lr_frac": 0.1,
                "wd_schedule": "cosine",
            }
        ],
        "shuffled": [{"order": "shuffle_titles", "epochs": 2}],
        "unigram": [{"tokenizer": "unigram", "tokenizer_fit": "train+val", "vocab_size": 380}],
        "bfloat16": [{"dtype": "bfloat16"}],
        "decay": [{"weight_decay_aux": 0.02}, {"weight_decay": 0.1, "cautious_decay": True}],
    }
    return chance.choice(choices[name])


def draw_growth(chance: random.Random) -> dict[str, Any]:
    ops = []
    for i, op in enumerate(chance.sample(OPS, chance.choice([1, 2, 3]))):
        triggers: list[dict[str, Any]] = [
            {"step": 5 + 6 * i},
            {"budget_frac": 0.2 + 0.2 * i},
            {"wait_iters": 6},
            {"any": [{"loss_below": 5.5}, {"wait_iters": 9}]},
        ]
        ops.append(op | {"trigger": chance.choice(triggers)})
    return {"version": 2, "ops": ops}


def write_mix(chance: random.Random, folder: Path) -> Path:
    words = [
        "ker",
        "ban",
        "shol",
        "pyth",
        "rust",
        "nel",
        "ing",
        "orb",
        "data",
        "web",
        "cache",
        "show",
        "ask",
        "tell",
        "new",
        "old",
    ]
    titles = [" ".join(chance.choices(words, k=chance.randint(2, 7))) + f" {i}" for i in range(120)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.txt").write_text("\n".join(titles))
    mix = folder / "mix.toml"
    mix.write_text(
        '[[source]]\npath = "mine.txt"\nratio = 1\nweight = 2\n[[source]]\ncorpus = "synthetic"\nratio = 2\n'
    )
    return mix


def to_toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train_command(fields: dict[str, Any], out: Path, store: Path | None, size: str = "") -> tuple[str, ...]:
    sets = [part for key, value in fields.items() for part in ("--set", f"{key}={to_toml(value)}")]
    where = (
        ["--no-store"]
        if store is None
        else ["--store", str(store), *(["--store-size", size] if size else [])]
    )
    return ("train", "--preset", "baseline", *sets, "--out", str(out), *where)


def write_study(chance: random.Random, path: Path) -> Path:
    fields = BASE | {
        "optimizer": chance.choice(optimizers()),
        "dev_frac": 0.2,
        "schedule": "wsd",
        "dropout": 0.1,
        "checkpoint_every": 4,
    }
    lines = [
        'name = "soak"',
        'preset = "baseline"',
        "[set]",
        *(f"{k} = {json.dumps(v)}" for k, v in fields.items() if k != "threads"),
    ]
    lines += [
        "[space.lr]",
        "low = 1e-3",
        "high = 0.1",
        "log = true",
        "[space.decay_frac]",
        "values = [0.3, 0.6]",
    ]
    lines += [
        "[budget]",
        "trials = 5",
        "[sampler]",
        f'name = "{chance.choice(["random", "tpe"])}"',
        "startup = 2",
        "generation = 2",
    ]
    lines += ["[rungs]", "at = [0.4]", "keep = 0.5", f'score = "{chance.choice(["raw", "branch"])}"']
    lines += ["[evidence]", "noise_seeds = 2", "seeds = 2", "best = 1"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


# -- drawing disturbances


def draw_disturbances(chance: random.Random, expected: Ending, study: bool) -> tuple[Disturbance, ...]:
    """Draw one signal. If it stops the session or kills a worker, draw a second signal.

    About half of the first signals are timed. The others are sent just before a file operation.
    """
    kinds = ["KILL"] * 5 + ["TERM"] * 2 + ["INT"] + ["STOP"] * 2 + ["WORKER"] * 4 * study
    kind = chance.choice(kinds)
    pause = chance.choice([0.05, 0.2, 0.6]) if kind == "STOP" else 0.0
    # Prefer early moments, because a resumed session is short and may end before a later moment.
    share = chance.random() ** (4.0 if study else 3.0)
    if kind != "WORKER" and chance.random() < 0.5:
        first = Disturbance(kind, operation=1 + int(share * expected.operations), pause=pause)
    else:
        first = Disturbance(kind, after=share * expected.seconds, pause=pause)
    if kind not in ("STOP", "WORKER"):
        return (first,)
    return (
        first,
        Disturbance(chance.choice(["KILL", "TERM"]), after=chance.random() * expected.seconds * 0.6),
    )


def draw_clock(chance: random.Random) -> tuple[float, float, int]:
    if chance.random() < 0.6:
        return 0.0, 0.0, 0
    return chance.choice((0.0, *CLOCKS)), chance.choice(CLOCKS), chance.randrange(12)


def date_wrongly(chance: random.Random, folders: Sequence[Path]) -> None:
    """Move the modification times of some files into the past or the future."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if chance.random() < 0.3:
                when = time.time() + chance.choice(CLOCKS)
                with suppress(OSError):
                    os.utime(path, (when, when))


def date_now(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path)


@contextmanager
def own_disk(place: Path) -> Iterator[bool]:
    """Mount a small tmpfs at a folder, and yield whether mounting succeeded.

    `set_disk` changes the size of this disk.
    """
    place.mkdir(parents=True, exist_ok=True)
    mounted = ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={DISK}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            ctypes.CDLL(None).umount2(os.fsencode(place), MNT_DETACH)


def set_disk(place: Path, size: int) -> None:
    ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(place), b"tmpfs", MS_REMOUNT, f"size={size}".encode())


def used_space(place: Path) -> int:
    stat = os.statvfs(place)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


# -- a subject


@dataclass
class Result:
    index: int
    about: str = ""
    disturbances: Counter[str] = field(default_factory=Counter)
    areas: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    runs: int = 0
    comparisons: int = 0
    clocks: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    folder: str = ""
    seconds: float = 0.0

    def count(self, ending: Ending) -> None:
        self.sessions += 1
        self.clocks += any(ending.session.clock)
        self.codes[str(ending.code)] += 1
        for kind, area in ending.applied:
            self.disturbances[kind] += 1
            self.areas[area] += 1
        if ending.session.disk_is_full and ending.code == 75:
            self.disturbances["full disk"] += 1
            self.areas["full disk"] += 1
        problem = ending.problem()
        if problem:
            last = " | ".join(ending.text.strip().splitlines()[-3:])[-500:]
            self.failures.append(f"{problem}, session {ending.session.log.name} ({ending.session}): {last}")

    @property
    def total(self) -> int:
        return sum(self.disturbances.values())


@dataclass
class Member:
    """One command of a subject, with its undisturbed ending and the number of remaining disturbances."""

    argv: tuple[str, ...]
    reference: Path
    place: Path
    expected: Ending
    chance: random.Random
    left: int
    started: int = 0
    done: bool = False
    running: Running | None = None


class Subject:
    """One test case: a run, two runs that share a store, or a study."""

    def __init__(self, seed: int, index: int, folder: Path, limit: float = 240.0) -> None:
        self.seed, self.index, self.folder, self.limit = seed, index, folder, limit
        self.chance = random.Random(f"{seed}/{index}")
        self.kind = "study" if index % EVERY_STUDY == 9 else "pair" if index % EVERY_PAIR == 2 else "run"
        self.result = Result(index, folder=str(folder))
        self.disk = folder / "disk"
        self.cache = folder / "cache"
        self.shared_cache = folder / "reference-cache"
        self._had_second_process = False
        self._refused = 0

    def run(self) -> Result:
        begin = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with own_disk(self.disk) as self.has_disk:
            try:
                self._run()
            except Exception:
                self.result.failures.append("the soak itself failed: " + traceback.format_exc())
            finally:
                if not wait_for_orphans(60):
                    self.result.failures.append("a process outlived its session by 60 s")
                if self.result.failures and self.has_disk:
                    shutil.copytree(self.disk, self.folder / "disk-as-it-was", dirs_exist_ok=True)
        if not self.result.failures:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.result.seconds = time.monotonic() - begin
        return self.result

    def _run(self) -> None:
        members = self._study() if self.kind == "study" else self._runs()
        if members is None:
            return
        self._disturb(members)
        if self.result.failures:
            return
        for member in members:
            self.result.runs += 1
            self.result.comparisons += 1
            compare = compare_studies if self.kind == "study" else compare_runs
            self.result.failures += [
                f"{member.place.name}: {text}" for text in compare(member.reference, member.place)
            ]
        store = self.disk / "store"
        if store.is_dir() and self.kind != "study":
            # Reset the dates, because `store verify` would report the future dates that this test has set.
            date_now(store)
            self._undisturbed(("store", "verify", "--store", str(store)), "verify")

    # -- undisturbed

    def _undisturbed(self, argv: Sequence[str], name: str) -> Ending:
        session = Session(
            tuple(argv), self.folder, self.shared_cache, self.folder / f"{name}.log", limit=self.limit
        )
        ending = Running(session).wait()
        self.result.count(ending)
        return ending

    def _reference(self, argv: Sequence[str], name: str) -> Ending | None:
        """Train a subject without disturbances.

        Return None if training fails even without disturbances.
        """
        ending = self._undisturbed(argv, name)
        if ending.code in (2, 3):
            self.result.failures.clear()
            self.result.skipped = ending.text.strip().splitlines()[-1][:200]
            return None
        return None if self.result.failures else ending

    def _runs(self) -> list[Member] | None:
        chance = self.chance
        fields, special = draw_run(chance, self.index, self.folder / "titles")
        store = self.disk / "store" if self.kind == "pair" or chance.random() < 0.5 else None
        size = chance.choice(["", "", "200KB"]) if store else ""
        configs = [fields]
        if self.kind == "pair":
            configs.append(
                fields
                | chance.choice(
                    [
                        {"lr": 0.02, "warmup_iters": 0},
                        {"decay_frac": 0.6},
                        {"swa": 0.5, "ema": 0.0},
                        {"log_every": 2},
                    ]
                )
            )
        kinds = [
            self.kind,
            *special,
            *(["store"] if store else []),
            *([f"store of {size}"] if size else []),
            *(["own disk"] if self.has_disk else []),
        ]
        self.result.about = " ".join(kinds)
        members = []
        for number, config in enumerate(configs):
            reference, out = self.folder / f"reference-{number}", self.disk / f"out-{number}"
            ending = self._reference(train_command(config, reference, None), f"reference-{number}")
            if ending is None:
                return None
            (run,) = reference.glob("*/summary.json")
            place = out / run.parent.name
            left = chance.randint(6, 20) // len(configs)
            members.append(
                Member(
                    train_command(config, out, store, size),
                    run.parent,
                    place,
                    ending,
                    random.Random(f"{self.seed}/{self.index}/{number}"),
                    left,
                )
            )
        return members

    def _study(self) -> list[Member] | None:
        study = write_study(self.chance, self.folder / "soak.toml")
        reference, out = self.folder / "studies-reference", self.disk / "studies"
        self.result.about = "study"
        command = ("sweep", "run", str(study), "--workers", "2", "--out")
        ending = self._reference((*command, str(reference)), "reference")
        if ending is None:
            return None
        chance = random.Random(f"{self.seed}/{self.index}/study")
        return [
            Member(
                (*command, str(out)),
                reference / "soak",
                out / "soak",
                ending,
                chance,
                self.chance.randint(8, 16),
            )
        ]

    # -- disturbed

    def _disturb(self, members: list[Member]) -> None:
        try:
            while not all(member.done for member in members) and not self.result.failures:
                for member in members:
                    self._advance(member)
                time.sleep(0.003)
        finally:
            for member in members:
                if member.running:
                    member.running.destroy()

    def _advance(self, member: Member) -> None:
        if member.done:
            return
        if member.running is None:
            session = self._next_session(member)
            stopped = (lambda: self._start_second_process(member)) if member.chance.random() < 0.3 else None
            member.running = Running(session, stopped)
            return
        ending = member.running.poll()
        if ending is None:
            return
        member.running = None
        if ending.session.disk_is_full and self.has_disk:
            set_disk(self.disk, DISK)
        if ending.code == 2 and BUSY in ending.text and (self.kind == "study" or self._had_second_process):
            self._refused += 1  # another process is still writing to the run
            if self._refused > MOST_REFUSALS:
                self.result.failures.append(
                    f"a lock that no process holds any more: {ending.text.strip()[-300:]}"
                )
            time.sleep(0.1)
            return
        self.result.count(ending)
        member.left -= max(1, len(ending.applied))
        member.done = ending.code == 0

    def _next_session(self, member: Member) -> Session:
        chance = member.chance
        member.started += 1
        name = f"session-{member.place.parent.name}-{member.started:03d}"
        session = Session(member.argv, self.folder, self.cache, self.folder / f"{name}.log", limit=self.limit)
        if member.left <= 0:
            return session
        if chance.random() < 0.15:
            date_wrongly(chance, [self.disk, self.cache])
        if chance.random() < 0.1:
            shutil.rmtree(self.cache, ignore_errors=True)
        session = replace(session, clock=draw_clock(chance))
        if chance.random() < 0.15:
            return self._on_a_full_disk(session, chance)
        return replace(session, disturbances=draw_disturbances(chance, member.expected, self.kind == "study"))

    def _on_a_full_disk(self, session: Session, chance: random.Random) -> Session:
        if self.has_disk and self.kind != "pair":  # a full disk would also affect the other run of a pair
            set_disk(self.disk, used_space(self.disk) + int(600_000 * chance.random() ** 2))
            return replace(session, disk_is_full=True)
        return replace(session, disk_is_full=True, file_limit=chance.randint(3_000, 200_000))

    def _start_second_process(self, member: Member) -> None:
        """Run the command a second time while the first process is stopped.

        One of the two processes must be refused.
        """
        if self.kind != "run":
            return
        self._had_second_process = True
        session = Session(
            member.argv,
            self.folder,
            self.cache,
            self.folder / f"second-{member.started:03d}.log",
            limit=self.limit,
        )
        ending = Running(session).wait()
        if not (ending.code == 2 and BUSY in ending.text):
            self.result.count(ending)


# -- many subjects


def serve(seed: int, folder: Path, requests: int, answers: int) -> None:
    """Run the subjects whose numbers arrive on `requests`, and write their results to `answers`.

    This function runs in a child process.
    """
    adopt_orphans()
    with os.fdopen(requests, "r") as numbers, os.fdopen(answers, "w") as results:
        for line in numbers:
            result = Subject(seed, int(line), folder / f"subject-{int(line)}").run()
            results.write(json.dumps(vars(result)) + "\n")
            results.flush()


def soak(seed: int, kills: int, jobs: int, minutes: float, folder: Path, only: int | None) -> list[Result]:
    """Run subjects until `kills` disturbances have happened."""
    end = time.monotonic() + 60 * minutes
    servers: dict[int, tuple[int, int]] = {}
    for _ in range(1 if only is not None else jobs):
        (theirs, send), (receive, ours) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # On SIGTERM, exit normally, which kills the running sessions and unmounts their disks.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            for fd in [send, receive, *(fd for pair in servers.values() for fd in pair)]:
                os.close(fd)
            with suppress(BaseException):
                serve(seed, folder, theirs, ours)
            os._exit(0)
        os.close(theirs)
        os.close(ours)
        servers[pid] = (send, receive)
    results: list[Result] = []
    numbers = iter([only]) if only is not None else iter(range(1_000_000))
    files = {receive: os.fdopen(receive, "r") for _, receive in servers.values()}
    idle = list(servers.values())
    busy: dict[int, tuple[int, int]] = {}
    done = 0
    try:
        while True:
            try:
                while idle and done < kills and time.monotonic() < end:
                    number = next(numbers, None)
                    if number is None:
                        break
                    pair = idle.pop()
                    busy[pair[1]] = pair
                    os.write(pair[0], f"{number}\n".encode())
                if not busy:
                    break
                ready, _, _ = select.select(list(busy), [], [], 60)
            except KeyboardInterrupt:
                print("stopping; the current subjects are finished first", flush=True)
                end = 0.0
                continue
            for receive in ready:
                line = files[receive].readline()
                if not line:
                    raise RuntimeError("a process of the soak exited unexpectedly")
                result = Result(**json.loads(line))
                for name in ("disturbances", "areas", "codes"):
                    setattr(result, name, Counter(getattr(result, name)))
                results.append(result)
                idle.append(busy.pop(receive))
                done += result.total
                counter = "" if only is not None else f"[{done}/{kills}] "
                print(counter + progress(result), flush=True)
    except BaseException:
        for pid in servers:
            os.kill(pid, signal.SIGTERM)
        raise
    finally:
        for pid, (send, _) in servers.items():
            os.close(send)
            os.waitpid(pid, 0)
    return results


def progress(result: Result) -> str:
    verdict = f"FAILED: {result.failures[0]}" if result.failures else "the same"
    if result.skipped:
        verdict = f"skipped: {result.skipped}"
    disturbances = show(result.disturbances)
    subject = f"#{result.index} {result.about}: {disturbances} in {result.sessions} sessions"
    return f"{subject}, {verdict} ({result.seconds:.1f} s)"


def summary(results: Sequence[Result], seed: int, seconds: float) -> str:
    counters = {
        name: sum((getattr(r, name) for r in results), Counter())
        for name in ("disturbances", "areas", "codes")
    }
    failed = [r for r in results if r.failures]
    skipped = [r for r in results if r.skipped]
    kinds = Counter(r.about.split()[0] for r in results if r.about and not r.skipped)
    lines = [
        "",
        f"disturbances: {sum(counters['disturbances'].values()):,} ({show(counters['disturbances'])})",
        f"during: {show(counters['areas'])}",
        f"sessions: {sum(r.sessions for r in results):,}, "
        f"of which {sum(r.clocks for r in results):,} had a wrong or jumping clock",
        f"exit codes: {show_codes(counters['codes'])}",
        f"subjects: {show(kinds)}; {len(skipped)} skipped",
        f"comparisons: {sum(r.comparisons for r in results):,}",
        f"failures: {len(failed)}",
        f"minutes: {seconds / 60:.1f}",
    ]
    for result in failed:
        lines += ["", f"#{result.index} {result.about}", *(f"  {text}" for text in result.failures)]
        lines += [
            f"  repeat it: ./task soak -- --seed {seed} --only {result.index}",
            f"  its files: {result.folder}",
        ]
    return "\n".join(lines)


def show(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common()) or "none"


def show_codes(counter: Counter[str]) -> str:
    """List exit codes with their counts, as in `0 (10 times), 75 (7)`."""
    parts = [f"{code} ({count:,})" for code, count in counter.most_common()]
    if not parts:
        return "none"
    return ", ".join([parts[0].replace(")", " times)"), *parts[1:]])


# -- the command line


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number above 0")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./task soak",
        usage="./task soak -- [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0: all results are equal. 1: a result differs, a session crashes, or nothing was "
        "compared. 2: invalid arguments. 130, 143: stopped.",
    )
    parser.add_argument(
        "--kills",
        type=whole_number(1),
        default=100,
        metavar="N",
        help="stop after N disturbances, including stops, killed workers and full disks (default: 100)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="the seed of the subjects and their disturbances (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=whole_number(1), default=1, help="how many subjects run at the same time (default: 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder for the runs, which keeps failed subjects (default: a temporary folder)",
    )
    parser.add_argument(
        "--minutes",
        type=positive_number,
        default=600,
        help="start no more subjects after this many minutes (default: 600)",
    )
    parser.add_argument(
        "--only", type=whole_number(0), metavar="INDEX", help="run only the subject with this index"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        folder = (args.out or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"soak: --out {args.out}: cannot be used as a folder ({error.strerror}); give another path",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = False
    try:
        results = run(args, folder)
        failed = any(result.failures for result in results)
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 130
    finally:
        if args.out is None and not failed:
            shutil.rmtree(folder, ignore_errors=True)
    if failed:
        return 1
    if not any(result.comparisons for result in results):
        print("soak: nothing was compared", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace, folder: Path) -> list[Result]:
    start = time.monotonic()
    warm_up()
    amount = (
        f"{args.kills:,} disturbances, {args.jobs} at once"
        if args.only is None
        else f"only subject {args.only}"
    )
    print(f"soak: seed {args.seed}, {amount}, in {folder}", flush=True)
    results = soak(args.seed, args.kills, args.jobs, args.minutes, folder, args.only)
    print(summary(results, args.seed, time.monotonic() - start), flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
