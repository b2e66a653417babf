"""The command line in one process: what it prints where, its exit codes, its tables, and how it says no."""

import json
import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import mainrun
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.data.corpus import load_corpus
from mainrun.errors import Diverged, Interrupted, RunError
from mainrun.plan.recipes import preset_names
from mainrun.store.rundir import write_json
from mainrun.ui import compare, doctor
from mainrun.ui import console as terminal


def ask(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def refused(result: Result, *words: str) -> str:
    """Exit 2, nothing on stdout, one message on stderr."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    for word in words:
        assert word in result.stderr, result.stderr
    return result.stderr


def summary(cfg: TrainConfig, **changes: Any) -> dict[str, Any]:
    """A summary as train() writes it, with made-up figures."""
    score = {
        "step": 10,
        "split": "val",
        "official": 1.4,
        "full": 1.5,
        "loss": 5.0,
        "bits_per_byte": 2.0,
        "coverage": 0.98,
        "tokens": 999,
    }
    found: dict[str, Any] = {
        "run": cfg.run_id, "preset": cfg.preset, "status": "done", "steps": 10,
        "params": 27_172_864, "tokens": 81_920, "presentations": {"presentations_per_token": 7.0}, "flops": 1e12, "seconds": 75.0,
        "tokens_per_s": 1092.0, "fingerprints": {"corpus": "c" * 64, "val": "v" * 64, "train": "t" * 64}, "geometry": [64, 128],
        "guards": [{"name": "causality", "status": "pass", "detail": ""}, {"name": "coverage", "status": "flag", "detail": "0.78"}],
    }  # fmt: skip
    last = changes.pop("last", {})
    best = {**score, "full": 1.45, "split": last.get("split", "val")}
    return found | {"last": {**score, **last}, "best": best} | changes


def make_run(out: Path, cfg: TrainConfig, **changes: Any) -> Path:
    path = out / cfg.run_id
    path.mkdir(parents=True)
    write_json(path / "config.json", {"config": cfg.model_dump(), "digest": cfg.digest, "plan": {}})
    found = summary(cfg, **changes)
    write_json(path / "summary.json", found)
    rows = [{"event": "eval", **found[name]} for name in ("best", "last")]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- the face


def test_the_public_face_is_small_and_whole() -> None:
    assert mainrun.__all__ == sorted(mainrun.__all__)
    assert set(mainrun.__all__) == {
        "Diverged", "Interrupted", "MainrunError", "TrainConfig", "UsageError", "__version__", "from_dict", "load",
    }  # fmt: skip
    for name in mainrun.__all__:
        assert getattr(mainrun, name) is not None
    assert mainrun.TrainConfig is TrainConfig
    assert mainrun.Diverged is Diverged
    assert dir(mainrun) == mainrun.__all__
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'; it has: Diverged"):
        _ = mainrun.nonsense


def test_version() -> None:
    result = ask("--version")
    assert (result.exit_code, result.stdout) == (0, f"mainrun {mainrun.__version__}\n")


def test_help_lists_every_command_in_full_sentences() -> None:
    for result in (ask("--help"), ask("-h"), ask()):
        assert result.exit_code == 0
        assert result.stderr == ""
        for command in ("train", "presets", "compare", "sample", "doctor", "download"):
            assert re.search(rf"^  {command} +[A-Z].*\.$", result.stdout, re.M), result.stdout
        assert "..." not in result.stdout.split("Commands:")[1]


@pytest.mark.parametrize("command", ["train", "presets", "compare", "sample", "doctor", "download"])
def test_every_command_has_help_and_debug(command: str) -> None:
    text = ask(command, "--help").stdout
    assert "--debug" in text
    assert f"Usage: mainrun {command}" in text


def imported(code: str) -> set[str]:
    probe = f"import sys\n{code}\nprint(*sorted(m for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "numpy", "pyarrow", "tokenizers", "sentencepiece", "huggingface_hub", "safetensors"}


def test_the_package_and_the_command_line_import_nothing_heavy() -> None:
    assert not imported("import mainrun") & (HEAVY | {"pydantic", "typer", "rich"})
    assert not imported("import mainrun.cli") & (HEAVY | {"pydantic"})
    run = "from typer.testing import CliRunner\nfrom mainrun.cli import app\nCliRunner().invoke(app, {!r})"
    assert not imported(run.format(["--help"])) & (HEAVY | {"pydantic", "rich"})
    assert not imported(run.format(["train", "--help"])) & HEAVY
    assert not imported(run.format(["presets"])) & HEAVY
    assert not imported(run.format(["train", "--preset", "nonsense"])) & HEAVY


def test_help_takes_less_than_400_ms() -> None:
    """In CPU time, the best of several: it has nothing to wait for, and this machine may be busy."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    times = []
    for _ in range(5):
        begin = used()
        subprocess.run([sys.executable, "-m", "mainrun", "--help"], capture_output=True, check=True)
        times.append(used() - begin)
    assert min(times) < 0.4


# -- how it says no


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["'trian'", "did you mean 'train'?", "mainrun --help"]),
        (["train", "--presett", "x"], ["'--presett'", "did you mean '--preset'?", "mainrun train --help"]),
        (["train", "-z"], ["'-z'", "mainrun train --help"]),
        (["train", "--set"], ["--set", "argument"]),
        (["train", "lr=1"], ["lr=1", "--set"]),
        (["train", "--set", "lr"], ["--set got 'lr'", "key=value"]),
        (["train", "--json=1"], ["--json"]),
        (["compare"], ["RUN", "mainrun compare --help"]),
        (["sample", "x"], ["--prompt", "mainrun sample --help"]),
        (["sample", "x", "--prompt", "a", "-n", "0"], ["-n", "mainrun sample --help"]),
        (["sample", "x", "--prompt", "a", "--temperature", "hot"], ["--temperature"]),
        (["presets", "--fields", "baseline"], ["'baseline'", "--fields"]),
        (["presets", "basline"], ["'basline'", "did you mean 'baseline'?"]),
        (["train", "--preset", "basline"], ["'basline'", "did you mean 'baseline'?"]),
    ],
)
def test_a_wrong_command_line_gets_one_message_and_2(args: list[str], words: list[str]) -> None:
    refused(ask(*args), *words)


@pytest.mark.parametrize("args", [["compare", "a", "b"], ["sample", "a", "--prompt", "x"]])
def test_an_unknown_run_is_refused_with_the_nearest(args: list[str], tmp_path: Path) -> None:
    refused(ask(*args, "--out", tmp_path), "'a'", "it has no runs yet")
    make_run(tmp_path, TrainConfig(preset="apple"))
    refused(
        ask(*[a.replace("a", "appel-0") if a == "a" else a for a in args], "--out", tmp_path),
        "'appel-0'",
        TrainConfig(preset="apple").run_id,
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `mainrun presets` end with an error of choice."""

    def fail_with(error: BaseException) -> None:
        def raise_it() -> list[str]:
            raise error

        monkeypatch.setattr("mainrun.plan.recipes.preset_names", raise_it)

    return fail_with


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            RuntimeError("the disk\nis on fire"),
            1,
            "crash: RuntimeError: the disk; --debug shows the traceback\n",
        ),
        (Diverged("loss nan at step 3"), 3, "diverged: loss nan at step 3\n"),
        (Interrupted("SIGTERM at step 3"), 75, "interrupted: SIGTERM at step 3\n"),
        (RunError("no such run"), 2, "error: no such run\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    failing: Callable[[BaseException], None], error: BaseException, code: int, text: str
) -> None:
    failing(error)
    result = ask("presets")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", text)
    if code != 130:
        assert "Traceback" in ask("presets", "--debug").stderr


# -- presets


def test_presets_are_listed_with_what_they_are() -> None:
    text = ask("presets").stdout
    found = json.loads(ask("presets", "--json").stdout)
    assert [f["preset"] for f in found] == preset_names()
    for f in found:
        assert f["preset"] in text
        assert f["about"][:40] in text


def test_a_preset_shows_what_it_changes() -> None:
    (found,) = json.loads(ask("presets", "baseline", "--json").stdout)
    assert found["fields"]["dropout"] == 0.1
    assert "lr" not in found["fields"]
    assert re.search(r"dropout +0\.1 +0\b", ask("presets", "baseline").stdout)


def test_a_ladder_shows_its_steps_against_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'about = "x"\nlr = 0.5\n[[steps]]\nname = "a"\n[[steps]]\nname = "b"\nn_layer = 2\n', encoding="utf-8"
    )
    a, b = json.loads(ask("presets", path, "--json").stdout)
    assert (a["preset"], a["step"]) == ("mine:a", {"lr": 0.5})
    assert (b["preset"], b["step"], b["fields"]) == ("mine:b", {"n_layer": 2}, {"lr": 0.5, "n_layer": 2})
    assert re.search(r"mine:b +n_layer +2 +6\b", ask("presets", path).stdout)


def test_the_table_of_fields_is_all_of_them() -> None:
    found = json.loads(ask("presets", "--fields", "--json").stdout)
    assert [f["field"] for f in found] == list(TrainConfig.model_fields)
    by_name = {f["field"]: f for f in found}
    assert by_name["dropout"] | {"about": ""} == {
        "field": "dropout",
        "default": 0.0,
        "allowed": "number, >= 0, < 1",
        "class": "scheduled",
        "about": "",
    }
    assert by_name["optimizer"]["allowed"] == "sgd | adamw | muon"
    assert by_name["attn_dropout"]["allowed"] == "number, >= 0, < 1, or none"
    assert by_name["attn_dropout"]["default"] is None
    text = ask("presets", "--fields").stdout
    assert all(re.search(rf"^ ?{name} ", text, re.M) for name in TrainConfig.model_fields)


# -- compare


def test_compare_ranks_by_full_and_flags_a_short_official(tmp_path: Path) -> None:
    one, two = TrainConfig(preset="one"), TrainConfig(preset="two", lr=0.5)
    make_run(tmp_path, one, last={"coverage": 0.65, "official": 1.3, "full": 2.0})
    make_run(tmp_path, two, last={"coverage": 0.98, "official": 1.4, "full": 1.5})
    a, b = json.loads(ask("compare", "one", "two", "--out", tmp_path, "--json").stdout)
    assert (a["delta_full"], b["delta_full"]) == (0.0, -0.5)
    assert a["official_flagged"]
    assert not b["official_flagged"]
    assert a["delta_official"] is None
    assert b["delta_official"] is None
    assert b["full_best"] == 1.45
    assert b["presentations_per_token"] == 7.0
    assert b["params"] == 27_172_864
    assert b["guards"] == {"pass": ["causality"], "flag": ["coverage"], "fail": []}
    text = ask("compare", "one", "two", "--out", tmp_path).stdout
    assert "1.3000 (65%!)" in text
    assert "1.4000 (98%)" in text
    assert "-0.5000" in text
    assert "not comparable" in text
    assert "+0.1000" not in text
    assert "27.2M" in text
    assert "guards: flag: coverage" in text


def test_official_scores_that_cover_enough_have_a_difference(tmp_path: Path) -> None:
    one, two = TrainConfig(preset="one"), TrainConfig(preset="two", lr=0.5)
    make_run(tmp_path, one, last={"coverage": 0.97})
    make_run(tmp_path, two, last={"official": 1.3})
    _, b = json.loads(ask("compare", "one", "two", "--out", tmp_path, "--json").stdout)
    assert b["delta_official"] == pytest.approx(-0.1)
    assert "!" not in ask("compare", "one", "two", "--out", tmp_path).stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"fingerprints": {"corpus": "c" * 64, "val": "w" * 64}},
            ["val fingerprint vvvvvvvvvvvv against wwwwwwwwwwww"],
        ),
        (
            {"fingerprints": {"corpus": "d" * 64, "val": "v" * 64}},
            ["corpus fingerprint cccccccccccc against dddddddddddd"],
        ),
        ({"last": {"split": "dev"}}, ["scored split val against dev"]),
    ],
)
def test_runs_on_other_data_are_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    one, two = TrainConfig(preset="one"), TrainConfig(preset="two", lr=0.5)
    make_run(tmp_path, one)
    make_run(tmp_path, two, **changes)
    for extra in ([], ["--json"]):
        refused(ask("compare", "one", "two", "--out", tmp_path, *extra), one.run_id, two.run_id, *words)


def test_other_training_titles_are_no_reason_to_refuse(tmp_path: Path) -> None:
    make_run(tmp_path, TrainConfig(preset="one"))
    make_run(
        tmp_path,
        TrainConfig(preset="two"),
        fingerprints={"corpus": "c" * 64, "val": "v" * 64, "train": "other"},
    )
    assert ask("compare", "one", "two", "--out", tmp_path).exit_code == 0


def test_a_comparison_is_drawn_as_a_picture_and_the_same_one_each_time(tmp_path: Path) -> None:
    for cfg in (TrainConfig(preset="one"), TrainConfig(preset="two", lr=0.5)):
        make_run(tmp_path, cfg)
    for name in ("a.svg", "b.svg"):
        assert ask("compare", "one", "two", "--out", tmp_path, "--svg", tmp_path / name).exit_code == 0
    picture = ElementTree.parse(tmp_path / "a.svg")
    assert TrainConfig(preset="one").run_id in "".join(picture.getroot().itertext())
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    refused(ask("compare", "one", "--out", tmp_path, "--svg", tmp_path / "no" / "c.svg"), "c.svg")


def test_an_unfinished_run_is_not_compared(tmp_path: Path) -> None:
    cfg = TrainConfig(preset="half")
    path = make_run(tmp_path, cfg)
    (path / "summary.json").unlink()
    write_json(path / "status.json", {"state": "interrupted", "step": 3})
    refused(
        ask("compare", "half", "--out", tmp_path), cfg.run_id, "not finished (interrupted)", "mainrun train"
    )


@pytest.mark.parametrize("broken", ["{", "[]", '{"run": "x"}', "\x00\x01"])
def test_a_damaged_summary_is_refused(tmp_path: Path, broken: str) -> None:
    path = make_run(tmp_path, TrainConfig(preset="one"))
    (path / "summary.json").write_text(broken, encoding="utf-8")
    refused(ask("compare", "one", "--out", tmp_path), "summary.json")


def rows(n: int) -> list[dict[str, Any]]:
    return compare.rows([summary(TrainConfig(preset=f"a-rather-long-name-{i}", seed=i)) for i in range(n)])


@pytest.mark.parametrize("width", [48, 60, 80, 100, 120, 160, 240])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_comparison_fits_the_screen(width: int, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    compare.show(rows(n), Console(width=width, force_terminal=False, highlight=False))
    text = capsys.readouterr().out
    table = text.split("a-rather-long-name-0-", 1)[1]
    for i in range(n):
        assert f"a-rather-long-name-{i}-" in text
    assert text.count("1.4500") == n
    assert "…" not in text
    assert all(len(line) <= width for line in table.splitlines() if "guards: flag" not in line)


# -- doctor


def test_doctor_says_what_this_machine_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mainrun.data.hub.hub_reachable", lambda *a, **k: (True, "the hub answers"))
    result = ask("doctor", "--json", "--out", tmp_path)
    found = {c["name"]: c for c in json.loads(result.stdout)}
    names = "python, torch, cores, cpu, gpu, memory, allocator, disk: runs, disk: cache, c++ compiler, hub"
    assert set(found) == set(names.split(", "))
    assert all(c["status"] in ("ok", "warn", "fail") for c in found.values())
    assert all(c["fix"] for c in found.values() if c["status"] != "ok")
    assert found["torch"]["status"] == "ok"
    assert "imports in" in found["torch"]["detail"]
    assert result.exit_code == (1 if any(c["status"] == "fail" for c in found.values()) else 0)


def test_doctor_without_torch_fails_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", "import no_such_torch")
    check = doctor._torch(doctor._ask_torch())
    assert check.status == "fail"
    assert "no_such_torch" in check.detail
    assert "pip install" in check.fix
    monkeypatch.setattr(doctor, "_ASK_TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "TORCH_SECONDS", 0.2)
    assert "more than" in doctor._ask_torch()["error"]
    monkeypatch.setattr(doctor, "_ASK_TORCH", "print('no json')")
    monkeypatch.setattr(doctor, "TORCH_SECONDS", 60)
    assert "nothing that can be read" in doctor._ask_torch()["error"]
    monkeypatch.setattr(doctor, "_ASK_TORCH", "import os; os.abort()")
    assert doctor._torch(doctor._ask_torch()).status == "fail"


def test_doctor_refuses_an_old_torch() -> None:
    assert doctor._torch({"version": "2.5.1+cpu", "seconds": 1.0, "gpus": []}).status == "fail"
    assert doctor._torch({"version": "2.13.0", "seconds": 1.0, "gpus": []}).status == "ok"
    assert doctor._torch({"version": "3.0.0a0+git12", "seconds": 1.0, "gpus": []}).status == "ok"


def test_doctor_without_a_compiler_or_a_hub_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    check = doctor._compiler()
    assert check.status == "warn"
    assert "g++" in check.fix
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "/no/such/compiler" in doctor._compiler().detail
    monkeypatch.setattr("mainrun.data.hub.hub_reachable", lambda *a, **k: (False, "nobody answers"))
    assert (doctor._hub().status, doctor._hub().detail) == ("warn", "nobody answers")


def test_doctor_finds_a_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    runs, cache = doctor._disk(blocked / "runs")
    assert runs.status == "fail"
    assert "--out" in runs.fix
    assert cache.name == "disk: cache"
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 1e9})())
    assert [c.status for c in doctor._disk(tmp_path)] == ["warn", "warn"]
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 1e6})())
    assert [c.status for c in doctor._disk(tmp_path)] == ["fail", "fail"]


def test_doctor_prints_a_line_a_check_and_fails_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = [
        doctor.Check("torch", "fail", "not there", "install it"),
        doctor.Check("hub", "ok", "reachable"),
    ]
    monkeypatch.setattr(doctor, "checks", lambda out: iter(made_up))
    result = ask("doctor")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout == "fail  torch: not there\n      fix: install it\nok    hub: reachable\n"
    monkeypatch.setattr(doctor, "checks", lambda out: iter(made_up[1:]))
    assert ask("doctor").exit_code == 0


# -- train, without training


def test_a_finished_run_is_shown_without_training(tmp_path: Path) -> None:
    (cfg,) = mainrun.load("baseline", ["lr=0.5"])
    make_run(tmp_path, cfg)
    args = ["train", "--preset", "baseline", "--set", "lr=0.5", "--out", str(tmp_path)]
    code = f"from mainrun.cli import app\ntry: app({args!r})\nexcept SystemExit as e: assert not e.code"
    assert not imported(code) & {"torch"}
    shown = ask(*args)
    assert shown.exit_code == 0
    assert cfg.run_id in shown.stdout
    assert "1.5000" in shown.stdout
    assert json.loads(ask(*args, "--json").stdout) == summary(cfg)
    quiet = ask(*args, "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_finished_run_does_not_speak_for_titles_that_changed(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("".join(f"Title number {i}\n" for i in range(40)))
    args = [
        "train",
        "--preset",
        "baseline",
        "--set",
        f"corpus=file:{titles}",
        "--set",
        "num_titles=40",
        "--out",
        tmp_path,
    ]
    (cfg,) = mainrun.load("baseline", [f"corpus=file:{titles}", "num_titles=40"])
    path = make_run(tmp_path, cfg)
    begun = json.loads((path / "config.json").read_text()) | {"fingerprints": load_corpus(cfg).fingerprints}
    write_json(path / "config.json", begun)
    assert ask(*args).exit_code == 0
    titles.write_text(titles.read_text().replace("number 7", "number seven"))
    refused(ask(*args), cfg.run_id, "other fingerprints", "restore the corpus", "--fresh")
    titles.unlink()
    assert ask(*args).exit_code == 0, "what is gone contradicts nothing"


def test_a_warning_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(out: Path) -> list[doctor.Check]:
        warnings.warn("the cache is damaged", stacklevel=1)
        return []

    monkeypatch.setattr(doctor, "checks", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert ask("doctor", "--out", tmp_path).stderr == "warning: the cache is damaged\n"


def test_a_summary_of_another_config_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (cfg,) = mainrun.load("baseline")
    path = make_run(tmp_path, cfg)
    other = from_dict(cfg.model_dump() | {"lr": 0.7})
    write_json(path / "config.json", {"config": other.model_dump(), "digest": other.digest, "plan": {}})
    refused(
        ask("train", "--preset", "baseline", "--out", tmp_path),
        cfg.run_id,
        "another config",
        "lr=0.7",
        "--fresh",
    )


class FakeTrain:
    """Stands where mainrun.train.train stands; the ladder and the exit codes need no real training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.errors: dict[str, BaseException] = {}
        self.changes: dict[str, dict[str, Any]] = {}
        monkeypatch.setattr("mainrun.train.train", self)

    def __call__(
        self, cfg: TrainConfig, out: Path, *, fresh: bool, progress: Any, store: Any, keep: Any, until: int
    ) -> dict[str, Any]:
        self.asked.append(cfg.preset)
        (out / cfg.run_id).mkdir(parents=True, exist_ok=True)
        if error := self.errors.get(cfg.preset):
            raise error
        return summary(cfg, **self.changes.get(cfg.preset, {}))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    return FakeTrain(monkeypatch)


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    path = tmp_path / "ladder.toml"
    steps = "".join(f'[[steps]]\nname = "{s}"\nseed = {i}\n' for i, s in enumerate("abc"))
    path.write_text(steps, encoding="utf-8")
    return path


@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_fresh_run_does_not_ask_for_fresh_again(
    fake: FakeTrain, tmp_path: Path, fresh: bool
) -> None:
    fake.errors["baseline"] = Interrupted("SIGTERM at step 3 of 9; run the same command again to resume")
    result = ask("train", "--preset", "baseline", "--out", tmp_path, *(["--fresh"] if fresh else []))
    assert result.exit_code == 75
    assert ("without --fresh" in result.stderr) == fresh


def test_a_ladder_trains_each_step_and_ends_with_the_comparison(
    fake: FakeTrain, ladder: Path, tmp_path: Path
) -> None:
    result = ask("train", "--preset", ladder, "--out", tmp_path / "runs")
    assert result.exit_code == 0
    assert fake.asked == ["ladder:a", "ladder:b", "ladder:c"]
    assert "full last" in result.stdout
    assert all(f"ladder-{s}-" in result.stdout for s in "abc")
    assert "[1/3]" in result.stderr
    assert "[3/3]" in result.stderr
    listed = json.loads(ask("train", "--preset", ladder, "--out", tmp_path / "runs", "--json").stdout)
    assert [s["preset"] for s in listed] == fake.asked[:3]
    one = json.loads(ask("train", "--preset", f"{ladder}:b", "--out", tmp_path / "runs", "--json").stdout)
    assert one["preset"] == "ladder:b"


def test_a_ladder_goes_on_when_one_step_diverges_and_ends_with_3(
    fake: FakeTrain, ladder: Path, tmp_path: Path
) -> None:
    fake.errors["ladder:b"] = Diverged("loss nan at step 4")
    result = ask("train", "--preset", ladder, "--out", tmp_path, "--quiet")
    assert result.exit_code == 3
    assert len(fake.asked) == 3
    assert result.stderr.count("diverged: ") == 1
    assert "ladder-b-" in result.stderr
    assert "loss nan at step 4" in result.stderr


def test_a_ladder_stops_when_it_is_interrupted(fake: FakeTrain, ladder: Path, tmp_path: Path) -> None:
    fake.errors["ladder:b"] = Interrupted("SIGTERM at step 4")
    result = ask("train", "--preset", ladder, "--out", tmp_path, "--json", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (75, "", "interrupted: SIGTERM at step 4\n")
    assert fake.asked == ["ladder:a", "ladder:b"]


def test_a_ladder_over_several_data_sets_has_no_common_table(
    fake: FakeTrain, ladder: Path, tmp_path: Path
) -> None:
    fake.changes["ladder:c"] = {"fingerprints": {"corpus": "d" * 64, "val": "w" * 64}}
    result = ask("train", "--preset", ladder, "--out", tmp_path)
    assert result.exit_code == 0
    assert "no comparison" in result.stderr
    assert result.stdout.count("full last") == 3


def test_a_crash_keeps_its_traceback_in_the_run_directory(fake: FakeTrain, tmp_path: Path) -> None:
    (cfg,) = mainrun.load("baseline")
    fake.errors["baseline"] = ZeroDivisionError("by nought")
    args = ["train", "--preset", "baseline", "--out", str(tmp_path), "--quiet"]
    result = ask(*args)
    kept = tmp_path / cfg.run_id / "traceback.txt"
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"crash: ZeroDivisionError: by nought; --debug shows the traceback, {kept} keeps it\n"
    )
    assert "Traceback" in kept.read_text(encoding="utf-8")
    fake.errors.clear()
    assert ask(*args).exit_code == 0
    assert not kept.exists()


# -- paths


def test_a_picture_overwrites_no_other_file(tmp_path: Path) -> None:
    make_run(tmp_path, TrainConfig(preset="one"))
    preset = tmp_path / "mine.toml"
    preset.write_text('base = "baseline"')
    refused(
        ask("compare", "one", "--out", tmp_path, "--svg", preset),
        "mine.toml",
        "of another kind, which would be overwritten",
        "an earlier SVG",
    )
    assert preset.read_text() == 'base = "baseline"'


def test_an_export_overwrites_no_other_study_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.folder.finished", lambda folder: {})
    (tmp_path / "study.json").write_text("mine")
    refused(ask("sweep", "export", "demo", tmp_path), "study.json", "not an export", "another folder")
    assert (tmp_path / "study.json").read_text() == "mine"


def test_every_path_option_is_checked_for_being_empty() -> None:
    root = Path(mainrun.__file__).parents[1]
    code = "".join(
        path.read_text()
        for folder in ("mainrun", "reports", "sweeps")
        for path in (root / folder).rglob("*.py")
    )
    checked = set(re.findall(r"""Option\(\s*"(--[a-z]+)",[^()]*callback=validate_paths""", code))
    assert {"--out", "--svg"} <= checked <= set(terminal.PATH_OPTIONS)


@pytest.mark.parametrize("option", terminal.PATH_OPTIONS)
@pytest.mark.parametrize("written", ["{} ", "{}="])
def test_an_empty_path_is_refused(option: str, written: str) -> None:
    refused(
        ask("compare", "one", *written.format(option).split(" ")),
        f"got {option}",
        "'', which is empty; give a path",
    )


@pytest.mark.parametrize("command", [("compare", ""), ("submit", "--run=")])
def test_an_empty_run_is_refused(command: tuple[str, ...]) -> None:
    refused(ask(*command), "empty", "give a")


def test_a_current_folder_that_was_removed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(ask("presets"), "the current folder cannot be used", "change to another one")


@pytest.mark.parametrize("columns", ["²", "1" * 5000, "-1", "wide", ""])
def test_a_width_that_is_no_number_is_ignored(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert ask("presets").exit_code == 0
    assert "COLUMNS" not in os.environ
