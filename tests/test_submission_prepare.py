"""Tests what `submit` says after one change to a good run, report or commit."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence import MACHINE, STEPS, VERSIONS, edit, guard, make_rows, make_run, score, write_log, write_run
from submitting import make_pdf, make_report

from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.store.rundir import RunDir
from reports.submission import bundle, finished_run, prepare
from reports.submission.bundle import sha256
from reports.submission.commit import ROOT, Commit

RUN_FILES = ("config.json", "env.json", "status.json", "metrics.jsonl", "summary.json", "tokenizer.json")
FIGURES = ("last", "best", "steps", "params", "weights")
BEST = score(step=2, full=1.9)


class Setup:
    """A finished run, its report and a commit. Each test changes one of them.

    `result` is the result of the replay, and `calls` lists the calls of `read_head` and `run_replay`.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = make_run(best=BEST, last=score())
        self.runs = folder / "runs"
        self.folder = write_run(self.runs, self.run)
        self.report = folder / "report.pdf"
        self.out = folder / "x.zip"
        self.report.write_bytes(make_report(self.run.summary))
        files = {"mainrun/replay.py": b"1", "task": b"2"}
        self.commit = Commit("c0ffee" * 6, "7ee" * 10, files, ["task"], {})
        same = {name: self.run.summary[name] for name in ("fingerprints", "tokenizer")}
        self.result: dict[str, Any] = copy.deepcopy(
            {"versions": VERSIONS, "guards": [guard("coverage"), guard("causality")], **same}
        )
        self.calls: list[Any] = []
        self.notes: list[str] = []
        monkeypatch.setattr(prepare, "read_head", self.read_head)
        monkeypatch.setattr(prepare, "run_replay", self.run_replay)

    def read_head(self, root: Path, ignored: Any) -> Commit:
        self.calls.append((root, tuple(ignored)))
        return self.commit

    def run_replay(self, code: Path, *args: Any) -> dict[str, Any]:
        assert code.name.startswith("mainrun-submit-")
        names = sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file())
        self.calls.append((names, *args))
        return self.result

    def prepare(self) -> prepare.Submission:
        return prepare.prepare(
            RunDir(self.folder), self.report, self.out, self.notes.append, root=self.runs.parent
        )

    def refusal(self) -> str:
        with pytest.raises(MainrunError) as caught:
            self.prepare()
        assert caught.value.exit_code == 2
        return str(caught.value)

    def edit_summary(self, **changes: Any) -> None:
        edit(self.folder / "summary.json", lambda summary: summary.update(changes))


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(tmp_path, monkeypatch)


def test_the_files_and_the_manifest(setup: Setup) -> None:
    submission = setup.prepare()
    names = [*(f"run/{name}" for name in RUN_FILES), "code/mainrun/replay.py", "code/task", "report.pdf"]
    assert sorted(submission.files) == sorted([*names, "MANIFEST.json"])
    for name in RUN_FILES:
        assert submission.files[f"run/{name}"] == (setup.folder / name).read_bytes()
    assert (
        submission.files["report.pdf"] == setup.report.read_bytes() and submission.files["code/task"] == b"2"
    )
    summary = setup.run.summary
    same = ("run", "preset", "fingerprints", "tokenizer", "geometry", "machine_class", "versions")
    assert submission.manifest == {
        "format": 1, "commit": "c0ffee" * 6, "tree": "7ee" * 10, "guards": setup.result["guards"],
        **{name: summary[name] for name in same},
        "figures": {name: summary[name] for name in FIGURES},
        "files": {
            name: {"sha256": sha256(submission.files[name]), "bytes": len(submission.files[name])}
            for name in names
        },
    }  # fmt: skip
    assert (
        list(submission.manifest["files"]) == sorted(names)
        and json.loads(submission.files["MANIFEST.json"]) == submission.manifest
    )
    setup.out.write_bytes(submission.data)
    assert bundle.read(setup.out) == submission.files
    assert (submission.commit, submission.flags, submission.notes) == (setup.commit, [], [])
    assert setup.calls == [
        (setup.runs.parent, (setup.report, setup.out)),
        (["mainrun/replay.py", "task"], "guards", setup.folder),
    ]
    (note,) = setup.notes
    assert "commit c0ffeec0ffee" in note


def test_the_size_is_checked(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_FILES", 3)
    assert "at most 3 files and" in setup.refusal()


def test_executable_files_stay_executable(setup: Setup) -> None:
    with zipfile.ZipFile(io.BytesIO(setup.prepare().data)) as archive:
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
    assert modes.pop("code/task") == 0o755 and set(modes.values()) == {0o644}


def test_flags_are_returned(setup: Setup) -> None:
    setup.result["guards"] = [guard("a", "flag", "b"), guard("c"), guard("d", "flag", "e")]
    assert setup.prepare().flags == ["a: b", "d: e"]


# -- which run


def test_the_only_finished_run_is_chosen(setup: Setup) -> None:
    assert prepare.choose_run(None, setup.runs).path == setup.folder
    unfinished = write_run(setup.runs, make_run(seed=2))
    (unfinished / "summary.json").unlink()
    assert prepare.choose_run(None, setup.runs).path == setup.folder
    assert prepare.choose_run(unfinished.name, setup.runs).path == unfinished
    with pytest.raises(RunError, match="no run 'nothing'"):
        prepare.choose_run("nothing", setup.runs)


def test_a_name_is_needed_without_a_single_finished_run(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none has no finished run; train a run, then give --run RUN"):
        prepare.choose_run(None, tmp_path / "none")
    ids = sorted(write_run(setup.runs, make_run(seed=seed)).name for seed in range(2, 8))
    shown = sorted([*ids, setup.folder.name])[:5]
    with pytest.raises(UsageError) as caught:
        prepare.choose_run(None, setup.runs)
    expected = (
        f"{setup.runs} has several finished runs ({', '.join(shown)}); choose one of them with --run RUN"
    )
    assert expected in str(caught.value)


# -- an incomplete run


@pytest.mark.parametrize(
    "name", [name for name in RUN_FILES if name not in ("config.json", "summary.json", "metrics.jsonl")]
)
def test_a_missing_file(setup: Setup, name: str) -> None:
    (setup.folder / name).unlink()
    assert f"has no {name}" in setup.refusal()


def test_all_missing_files_are_listed(setup: Setup) -> None:
    for name in ("env.json", "tokenizer.json"):
        (setup.folder / name).unlink()
    assert "has no env.json, tokenizer.json" in setup.refusal()


@pytest.mark.parametrize(
    "name", ["weights", "scores", "tokenizer", "machine_class", "versions", "all_versions"]
)
def test_a_missing_key_of_the_summary(setup: Setup, name: str) -> None:
    edit(setup.folder / "summary.json", lambda summary: summary.pop(name))
    assert f"summary.json has no {name!r}" in setup.refusal()


def test_a_missing_key_is_reported_before_another_run(setup: Setup) -> None:
    edit(
        setup.folder / "summary.json",
        lambda summary: (summary.pop("weights"), summary.update(run="other-00000000")),
    )
    assert "has no 'weights'" in setup.refusal()


def test_a_summary_of_another_run(setup: Setup) -> None:
    setup.edit_summary(run="baseline-00000000")
    assert "summary.json belongs to another run, baseline-00000000" in setup.refusal()


def test_a_run_that_was_named_by_other_code(setup: Setup) -> None:
    setup.edit_summary(run="old-00000000")
    setup.folder = setup.folder.rename(setup.runs / "old-00000000")
    message = setup.refusal()
    assert (
        "was trained by different code" in message
        and setup.run.id in message
        and "check out the commit" in message
    )


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"val": {"last": score(), "best": score()}},
        {"val": {"last": BEST, "best": BEST}},
        {"val": {"last": score(full=2.5), "best": BEST}},
        {"dev": {"last": score(), "best": BEST}},
    ],
)
def test_contradicting_scores_of_val(setup: Setup, scores: dict[str, Any]) -> None:
    setup.edit_summary(scores=scores)
    assert "contains contradictory scores of val" in setup.refusal()


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        (lambda rows: rows, True),
        (lambda rows: [row for row in rows if (row["event"], row["step"]) != ("step", STEPS)], False),
        (lambda rows: [row for row in rows if row["event"] != "step"], False),
        (lambda rows: [row for row in rows if row["step"] != 1], True),
        (lambda rows: [*rows, {**rows[0], "step": STEPS + 1}], False),
        (lambda rows: [*rows, {**rows[-1], "split": "dev", "step": 1}], True),
    ],
    ids=["complete", "no last step", "no step", "no first step", "one step too many", "a score of dev"],
)
def test_a_log_must_reach_the_last_step(
    setup: Setup, change: Callable[[list[dict[str, Any]]], Any], complete: bool
) -> None:
    write_log(setup.folder / "metrics.jsonl", change(make_rows(setup.run.summary)))
    if complete:
        setup.prepare()
    else:
        assert f"does not end with a row and a val score of the last step, {STEPS}" in setup.refusal()


def test_a_score_before_the_last_step(setup: Setup) -> None:
    early = score(step=STEPS - 1)
    rows = [row for row in make_rows(setup.run.summary) if row["event"] == "step"]
    write_log(setup.folder / "metrics.jsonl", [*rows, {"event": "eval", **BEST}, {"event": "eval", **early}])
    setup.edit_summary(last=early, scores={"val": {"last": early, "best": BEST}})
    assert "does not end with a row and a val score of the last step" in setup.refusal()


# -- the report


@pytest.mark.parametrize(
    ("run", "official", "full", "missing"),
    [
        ("ID", "3.1235", "2.0001", []),
        ("ID", "3.12346", "2.000123", []),
        ("I D", "3.1235", "2.0001", []),
        ("ID", "3.1234", "2.0001", ["official 3.1235"]),
        ("ID", "3.1235", "2.0002", ["full 2.0001"]),
        ("ID", "3.123", "2.0001", ["official 3.1235"]),
        ("ID", "13.1235", "2.0001", ["official 3.1235"]),
        ("ID", "3.1235", "2.00011", ["full 2.0001"]),
        ("other", "3.1235", "2.0001", ["run ID"]),
        ("other", "", "", ["run ID", "official 3.1235", "full 2.0001"]),
    ],
)
def test_the_figures_that_a_report_must_quote(run: str, official: str, full: str, missing: list[str]) -> None:
    summary = {"run": "baseline-1234", "last": {"official": 3.123456789, "full": 2.000123456}}
    names = {"ID": "baseline-1234", "I D": "base\nline-\n1234"}
    text = f"of run {names.get(run, run)}: official {official}, full {full}."
    assert finished_run.missing_quotes(text, summary) == [
        part.replace("ID", "baseline-1234") for part in missing
    ]


def test_no_report(setup: Setup) -> None:
    setup.report.unlink()
    message = setup.refusal()
    assert f"there is no report {setup.report}" in message
    assert f"mainrun report {setup.run.id} --out {setup.report}" in message
    setup.report.mkdir()
    assert f"there is no report {setup.report}" in setup.refusal()


@pytest.mark.skipif(
    not Path("/proc/self/mem").is_file(),
    reason="needs a regular file that cannot be read, such as this one of Linux",
)
def test_an_unreadable_report(setup: Setup) -> None:
    setup.report = Path("/proc/self/mem")
    assert (
        "/proc/self/mem cannot be read (Input/output error); create it with mainrun report" in setup.refusal()
    )


def test_a_report_of_another_run(setup: Setup) -> None:
    setup.report.write_bytes(make_pdf(["run other", "full 2.0000"]))
    assert (
        f"it lacks run {setup.run.id}, official 3.0000; create it with mainrun report {setup.run.id}"
        in setup.refusal()
    )
    setup.report.write_bytes(b"%PDF no")
    assert f"{setup.report} is not a readable PDF" in setup.refusal()


@pytest.mark.parametrize(("more", "refused"), [(0, False), (1, True)])
def test_the_size_limit_of_the_report(
    setup: Setup, more: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_ZIP_BYTES", 20_000)
    data = setup.report.read_bytes()
    room = 20_000 + more - len(data)
    setup.report.write_bytes(data + b"\n" * room)
    if refused:
        assert "20.0 kB, but a submission may have at most 20.0 kB" in setup.refusal()
    else:
        setup.prepare()


def test_a_key_in_the_report_or_the_run(setup: Setup) -> None:
    key = "h" + "f_" + "aB3" * 12
    good = setup.report.read_bytes()
    lines = [setup.run.id, "2.0000 3.0000", f"see {key}"]
    setup.report.write_bytes(make_pdf(lines))
    message = setup.refusal()
    assert "report.pdf (its text)" in message and "a Hugging Face token" in message and key not in message
    setup.report.write_bytes(good)
    edit(setup.folder / "env.json", lambda env: env.update(command=["mainrun", key]))
    message = setup.refusal()
    assert "run/env.json" in message and "a Hugging Face token" in message and key not in message


# -- the files of a run


def add_checkpoint(folder: Path, step: int, weights: int = 10) -> Path:
    path = folder / "checkpoints" / f"step-{step:08}"
    path.mkdir(parents=True)
    (path / "meta.json").write_text("{}")
    (path / "state.safetensors").write_bytes(b"\0" * weights)
    return path


def test_the_newest_checkpoint_is_included(setup: Setup) -> None:
    add_checkpoint(setup.folder, 2)
    newest = add_checkpoint(setup.folder, 4)
    (newest / "notes.txt").touch()
    submission = setup.prepare()
    inside = sorted(name for name in submission.files if "checkpoint" in name)
    assert inside == [f"run/checkpoints/{newest.name}/{name}" for name in ("meta.json", "state.safetensors")]
    assert submission.notes == []
    assert submission.files[inside[1]] == b"\0" * 10


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_an_incomplete_checkpoint(setup: Setup, name: str) -> None:
    newest = add_checkpoint(setup.folder, 4)
    (newest / name).unlink()
    message = setup.refusal()
    assert str(newest) in message and name in message
    (newest / name).mkdir()
    assert str(newest / name) in setup.refusal()


@pytest.mark.parametrize(("weights", "inside"), [(998, True), (999, False)])
def test_the_size_limit_of_the_checkpoint(
    setup: Setup, weights: int, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_CHECKPOINT_BYTES", 1000)
    add_checkpoint(setup.folder, 4, weights)
    submission = setup.prepare()
    assert any("checkpoint" in name for name in submission.files) == inside
    if inside:
        assert submission.notes == []
    else:
        assert submission.notes == ["the last checkpoint is left out: it is 1.0 kB, and the limit is 1.0 kB"]


def test_the_journal_is_included(setup: Setup) -> None:
    event = {"event": "op SUCCESS", "op": "x", "name": "set_dropout", "step": 1, "tokens": 128, "value": 0.0}
    write_log(setup.folder / "growth.jsonl", [event])
    assert json.loads(setup.prepare().files["run/growth.jsonl"]) == event


@pytest.mark.parametrize(
    "name",
    [
        *RUN_FILES,
        "growth.jsonl",
        "checkpoints/step-00000004/meta.json",
        "checkpoints/step-00000004/state.safetensors",
    ],
)
def test_a_link_in_the_run_is_refused(setup: Setup, name: str) -> None:
    add_checkpoint(setup.folder, 4)
    path = setup.folder / name
    if not path.exists():
        path.touch()
    path.rename(setup.runs / "elsewhere")
    path.symlink_to(setup.runs / "elsewhere")
    assert f"{path} is a link" in setup.refusal()


# -- the commit and its guards


def test_a_commit_without_the_replay(setup: Setup) -> None:
    del setup.commit.files["mainrun/replay.py"]
    assert "commit c0ffeec0ffee has no mainrun/replay.py" in setup.refusal() and len(setup.calls) == 1


@pytest.mark.parametrize("versions", [[{"mainrun": "4" * 64}], [VERSIONS, {"mainrun": "4" * 64}]])
def test_a_run_of_other_code(setup: Setup, versions: list[dict[str, str]]) -> None:
    setup.edit_summary(all_versions=versions)
    sources = ", ".join(sorted(entry["mainrun"][:12] for entry in versions))
    expected = f"was trained by source {sources}, but commit c0ffeec0ffee is source 555555555555"
    assert f"run {setup.run.id} {expected}" in setup.refusal()


def test_failed_guards_are_listed_with_their_fixes(setup: Setup) -> None:
    setup.result["guards"] = [
        guard("coverage", "fail", "half"),
        guard("geometry", "flag"),
        guard("causality", "fail", "ahead"),
        guard("x"),
    ]
    message = setup.refusal()
    assert f"2 of 4 guards failed on {setup.run.id}:" in message
    for name, detail in (("coverage", "half"), ("causality", "ahead")):
        assert f"\n  {name}: {detail}\n    fix: {prepare.FIXES[name]}" in message
    assert "geometry" not in message


@pytest.mark.parametrize("name", ["fingerprints", "tokenizer"])
def test_other_titles_than_in_training(setup: Setup, name: str) -> None:
    setup.result[name] = "other"
    assert f"the {name} of the corpus changed after run {setup.run.id} was trained" in setup.refusal()


# -- the size and the file


@pytest.mark.parametrize("limit", ["MAX_ZIP_BYTES", "MAX_UNPACKED_BYTES", "MAX_FILES"])
def test_the_limits_of_a_submission(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"b": b"1" * 300, "a": b"2" * 2000, "c": b"3" * 1000, "d": b""}
    data = bundle.pack(files)
    sizes = {"MAX_ZIP_BYTES": len(data), "MAX_UNPACKED_BYTES": 3300, "MAX_FILES": 4}
    monkeypatch.setattr(bundle, limit, sizes[limit])
    prepare._check_size(files, data)
    monkeypatch.setattr(bundle, limit, sizes[limit] - 1)
    with pytest.raises(UsageError) as caught:
        prepare._check_size(files, data)
    message = str(caught.value)
    assert f"has 4 files and {bundle.format_size(len(data))} (3.3 kB unpacked)" in message
    assert message.endswith("the largest files are a (2.0 kB), c (1.0 kB), b (0.3 kB)")
    zip_limit = bundle.format_size(bundle.MAX_ZIP_BYTES)
    unpacked_limit = bundle.format_size(bundle.MAX_UNPACKED_BYTES)
    assert (
        f"at most {bundle.MAX_FILES:,} files and {zip_limit} ({unpacked_limit} unpacked) are allowed"
        in message
    )


def test_a_failed_write_leaves_the_old_zip(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = setup.prepare()
    setup.out.write_bytes(b"old")
    prepare.write(submission, setup.out)
    assert setup.out.read_bytes() == submission.data

    def full(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    setup.out.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MainrunError, match="no space left"):
        prepare.write(submission, setup.out)
    assert setup.out.read_bytes() == b"old" and not list(setup.out.parent.glob(".*"))


def test_the_folder_of_the_zip_is_synced(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(prepare, "fsync_folder", synced.append)
    monkeypatch.chdir(setup.out.parent)
    prepare.write(setup.prepare(), Path("x.zip"))
    assert synced == [setup.out.parent]


def test_root_is_the_repository_of_this_code() -> None:
    assert (ROOT / "reports" / "submission" / "prepare.py").is_file()


def test_pypdf_logs_nothing() -> None:
    logging.getLogger("pypdf").setLevel(logging.NOTSET)
    with pytest.raises(UsageError, match="is not a readable PDF"):
        finished_run.pdf_text(b"no", "x.pdf")
    assert not logging.getLogger("pypdf").isEnabledFor(logging.ERROR)


def test_every_guard_has_a_fix() -> None:
    assert len(prepare.FIXES) == 14 and all(re.search(r"[a-z]{3}", fix) for fix in prepare.FIXES.values())
    assert MACHINE["device"] == "cpu"
