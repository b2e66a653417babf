"""A run handed in and checked by whoever gets it, by the commands themselves; and every way in which one of the two must say no."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from handing_in import ROOT, commit, git, pdf, quoting, repository, summary
from test_upload import Server, answer, serving

from mainrun.checks.guards import GUARDS
from mainrun.config import from_dict
from mainrun.errors import MainrunError, UsageError
from mainrun.run.session import train
from reports import bundle, submission, verification
from reports.bundle import MANIFEST, pack, sha256
from reports.replaying import HANDED_ON, replay

SMALL: dict[str, Any] = {
    "num_titles": 200,
    "n_layer": 1,
    "optimizer": "adamw",
    "lr": 0.01,
    "dropout": 0.1,
    "ema": 0.9,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a finished run and the report of it; not to be changed."""
    root = repository(tmp_path_factory.mktemp("project") / "mainrun")
    train(from_dict(TINY | SMALL), root / "runs")
    (root / "report.pdf").write_bytes(quoting(summary(the_run(root))))
    return root


def the_run(root: Path) -> Path:
    (found,) = (root / "runs").glob("*/summary.json")
    return found.parent


@pytest.fixture
def mine(project: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(project, tmp_path / "mine"))


def mainrun(root: Path, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    more = {"stdin": subprocess.DEVNULL} | more
    return subprocess.run(
        [sys.executable, "-m", "mainrun", *args],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


@pytest.fixture(scope="module")
def handed_in(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle, made by the command."""
    out = tmp_path_factory.mktemp("handed-in") / "submission.zip"
    done = mainrun(project, "submit", "--out", str(out))
    assert done.returncode == 0, done.stderr
    shown = zipfile.ZipFile(out).namelist()
    assert all(name in done.stdout for name in shown)
    assert f"{len(shown)} files, {bundle.size(out.stat().st_size)} (at most 50.0 MB)" in done.stdout
    return out


def files_of(path: Path) -> dict[str, bytes]:
    return bundle.read(path)


def rewrite(path: Path, files: dict[str, bytes], *, honest: bool = False) -> Path:
    """The bundle with other files; honest: with a manifest that lists what there is."""
    if honest:
        found = json.loads(files[MANIFEST])
        found["files"] = {
            name: {"sha256": sha256(data), "bytes": len(data)}
            for name, data in files.items()
            if name != MANIFEST
        }
        files = files | {MANIFEST: json.dumps(found).encode()}
    path.write_bytes(pack(files))
    return path


def edited(files: dict[str, bytes], name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    found = json.loads(files[name])
    change(found)
    return files | {name: json.dumps(found).encode()}


def deny(path: Path, steps: int = 2) -> list[str]:
    found = verification.verify(path, steps, lambda _: None)
    assert not found.verified
    return found.differences


# -- what is handed in


@pytest.mark.slow
def test_the_bundle_holds_the_commit_the_run_and_the_report(project: Path, handed_in: Path) -> None:
    files = files_of(handed_in)
    run = the_run(project)
    assert {name for name in files if not name.startswith("code/")} == {
        "MANIFEST.json", "report.pdf",
        *(f"run/{name}" for name in submission.RUN_FILES),
        *(f"run/{path.relative_to(run)}" for path in max(run.glob("checkpoints/*")).iterdir()),
    }  # fmt: skip
    assert {f"code/{name}" for name in git(project, "ls-files").splitlines()} == {
        name for name in files if name.startswith("code/")
    }
    found = json.loads(files[MANIFEST])
    assert found["commit"] == git(project, "rev-parse", "HEAD") and found["tree"] == git(
        project, "rev-parse", "HEAD^{tree}"
    )
    assert (
        found["figures"]["last"] == summary(run)["last"]
        and found["machine_class"] == summary(run)["machine_class"]
    )
    assert [guard["name"] for guard in found["guards"]] == list(GUARDS)
    assert {name: entry["sha256"] for name, entry in found["files"].items()} == {
        k: sha256(v) for k, v in files.items() if k != MANIFEST
    }


@pytest.mark.slow
def test_another_folder_gives_the_same_bytes(mine: Path, handed_in: Path) -> None:
    done = mainrun(mine, "submit", "--json", "--run", the_run(mine).name[:10])
    assert done.returncode == 0, done.stderr
    assert (mine / "submission.zip").read_bytes() == handed_in.read_bytes()
    assert json.loads(done.stdout)["sha256"] == sha256(handed_in.read_bytes())


@pytest.mark.slow
def test_a_dry_run_writes_nothing(mine: Path) -> None:
    before = sorted(mine.rglob("*"))
    done = mainrun(mine, "submit", "--dry-run", "--upload", "https://nowhere.invalid/x")
    assert done.returncode == 0 and "nothing was written" in done.stdout, done.stderr
    assert [path for path in sorted(mine.rglob("*")) if "__pycache__" not in path.parts] == before


def test_every_guard_has_its_way_out() -> None:
    assert list(submission.FIXES) == list(GUARDS)


# -- what is not


def refused(root: Path, match: str, report: str = "report.pdf", **more: Any) -> str:
    """By the checks before the guards, which take seconds."""
    run = submission.choose(None, root / "runs")
    with pytest.raises(MainrunError, match=match) as caught:
        submission.prepare(run, root / report, root / "submission.zip", lambda _: None, root=root)
    assert caught.value.exit_code == 2 and not (root / "submission.zip").exists()
    return str(caught.value)


def test_uncommitted_changes(mine: Path) -> None:
    (mine / "mainrun" / "train.py").write_text("# edited\n")
    (mine / "new.py").touch()
    said = refused(
        mine, "the working tree is not committed: mainrun/train.py, new.py; `./task checkpoint` commits it"
    )
    assert "report.pdf" not in said


def test_a_report_that_git_does_not_ignore_may_lie_there(mine: Path) -> None:
    (mine / "mine.pdf").write_bytes((mine / "report.pdf").read_bytes())
    (mine / "other.pdf").touch()
    said = refused(mine, "not committed", report="mine.pdf")
    assert "other.pdf" in said and "mine.pdf" not in said


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "no report .*report.pdf; make it: mainrun report "),
        (["run RUN", "full FULL"], "no official OFFICIAL"),
        (["run RUN", "official OFFICIAL"], "no full FULL"),
        (["run other-00000000", "full FULL", "official OFFICIAL"], "no run RUN"),
        (["run RUN", "full 9FULL", "official OFFICIAL1"], "no official OFFICIAL, no full FULL"),
        (
            ["run RUN", "full FULL", "official OFFICIAL", "see https://ann" + ":secret9@example.org"],
            "a password in a URL",
        ),
        ([], "does not quote this run"),
    ],
)
def test_a_report_that_does_not_quote_the_run(mine: Path, lines: list[str] | None, said: str) -> None:
    last = summary(the_run(mine))["last"]
    words = {"RUN": the_run(mine).name, "FULL": f"{last['full']:.4f}", "OFFICIAL": f"{last['official']:.4f}"}

    def filled(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    (mine / "report.pdf").unlink()
    if lines is not None:
        (mine / "report.pdf").write_bytes(pdf([filled(line) for line in lines]))
    assert "secret9" not in refused(mine, filled(said))


def test_a_report_that_is_no_pdf(mine: Path) -> None:
    for data in (b"", b"hello", (mine / "report.pdf").read_bytes()[:100]):
        (mine / "report.pdf").write_bytes(data)
        refused(mine, "is no PDF that can be read|does not quote")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: (run / "summary.json").unlink(), "no finished run in .*: --run RUN"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
        (lambda run: (run / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda run: _cut_log(run), "metrics.jsonl"),
        (lambda run: _drop_steps(run), "metrics.jsonl does not reach the last step, 37, with its score"),
        (lambda run: _edit(run / "summary.json", lambda s: s["scores"]["val"]["last"].update(full=1.0)), "the scores of val in two ways"),
        (lambda run: _edit(run / "summary.json", lambda s: s["last"].update(full=1.0)), "gives 1.0 for full of the last score"),
        (lambda run: _edit(run / "config.json", lambda c: c["config"].update(lr=0.5)), "config.json was changed after the run began"),
        (lambda run: _edit(run / "env.json", lambda e: e.update(command=["--token", "gh" + "p_" + "aB3" * 12])), "a GitHub token"),
        (lambda run: _to_link(run / "env.json"), "env.json is a link"),
    ],
)  # fmt: skip
def test_a_run_that_is_not_whole(mine: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(the_run(mine))
    refused(mine, said) if (the_run_or_none(mine)) else _no_run(mine, said)


def the_run_or_none(root: Path) -> bool:
    return bool(list((root / "runs").glob("*/summary.json")))


def _no_run(root: Path, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        submission.choose(None, root / "runs")


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def _cut_log(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def _drop_steps(run: Path) -> None:
    """The last step's row, not its score."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(
        "".join(line for line in lines if not ('"event": "step"' in line and '"step": 37,' in line))
    )


def _to_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def test_several_runs_want_a_name(mine: Path) -> None:
    shutil.copytree(the_run(mine), mine / "runs" / "second")
    with pytest.raises(UsageError, match=r"several finished runs in .* \(.*, second\); name one: --run RUN"):
        submission.choose(None, mine / "runs")


def test_a_large_checkpoint_stays_behind(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "CHECKPOINT", 1000)
    files, notes = submission._run_files(submission.choose(None, mine / "runs"))
    assert not [name for name in files if "checkpoints" in name] and "without the last checkpoint" in notes[0]


def test_a_submission_that_is_too_large_names_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LIMIT", 1000)
    files = {"a": os.urandom(900), "b": os.urandom(300)}
    with pytest.raises(UsageError, match=r"has 2 files and 1\.\d kB .* the largest: a \(0\.9 kB\), b"):
        submission._check_size(files, pack(files))


@pytest.mark.slow
def test_a_run_of_other_code(mine: Path) -> None:
    with (mine / "mainrun" / "train.py").open("a") as f:
        f.write("# edited after the run\n")
    commit(mine)
    refused(
        mine,
        "was trained by source [0-9a-f]{12}, commit [0-9a-f]{12} is source [0-9a-f]{12}; check out the commit that trained it",
    )


@pytest.mark.slow
def test_a_failed_guard_stops_it_by_name(mine: Path) -> None:
    _edit(the_run(mine) / "summary.json", lambda s: s["presentations"].update(presentations_per_token=0.5))
    refused(
        mine,
        "(?s)1 of 14 guards failed .*presentations: the ledger says .*fix: the ledger must count every forward pass",
    )


@pytest.mark.slow
def test_weights_that_are_not_the_runs(mine: Path) -> None:
    shutil.rmtree(the_run(mine) / "checkpoints")
    run = submission.choose(None, mine / "runs")
    with pytest.raises(MainrunError, match="has no usable checkpoint of its last step"):
        submission.prepare(run, mine / "report.pdf", mine / "x.zip", lambda _: None, root=mine)


# -- the command


def test_the_command_says_no_in_one_line(mine: Path) -> None:
    os.mkfifo(mine / "pipe")
    for args, said in (
        (["--yes"], "got --yes without --upload"),
        (["--upload", "https://nowhere.invalid/x"], "got --upload without a terminal to ask on; add --yes"),
        (["--upload", "http://example.org/x", "--yes"], "write https://"),
        (["--out", "runs"], "got --out runs, a folder"),
        (["--out", "no/x.zip"], "whose folder is not there"),
        (["--out", "pipe"], "got --out pipe, a device or a pipe, not a file"),  # it would be replaced
        (["--out", "report.pdf"], "got --out report.pdf, a file of another kind, which would be overwritten"),
        (["--run", "nothing"], "no run 'nothing' in runs"),
        (["--report", "none.pdf"], "no report none.pdf"),
    ):
        done = mainrun(mine, "submit", *args)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr


@pytest.mark.slow
def test_it_is_sent_with_yes_and_kept_when_that_fails(mine: Path) -> None:
    with serving(answer(200)) as server:
        done = mainrun(mine, "submit", "--upload", server.url, "--yes")
        assert (
            done.returncode == 0
            and "sent to http://127.0.0.1:" in done.stderr
            and "hidden" not in done.stderr
        )
    assert [body for _, body in server.got] == [(mine / "submission.zip").read_bytes()]
    (mine / "submission.zip").unlink()
    with serving(answer(403)) as server:
        done = mainrun(mine, "submit", "--upload", server.url, "--yes")
    assert done.returncode == 1 and "answered 403" in done.stderr and "submission.zip is kept" in done.stderr
    assert (mine / "submission.zip").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_on_a_terminal_the_runs_id_is_typed(mine: Path, right: bool) -> None:
    leader, follower = pty.openpty()
    run = the_run(mine).name
    threading.Timer(0.5, os.write, (leader, f"{run if right else 'yes'}\n".encode())).start()
    with serving(answer(200)) as server:
        done = mainrun(mine, "submit", "--upload", server.url, stdin=follower)
    os.close(leader)
    os.close(follower)
    assert f"type the run's id, {run}, to send it" in done.stderr
    assert (done.returncode, len(server.got)) == ((0, 1) if right else (1, 0)), done.stderr
    assert (mine / "submission.zip").is_file() and isinstance(server, Server)


# -- whoever gets it


@pytest.mark.slow
def test_a_good_bundle_is_verified(handed_in: Path, tmp_path: Path) -> None:
    done = mainrun(ROOT, "verify", str(handed_in), "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("verified: ")
    assert "this executes the bundle's own code" in done.stderr
    assert "looked at: 3 of 37 steps trained again, scored after 1\n" in done.stdout
    assert "looked at: the last weights scored again\n" in done.stdout
    assert "compared: every bit, for this is the machine class of the run\n" in done.stdout
    assert "the trainer in the bundle is the one installed here\n" in done.stdout


@pytest.mark.slow
def test_all_steps_can_be_trained_again(handed_in: Path) -> None:
    found = verification.verify(handed_in, 1000, lambda _: None)
    assert found.verified and (found.steps, found.of, found.same_class) == (37, 37, True)


@pytest.mark.slow
def test_what_was_changed_is_named_and_nothing_is_run(
    handed_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "replay", lambda *args: pytest.fail("it was run"))
    files = files_of(handed_in)
    digit = files["run/summary.json"].replace(b'"steps": 37', b'"steps": 38', 1)
    code = files["code/mainrun/train.py"].replace(b"(", b"[", 1)
    for name, data in (
        ("run/summary.json", digit),
        ("code/mainrun/train.py", code),
        ("report.pdf", files["report.pdf"] + b" "),
    ):
        assert data != files[name]
        said = deny(rewrite(tmp_path / "x.zip", files | {name: data}))
        assert len(said) == 1 and said[0].startswith(f"{name} was changed: sha256 ")
    assert deny(rewrite(tmp_path / "x.zip", files | {"code/mainrun/evil.py": b""})) == [
        "code/mainrun/evil.py is in the bundle, not in its manifest"
    ]


@pytest.mark.slow
def test_a_manifest_that_was_made_to_fit_does_not_help_on_paper(
    handed_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "replay", lambda *args: pytest.fail("it was run"))
    files, place = files_of(handed_in), tmp_path / "x.zip"
    better = edited(files, "run/summary.json", lambda s: s["last"].update(full=s["last"]["full"] - 0.1))
    assert any("for full of the last score" in line for line in deny(rewrite(place, better, honest=True)))
    claims = edited(files, MANIFEST, lambda m: m["figures"]["last"].update(official=1.0))
    assert any(line.startswith("last of the figures") for line in deny(rewrite(place, claims)))
    other = files | {"report.pdf": pdf(["another report"])}
    assert any(
        line.startswith("report.pdf does not quote this run")
        for line in deny(rewrite(place, other, honest=True))
    )
    config = edited(files, "run/config.json", lambda c: c["config"].update(lr=1.0))
    assert any("config.json was changed" in line for line in deny(rewrite(place, config, honest=True)))
    torn = files | {"run/summary.json": b"[" * 100_000}
    lines = deny(rewrite(place, torn, honest=True))
    assert any("summary.json is damaged: it is" in line for line in lines), lines
    assert deny(rewrite(place, {k: v for k, v in files.items() if k != "run/env.json"}, honest=True)) == [
        "there is no run/env.json"
    ]


@pytest.mark.slow
def test_the_replay_finds_what_fits_on_paper(handed_in: Path, tmp_path: Path) -> None:
    """One digit of the log, or one byte of the code, with everything else made to fit."""
    files, place = files_of(handed_in), tmp_path / "x.zip"
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    (first,) = (row for row in rows if row["event"] == "step" and row["step"] == 2)
    was, first["loss"] = first["loss"], first["loss"] * (1 + 2**-40)
    log = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    said = deny(rewrite(place, files | {"run/metrics.jsonl": log}, honest=True))
    assert said == [f"step 2: loss is {first['loss']!r} in the log, {was!r} now"]

    code = files["code/mainrun/train.py"] + b"\n"
    said = deny(rewrite(place, files | {"code/mainrun/train.py": code}, honest=True))
    assert len(said) == 1 and said[0].startswith("the run was trained by source ")


@pytest.mark.slow
def test_what_else_follows_from_code_and_config_is_compared(handed_in: Path, tmp_path: Path) -> None:
    """Each with everything else made to fit: weights that cannot be read, FLOPs, a run that says it is not done."""
    files, place = files_of(handed_in), tmp_path / "x.zip"
    (weights,) = (name for name in files if name.endswith("state.safetensors"))
    torn = files | {weights: files[weights][:-1] + bytes([files[weights][-1] ^ 1])}
    said = deny(rewrite(place, torn, honest=True), steps=1)
    assert len(said) == 1 and said[0].startswith("the last weights are in the bundle and cannot be used: ")
    dearer = edited(files, "run/summary.json", lambda s: s.update(flops=2 * s["flops"]))
    without = {
        name: data for name, data in dearer.items() if "/checkpoints/" not in name
    }  # known without them, too
    for forged in (dearer, without):
        said = deny(rewrite(place, forged, honest=True), steps=1)
        assert len(said) == 1 and said[0].startswith("flops is ")
    running = edited(files, "run/status.json", lambda s: s.update(state="running"))
    assert deny(rewrite(place, running, honest=True)) == [
        "status.json says 'running', and only a run that is done can be handed in"
    ]


@pytest.mark.slow
def test_a_last_score_that_the_weights_do_not_give(handed_in: Path, tmp_path: Path) -> None:
    """Summary, log, manifest and report all tell the better figure; only the weights do not."""
    files = files_of(handed_in)
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    last = next(row for row in reversed(rows) if row["event"] == "eval")
    last["full"] -= 0.1
    files["run/metrics.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def better(found: dict[str, Any]) -> None:
        for score in (found["last"], found["best"], *found.get("scores", {}).get("val", {}).values()):
            score["full"] = last["full"]

    files = edited(files, "run/summary.json", better)
    files = edited(files, MANIFEST, lambda m: better(m["figures"]))
    files["report.pdf"] = quoting(json.loads(files["run/summary.json"]))
    said = deny(rewrite(tmp_path / "x.zip", files, honest=True), steps=1)
    assert len(said) == 1 and said[0].startswith(f"step 37, val: full is {last['full']!r} in the log, ")


@pytest.mark.slow
def test_another_machine_class_is_compared_within_a_tolerance(handed_in: Path, tmp_path: Path) -> None:
    files = files_of(handed_in)
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    for row in rows[:3]:
        row["loss"] *= 1 + 1e-4
    files["run/metrics.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    files = edited(files, "run/env.json", lambda e: e["machine_classes"][0].update(device="another"))
    found = verification.verify(rewrite(tmp_path / "x.zip", files, honest=True), 2, lambda _: None)
    assert found.verified and not found.same_class and found.tolerance == verification.TOLERANCE["float32"]
    assert found.apart[0].startswith("device: another there, ")


def test_no_key_of_the_user_reaches_foreign_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mainrun").mkdir()
    (tmp_path / "mainrun" / "__init__.py").touch()
    spy = "import json, os, sys\njson.dump({'env': dict(os.environ), 'path': sys.path}, open(sys.argv[3], 'w'))\n"
    (tmp_path / "mainrun" / "replay.py").write_text(spy)
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    found = replay(tmp_path, "steps", tmp_path)
    assert set(found["env"]) <= {*HANDED_ON, "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}
    assert found["path"][0] == str(tmp_path) and "" not in found["path"]


@pytest.mark.parametrize(
    "text",
    [
        "raise SystemExit('no')",
        "import sys; open(sys.argv[3], 'w').write('[' * 10000)",
        "import sys; open(sys.argv[3], 'w').write('3')",
    ],
)
def test_foreign_code_that_fails(tmp_path: Path, text: str) -> None:
    (tmp_path / "mainrun").mkdir()
    (tmp_path / "mainrun" / "__init__.py").touch()
    (tmp_path / "mainrun" / "replay.py").write_text(text)
    with pytest.raises(MainrunError, match="the code at hand"):
        replay(tmp_path, "steps", tmp_path)
