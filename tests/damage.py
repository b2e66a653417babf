"""Damage mainrun's files at random, and run commands that read them.

test_damaged.py runs a random sample of the cases. Run more cases with:

    python tests/damage.py --cases 20000 --seed 1        # print every case that fails
    python tests/damage.py --case 1:57                   # run one case and print all of its output

The seed and the index of a case determine the damaged file, the damage and the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from doors import Driver, Outcome, case_number
from mutate import whole_number

ROOT = Path(__file__).parents[1]

SIZES = {
    "num_titles": 300,
    "vocab_size": 320,
    "block_size": 16,
    "batch_size": 8,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
    "threads": 1,
    "device": "cpu",
    "epochs": 1,
    "eval_per_epoch": 2,
    "optimizer": "adamw",
    "lr": 0.005,
    "official_geometry": "4x16",
}
PLAIN = SIZES | {"epochs": 2, "checkpoint_every": 20}
HALF = SIZES | {"seed": 7, "checkpoint_every": 10}
GROWN = SIZES | {
    "seed": 5,
    "growth": {
        "version": 2,
        "ops": [
            {"name": "set_dropout", "value": 0.1, "trigger": {"step": 6}},
            {"name": "stack_layers", "value": [0, 0, 1, 1], "init": "identity", "trigger": {"step": 12}},
        ],
    },
}
STUDY = {
    "name": "tiny",
    "preset": "baseline",
    "set": SIZES | {"dev_frac": 0.2, "max_steps": 12},
    "space": {"lr": {"low": 0.001, "high": 0.01}},
    "budget": {"trials": 2},
    "sampler": {"name": "random", "generation": 2},
    "evidence": {"noise_seeds": 2, "seeds": 2, "best": 1},
    "workers": 1,
    "rungs": {"at": [0.5], "keep": 1.0},
}
STUB = """
import json, sys
from pathlib import Path
run, into = Path(sys.argv[2]), Path(sys.argv[3])
summary = json.loads((run / "summary.json").read_text())
fields = {name: summary[name] for name in ("versions", "machine_class", "fingerprints", "tokenizer")}
json.dump(fields | {"steps": 0, "rows": []}, into.open("w"))
"""


def sets(fields: dict[str, Any]) -> list[str]:
    """Return the fields as `--set` arguments."""
    return [
        word
        for key, value in fields.items()
        for word in ("--set", f"{key}={json.dumps(value) if key == 'growth' else value}")
    ]


# -- the fixture directory


def make(folder: Path) -> None:
    """Make three runs (finished, interrupted and growing), a store, a study, an export and a bundle."""
    os.environ["MAINRUN_CACHE"] = str(folder / "cache")
    runs = folder / "runs"
    names = {"whole": _train(runs, PLAIN), "half": _train(runs, HALF, until=14), "grown": _train(runs, GROWN)}
    with tempfile.TemporaryDirectory() as uninterrupted:
        name = _train(Path(uninterrupted), HALF)
        names["weights"] = json.loads(
            (Path(uninterrupted) / name / "summary.json").read_text(encoding="utf-8")
        )["weights"]
    _search(folder)
    names["confirmation"] = _confirmation(folder)
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")
    _bundle(folder, runs / names["whole"])


def _confirmation(folder: Path) -> str:
    """Return a run of the study that trains a config again with another seed."""
    from mainrun.config import TASK

    for config in sorted(folder.glob("studies/tiny/runs/*/config.json")):
        if json.loads(config.read_text(encoding="utf-8"))["config"]["seed"] != TASK["seed"]:
            return config.parent.name
    raise LookupError("the study has no confirmation run")


def _train(out: Path, fields: dict[str, Any], until: int = 0) -> str:
    from mainrun.errors import Interrupted
    from mainrun.plan.recipes import load
    from mainrun.run.session import train
    from mainrun.store.nodes import Store

    (cfg,) = load("baseline", sets(fields)[1::2])
    with suppress(Interrupted):
        train(cfg, out, store=Store(out / ".store"), until=until)
    return cfg.run_id


class SameProcess:
    """An engine that trains in the current process."""

    workers = 1

    def train(self, task: Any) -> Any:
        from mainrun.errors import Interrupted
        from mainrun.plan.recipes import load
        from mainrun.run.session import train
        from mainrun.store.nodes import Store
        from sweeps.engine.protocol import Outcome as End

        with suppress(Interrupted):
            train(load(task.preset, list(task.sets))[0], task.out, store=Store(task.store), until=task.until)
        return End(True)

    def close(self) -> None:
        pass


def _search(folder: Path) -> None:
    from mainrun.data.corpus import load_corpus
    from mainrun.data.token_cache import prepare
    from sweeps.confirm import confirm
    from sweeps.driver import Search
    from sweeps.export import write_export
    from sweeps.folder import locked_folder, write_study_json
    from sweeps.study import validate_study

    study, place = validate_study(STUDY, "tiny"), folder / "studies" / "tiny"
    base = study.base()
    corpus = load_corpus(base)
    with locked_folder(place, study):
        known = {
            "train_tokens": len(prepare(base, corpus).splits["train"]),
            "fingerprints": corpus.fingerprints,
        }
        (place / "tokens.json").write_text(json.dumps(known), encoding="utf-8")
        search = Search(study, place, SameProcess(), lambda text: None, lambda: None)
        write_study_json(place, study, "mainrun sweep tiny.toml")
        search.run()
        write_export(search, confirm(search))
    lines = [f"{key} = {json.dumps(STUDY[key])}" for key in ("name", "preset", "workers")]
    lines += [
        f"{part}.{key} = {_toml(value)}"
        for part in STUDY
        if isinstance(STUDY[part], dict)
        for key, value in STUDY[part].items()
    ]
    (folder / "tiny.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def _bundle(folder: Path, run: Path) -> None:
    from submitting import make_report

    from reports.submission import bundle

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    report = make_report(summary)
    (folder / "report.pdf").write_bytes(report)
    names = ["config.json", "env.json", "status.json", "metrics.jsonl", "summary.json", "tokenizer.json"]
    newest = max((run / "checkpoints").iterdir())
    names += [str(path.relative_to(run)) for path in newest.iterdir()]
    files = {f"run/{name}": (run / name).read_bytes() for name in names}
    files |= {"report.pdf": report, "code/mainrun/replay.py": STUB.encode(), "code/mainrun/__init__.py": b""}
    (folder / "submission.zip").write_bytes(bundle.pack(add_manifest(files, summary)))


def add_manifest(files: dict[str, bytes], summary: dict[str, Any]) -> dict[str, bytes]:
    """Return the files with a new manifest that lists their checksums."""
    members = {name: data for name, data in files.items() if name != "MANIFEST.json"}
    figures = {name: summary[name] for name in ("last", "best", "steps", "params", "weights")}
    plain = ("run", "preset", "fingerprints", "tokenizer", "geometry", "machine_class", "versions", "guards")
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in members.items()
    }
    manifest = {"format": 1, "commit": "0" * 40, "tree": "0" * 40, "figures": figures, "files": listed}
    manifest |= {name: summary[name] for name in plain}
    return members | {"MANIFEST.json": json.dumps(manifest).encode()}


# -- damage

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    5,
    2**31,
    10**18,
    -(10**18),
    0.5,
    1e308,
    -1e308,
    1e-320,
    "",
    "x",
    "5",
    "nan",
    "a" * 300,
    "\x1b[31m\x00\r\n",
    "\ud800",
    "../../../etc/passwd",
    [],
    [1],
    [[]],
    [None],
    {},
    {"a": 1},
    list(range(1000)),
)
RAW_VALUES = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e400": "1e400",
    "4,000 digits": "9" * 4000,
    "5,000 digits": "9" * 5000,
    "nested 500 deep": "[" * 500 + "]" * 500,
    "nested 10,000 deep": "[" * 10_000 + "]" * 10_000,
    "100,000 items": f"[{'0,' * 99_999}0]",
}
FIXED = ", checksums fixed"  # marks a case whose checksums were updated
PLACEHOLDER = "PLACEHOLDER-OF-A-RAW-VALUE"
RAW_LINES = (
    "[1]",
    "5",
    "null",
    "true",
    '"x"',
    "[]",
    "{}",
    "",
    "{",
    "NaN",
    "\0\0\0\0",
    '{"event": "step"}',
    '{"event": 5, "step": 1}',
)


def slots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a nested value, including lists and dicts."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from slots(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a nested value with a new value at the given path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def cut(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy of a nested value without the entry at the path."""
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    shorter = parent.copy()
    del shorter[path[-1]]
    return put(value, path[:-1], shorter)


def damage_value(chance: random.Random, value: Any) -> tuple[str, str]:
    """Return a damaged JSON text and a description of the damage."""
    paths = list(slots(value))
    # Draw the depth before the path. Most values are deeply nested, so the others would rarely be drawn.
    depth = chance.randint(0, max(map(len, paths)))
    path = chance.choice([path for path in paths if len(path) <= depth])
    where = ".".join(map(str, path)) or "the top"
    if path and chance.random() < 0.25:
        return json.dumps(cut(value, path)), f"without {where}"
    if path and isinstance(path[-1], str) and chance.random() < 0.1:
        text = json.dumps(put(value, path, PLACEHOLDER))
        old = json.dumps(PLACEHOLDER)
        return text.replace(old, f"5, {json.dumps(path[-1])}: 6", 1), f"{where} twice"
    if chance.random() < 0.35:
        name = chance.choice(sorted(RAW_VALUES))
        return json.dumps(put(value, path, PLACEHOLDER)).replace(
            json.dumps(PLACEHOLDER), RAW_VALUES[name]
        ), f"{where} = {name}"
    new = chance.choice(ODD_VALUES)
    return json.dumps(put(value, path, new)), f"{where} = {new!r:.60}"


def damage_json(chance: random.Random, data: bytes) -> tuple[bytes, str]:
    text, what = damage_value(chance, json.loads(data))
    return text.encode(), what


def damage_lines(chance: random.Random, data: bytes) -> tuple[bytes, str]:
    lines = data.splitlines()
    place = chance.choice((0, len(lines) - 1, chance.randrange(len(lines))))
    kind = chance.random()
    if kind < 0.25:
        raw = chance.choice(RAW_LINES)
        lines[place] = raw.encode()
        what = f"line {place + 1} is {raw!r}"
    elif kind < 0.35:
        del lines[place]
        what = f"without line {place + 1}"
    elif kind < 0.4:
        lines.insert(place, lines[place])
        what = f"line {place + 1} twice"
    else:
        text, what = damage_value(chance, json.loads(lines[place]))
        lines[place], what = text.encode(), f"line {place + 1}: {what}"
    return b"".join(line + b"\n" for line in lines), what


def damage_bytes(chance: random.Random, data: bytes) -> tuple[bytes, str]:
    size = len(data)
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut": lambda: data[: chance.randrange(size + 1)],
        "cut at its end": lambda: data[:-1],
        "NUL bytes": lambda: bytes(size),
        "NUL bytes from the middle on": lambda: data[: size // 2] + bytes(size - size // 2),
        "random bytes": lambda: chance.randbytes(min(size, 4096)),
        "a changed byte": lambda: _with(data, chance.randrange(max(size, 1)), chance.randrange(1, 256)),
        "a BOM": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode(errors="replace").encode("utf-16"),
        "Windows line ends": lambda: data.replace(b"\n", b"\r\n"),
        "garbage behind it": lambda: data + b"\0\xff garbage",
        "twice": lambda: data + data,
        "half a line behind it": lambda: data + b'{"event": "st',
        "NUL bytes behind it": lambda: data + bytes(100),
    }
    what = chance.choice(sorted(ways))
    return ways[what](), what


def _with(data: bytes, place: int, flip: int) -> bytes:
    return data[:place] + bytes(byte ^ flip for byte in data[place : place + 1]) + data[place + 1 :]


def _socket(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # the path of a Unix socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(folder)


PLACES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a folder with a file": lambda path: (path.mkdir(), (path / "x").write_text("x")),
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing-is-there"),
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a link to its folder": lambda path: path.symlink_to("."),
    "a file that nobody may read": lambda path: (path.write_text("x"), path.chmod(0)),
}


def damage_place(chance: random.Random, path: Path) -> str:
    what = chance.choice(sorted(PLACES))
    replace_with(path, what)
    return what


def replace_with(path: Path, what: str) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    PLACES[what](path)


# -- recomputed checksums


def _dumped(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fix_config(path: Path) -> None:
    data = json.loads(path.read_bytes())
    data["digest"] = _sha256(_dumped({k: v for k, v in data["config"].items() if k != "preset"}))
    path.write_text(json.dumps(data))


def fix_meta(path: Path) -> None:
    meta = json.loads(path.read_bytes())
    meta.pop("meta_sha256", None)
    path.write_text(
        json.dumps(meta | {"meta_sha256": _sha256(_dumped(meta))}, indent=1, ensure_ascii=False) + "\n"
    )


def fix_node(path: Path) -> None:
    head, _, body = path.read_bytes().partition(b"\n")
    line = json.loads(head)
    line.pop("sha256", None)
    line["rows_sha256"] = _sha256(body)
    path.write_bytes(_dumped(line | {"sha256": _sha256(_dumped(line))}) + b"\n" + body)


CHECKSUMS: dict[str, Callable[[Path], None]] = {
    "config.json": fix_config,
    "meta.json": fix_meta,
    "nodes": fix_node,
}


# -- files and their commands


@dataclass(frozen=True)
class Target:
    """A kind of file to damage, and the commands that read it.

    In `commands`, {whole}, {half} and {grown} are placeholders for the names of the three runs.
    """

    pattern: str  # relative to the fixture directory
    damage: Callable[[random.Random, bytes], tuple[bytes, str]]
    commands: tuple[str, ...]
    weight: int = 1


SHOW = (
    "compare {whole} {grown}",
    "compare {whole} --json",
    "train-whole",
    "train-whole --json",
    "report-one",
    "submit",
)
RESUME = ("train-half", "train-half", "plan-half")
RUNS = ("sample {whole} --prompt a --max-tokens 3",)
GROW = ("grow verify runs/{grown}", "train-grown", "report-grown")
STORE = (
    "store ls",
    "store ls --json",
    "store du",
    "store verify",
    "store gc",
    "train-new",
    "train-half",
    "store audit --segments 1 --seed 1",
)
SWEEP = (
    "sweep run tiny.toml --out studies",
    "sweep show tiny --out studies",
    "sweep best tiny --out studies",
)
SWEEP += (
    "sweep ls --out studies",
    "sweep export tiny exported --out studies",
    "sweep show tiny --out studies --json",
)
STUDIES = ("report-study",)

TARGETS = (
    Target("runs/{whole}/summary.json", damage_json, SHOW, 6),
    Target("runs/{whole}/metrics.jsonl", damage_lines, SHOW, 6),
    Target("runs/{whole}/config.json", damage_json, (*SHOW, *RUNS), 3),
    Target("runs/{whole}/env.json", damage_json, ("report-one", "submit", "train-whole"), 2),
    Target("runs/{whole}/status.json", damage_json, SHOW, 1),
    Target("runs/{whole}/tokenizer.json", damage_json, (*RUNS, "report-one", "submit"), 2),
    Target("runs/{whole}/checkpoints", damage_bytes, (*RUNS, "submit", "report-one"), 1),
    Target("runs/{whole}/checkpoints/*/meta.json", damage_json, (*RUNS, "submit"), 2),
    Target("runs/{whole}/checkpoints/*/state.safetensors", damage_bytes, (*RUNS, "submit"), 2),
    Target("runs/{half}/metrics.jsonl", damage_lines, RESUME, 4),
    Target("runs/{half}/config.json", damage_json, RESUME, 3),
    Target("runs/{half}/env.json", damage_json, RESUME, 4),
    Target("runs/{half}/status.json", damage_json, (*RESUME, "compare {half}"), 1),
    Target("runs/{half}/tokenizer.json", damage_json, RESUME, 1),
    Target("runs/{half}/.lock", damage_bytes, RESUME, 1),
    Target("runs/{half}/checkpoints", damage_bytes, RESUME, 1),
    Target("runs/{half}/checkpoints/*/meta.json", damage_json, RESUME, 6),
    Target("runs/{half}/checkpoints/*/state.safetensors", damage_bytes, RESUME, 3),
    Target("runs/{grown}/growth.jsonl", damage_lines, GROW, 4),
    Target("runs/{grown}/summary.json", damage_json, GROW, 2),
    Target(
        "runs/{grown}/checkpoints/*/meta.json", damage_json, ("sample {grown} --prompt a --max-tokens 3",), 2
    ),
    Target("runs/.store/store.json", damage_json, STORE, 2),
    Target("runs/.store/nodes/*", damage_lines, STORE, 6),
    Target("runs/.store/states/*", damage_bytes, STORE, 2),
    Target("runs/.store/roots/*", damage_json, STORE, 2),
    Target("runs/.store/*", damage_bytes, STORE, 2),
    Target("runs/.store/pins/batch-x", damage_json, STORE, 1),
    Target("studies/tiny/study.json", damage_json, SWEEP, 3),
    Target("studies/tiny/tokens.json", damage_json, SWEEP[:1], 2),
    Target("studies/tiny/export.json", damage_json, (*SWEEP[1:], *SWEEP[:1]), 6),
    Target("studies/tiny/study.db", damage_bytes, SWEEP[:1], 2),
    Target("studies/tiny/.lock", damage_bytes, SWEEP[:1], 1),
    Target("studies/tiny/runs/*/metrics.jsonl", damage_lines, SWEEP[:1], 3),
    Target("studies/tiny/runs/*/summary.json", damage_json, SWEEP[:1], 2),
    Target("studies/tiny/runs/*/status.json", damage_json, SWEEP[:1], 2),
    Target("studies/tiny/runs/*/env.json", damage_json, SWEEP[:1], 2),
    Target("studies/tiny/runs/*/config.json", damage_json, SWEEP[:1], 1),
    Target("studies/tiny/export/study.json", damage_json, STUDIES, 4),
    Target("studies/tiny/export/trials.parquet", damage_bytes, STUDIES, 2),
    Target("submission.zip", damage_bytes, ("verify submission.zip",), 2),
    Target("cache/tokens/*/meta.json", damage_json, ("train-half",), 2),
    Target("cache/tokens/*/tokenizer.json", damage_json, ("train-half",), 2),
    Target("cache/tokens/*/train.npy", damage_bytes, ("train-half",), 2),
)
MEMBERS = (
    "MANIFEST.json",
    "run/summary.json",
    "run/metrics.jsonl",
    "run/config.json",
    "run/env.json",
    "run/status.json",
    "run/tokenizer.json",
)

REWRITTEN = (".lock", "status.json", "env.json")  # every start rewrites these files
# These error messages describe the source tree under test. The damage does not cause them.
ABOUT_THE_TREE = (
    "the working tree has uncommitted changes",
    "a submission must not contain",
)
# Commands that check files exit with these codes if they find a problem.
CHECKS = {
    "store verify": {1},
    "store audit": {1},
    "grow verify": {1},
    "verify": {1},
}


# -- known crashes and hangs


@dataclass(frozen=True)
class Row:
    name: str
    pattern: str
    damage: Callable[[Path], Any]
    command: str
    code: int = 2


def value_at(*path: Any, value: Any) -> Callable[[Path], Any]:
    """Return a function that replaces a value in a JSON file and updates the checksum, if there is one."""

    def damage(file: Path) -> None:
        file.write_text(json.dumps(put(json.loads(file.read_bytes()), path, value)))
        fix_checksum = CHECKSUMS.get(file.name)
        if fix_checksum:
            fix_checksum(file)

    return damage


def last_line(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(
        file.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n" + text.encode() + b"\n"
    )


def content(text: str | bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(text if isinstance(text, bytes) else text.encode())


def place(what: str) -> Callable[[Path], Any]:
    return lambda file: replace_with(file, what)


def behind(data: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes() + data)


LATE = b'{"event": "step", "step": 1000000000000000000}\n'
DEEP = RAW_VALUES["nested 10,000 deep"]
ROWS = (
    Row("last is a number", "runs/{whole}/summary.json", value_at("last", value=5), "compare {whole}"),
    Row("guards is a text", "runs/{whole}/summary.json", value_at("guards", value="pass"), "compare {whole}"),
    Row(
        "a guard without a status",
        "runs/{whole}/summary.json",
        value_at("guards", value=[{"name": "x"}]),
        "report-one",
    ),
    Row("seconds is a text", "runs/{whole}/summary.json", value_at("seconds", value="1"), "compare {whole}"),
    Row("seconds is 0", "runs/{whole}/summary.json", value_at("seconds", value=0), "compare {whole}"),
    Row("flops is a list", "runs/{whole}/summary.json", value_at("flops", value=[]), "report-one"),
    Row("scores is a list", "runs/{whole}/summary.json", value_at("scores", value=[]), "submit"),
    Row("a deep summary", "runs/{whole}/summary.json", content(DEEP), "compare {whole}"),
    Row("a pipe as a summary", "runs/{whole}/summary.json", place("a FIFO"), "train-whole"),
    Row("a row that is a list", "runs/{whole}/metrics.jsonl", last_line("[1]"), "compare {whole}"),
    Row("a row that is null", "runs/{whole}/metrics.jsonl", last_line("null"), "train-whole"),
    Row("a row that is a number", "runs/{whole}/metrics.jsonl", last_line("5"), "report-one"),
    Row("a row nested deep", "runs/{whole}/metrics.jsonl", last_line(DEEP), "compare {whole}"),
    Row("a pipe as a log", "runs/{whole}/metrics.jsonl", place("a FIFO"), "train-whole"),
    Row("a folder as a log", "runs/{whole}/metrics.jsonl", place("a folder"), "compare {whole}"),
    Row(
        "a link to itself as a log",
        "runs/{whole}/metrics.jsonl",
        place("a link to itself"),
        "compare {whole}",
    ),
    Row(
        "NUL bytes behind the last checkpoint",
        "runs/{half}/metrics.jsonl",
        behind(bytes(100) + b"\n"),
        "train-half",
        0,
    ),
    Row("a list behind the last checkpoint", "runs/{half}/metrics.jsonl", behind(b"[1]\n"), "train-half", 0),
    Row("a step of a billion billion", "runs/{half}/metrics.jsonl", behind(LATE), "train-half", 0),
    Row("plan is a list", "runs/{whole}/config.json", value_at("plan", value=[]), "report-one"),
    Row("a deep config", "runs/{whole}/config.json", content(DEEP), "compare {whole}"),
    Row("a pipe as a config", "runs/{whole}/config.json", place("a FIFO"), "compare {whole}"),
    Row("status is a list", "runs/{half}/status.json", content("[1]"), "compare {half}"),
    Row("carried is a text", "runs/{half}/env.json", value_at("carried", value="x"), "train-half"),
    Row("no machine class", "runs/{half}/env.json", value_at("machine_classes", value=[]), "train-half"),
    Row(
        "a tokenizer in UTF-16",
        "runs/{whole}/tokenizer.json",
        content("{}".encode("utf-16")),
        "sample {whole} --prompt a",
    ),
    Row(
        "a mark that is a number",
        "runs/{half}/checkpoints/*/meta.json",
        value_at("metrics", value=5),
        "train-half",
        0,
    ),
    Row(
        "fired is a text",
        "runs/{half}/checkpoints/*/meta.json",
        value_at("growth", value={"fired": "x"}),
        "train-half",
        0,
    ),
    Row(
        "spent is a list",
        "runs/{half}/checkpoints/*/meta.json",
        value_at("spent", value=[1]),
        "train-half",
        0,
    ),
    Row("a deep checkpoint", "runs/{half}/checkpoints/*/meta.json", content(DEEP), "train-half", 0),
    Row("a pipe as a state", "runs/{half}/checkpoints/*/state.safetensors", place("a FIFO"), "train-half", 0),
    Row(
        "a file as the folder of checkpoints",
        "runs/{half}/checkpoints",
        lambda path: (shutil.rmtree(path), path.touch()),
        "train-half",
    ),
    Row("an event that is a number", "runs/{grown}/growth.jsonl", last_line("5"), "grow verify runs/{grown}"),
    Row(
        "an event without a name",
        "runs/{grown}/growth.jsonl",
        last_line('{"event": "OPERATION_SUCCESS"}'),
        "report-grown",
    ),
    Row("a deep store.json", "runs/.store/store.json", content(DEEP), "store ls"),
    Row("a pipe as a store.json", "runs/.store/store.json", place("a FIFO"), "store ls"),
    Row("a pipe as a node", "runs/.store/nodes/*", place("a FIFO"), "store ls", 0),
    Row("a pipe as a state of the store", "runs/.store/states/*", place("a FIFO"), "store verify", 1),
    Row("a deep node", "runs/.store/nodes/*", content(DEEP), "store ls", 0),
    Row("a deep root", "runs/.store/roots/*", content(DEEP), "store verify", 1),
    Row("tokens are a list", "studies/tiny/tokens.json", content("[1]"), "sweep run tiny.toml --out studies"),
    Row(
        "tokens in UTF-16",
        "studies/tiny/tokens.json",
        content("{}".encode("utf-16")),
        "sweep run tiny.toml --out studies",
    ),
    Row("no train_tokens", "studies/tiny/tokens.json", content("{}"), "sweep run tiny.toml --out studies"),
    Row(
        "trials is a number",
        "studies/tiny/export.json",
        value_at("trials", value=5),
        "sweep show tiny --out studies",
    ),
    Row(
        "a trial is null",
        "studies/tiny/export.json",
        value_at("trials", value=[None]),
        "sweep best tiny --out studies",
    ),
    Row(
        "a winner that is no trial",
        "studies/tiny/export.json",
        value_at("evidence", "winner", value=9),
        "sweep best tiny --out studies",
    ),
    Row(
        "values of many kinds",
        "studies/tiny/export.json",
        value_at("trials", 0, "run", value=True),
        "sweep export tiny x --out studies",
    ),
    Row(
        "the log of a confirmation run is a number",
        "studies/tiny/runs/{confirmation}/metrics.jsonl",
        last_line("0"),
        "sweep run tiny.toml --out studies",
    ),
    Row(
        "the summary of a confirmation run is empty",
        "studies/tiny/runs/{confirmation}/summary.json",
        content("{}"),
        "sweep run tiny.toml --out studies",
    ),
    Row(
        "a trial's status is a text",
        "studies/tiny/runs/*/status.json",
        content('"x"'),
        "sweep run tiny.toml --out studies",
    ),
    Row(
        "a correlation is a text",
        "studies/tiny/export/study.json",
        value_at("rung_correlation", value={"0": "x"}),
        "report-study",
    ),
    Row(
        "evidence is a list",
        "studies/tiny/export/study.json",
        value_at("evidence", value=[1]),
        "report-study",
    ),
)


def prepare_row(fixture: FixtureDirectory, row: Row) -> Case:
    fixture.renew(row.pattern.partition("/")[0])
    path = fixture.file(row.pattern, random.Random(0))
    row.damage(path)
    return Case(row.name, str(path.relative_to(fixture.place)), row.name, fixture.argv(row.command))


@dataclass(frozen=True)
class Case:
    name: str
    place: str  # the damaged file
    damage: str  # what was done to it
    argv: tuple[str, ...]


class FixtureDirectory:
    """A copy of the fixture directory whose files can be damaged."""

    def __init__(self, made: Path, place: Path) -> None:
        self.made, self.place = made, place
        self.names: dict[str, str] = json.loads((made / "names.json").read_text(encoding="utf-8"))
        self.hashes = self._hashes()

    def _hashes(self) -> dict[str, str]:
        """Return the hash of every file that a refused command must not change."""
        paths = sorted(path for path in self.made.rglob("*") if path.is_file() and path.name not in REWRITTEN)
        hashes = {str(path.relative_to(self.made)): _sha256(path.read_bytes()) for path in paths}
        hashes.pop("studies/tiny/study.json")  # each start of a study rewrites this file
        return hashes

    def renew(self, *parts: str) -> None:
        """Copy the given folders, the cache and all top-level files into a clean directory."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for path in self.made.iterdir():
            if path.is_file():
                shutil.copy(path, self.place)
            elif path.name in (*parts, "cache"):
                shutil.copytree(path, self.place / path.name)

    def changed(self, damaged: str) -> list[str]:
        """Return the undamaged files that the command has changed."""
        changed = []
        for name, sha256 in self.hashes.items():
            path = self.place / name
            is_present = (self.place / Path(name).parts[0]).exists()
            if not is_present or name == damaged or name.startswith(f"{damaged}/"):
                continue
            if not path.is_file() or _sha256(path.read_bytes()) != sha256:
                changed.append(name)
        return changed

    def argv(self, command: str) -> tuple[str, ...]:
        name, _, more = command.partition(" ")
        trains = {
            "train-whole": PLAIN,
            "train-half": HALF,
            "train-grown": GROWN,
            "train-new": HALF | {"log_every": 2},
        }
        if name in trains:
            return ("train", "--preset", "baseline", *sets(trains[name]), "--quiet", *more.split())
        plain = {
            "plan-half": ("train", "--preset", "baseline", *sets(HALF), "--plan"),
            "report-one": ("report", "runs/{whole}", "--samples", "0"),
            "report-grown": ("report", "runs/{grown}", "--samples", "0"),
            "report-study": ("report", "studies/tiny", "--samples", "0"),
            "submit": ("submit", "--run", "{whole}", "--dry-run"),
        }
        return tuple(word.format(**self.names) for word in plain.get(name, command.split(" ")))

    def file(self, pattern: str, chance: random.Random) -> Path:
        pattern = pattern.format(**self.names)
        return chance.choice(sorted(self.place.glob(pattern)) or [self.place / pattern])


def prepare(fixture: FixtureDirectory, seed: int, index: int) -> Case:
    """Damage one file in a fresh copy of the fixture directory.

    The seed and the index determine the file, the damage and the command.
    """
    chance = random.Random(f"{seed}:{index}")
    if chance.random() < 0.06:
        fixture.renew()
        return _damage_member(fixture, chance, f"{seed}:{index}")
    target = chance.choices(TARGETS, [target.weight for target in TARGETS])[0]
    fixture.renew(target.pattern.partition("/")[0], *(["runs"] if target.pattern.startswith("cache") else []))
    path = fixture.file(target.pattern, chance)
    _add_missing(path)
    command = chance.choice(target.commands)
    kind = chance.random()
    if path.is_dir() or kind < 0.2:
        description = damage_place(chance, path)
    else:
        damage = damage_bytes if kind < 0.4 else target.damage
        data, description = damage(chance, path.read_bytes())
        path.write_bytes(data)
        fix_checksum = CHECKSUMS.get(path.name) or CHECKSUMS.get(path.parent.name)
        if fix_checksum and chance.random() < 0.6:
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                fix_checksum(path)
                description += FIXED
    return Case(f"{seed}:{index}", str(path.relative_to(fixture.place)), description, fixture.argv(command))


def _add_missing(path: Path) -> None:
    """Create a missing pin file. A store contains pins only while a run is using it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == "pins":
        path.write_text(json.dumps(["0" * 64]))
    elif path.name == "*":
        raise AssertionError(f"the fixture directory has no {path}")


def _damage_member(fixture: FixtureDirectory, chance: random.Random, name: str) -> Case:
    """Damage one file in the bundle. In most cases, update its checksum in the manifest."""
    from reports.submission import bundle

    path = fixture.place / "submission.zip"
    files = bundle.read(path)
    member = chance.choice(MEMBERS)
    damage = damage_bytes if chance.random() < 0.2 else damage_lines if member.endswith("l") else damage_json
    files[member], description = damage(chance, files[member])
    if member != "MANIFEST.json" and chance.random() < 0.8:
        manifest = json.loads(files["MANIFEST.json"])
        manifest["files"][member]["sha256"] = _sha256(files[member])
        with suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            if member == "run/summary.json":
                summary = json.loads(files[member])
                manifest |= {
                    k: summary[k]
                    for k in (
                        "run",
                        "preset",
                        "fingerprints",
                        "tokenizer",
                        "geometry",
                        "machine_class",
                        "versions",
                    )
                }
                manifest["figures"] |= {k: summary[k] for k in manifest["figures"]}
        files["MANIFEST.json"] = json.dumps(manifest).encode()
        description += FIXED
    path.write_bytes(bundle.pack(files))
    return Case(name, f"submission.zip/{member}", description, ("verify", "submission.zip"))


def run_case(fixture: FixtureDirectory, driver: Driver, case: Case) -> tuple[Outcome, str]:
    """Run the command of a prepared case.

    Return the outcome and the reason for a failure. The reason is empty if the case passed.
    """
    env = {"MAINRUN_CACHE": str(fixture.place / "cache")}
    outcome = driver.run(case.argv, fixture.place, env)
    return outcome, find_problem(fixture, case, outcome)


def find_problem(fixture: FixtureDirectory, case: Case, outcome: Outcome) -> str:
    allowed = CHECKS.get(" ".join(case.argv[:2]), CHECKS.get(case.argv[0], set()))
    problem = outcome.problem(tuple(allowed))
    if problem:
        return problem
    if outcome.code == 0 and case.argv[0] == "train" and FIXED not in case.damage:
        return _compare_weights(fixture)
    if outcome.code == 2:
        changed = fixture.changed(
            case.place.partition(".zip/")[0] + ".zip" if ".zip/" in case.place else case.place
        )
        if changed:
            return f"a refused command changed {', '.join(changed[:3])}"
        if any(text in outcome.message for text in ABOUT_THE_TREE):
            return ""
        if not _names(case, outcome.message):
            return f"the message does not name the damaged file: {outcome.message[:300]}"
        if ";" not in outcome.message and "fix:" not in outcome.message:
            return f"the message does not say how to fix it: {outcome.message[:300]}"
    return ""


def _compare_weights(fixture: FixtureDirectory) -> str:
    """Return a problem if the resumed run ended with different weights than an uninterrupted run."""
    summary = fixture.place / "runs" / fixture.names["half"] / "summary.json"
    if not summary.is_file():
        return ""
    weights = json.loads(summary.read_text(encoding="utf-8"))["weights"]
    return "" if weights == fixture.names["weights"] else "the resumed run ended with other weights"


def _names(case: Case, message: str) -> bool:
    parts = Path(case.place).parts
    return any(part in message for part in parts if part not in ("runs", "studies"))


# -- the command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit codes: 0: all cases passed. 1: a case failed. 2: invalid arguments. 130: interrupted.",
    )
    parser.add_argument(
        "--cases", type=whole_number(1), default=1000, help="the number of cases (default: 1000)"
    )
    parser.add_argument(
        "--first", type=whole_number(0), default=0, help="the index of the first case (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed of the random cases (default: 0)")
    parser.add_argument(
        "--case",
        type=case_number,
        metavar="SEED:INDEX",
        help="run only this case and print all of its output",
    )
    parser.add_argument("--rows", action="store_true", help="run the damage in ROWS instead of random damage")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the root folder of the code under test")
    parser.add_argument("--made", type=Path, help="use this fixture directory, or make it if it is missing")
    parser.add_argument("--make", type=Path, help="make a fixture directory at this path and exit")
    parser.add_argument("--keep", type=Path, help="keep the damaged copy in this folder")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.make:
        make(args.make)
        return 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # copying is fastest in memory
    with tempfile.TemporaryDirectory(prefix="damage-", dir=memory) as folder:
        made = args.made or Path(folder) / "made"
        sys.path.insert(0, str(args.tree))
        if not (made / "submission.zip").is_file():
            command = [sys.executable, __file__, "--make", str(made.resolve())]
            env = os.environ | {"PYTHONPATH": f"{args.tree}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=env, check=True)
        fixture = FixtureDirectory(made, args.keep or Path(folder) / "copy")
        with Driver(tree=args.tree) as driver:
            if args.rows:
                return _run_rows(fixture, driver)
            if args.case:
                return _show(fixture, driver, *args.case)
            return _run_many(fixture, driver, args.seed, args.first, args.cases)


def _run_rows(fixture: FixtureDirectory, driver: Driver) -> int:
    failures = 0
    for row in ROWS:
        outcome, problem = run_case(fixture, driver, prepare_row(fixture, row))
        if not problem and outcome.code != row.code:
            problem = f"exit code {outcome.code}, expected {row.code}"
        failures += bool(problem)
        print(
            f"{'FAILS' if problem else 'ok':5}  {row.name}: {problem[:200] or outcome.message[:300]}",
            flush=True,
        )
    print(f"{failures} of {len(ROWS)} rows fail")
    return bool(failures)


def _show(fixture: FixtureDirectory, driver: Driver, seed: int, index: int) -> int:
    case = prepare(fixture, seed, index)
    outcome, problem = run_case(fixture, driver, replace(case, argv=(*case.argv, "--debug")))
    print(f"{case.place}: {case.damage}\n$ mainrun {' '.join(case.argv)}")
    print(f"{outcome.out}{outcome.err}\nexit code {outcome.code}; {problem or 'ok'}")
    return bool(problem)


def _run_many(fixture: FixtureDirectory, driver: Driver, seed: int, first: int, cases: int) -> int:
    codes, problems, start = Counter[Any](), Counter[str](), time.monotonic()
    for index in range(first, first + cases):
        case = prepare(fixture, seed, index)
        outcome, problem = run_case(fixture, driver, case)
        codes[outcome.code] += 1
        if problem:
            kind = re.sub(r"\d+", "N", problem)[:120]
            problems[kind] += 1
            command = " ".join(case.argv)[:150]
            print(f"{case.name}  {case.place}: {case.damage}\n    {command}\n    {problem[:400]}", flush=True)
        if (index + 1 - first) % 500 == 0:
            print(
                f"{index + 1 - first:,} cases so far, {sum(problems.values())} problems",
                file=sys.stderr,
                flush=True,
            )
        if outcome.seconds > 8:
            command = " ".join(case.argv)[:80]
            print(
                f"{case.name} slow: {outcome.seconds:.1f} s {case.place} {case.damage} {command}", flush=True
            )
    seconds = time.monotonic() - start
    print(f"{cases:,} cases from {first} with seed {seed} in {seconds:.0f} s: exit codes {dict(codes)}")
    for kind, count in problems.most_common():
        print(f"{count:6}  {kind}")
    print(f"{sum(problems.values()):,} problems")
    return bool(problems)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("damage: interrupted", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError:
        print("damage: the fixture directory cannot be made; see the error above", file=sys.stderr)
        sys.exit(2)
