"""Unusual command lines for test_doors.py: every command and every option, with unlikely values.

The seed and the index determine a case. The commands and options are read from the Typer application. Each
text option needs a row in the table `TEXT`. The values of all other options depend on their types. The
arguments in `BASE` prevent a case from using the network or from training for more than a second.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doors import Driver, Outcome

Draw = Callable[[random.Random], str]

SMALL = {
    "num_titles": 120, "vocab_size": 300, "block_size": 8, "batch_size": 4, "n_layer": 1, "n_head": 1,
    "d_model": 8, "threads": 1, "device": "cpu", "max_steps": 1, "eval_per_epoch": 0, "dev_frac": 0.2,
}  # fmt: skip


# -- odd values


def nested(rng: random.Random) -> str:
    """Return deeply nested lists and tables in TOML, JSON or YAML. Some of them are not closed."""
    depth = rng.choice([60, 99, 101, 400, 3000, 20_000])
    shapes = [
        "[" * depth,
        "[" * depth + "]" * depth,
        "{a=" * depth + "1" + "}" * depth,
        '{"a":' * depth + "1" + "}" * depth,
        '{"ops":' + "[" * depth + "]" * depth + "}",
        "- " * depth + "x",
        "{ops: &a [*a]}",
        "ops: &a [*a]\n",
        'a: &a ["x","x"]\n'
        + "".join(
            f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a." * depth + "b = 1",
        "(" * depth,
    ]
    return rng.choice(shapes)


def bomb(word: str) -> str:
    """Return ten lines of YAML that expand to a hundred million words."""
    lists = [f"{b}: &{b} [{','.join(['*' + a] * 8)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join([f"a: &a [{word},{word}]", *lists, ""])


WORDS = (
    "", " ", "\t", "\n", "x" * 300, "x" * 5000, "ü" * 200, "\0", "a\0b", "\x1b[31mred\x1b[0m", "\x07", "a\nb",
    "a\rb", "\x9b31m", "\x7f", "ü", "日本語", "\u202egnp.exe", "e\u0301", "\u2028", "\ufeff", "\ud83d",
    os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff\xfe"), "😀" * 80, "-", "--", "-x", "=", "a=b", "=b", "a=",
    "%s%n%d", "{}", "{0}", "{", "[bold]x[/bold]", "[/]", "'", '"', "`id`", "$(id)", "*", "?", "!", "..", ".",
    "/", "//", "~", "~no-such-user", "a/b", "None", "null", "true", "nan", "C:\\x", "file:x", "memory://x",
    "http://127.0.0.1:9/x", "#", "a#b", ":", "a:b", ":a", "a:", "@", "a,b", ",", "<x>", "&amp;", "1" * 5000,
    "\\", "\\x1b", "x.toml", ".toml", "x" * 300 + ".toml",
)  # fmt: skip
NUMBERS = (
    "0", "-0", "-1", "1", "2", "007", "0x10", "1" * 400, "1" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000,
    "1e-320", "-1e-320", "1e400", "nan", "-nan", "inf", "-inf", "1.5", "0.0", "-0.0", "1e3", " 1", "1 ", "+1",
    "1,0", "٣", "½", "²", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "4294967296",
    "", "true", "1j", "1;2", "0b1", "0o7", "1__0", "0.1e", ".5", "5.", "1979-05-27T07:32:00Z", "07:32:00",
    "[1]", "{a=1}", "'1'", '"1"',
)  # fmt: skip


def word(rng: random.Random) -> str:
    return nested(rng) if rng.random() < 0.06 else rng.choice(WORDS)


def number(rng: random.Random) -> str:
    return word(rng) if rng.random() < 0.15 else rng.choice(NUMBERS)


# -- nearly valid documents

VALUES = (
    "-1", "0", "1", "1.5", "1e-320", "1e308", "-0.0", "nan", "inf", "true", '""', '"x"', '"none"', "[]", "{}",
    "[[]]", "[1, 1]", "[0.5]", "{ a = 1 }", "9223372036854775807", "1" + "0" * 299, "1" * 5000,
    "0x" + "f" * 400, "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", '"\\u0000"', '"\\u001b[2J"',
    '"\\u0085"', '"' + "x" * 300 + '"', '"' + "y" * 5000 + '"', "[" + "1," * 2000 + "]", "[nan, inf]",
    "[true, false, 1]", '"""two\nlines"""', "[" * 90 + "]" * 90, "[" * 3000 + "]" * 3000, '"../../x"',
    '"small.toml"', '"demo"', '"file:titles.txt"', '["sgd", "muon"]', "[0.5, 0.25]", "[1e-320, 2]",
    '["a", "a"]', "[1, 1.0]", '[0.1, "x"]',
)  # fmt: skip
STUDY = {
    "name": '"odd"', "about": '"text"', "preset": '"small.toml"', "objective": '"dev/full"', "threads": "1",
    "workers": "0", "engine": '"local"', "address": '""', "gpus": "0.0", "storage": '""', "set.lr": "0.1",
    "set.dev_frac": "0.2", "space.lr.low": "1e-3", "space.lr.high": "1e-2", "space.lr.log": "true",
    "space.lr.step": "1e-4", "space.momentum.values": "[0.0, 0.9]",
    "space.momentum.when": '{ optimizer = ["sgd"] }', "space.x.low": "1", "space.growth.low": "1",
    "space.timescale.low": "0.1", "space.timescale.high": "1e300", "space.dropout.values": "[0.1, 0.2]",
    "budget.trials": "1", "budget.tokens": "1e9", "sampler.name": '"random"', "sampler.seed": "0",
    "sampler.generation": "4", "rungs.at": "[0.5]", "rungs.keep": "0.5", "rungs.score": '"raw"',
    "evidence.seeds": "2", "evidence.noise_seeds": "2", "evidence.best": "1",
    "evidence.sequential": "true", "x": "1",
}  # fmt: skip
MIX = {"path": '"titles.txt"', "corpus": '"synthetic"', "ratio": "1", "weight": "1", "x": "1"}
OPS = '[{ name = "set_lr", value = 0.1, trigger = { step = 1 } }]'
GROWTH = {"version": "2", "seed": "0", "defaults.reevaluate": "true", "ops": OPS, "x": "1"}


def study_file(rng: random.Random) -> str:
    return _document(
        rng, STUDY, ("name", "preset", "space.lr.low", "space.lr.high", "set.dev_frac", "budget.trials")
    )


def preset_file(rng: random.Random) -> str:
    from mainrun.config import TrainConfig

    fields = dict.fromkeys(TrainConfig.model_fields, "1") | {
        "about": '""',
        "steps": "[{}]",
        "scale.lr": "1",
        "x": "1",
        "base": '"small.toml"',
    }
    return _document(rng, fields, ("base",))


def mix_file(rng: random.Random) -> str:
    tables = [
        _document(rng, MIX, ("path",) if rng.random() < 0.7 else ("corpus",))
        for _ in range(rng.choice((1, 2, 3)))
    ]
    return "".join(f"[[source]]\n{table}" for table in tables)


def growth_file(rng: random.Random) -> str:
    return schedule(rng) if rng.random() < 0.7 else _document(rng, GROWTH, ("ops",))


def _document(rng: random.Random, known: dict[str, str], always: tuple[str, ...]) -> str:
    """Return a TOML document with the keys in `always` and a few others. Up to two keys have odd values."""
    keys = [*always, *rng.sample(sorted(set(known) - set(always)), rng.choice((0, 1, 1, 2, 3)))]
    odd = rng.choices(keys, k=rng.choice((0, 1, 1, 2)))
    return "".join(f"{key} = {rng.choice(VALUES) if key in odd else known[key]}\n" for key in keys)


DOCUMENTS: dict[str, Draw] = {
    "odd-study.toml": study_file,
    "odd-preset.toml": preset_file,
    "odd-mix.toml": mix_file,
    "odd-growth.json": growth_file,
    "odd-growth.toml": growth_file,
    "odd-growth.yaml": growth_file,
}


def path(rng: random.Random) -> str:
    """Draw a path in the folder of the case, or an odd word."""
    chance = rng.random()
    if chance < 0.25:
        return word(rng)
    name = rng.choice(PLACES)
    return name + rng.choice(("/", "/x", "/../x.toml", "/" + "y" * 300)) if chance < 0.4 else name


PLACES = (
    "fifo", "fifo.toml", "fifo.json", "fifo.yaml", "fifo.csv", "fifo.pdf", "loop", "loop.toml", "loop.json",
    "loop/x", "folder", "folder.toml", "folder.json", "folder.pdf", "folder.zip", "dangling", "dangling.toml",
    "socket", "socket.toml", "notes.txt", "titles.txt", "empty.toml", "empty.json", "empty.pdf",
    "binary.toml", "binary.json", "binary.yaml", "binary.pdf", "binary.zip", "utf16.toml", "utf16.json",
    "utf16.yaml", "bom.toml", "bom.json", "bom.yaml", "latin.toml", "latin.json", "latin.yaml", "deep.toml",
    "deep.json", "deep.yaml", "dotted.toml", "bomb.yaml", "numbers.toml", "numbers.json", "numbers.yaml",
    "keys.toml", "keys.json", "keys.yaml", "nul.toml", "surrogate.json", "wide.csv", "long.csv", "mix.toml",
    "deepmix.toml", "loopmix.toml", "growth.json", "growth.toml", "small.toml", "base.toml", "steps.toml",
    "study.toml", "broken.toml", "types.toml", "dates.toml", "readonly", "no/such/place", "new", "runs",
    "runs/studies", "runs/studies/done", "runs/.store", "ünï", "a b", "with\nline", "report.pdf",
    "bundle.zip", "/dev/null", "/dev/full", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/fd/1",
    ".", "..", "/", "./" * 3000 + "x", "d/" * 1500 + "x",
)  # fmt: skip


# -- nearly valid text options


def preset(rng: random.Random) -> str:
    """Draw a preset that does not take minutes to train."""
    names = ("demo:x", "baseline:x", "staged:", "small.toml", "small.toml:x", "Grown", "demo-grow", "demo:")
    drawn = rng.choice((path, word, lambda r: "odd-preset.toml", lambda r: r.choice(names)))(rng)
    if drawn == "empty.toml":  # an empty preset would train the full-size baseline
        return "small.toml"
    return drawn


def setting(rng: random.Random) -> str:
    """Return KEY=VALUE. Fields that set the amount of work, such as `epochs`, get no large valid number."""
    from mainrun.config import TrainConfig

    fields = [*sorted(TrainConfig.model_fields), *["corpus", "growth"] * 6]
    key = rng.choice(fields) if rng.random() < 0.85 else word(rng)
    chance = rng.random()
    if key == "corpus" and chance < 0.3:
        return "corpus=mix:odd-mix.toml"
    if key == "corpus" and chance < 0.8:
        return f"corpus={rng.choice(('file:', 'mix:', ''))}{path(rng)}{rng.choice(('', '#x', '#title'))}"
    if key == "growth" and chance < 0.8:
        return f"growth={rng.choice((path, nested, schedule, _growth_name))(rng)}"
    if chance < 0.05:
        return key
    return f"{key}={rng.choice((number, word, nested))(rng)}"


def _growth_name(rng: random.Random) -> str:
    return "odd-growth" + rng.choice((".json", ".toml", ".yaml"))


def schedule(rng: random.Random) -> str:
    """Return a growth schedule with something odd in it, as JSON or TOML."""
    odd: list[Any] = [
        None,
        -1,
        0,
        1,
        1e-320,
        1e308,
        float("nan"),
        10**400,
        "",
        "x" * 300,
        [],
        {},
        [[]],
        True,
        "\u0000",
        "\x1b[2J",
        [0] * 50,
    ]
    op: dict[str, Any] = {"name": "set_lr", "value": 0.1, "trigger": {"step": 1}}
    op[rng.choice((*op, "id", "init", "lr", "optimizer", "x"))] = rng.choice(odd)
    if rng.random() < 0.3:
        op["trigger"] = {rng.choice(("step", "tokens", "loss_below", "plateau", "any", "x")): rng.choice(odd)}
    if rng.random() < 0.3:
        op["name"] = rng.choice(
            (
                "stack_layers",
                "widen_model",
                "upcycle_to_moe",
                "freeze_layer",
                "resize_vocab",
                "reset_lr_schedule",
            )
        )
    data: Any = {
        "ops": [op] * rng.choice((1, 1, 2, 30)),
        rng.choice(("version", "seed", "defaults", "y")): rng.choice(odd),
    }
    try:
        return json.dumps(data if rng.random() < 0.7 else data["ops"])
    except ValueError:  # Python refuses to print integers with too many digits
        return "{}"


def run(rng: random.Random) -> str:
    return rng.choice((path, word, lambda r: r.choice(("small", "custom", "RUN", "runs/RUN", "runs"))))(rng)


def study(rng: random.Random) -> str:
    return rng.choice(
        (
            path,
            word,
            lambda r: "odd-study.toml",
            lambda r: r.choice(("demo", "lr", "done", "study.toml", "broken.toml", "runs/studies/done")),
        )
    )(rng)


def store(rng: random.Random) -> str:
    urls = (
        "memory://x", "memory://", "://", "x://y", "file://", "file:" + "x" * 300, "local://loop", "s3://b/x",
        "simplecache::x", "zip://x", "file:/dev/null", "http://127.0.0.1:9/x", "ftp://127.0.0.1:9/x",
        "data:,x", "dir://x", "reference://x", "a" * 300 + "://x",
    )  # fmt: skip
    return rng.choice((path, word, lambda r: r.choice(urls)))(rng)


def url(rng: random.Random) -> str:
    urls = (
        "http://127.0.0.1:9/x", "https://127.0.0.1:9/", "http://", "http://[", "http://x:99999/", "ftp://x",
        "file:x", "http://\x00/", "http://a b/", "http://" + "x" * 300 + "/",
        "http://user:" + "secret@127.0.0.1:9/x", "http://127.0.0.1:9/" + "x" * 5000,
    )  # fmt: skip
    return rng.choice((word, lambda r: r.choice(urls)))(rng)


def storage(rng: random.Random) -> str:
    urls = (
        "sqlite:///no/such/place.db", "sqlite:///folder", "sqlite:", "sqlite:///loop",
        "sqlite:///" + "x" * 300, "sqlite:///notes.txt", "postgresql://", "postgresql://u:p@127.0.0.1:9/d",
        "postgresql://u:p@p@h/d", "mysql://x",
    )  # fmt: skip
    return rng.choice((word, lambda r: r.choice(urls)))(rng)


def size(rng: random.Random) -> str:
    return rng.choice(
        (
            number,
            lambda r: r.choice(
                ("20GB", "1" * 16, "1e9", "-1GB", "1.5.5G", "٣GB", "1 PB", "0", "0.0000000000000001k")
            ),
        )
    )(rng)


def choice(*some: str) -> Draw:
    return lambda rng: rng.choice(some) if rng.random() < 0.4 else word(rng)


# These functions draw the values of text options and arguments.
TEXT: dict[str, Draw] = {
    "--preset": preset,
    "--set": setting,
    "--where": choice("lr<0.1", "state=done", "full>=1e999", "lr~1", "=", "x=1", "growth!=none"),
    "--sort": choice("full", "-lr", "-", "", "--", "config"),
    "--store": store,
    "--store-size": size,
    "--compare": choice("small,custom", "small,small", "small,custom,0.1", "small", ",", "\ud800,small"),
    "--paired": choice("small,custom", "small,small", "small,custom,0.1", "small,custom,nan", ",", "a,b,-1"),
    "--memory": choice("16GB", "1KB", "0", "-1GB", "16 apples", ""),
    "--prompt": word,
    "--tasks": choice("no_such_task", "a,,b", ",", " "),
    "--split": choice("val", "dev", "train", "Val", ""),
    "--route": choice("own", "student", "Own", ""),
    "--title": word,
    "--host": word,
    "--run": run,
    "--upload": url,
    "--engine": choice("local", "ray", "Local"),
    "--keep": choice("1,2", "5", "1,", "a", "-1"),
    "--address": choice("auto", "127.0.0.1:9", "x:y", ":"),
    "--storage": storage,
    "--as": word,
    "--pattern": choice("D", "DM", "DS", "MD", "DQ"),
    "--dtype": choice("float32", "bfloat16", "float16", ""),
    "--track": choice("tensorboard", "wandb:", "mlflow", "trackio:a/b", ""),
    "repo": choice("owner/name", "owner", "a/b/c", "../x", "owner/na me", ""),
    "--save": word,
    "--table": choice("C", "a", "", "A,B"),
    "--record": choice("C", "a", "", "A,B"),
    "--rivals": choice("all", "optuna", "random,,random", ","),
    "--studies": choice("1", "1,2", "5", "1,", "1,1,1"),
    "name": choice("baseline", "demo", "hn-2024", "done", "small.toml"),
    "runs": run,
    "run": run,
    "places": run,
    "source": lambda rng: rng.choice((path, choice("owner/name", "owner/name@main", "a/b@", "a/b/c")))(rng),
    "key": choice("0", "a", "f" * 64, "zz"),
    "place": study,
    "file": lambda rng: rng.choice((path, nested, schedule, word, _growth_name))(rng),
}

# These arguments make each command finish quickly.
BASE: dict[str, list[str]] = {
    "train": ["--preset", "small.toml"],
    "demo": ["--set", "no_such_field=1"],
    "presets": [],
    "ls": [],
    "compare": [],
    "ensemble": [],
    "sample": ["--max-tokens", "2"],
    "eval": [],
    "doctor": [],
    "download": [],
    "report": ["--samples", "0"],
    "board": ["--host", "no host"],  # refused before it serves
    "submit": [],
    "verify": ["--steps", "1"],
    "store ls": [],
    "store du": [],
    "store gc": [],
    "store verify": [],
    "store audit": ["--segments", "1"],
    "store pin": [],
    "store unpin": [],
    "sweep run": [],
    "sweep ls": [],
    "sweep show": [],
    "sweep best": [],
    "sweep export": [],
    "sweep dashboard": [],
    "bench step": ["--set", "no_such_field=1"],
    "bench lineage": ["--set", "no_such_field=1"],
    "bench gpu": ["--set", "no_such_field=1"],
    "bench search": ["--table", "no-such-table.parquet"],
    "grow plan": [],
    "grow verify": [],
    "hub import": [],
    "hub export": [],
    "hub push": [],
}
# For these commands, the arguments in BASE come last, because the last value of an option takes effect.
LAST = {"board", "demo", "bench step", "bench lineage", "bench gpu", "bench search"}
WEIGHT = {
    "train": 4.0,
    "sweep run": 3.0,
    "grow plan": 3.0,
    "demo": 0.1,
    "doctor": 0.1,
    "bench step": 0.15,
    "bench gpu": 0.3,
    "bench lineage": 0.3,
    "report": 0.5,
    "store audit": 0.5,
}
VALID = {
    "name": "done", "runs": "RUN", "run": "RUN", "places": "runs", "key": "0", "place": "study.toml",
    "source": "folder", "file": "growth.json", "folder": "new", "directory": "runs", "path": "bundle.zip",
    "repo": "owner/name",
}  # fmt: skip
# These options set the amount of work, such as the number of samples.
WORK_SIZES = {
    "-n",
    "--max-tokens",
    "--samples",
    "--segments",
    "--repeats",
    "--steps",
    "--trials",
    "--workers",
}


# -- cases


@dataclass(frozen=True)
class Case:
    command: str
    argv: list[str]
    cwd: str = "."
    stdin: str = "null"
    stdout: str = "file"
    stderr: str = "file"
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        other = {
            k: v
            for k, v in vars(self).items()
            if k not in ("command", "argv") and v != getattr(Case("", []), k)
        }
        words = [
            text if len(text) < 100 else f"{text[:60]}...({len(text)})" for text in map(ascii, self.argv)
        ]
        return f"mainrun {' '.join(words)}{f'  {other}' if other else ''}"


def commands() -> dict[str, list[Any]]:
    """Map each command, such as `store ls`, to its parameters."""
    from typer.main import get_command

    from mainrun.cli import app

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
        below = getattr(command, "commands", None)
        if below is None:
            yield " ".join(words), command.params
            return
        for name, other in below.items():
            yield from walk(other, (*words, name))

    return dict(walk(get_command(app), ()))


def draw_for(param: Any) -> Draw | None:
    """Return the function that draws odd values of a parameter, or None for a flag.

    Raise LookupError if a text option has no row in `TEXT`.
    """
    kind = param.type_descriptor.annotation
    if getattr(param, "is_flag", False):
        return None
    if kind is Path:
        return path
    if kind in (int, float):
        sets_work = param.opts[0] in WORK_SIZES
        return (
            (lambda rng: rng.choice(("0", "-1", "1", "2", "nan", "1e-320", "1" * 5000, "x", "")))
            if sets_work
            else number
        )
    if param.opts[0] in TEXT:
        return TEXT[param.opts[0]]
    raise LookupError(
        f"{param.opts[0]} of type {kind} has no odd values; add a row to TEXT in {Path(__file__).name}"
    )


def make(seed: int, index: int, known: dict[str, list[Any]]) -> Case:
    rng = random.Random(f"{seed}:{index}")
    names = list(known)
    (command,) = rng.choices(names, [WEIGHT.get(name, 1.0) for name in names])
    params = known[command]
    options = [p for p in params if p.param_type_name == "option" and p.opts[0] != "--debug"]
    arguments = [p for p in params if p.param_type_name == "argument"]
    drawn: list[str] = []
    for param in rng.choices(options, k=rng.choice((0, 1, 1, 1, 2, 3))) if options else ():
        draw = draw_for(param)
        value = [] if draw is None else [draw(rng)]
        if value and rng.random() < 0.2 and param.opts[0].startswith("--"):
            drawn.append(f"{param.opts[0]}={value[0]}")
        else:
            drawn += [param.opts[0], *value]
    ends_early = command == "sweep run" and rng.random() < 0.2
    if command == "sweep run" and not ends_early:
        drawn.append("--plan")
    if command == "train" and rng.random() < 0.5:
        drawn.append(rng.choice(("--dry-run", "--plan")))
    places = []
    for param in arguments:
        draw = draw_for(param)
        assert draw
        valid = VALID[param.name]
        odd = rng.random() < (0.6 if len(drawn) else 0.9)
        count = rng.choice((0, 1, 1, 2)) if param.nargs == -1 else rng.choice((1,) * 20 + (0, 2))
        places += [draw(rng) if odd else valid for _ in range(count)]
    if ends_early:
        places = ["broken.toml"]  # the corpus of this study is missing
    if any(p.opts[0] == "--prompt" for p in options) and "--prompt" not in drawn and rng.random() < 0.9:
        drawn += ["--prompt", "Show"]
    base = BASE[command]
    words = [*drawn, *base] if command in LAST else [*base, *drawn]
    if rng.random() < 0.03:
        words.insert(0, rng.choice(("--no-such", "-z", "--o", word(rng))))
    argv = [*command.split(), *words, *(["--"] if rng.random() < 0.1 and places else []), *places]
    around = _around(rng)
    named = " ".join(argv)
    return Case(
        command, argv, files={name: draw(rng) for name, draw in DOCUMENTS.items() if name in named}, **around
    )


def _around(rng: random.Random) -> dict[str, Any]:
    """Draw redirections and environment variables. Most cases have neither."""
    around: dict[str, Any] = {}
    if rng.random() < 0.2:
        around["stdout"] = rng.choice(("pipe", "closed", "full", "none"))
    if rng.random() < 0.05:
        around["stderr"] = rng.choice(("pipe", "closed", "full", "none"))
    if rng.random() < 0.05:
        around["stdin"] = rng.choice(("none", "text:", "text:yes\n", "text:\x1b\n", "text:" + "x" * 10_000))
    if rng.random() < 0.15:
        name = rng.choice(
            (
                "MAINRUN_STORE",
                "MAINRUN_CACHE",
                "HF_ENDPOINT",
                "COLUMNS",
                "XDG_CACHE_HOME",
                "MAINRUN_ALLOCATOR",
                "TERM",
                "CXX",
            )
        )
        draws = {
            "MAINRUN_STORE": store,
            "MAINRUN_CACHE": path,
            "XDG_CACHE_HOME": path,
            "HF_ENDPOINT": url,
            "COLUMNS": number,
        }
        around["env"] = {name: re.sub("[\0\ud800-\udb7f]", "", draws.get(name, word)(rng))}
    return around


# -- the folder of a case


def make_fixture(driver: Driver, folder: Path) -> Path:
    """Make a finished run with a store, and a finished study. Each case gets a copy of these files."""
    fixture = folder / "fixture"
    fixture.mkdir()
    _small(fixture)
    made = driver.run(["train", "--preset", "small.toml", "--json"], cwd=fixture, limit=120)
    assert made.code == 0, made.err
    done = fixture / "runs" / "studies" / "done"
    done.mkdir(parents=True)
    ledger = {"asked": 1, "trained": 1, "reused": 0, "wasted": 0, "branch": 0}
    trial = {
        "trial": 0, "state": "done", "value": 2.5, "seed": 1, "params": {"lr": 0.1}, "rung": 0,
        "scores": {"0": 2.5}, "raw_scores": {"0": 2.5}, "stops": [1], "run": "x", "reason": "",
        "sets": ["lr=0.1"], "steps": 1, "tokens": 1, "flops": 1.0, "seconds": 1.0, **ledger,
    }  # fmt: skip
    study = {
        "name": "done", "preset": "small.toml", "storage": "", "sampler": {"name": "random", "seed": 0},
        "space": {}, "budget": {"trials": 1},
    }  # fmt: skip
    ended = {
        "name": "done", "preset": "small.toml", "objective": "dev/full", "digest": "x", "study": study,
        "trials": [trial], "ledger": ledger, "rung_correlation": {}, "raw_rung_correlation": {},
        "evidence": None,
    }  # fmt: skip
    (done / "study.json").write_text(
        json.dumps({"digest": "x", "study": study, "command": "mainrun sweep done"}), encoding="utf-8"
    )
    (done / "export.json").write_text(json.dumps(ended), encoding="utf-8")
    return fixture


def _small(folder: Path) -> None:
    (folder / "small.toml").write_bytes(SMALL_TOML)


SMALL_TOML = "\n".join(f"{key} = {json.dumps(value)}" for key, value in SMALL.items()).encode()
DEEP = 3000
FILES: dict[str, bytes] = {
    "notes.txt": b"someone's notes\n", "titles.txt": b"".join(b"Show HN: title %d\n" % i for i in range(150)),
    "empty.toml": b"", "empty.json": b"", "empty.pdf": b"", "binary.toml": bytes(range(256)),
    "binary.json": bytes(range(256)), "binary.yaml": bytes(range(256)),
    "binary.pdf": b"%PDF" + bytes(range(256)), "binary.zip": b"PK\3\4" + bytes(range(256)),
    "bundle.zip": b"PK\5\6" + bytes(18), "report.pdf": b"%PDF-1.4\n%%EOF\n",
    "utf16.toml": "lr = 0.1\n".encode("utf-16"), "utf16.json": b"{}".decode().encode("utf-16"),
    "utf16.yaml": "ops: []".encode("utf-16"), "bom.toml": b"\xef\xbb\xbf" + SMALL_TOML,
    "bom.json": b'\xef\xbb\xbf{"ops": []}', "bom.yaml": b"\xef\xbb\xbfops: []\n",
    "latin.toml": b'about = "caf\xe9"\n', "latin.json": b'{"ops": "\xe9"}', "latin.yaml": b"ops: \xe9\n",
    "deep.toml": b"lr = " + b"[" * DEEP + b"]" * DEEP, "deep.json": b"[" * DEEP + b"]" * DEEP,
    "deep.yaml": b"[" * DEEP + b"]" * DEEP, "dotted.toml": b"a." * DEEP + b"b = 1\n",
    "bomb.yaml": bomb("x").encode(),
    "numbers.toml": b"seed = " + b"1" * 5000 + b"\nlr = 1e-320\nn_layer = 0x" + b"f" * 5000
    + b"\nd_model = nan\n",
    "numbers.json": b'{"ops": ' + b"1" * 5000 + b"}",
    "numbers.yaml": b"ops: 0x" + b"f" * 5000 + b"\nseed: " + b"1:" * 3000 + b"1\n",
    "keys.toml": b"".join(b"k%d = 1\n" % i for i in range(2000)),
    "keys.json": json.dumps({f"k{i}": 1 for i in range(2000)}).encode(),
    "keys.yaml": b"".join(b"k%d: 1\n" % i for i in range(500)), "nul.toml": b'about = "\\u0000"\nlr = 1\n',
    "surrogate.json": b'{"ops": "\\ud800"}', "wide.csv": b"title\n" + b"x" * 140_000 + b"\n",
    "long.csv": b"title," * 300 + b"\n",
    "mix.toml": b'[[source]]\npath = "titles.txt"\n[[source]]\ncorpus = "synthetic"\nratio = 1e-320\n',
    "deepmix.toml": b"source = " + b"[" * DEEP + b"]" * DEEP,
    "loopmix.toml": b'[[source]]\npath = "loop"\n[[source]]\npath = "fifo"\n',
    "growth.json": b'{"version": 2, "ops": [{"name": "set_dropout", "value": 0.1, "trigger": {"step": 1}}]}',
    "growth.toml": b'[[ops]]\nname = "set_dropout"\nvalue = 0.1\ntrigger = { step = 1 }\n',
    "base.toml": b'base = "base.toml"\n',
    "steps.toml": b'base = "small.toml"\n[[steps]]\nname = "a"\n[[steps]]\nname = "a"\n',
    "study.toml": b'preset = "small.toml"\n[space.lr]\nlow = 1e-3\nhigh = 1e-2\n[budget]\ntrials = 1\n',
    "broken.toml": b'preset = "small.toml"\n[set]\ncorpus = "file:none.txt"\n'
    + b"[space.lr]\nlow = 1e-3\nhigh = 1e-2\n[budget]\ntrials = 1\n",
    "types.toml": b'preset = []\nspace = 3\nbudget = "x"\nset = [1]\nname = {a=1}\nsteps = {}\nscale = 1\n'
    + b"base = 7\nsource = [1]\nops = 1\n",
    "dates.toml": b"about = 1979-05-27\nlr = 07:32:00\n[set]\nlr = 1979-05-27T07:32:00Z\n"
    + b"[space.lr]\nvalues = [1979-05-27]\n[budget]\ntrials = nan\n",
    "ünï": b"x", "a b": b"x", "with\nline": b"x",
}  # fmt: skip


REFERS = {
    "mix.toml": "titles.txt",
    "loopmix.toml": "loop fifo",
    "study.toml": "small.toml",
    "broken.toml": "small.toml",
}


def make_folder(fixture: Path, folder: Path, words: Sequence[str]) -> None:
    """Copy the fixture into the folder of a case, and add the odd files that its command names."""
    shutil.copytree(fixture, folder, symlinks=True)
    named = " ".join(words)
    named += " ".join(more for name, more in REFERS.items() if name in named)
    for name, data in FILES.items():
        if name in named:
            (folder / name).write_bytes(data)
    for kind, make_odd in ODD.items():
        for suffix in ("", ".toml", ".json", ".yaml", ".csv", ".pdf", ".zip"):
            if kind + suffix in named:
                make_odd(folder / f"{kind}{suffix}")


def _socket(path: Path) -> None:
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # the path of a Unix socket is limited to about 100 characters
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


ODD: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "folder": Path.mkdir,
    "readonly": lambda path: path.mkdir(0o500),
    "socket": _socket,
}


def run_case(driver: Driver, case: Case, fixture: Path, folder: Path) -> tuple[Outcome, str]:
    """Run a case.

    Return the outcome and the reason for a failure. The reason is empty if the case passed.
    """
    make_folder(fixture, folder, [*case.argv, *case.env.values(), *case.files.values()])
    for document, text in case.files.items():
        (folder / document).write_text(text, encoding="utf-8", errors="surrogateescape")
    (name,) = (p.name for p in (folder / "runs").iterdir() if (p / "config.json").is_file())
    argv = [text.replace("RUN", name) if text in ("RUN", "runs/RUN") else text for text in case.argv]
    before = _state(folder / "runs" / name)
    try:
        outcome = driver.run(argv, folder, case.env, case.stdin, case.stdout, case.stderr)
        problem = outcome.problem(stderr_is_read=case.stderr in ("file", "pipe"))
        if (
            not problem
            and outcome.code == 2
            and case.stdout != "full"
            and _state(folder / "runs" / name) != before
        ):
            problem = "a refused command changed a finished run"
        return outcome, problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _state(run: Path) -> dict[str, tuple[int, int]]:
    """Return the size and the modification time of every file except .lock."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(run)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}
