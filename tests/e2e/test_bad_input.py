"""Tests that bad input of every kind gives exit code 2 and one message, and changes no file.

Most cases run in the test process, which imports torch only once. A few run in their own process.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_sets
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.config import digest_of

TITLES = "".join(
    f"Show HN: a title about {word} number {i}\n" for i in range(200) for word in ("ships", "bread", "rust")
)


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def train(
    out: Path, *sets: str, preset: object = "baseline", flags: tuple[str, ...] = ("--quiet",)
) -> Result:
    """Train a tiny run with two checkpoints. `sets` overrides fields of its config."""
    options: list[str] = []
    for text in sets:
        options += ["--set", text]
    return invoke(
        "train",
        "--preset",
        preset,
        *tiny_sets(epochs=2),
        *options,
        "--out",
        out,
        *flags,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files but .lock, which changes when a run is read."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def one_message(stderr: str, *words: str) -> None:
    assert "Traceback" not in stderr
    assert stderr.startswith("error: "), stderr
    assert stderr.count("error: ") == len(stderr.splitlines()) == 1, stderr
    for word in words:
        assert word in stderr, stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, which tests copy."""
    out = tmp_path_factory.mktemp("made")
    assert train(out).exit_code == 0
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "runs"
    shutil.copytree(made, copy)
    return copy


def only(out: Path) -> Path:
    (path,) = (p for p in out.iterdir() if p.is_dir() and p.name != ".store")
    return path


def refused(out: Path, call: Callable[[], Result], *words: str) -> None:
    """Check that a call ends with one error message, and that it changes nothing in `out`."""
    before = files(out)
    folders = sorted(p.name for p in out.iterdir())
    result = call()
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert result.stdout == ""
    one_message(result.stderr, *words)
    assert files(out) == before, "a file has changed"
    assert sorted(p.name for p in out.iterdir()) == folders, "the refused command left a directory"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["n_layers=2"], ["unknown field 'n_layers'", "did you mean 'n_layer'?", "mainrun presets --fields"]),
        (["learning_rate=2"], ["unknown field 'learning_rate'"]),
        (["n_layer=two"], ["n_layer='two'", "integer"]),
        (["n_layer=2.5"], ["n_layer=2.5", "integer"]),
        (["bias=1"], ["bias=1", "true or false"]),
        (["lr=fast"], ["lr='fast'", "number"]),
        (["lr=nan"], ["lr=nan"]),
        (["optimizer=adam"], ["optimizer='adam'", "'adamw'"]),
        (["lr=-1"], ["lr=-1", "greater than 0"]),
        (["dropout=1"], ["dropout=1", "less than 1"]),
        (["n_layer=0"], ["n_layer=0", "greater than or equal to 1"]),
        (["n_head=7"], ["n_head=7", "d_model=32", "set n_head to one of [2, 4, 8]"]),
        (["grad_accum=3"], ["grad_accum=3", "batch_size=8"]),
        (["official_geometry=1x17"], ["official_geometry='1x17'", "block_size=16"]),
        (["corpus=wiki"], ["corpus='wiki'", "synthetic"]),
        (["lr"], ["--set got 'lr'", "key=value"]),
        (["vocab_size=50000"], ["vocab_size=50,000", "--set vocab_size="]),
        (["tokenizer=unigram", "vocab_size=50000"], ["vocab_size=50,000", "--set vocab_size="]),
        (["official_geometry=1000x16"], ["the val split", "16,001", "official_geometry"]),
        (["dev_frac=0.01", "official_geometry=10x16"], ["the dev split", "161"]),
        (["batch_size=2048", "official_geometry=4x16"], ["batch_size"]),
    ],
)
def test_a_bad_field(out: Path, sets: list[str], words: list[str]) -> None:
    refused(out, lambda: train(out, *sets), *words)


@pytest.mark.parametrize(
    ("preset", "text", "words"),
    [
        ("basline", None, ["unknown preset 'basline'", "did you mean 'baseline'?"]),
        ("baseline:x", None, ["baseline", "no steps"]),
        ("{dir}/no.toml", None, ["no.toml", "does not exist"]),
        ("{dir}/mine.toml", "lr = = 3", ["mine.toml", "not valid TOML"]),
        ("{dir}/mine.toml", "\udc80\udcff", ["mine.toml", "not UTF-8"]),
        ("{dir}/mine.toml", "learning = 3", ["unknown field 'learning'"]),
        ("{dir}/mine.toml", "steps = 3", ["mine.toml", "steps"]),
        ("{dir}/mine.toml", "steps = []", ["mine.toml", "steps"]),
        ("{dir}/mine.toml", "steps = [1, 2]", ["mine.toml", "steps"]),
        ("{dir}/mine.toml", "scale = 3", ["mine.toml", "scale"]),
    ],
)
def test_a_bad_preset(out: Path, tmp_path: Path, preset: str, text: str | None, words: list[str]) -> None:
    if text is not None:
        (tmp_path / "mine.toml").write_bytes(text.encode(errors="surrogateescape"))
    refused(out, lambda: train(out, preset=preset.format(dir=tmp_path)), *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt"]),
        ("empty.txt", b"", ["empty.txt"]),
        ("blank.txt", b"\n\n  \n", ["blank.txt"]),
        ("binary.txt", bytes(range(256)) * 100, ["binary.txt"]),
        ("nul.txt", b"one\0title\n" * 1000, ["nul.txt"]),
        ("oneline.txt", b"only one title\n", ["oneline.txt"]),
        ("latin1.txt", "caf\xe9 number\n".encode("latin-1") * 1000, ["latin1.txt"]),
        ("few.txt", TITLES[:2000].encode(), ["few.txt", "num_titles"]),
        ("titles.csv#title", b"name,score\na,1\nb,2\n", ["titles.csv", "title"]),
        ("titles.jsonl", b'{"title": "a"}\nnot json\n', ["titles.jsonl"]),
        ("titles.parquet", b"PAR1 but not really", ["titles.parquet"]),
        ("titles.xlsx", b"PK", ["titles.xlsx"]),
    ],
)
def test_a_bad_corpus(out: Path, tmp_path: Path, name: str, content: bytes | None, words: list[str]) -> None:
    path = tmp_path / name.partition("#")[0]
    if content is not None:
        path.write_bytes(content)
    refused(out, lambda: train(out, f"corpus=file:{tmp_path / name}"), *words)


def test_a_folder_is_refused_as_a_corpus(out: Path, tmp_path: Path) -> None:
    refused(out, lambda: train(out, f"corpus=file:{tmp_path}"), str(tmp_path))


def test_a_bad_mix_file(out: Path, tmp_path: Path) -> None:
    refused(out, lambda: train(out, f"corpus=mix:{tmp_path}/no.toml"), "no.toml")
    (tmp_path / "mix.toml").write_text("this is = = not TOML", encoding="utf-8")
    refused(out, lambda: train(out, f"corpus=mix:{tmp_path}/mix.toml"), "mix.toml")


# -- the output


@pytest.mark.parametrize("folder", ["{file}", "{file}/runs", "/proc/no-such-place/runs"])
def test_an_output_that_cannot_be_written(out: Path, tmp_path: Path, folder: str) -> None:
    """Not even root can create a folder below a file or below /proc."""
    blocker = tmp_path / "a-file"
    blocker.write_text("mine", encoding="utf-8")
    refused(out, lambda: train(Path(folder.format(file=blocker))), "cannot write", "--out")
    assert blocker.read_text(encoding="utf-8") == "mine"


def test_a_run_directory_of_another_config(out: Path) -> None:
    path = only(out) / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["config"]["lr"] = 0.7
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(out, lambda: train(out), "config.json was changed after the run began", "--fresh")
    content["digest"] = digest_of(content["config"])  # the file is now valid, but has another config
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(out, lambda: train(out), "another config", "lr=0.7", "0.006", "--fresh")
    (only(out) / "summary.json").unlink()
    refused(out, lambda: train(out), "another config", "lr=0.7", "0.006", "--fresh")
    refused(out, lambda: train(out, flags=("--json",)), "another config")


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"config": {}}', '{"config": {"lr": -1}}', '{"config": {"unheard_of": 1}}']
)
def test_an_invalid_config_json(out: Path, content: str) -> None:
    (only(out) / "config.json").write_text(content, encoding="utf-8")
    refused(out, lambda: train(out), only(out).name)
    (only(out) / "summary.json").unlink()
    refused(out, lambda: train(out), only(out).name)


def test_a_folder_that_is_not_a_run(out: Path) -> None:
    for p in only(out).iterdir():
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    (only(out) / "thesis.txt").write_text("ten years of work", encoding="utf-8")
    result = train(out)
    assert result.exit_code == 2
    one_message(result.stderr, "thesis.txt", "no run of mainrun", "move the folder away")
    assert (only(out) / "thesis.txt").read_text(encoding="utf-8") == "ten years of work"


def test_a_run_that_another_process_is_writing(out: Path) -> None:
    (only(out) / "summary.json").unlink()
    with (only(out) / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(out, lambda: train(out), "being written by process")
    assert train(out).exit_code == 0


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"run": "x"}', "\0"])
def test_a_damaged_summary(out: Path, content: str) -> None:
    (only(out) / "summary.json").write_text(content, encoding="utf-8")
    for flags in ([], ["--json"]):
        refused(out, lambda flags=flags: train(out, flags=tuple(flags)), "summary.json", "--fresh")  # type: ignore[misc]
    refused(out, lambda: invoke("compare", only(out)), "summary.json")


# -- checkpoints


def damage(path: Path, how: str) -> None:
    meta = path / "meta.json"
    state = path / "state.safetensors"
    if how == "a changed meta.json":
        text = json.loads(meta.read_text(encoding="utf-8"))
        meta.write_text(json.dumps(text | {"step": text["step"] + 1}), encoding="utf-8")
    elif how == "a changed weight":
        data = bytearray(state.read_bytes())
        data[-3] ^= 1
        state.write_bytes(data)
    elif how == "a torn state":
        state.write_bytes(state.read_bytes()[:-100])
    elif how == "no state":
        state.unlink()
    elif how == "an empty meta.json":
        meta.write_text("", encoding="utf-8")
    else:
        meta.write_text("[1, 2]", encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        "a changed meta.json",
        "a changed weight",
        "a torn state",
        "no state",
        "an empty meta.json",
        "another meta.json",
    ],
)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_damaged_checkpoint_is_skipped_with_a_message(out: Path, how: str, all_of_them: bool) -> None:
    """The run resumes from an earlier checkpoint or from the start, and its result is the same."""
    undamaged = json.loads((only(out) / "summary.json").read_text(encoding="utf-8"))
    (only(out) / "summary.json").unlink()
    checkpoints = sorted((only(out) / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    damaged = checkpoints if all_of_them else checkpoints[-1:]
    for checkpoint in damaged:
        damage(checkpoint, how)
    result = train(out, flags=("--json",))
    assert result.exit_code == 0, result.output
    for checkpoint in damaged:
        assert f"{checkpoint.name} is skipped" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    again = json.loads(result.stdout)
    assert again["weights"] == undamaged["weights"]
    assert again["last"] == undamaged["last"]


@pytest.mark.parametrize("how", ["a changed weight", "an empty meta.json"])
def test_sampling_from_a_damaged_run(out: Path, how: str) -> None:
    for checkpoint in (only(out) / "checkpoints").iterdir():
        damage(checkpoint, how)
    refused(out, lambda: invoke("sample", only(out), "--prompt", "a"), "no usable checkpoint")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"kind": "bpe"}'])
def test_sampling_with_a_damaged_tokenizer(out: Path, content: str | None) -> None:
    path = only(out) / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    refused(out, lambda: invoke("sample", only(out), "--prompt", "a"), "tokenizer")


# -- other commands


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compare", "nothing"], ["'nothing'", "baseline-"]),
        (["sample", "nothing", "--prompt", "a"], ["'nothing'", "baseline-"]),
        (["download", "hm"], ["'hm'", "hn"]),
        (["download", "synthetic"], ["'synthetic'", "hn"]),
    ],
)
def test_other_commands(out: Path, args: list[str], words: list[str]) -> None:
    refused(out, lambda: invoke(*args, *(["--out", out] if args[0] != "download" else [])), *words)


def test_a_dry_run_refuses_the_same_input(out: Path, tmp_path: Path) -> None:
    dry = ("--dry-run",)
    refused(out, lambda: train(out, "n_head=7", flags=dry), "n_head=7")
    refused(out, lambda: train(out, f"corpus=file:{tmp_path}/no.txt", flags=dry), "no.txt")
    refused(out, lambda: train(out, "official_geometry=1000x16", flags=dry), "the val split")


# -- in a separate process


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["train", "--fersh"], ["unknown option '--fersh'", "did you mean '--fresh'?"]),
        (["train", "--preset", "optimised"], ["unknown preset 'optimised'", "did you mean 'optimized'?"]),
        (["train", *tiny_sets(), "--set", "n_head=7"], ["n_head=7"]),
        (["train", *tiny_sets(), "--set", "corpus=file:no-such-file.txt"], ["no-such-file.txt"]),
        (["train", *tiny_sets(), "--out", "/dev/null/runs"], ["/dev/null/runs", "--out"]),
    ],
)
def test_a_separate_process(args: list[str], words: list[str], tmp_path: Path) -> None:
    src = str(Path(__file__).parents[2])
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": src}
    done = subprocess.run(
        [sys.executable, "-m", "mainrun", *args],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    one_message(done.stderr, *words)
    assert list(tmp_path.iterdir()) == []
