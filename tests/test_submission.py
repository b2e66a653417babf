"""Tests `submit` and `verify` with a real run and a real repository, and every reason for a refusal."""

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
from submitting import ROOT, commit, git, make_pdf, make_report, read_summary, repository
from test_upload import answer, serving

from mainrun.checks.guards import GUARDS
from mainrun.config import from_dict
from mainrun.errors import MainrunError, UsageError
from mainrun.run.session import train
from reports.submission import bundle, finished_run, prepare, verification
from reports.submission.bundle import MANIFEST, pack, sha256
from reports.submission.replay_process import PASSED_VARIABLES, run_replay

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
    """Return a repository with a finished run and its report, which tests must not change."""
    root = repository(tmp_path_factory.mktemp("project") / "mainrun")
    train(from_dict(TINY | SMALL), root / "runs")
    (root / "report.pdf").write_bytes(make_report(read_summary(the_run(root))))
    return root


def the_run(root: Path) -> Path:
    (summary,) = (root / "runs").glob("*/summary.json")
    return summary.parent


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """Return a copy of the project that a test may change."""
    return Path(shutil.copytree(project, tmp_path / "copy"))


def mainrun(root: Path, *args: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mainrun", *args],
        cwd=root,
        env=env,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def submission(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a valid bundle made by `mainrun submit`."""
    out = tmp_path_factory.mktemp("submission") / "submission.zip"
    done = mainrun(project, "submit", "--out", str(out))
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(out).namelist()
    assert all(name in done.stdout for name in names)
    assert f"{len(names)} files, {bundle.format_size(out.stat().st_size)} (at most 50.0 MB)" in done.stdout
    return out


def files_of(path: Path) -> dict[str, bytes]:
    return bundle.read(path)


def rewrite(path: Path, files: dict[str, bytes], *, honest: bool = False) -> Path:
    """Write a bundle with the given files. If `honest` is true, the manifest lists these files."""
    if honest:
        manifest = json.loads(files[MANIFEST])
        manifest["files"] = {
            name: {"sha256": sha256(data), "bytes": len(data)}
            for name, data in files.items()
            if name != MANIFEST
        }
        files = files | {MANIFEST: json.dumps(manifest).encode()}
    path.write_bytes(pack(files))
    return path


def edited(files: dict[str, bytes], name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    value = json.loads(files[name])
    change(value)
    return files | {name: json.dumps(value).encode()}


def differences(path: Path, steps: int = 2) -> list[str]:
    """Verify a bundle that must fail, and return the differences."""
    verdict = verification.verify(path, steps, lambda _: None)
    assert not verdict.verified
    return verdict.differences


# -- the content of a submission


@pytest.mark.slow
def test_the_bundle_contains_the_commit_the_run_and_the_report(project: Path, submission: Path) -> None:
    files = files_of(submission)
    run = the_run(project)
    assert {name for name in files if not name.startswith("code/")} == {
        "MANIFEST.json", "report.pdf",
        *(f"run/{name}" for name in finished_run.RUN_FILES),
        *(f"run/{path.relative_to(run)}" for path in max(run.glob("checkpoints/*")).iterdir()),
    }  # fmt: skip
    assert {f"code/{name}" for name in git(project, "ls-files").splitlines()} == {
        name for name in files if name.startswith("code/")
    }
    manifest = json.loads(files[MANIFEST])
    assert manifest["commit"] == git(project, "rev-parse", "HEAD")
    assert manifest["tree"] == git(project, "rev-parse", "HEAD^{tree}")
    assert manifest["figures"]["last"] == read_summary(run)["last"]
    assert manifest["machine_class"] == read_summary(run)["machine_class"]
    assert [guard["name"] for guard in manifest["guards"]] == list(GUARDS)
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        k: sha256(v) for k, v in files.items() if k != MANIFEST
    }


@pytest.mark.slow
def test_another_folder_gives_the_same_bytes(copy: Path, submission: Path) -> None:
    done = mainrun(copy, "submit", "--json", "--run", the_run(copy).name[:10])
    assert done.returncode == 0, done.stderr
    assert (copy / "submission.zip").read_bytes() == submission.read_bytes()
    assert json.loads(done.stdout)["sha256"] == sha256(submission.read_bytes())


@pytest.mark.slow
def test_a_dry_run_writes_nothing(copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    done = mainrun(copy, "submit", "--dry-run", "--upload", "https://nowhere.invalid/x")
    assert done.returncode == 0 and "nothing was written" in done.stdout, done.stderr
    assert [path for path in sorted(copy.rglob("*")) if "__pycache__" not in path.parts] == before


def test_every_guard_has_a_fix() -> None:
    assert list(prepare.FIXES) == list(GUARDS)


# -- refusals


def refused(root: Path, match: str, report: str = "report.pdf") -> str:
    """Return the error of `prepare`. The checks before the guards take only a few seconds."""
    run = prepare.choose_run(None, root / "runs")
    with pytest.raises(MainrunError, match=match) as caught:
        prepare.prepare(run, root / report, root / "submission.zip", lambda _: None, root=root)
    assert caught.value.exit_code == 2 and not (root / "submission.zip").exists()
    return str(caught.value)


def test_uncommitted_changes(copy: Path) -> None:
    (copy / "mainrun" / "train.py").write_text("# edited\n")
    (copy / "new.py").touch()
    message = refused(
        copy,
        "the working tree has uncommitted changes: mainrun/train.py, new.py; "
        "commit them with `./task checkpoint`",
    )
    assert "report.pdf" not in message


def test_the_report_may_be_untracked(copy: Path) -> None:
    (copy / "copy.pdf").write_bytes((copy / "report.pdf").read_bytes())
    (copy / "other.pdf").touch()
    message = refused(copy, "uncommitted changes", report="copy.pdf")
    assert "other.pdf" in message and "copy.pdf" not in message


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (None, "there is no report .*report.pdf; create it with mainrun report "),
        (["run RUN", "full FULL"], "it lacks official OFFICIAL"),
        (["run RUN", "official OFFICIAL"], "it lacks full FULL"),
        (["run other-00000000", "full FULL", "official OFFICIAL"], "it lacks run RUN"),
        (["run RUN", "full 9FULL", "official OFFICIAL1"], "it lacks official OFFICIAL, full FULL"),
        (
            ["run RUN", "full FULL", "official OFFICIAL", "see https://ann" + ":secret9@example.org"],
            "a password in a URL",
        ),
        ([], "does not quote this run"),
    ],
)
def test_a_report_that_does_not_quote_the_run(copy: Path, lines: list[str] | None, problem: str) -> None:
    last = read_summary(the_run(copy))["last"]
    words = {"RUN": the_run(copy).name, "FULL": f"{last['full']:.4f}", "OFFICIAL": f"{last['official']:.4f}"}

    def fill_in(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    (copy / "report.pdf").unlink()
    if lines is not None:
        (copy / "report.pdf").write_bytes(make_pdf([fill_in(line) for line in lines]))
    assert "secret9" not in refused(copy, fill_in(problem))


def test_a_report_that_is_not_a_pdf(copy: Path) -> None:
    for data in (b"", b"hello", (copy / "report.pdf").read_bytes()[:100]):
        (copy / "report.pdf").write_bytes(data)
        refused(copy, "is not a readable PDF|does not quote")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda run: (run / "summary.json").unlink(), "no finished run; train a run, then give --run RUN"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
        (lambda run: (run / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda run: _cut_log(run), "metrics.jsonl"),
        (
            lambda run: _drop_steps(run),
            "metrics.jsonl does not end with a row and a val score of the last step, 37",
        ),
        (lambda run: _edit(run / "summary.json", _change_a_score), "contradictory scores of val"),
        (
            lambda run: _edit(run / "summary.json", lambda s: s["last"].update(full=1.0)),
            "says 1.0 for full of the last score",
        ),
        (
            lambda run: _edit(run / "config.json", lambda c: c["config"].update(lr=0.5)),
            "config.json was changed after the run began",
        ),
        (
            lambda run: _edit(run / "env.json", lambda e: e.update(command=["gh" + "p_" + "aB3" * 12])),
            "a GitHub token",
        ),
        (lambda run: _to_link(run / "env.json"), "env.json is a link"),
    ],
)  # fmt: skip
def test_a_damaged_run(copy: Path, damage: Callable[[Path], None], problem: str) -> None:
    damage(the_run(copy))
    if list((copy / "runs").glob("*/summary.json")):
        refused(copy, problem)
    else:
        with pytest.raises(UsageError, match=problem):
            prepare.choose_run(None, copy / "runs")


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _change_a_score(summary: dict[str, Any]) -> None:
    summary["scores"]["val"]["last"].update(full=1.0)


def _cut_log(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def _drop_steps(run: Path) -> None:
    """Remove the row of the last step, but not its score."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"event": "step"' not in line or '"step": 37,' not in line]
    (run / "metrics.jsonl").write_text("".join(kept))


def _to_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def test_several_runs_need_a_name(copy: Path) -> None:
    shutil.copytree(the_run(copy), copy / "runs" / "second")
    with pytest.raises(
        UsageError, match=r"has several finished runs \(.*, second\); choose one of them with --run RUN"
    ):
        prepare.choose_run(None, copy / "runs")


def test_a_large_checkpoint_is_left_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_CHECKPOINT_BYTES", 1000)
    files, notes = prepare._run_files(prepare.choose_run(None, copy / "runs"))
    assert (
        not [name for name in files if "checkpoints" in name]
        and "the last checkpoint is left out" in notes[0]
    )


def test_a_submission_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_ZIP_BYTES", 1000)
    files = {"a": os.urandom(900), "b": os.urandom(300)}
    with pytest.raises(
        UsageError, match=r"has 2 files and 1\.\d kB .* the largest files are a \(0\.9 kB\), b"
    ):
        prepare._check_size(files, pack(files))


@pytest.mark.slow
def test_a_run_of_other_code(copy: Path) -> None:
    with (copy / "mainrun" / "train.py").open("a") as f:
        f.write("# edited after the run\n")
    commit(copy)
    sources = "was trained by source [0-9a-f]{12}, but commit [0-9a-f]{12} is source [0-9a-f]{12}"
    refused(copy, f"{sources}; check out the commit that trained the run")


@pytest.mark.slow
def test_a_failed_guard(copy: Path) -> None:
    _edit(the_run(copy) / "summary.json", lambda s: s["presentations"].update(presentations_per_token=0.5))
    fix = "fix: the ledger must count every forward pass"
    refused(copy, f"(?s)1 of 14 guards failed .*presentations: the ledger says .*{fix}")


@pytest.mark.slow
def test_a_run_without_its_weights(copy: Path) -> None:
    shutil.rmtree(the_run(copy) / "checkpoints")
    run = prepare.choose_run(None, copy / "runs")
    with pytest.raises(MainrunError, match="has no usable checkpoint of its last step"):
        prepare.prepare(run, copy / "report.pdf", copy / "x.zip", lambda _: None, root=copy)


# -- the command


def test_a_refusal_is_one_line(copy: Path) -> None:
    os.mkfifo(copy / "pipe")
    for args, problem in (
        (["--yes"], "got --yes without --upload"),
        (
            ["--upload", "https://nowhere.invalid/x"],
            "--upload cannot ask for confirmation without a terminal; add --yes",
        ),
        (["--upload", "http://example.org/x", "--yes"], "use https://"),
        (["--out", "runs"], "got --out runs, which is a folder"),
        (["--out", "no/x.zip"], "the folder of --out no/x.zip does not exist"),
        (["--out", "pipe"], "got --out pipe, which is a device or a pipe, not a file"),
        (
            ["--out", "report.pdf"],
            "got --out report.pdf, which is a file of another kind and would be overwritten",
        ),
        (["--run", "nothing"], "no run 'nothing' in runs"),
        (["--report", "none.pdf"], "there is no report none.pdf"),
    ):
        done = mainrun(copy, "submit", *args)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ") and problem in done.stderr


@pytest.mark.slow
def test_yes_uploads_at_once_and_a_failed_upload_keeps_the_zip(copy: Path) -> None:
    with serving(answer(200)) as server:
        done = mainrun(copy, "submit", "--upload", server.url, "--yes")
        assert done.returncode == 0, done.stderr
        assert "sent to http://127.0.0.1:" in done.stderr and "hidden" not in done.stderr
    assert [body for _, body in server.requests] == [(copy / "submission.zip").read_bytes()]
    (copy / "submission.zip").unlink()
    with serving(answer(403)) as server:
        done = mainrun(copy, "submit", "--upload", server.url, "--yes")
    assert done.returncode == 1 and "answered 403" in done.stderr and "submission.zip is kept" in done.stderr
    assert (copy / "submission.zip").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_on_a_terminal_the_id_of_the_run_confirms(copy: Path, right: bool) -> None:
    leader, follower = pty.openpty()
    run = the_run(copy).name
    typed = run if right else "yes"
    threading.Timer(0.5, os.write, (leader, f"{typed}\n".encode())).start()
    with serving(answer(200)) as server:
        done = mainrun(copy, "submit", "--upload", server.url, stdin=follower)
    os.close(leader)
    os.close(follower)
    assert f"type the run's id, {run}, to send it" in done.stderr
    assert len(server.requests) == (1 if right else 0)
    assert done.returncode == (0 if right else 1), done.stderr
    assert (copy / "submission.zip").is_file()


# -- verification


@pytest.mark.slow
def test_a_good_bundle_is_verified(submission: Path, tmp_path: Path) -> None:
    done = mainrun(ROOT, "verify", str(submission), "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("verified: ")
    assert "this executes the bundle's own code" in done.stderr
    assert "checked: 3 of 37 steps trained again, scored after 1\n" in done.stdout
    assert "checked: the last weights scored again\n" in done.stdout
    assert "compared: every bit, because this is the machine class of the run\n" in done.stdout
    assert "the trainer in the bundle is the installed one\n" in done.stdout


@pytest.mark.slow
def test_the_bundle_of_an_ensemble_is_verified(tmp_path: Path) -> None:
    root = repository(tmp_path / "mainrun")
    train(from_dict(TINY | SMALL | {"members": 2, "max_steps": 12}), root / "runs")
    (root / "report.pdf").write_bytes(make_report(read_summary(the_run(root))))
    out = tmp_path / "ensemble.zip"
    done = mainrun(root, "submit", "--out", str(out))
    assert done.returncode == 0, done.stderr
    verdict = verification.verify(out, 12, lambda _: None)
    assert verdict.verified and verdict.same_class and verdict.steps == 12, verdict.differences


@pytest.mark.slow
def test_all_steps_can_be_trained_again(submission: Path) -> None:
    verdict = verification.verify(submission, 1000, lambda _: None)
    assert verdict.verified and verdict.same_class
    assert verdict.steps == verdict.total_steps == 37


@pytest.mark.slow
def test_a_changed_file_is_named_and_no_code_is_run(
    submission: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "run_replay", lambda *args: pytest.fail("the code was run"))
    files = files_of(submission)
    summary = files["run/summary.json"].replace(b'"steps": 37', b'"steps": 38', 1)
    code = files["code/mainrun/train.py"].replace(b"(", b"[", 1)
    for name, data in (
        ("run/summary.json", summary),
        ("code/mainrun/train.py", code),
        ("report.pdf", files["report.pdf"] + b" "),
    ):
        assert data != files[name]
        (difference,) = differences(rewrite(tmp_path / "x.zip", files | {name: data}))
        assert difference.startswith(f"{name} was changed: its sha256 is ")
    assert differences(rewrite(tmp_path / "x.zip", files | {"code/mainrun/evil.py": b""})) == [
        "code/mainrun/evil.py is in the bundle, but not in its manifest"
    ]


@pytest.mark.slow
def test_changes_with_a_matching_manifest_are_found_without_running_code(
    submission: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "run_replay", lambda *args: pytest.fail("the code was run"))
    files = files_of(submission)
    path = tmp_path / "x.zip"
    better = edited(files, "run/summary.json", lambda s: s["last"].update(full=s["last"]["full"] - 0.1))
    assert any(
        "for full of the last score" in line for line in differences(rewrite(path, better, honest=True))
    )
    claims = edited(files, MANIFEST, lambda m: m["figures"]["last"].update(official=1.0))
    assert any(line.startswith("the figure last is") for line in differences(rewrite(path, claims)))
    other = files | {"report.pdf": make_pdf(["another report"])}
    assert any(
        line.startswith("report.pdf does not quote this run")
        for line in differences(rewrite(path, other, honest=True))
    )
    config = edited(files, "run/config.json", lambda c: c["config"].update(lr=1.0))
    assert any("config.json was changed" in line for line in differences(rewrite(path, config, honest=True)))
    torn = files | {"run/summary.json": b"[" * 100_000}
    lines = differences(rewrite(path, torn, honest=True))
    assert any("summary.json is damaged: it is" in line for line in lines), lines
    assert differences(
        rewrite(path, {k: v for k, v in files.items() if k != "run/env.json"}, honest=True)
    ) == ["the bundle has no run/env.json"]


@pytest.mark.slow
def test_the_replay_finds_consistent_changes(submission: Path, tmp_path: Path) -> None:
    """A forger changes one digit of the log or one byte of the code, and makes all other files consistent."""
    files = files_of(submission)
    path = tmp_path / "x.zip"
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    (first,) = (row for row in rows if row["event"] == "step" and row["step"] == 2)
    loss = first["loss"]
    first["loss"] = loss * (1 + 2**-40)
    log = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    assert differences(rewrite(path, files | {"run/metrics.jsonl": log}, honest=True)) == [
        f"step 2: loss is {first['loss']!r} in the log, {loss!r} in the replay"
    ]

    code = files["code/mainrun/train.py"] + b"\n"
    (difference,) = differences(rewrite(path, files | {"code/mainrun/train.py": code}, honest=True))
    assert difference.startswith("the run was trained by source ")


@pytest.mark.slow
def test_consistent_changes_of_weights_flops_and_status(submission: Path, tmp_path: Path) -> None:
    """A forger damages the weights, doubles the FLOPs or resets the status.

    All other files are made consistent.
    """
    files = files_of(submission)
    path = tmp_path / "x.zip"
    (weights,) = (name for name in files if name.endswith("state.safetensors"))
    torn = files | {weights: files[weights][:-1] + bytes([files[weights][-1] ^ 1])}
    (difference,) = differences(rewrite(path, torn, honest=True), steps=1)
    assert difference.startswith("the last weights are in the bundle, but cannot be used: ")
    doubled = edited(files, "run/summary.json", lambda s: s.update(flops=2 * s["flops"]))
    without_weights = {name: data for name, data in doubled.items() if "/checkpoints/" not in name}
    for forged in (doubled, without_weights):
        (difference,) = differences(rewrite(path, forged, honest=True), steps=1)
        assert difference.startswith("flops is ")
    running = edited(files, "run/status.json", lambda s: s.update(state="running"))
    assert differences(rewrite(path, running, honest=True)) == [
        "status.json says 'running', but only a finished run can be submitted"
    ]


@pytest.mark.slow
def test_a_last_score_that_the_weights_contradict(submission: Path, tmp_path: Path) -> None:
    """The summary, log, manifest and report all give a better score, and only the weights contradict it."""
    files = files_of(submission)
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    last = next(row for row in reversed(rows) if row["event"] == "eval")
    last["full"] -= 0.1
    files["run/metrics.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def improve(figures: dict[str, Any]) -> None:
        for score in (figures["last"], figures["best"], *figures.get("scores", {}).get("val", {}).values()):
            score["full"] = last["full"]

    files = edited(files, "run/summary.json", improve)
    files = edited(files, MANIFEST, lambda m: improve(m["figures"]))
    files["report.pdf"] = make_report(json.loads(files["run/summary.json"]))
    (difference,) = differences(rewrite(tmp_path / "x.zip", files, honest=True), steps=1)
    assert difference.startswith(f"step 37, val: full is {last['full']!r} in the log, ")


@pytest.mark.slow
def test_another_machine_class_is_compared_within_a_tolerance(submission: Path, tmp_path: Path) -> None:
    files = files_of(submission)
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    for row in rows[:3]:
        row["loss"] *= 1 + 1e-4
    files["run/metrics.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    files = edited(files, "run/env.json", lambda e: e["machine_classes"][0].update(device="another"))
    verdict = verification.verify(rewrite(tmp_path / "x.zip", files, honest=True), 2, lambda _: None)
    assert verdict.verified and not verdict.same_class
    assert verdict.tolerance == verification.TRAINING_TOLERANCE["float32"]
    assert verdict.machine_differences[0].startswith("device: the run had another, ")


def test_foreign_code_sees_no_key_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mainrun").mkdir()
    (tmp_path / "mainrun" / "__init__.py").touch()
    spy = "json.dump({'env': dict(os.environ), 'path': sys.path}, open(sys.argv[3], 'w'))"
    (tmp_path / "mainrun" / "replay.py").write_text(f"import json, os, sys\n{spy}\n")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    result = run_replay(tmp_path, "steps", tmp_path)
    assert set(result["env"]) <= {*PASSED_VARIABLES, "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}
    assert result["path"][0] == str(tmp_path) and "" not in result["path"]


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit('no')",
        "import sys; open(sys.argv[3], 'w').write('[' * 10000)",
        "import sys; open(sys.argv[3], 'w').write('3')",
    ],
)
def test_foreign_code_that_fails(tmp_path: Path, source: str) -> None:
    (tmp_path / "mainrun").mkdir()
    (tmp_path / "mainrun" / "__init__.py").touch()
    (tmp_path / "mainrun" / "replay.py").write_text(source)
    with pytest.raises(MainrunError, match=r"mainrun\.replay"):
        run_replay(tmp_path, "steps", tmp_path)
