"""What may be handed in, by rows: one thing is changed in a good run, report or commit, and what is said of it."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence import MACHINE, STEPS, VERSIONS, edit, guard, make_rows, make_run, score, write_log, write_run
from handing_in import pdf, quoting

from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.store.rundir import RunDir
from reports import bundle, submission
from reports.bundle import sha256
from reports.commit import Commit

RUN_FILES = ("config.json", "env.json", "status.json", "metrics.jsonl", "summary.json", "tokenizer.json")
FIGURES = ("last", "best", "steps", "params", "weights")
BEST = score(step=2, full=1.9)


class Desk:
    """A finished run, the report of it and a commit, to change one of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = make_run(best=BEST, last=score())
        self.runs = folder / "runs"
        self.folder = write_run(self.runs, self.run)
        self.report, self.out = folder / "report.pdf", folder / "x.zip"
        self.report.write_bytes(quoting(self.run.summary))
        files = {"mainrun/replay.py": b"1", "task": b"2"}
        self.commit = Commit("c0ffee" * 6, "7ee" * 10, files, ["task"], {})
        same = {name: self.run.summary[name] for name in ("fingerprints", "tokenizer")}
        self.found: dict[str, Any] = copy.deepcopy(
            {"versions": VERSIONS, "guards": [guard("coverage"), guard("causality")], **same}
        )
        self.calls: list[Any] = []
        self.notes: list[str] = []
        monkeypatch.setattr(submission, "head", self.head)
        monkeypatch.setattr(submission, "replay", self.replay)

    def head(self, root: Path, but: Any) -> Commit:
        self.calls.append((root, tuple(but)))
        return self.commit

    def replay(self, code: Path, *args: Any) -> dict[str, Any]:
        assert code.name.startswith("mainrun-submit-")
        self.calls.append(
            (sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()), *args)
        )
        return self.found

    def prepare(self) -> submission.Submission:
        return submission.prepare(
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
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_what_is_handed_in(desk: Desk) -> None:
    made = desk.prepare()
    names = [*(f"run/{name}" for name in RUN_FILES), "code/mainrun/replay.py", "code/task", "report.pdf"]
    assert sorted(made.files) == sorted([*names, "MANIFEST.json"])
    for name in RUN_FILES:
        assert made.files[f"run/{name}"] == (desk.folder / name).read_bytes()
    assert made.files["report.pdf"] == desk.report.read_bytes() and made.files["code/task"] == b"2"
    summary = desk.run.summary
    same = ("run", "preset", "fingerprints", "tokenizer", "geometry", "machine_class", "versions")
    assert made.manifest == {
        "format": 1, "commit": "c0ffee" * 6, "tree": "7ee" * 10, "guards": desk.found["guards"],
        **{name: summary[name] for name in same},
        "figures": {name: summary[name] for name in FIGURES},
        "files": {name: {"sha256": sha256(made.files[name]), "bytes": len(made.files[name])} for name in names},
    }  # fmt: skip
    assert (
        list(made.manifest["files"]) == sorted(names)
        and json.loads(made.files["MANIFEST.json"]) == made.manifest
    )
    desk.out.write_bytes(made.data)
    assert bundle.read(desk.out) == made.files
    assert (made.commit, made.flags, made.notes) == (desk.commit, [], [])
    assert desk.calls == [
        (desk.runs.parent, (desk.report, desk.out)),
        (["mainrun/replay.py", "task"], "guards", desk.folder),
    ]
    (note,) = desk.notes
    assert "commit c0ffeec0ffee" in note


def test_the_size_is_checked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FILES", 3)
    assert "allowed are 3 and" in desk.refusal()


def test_what_is_runnable_stays_so(desk: Desk) -> None:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(desk.prepare().data)) as z:
        modes = {name: z.getinfo(name).external_attr >> 16 & 0o777 for name in z.namelist()}
    assert modes.pop("code/task") == 0o755 and set(modes.values()) == {0o644}


def test_flags_are_kept_and_said(desk: Desk) -> None:
    desk.found["guards"] = [guard("a", "flag", "b"), guard("c"), guard("d", "flag", "e")]
    assert desk.prepare().flags == ["a: b", "d: e"]


# -- which run


def test_the_one_finished_run_is_chosen(desk: Desk) -> None:
    assert submission.choose(None, desk.runs).path == desk.folder
    unfinished = write_run(desk.runs, make_run(seed=2))
    (unfinished / "summary.json").unlink()
    assert submission.choose(None, desk.runs).path == desk.folder
    assert submission.choose(unfinished.name, desk.runs).path == unfinished
    with pytest.raises(RunError, match="no run 'nothing'"):
        submission.choose("nothing", desk.runs)


def test_without_one_a_name_is_asked_for(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no finished run in .*none; train one first: --run RUN"):
        submission.choose(None, tmp_path / "none")
    ids = sorted(write_run(desk.runs, make_run(seed=seed)).name for seed in range(2, 8))
    shown = sorted([*ids, desk.folder.name])[:5]
    with pytest.raises(UsageError) as caught:
        submission.choose(None, desk.runs)
    assert f"there are several finished runs in {desk.runs} ({', '.join(shown)}); name one: --run RUN" in str(
        caught.value
    )


# -- a run that is not whole


@pytest.mark.parametrize(
    "name", [name for name in RUN_FILES if name not in ("config.json", "summary.json", "metrics.jsonl")]
)
def test_a_file_that_is_missing(desk: Desk, name: str) -> None:
    (desk.folder / name).unlink()
    assert f"has no {name}" in desk.refusal()


def test_all_missing_files_are_named(desk: Desk) -> None:
    for name in ("env.json", "tokenizer.json"):
        (desk.folder / name).unlink()
    assert "has no env.json, tokenizer.json" in desk.refusal()


@pytest.mark.parametrize(
    "name", ["weights", "scores", "tokenizer", "machine_class", "versions", "all_versions"]
)
def test_a_summary_that_lacks_something(desk: Desk, name: str) -> None:
    edit(desk.folder / "summary.json", lambda summary: summary.pop(name))
    assert f"summary.json has no {name!r}" in desk.refusal()


def test_what_is_lacking_is_said_first(desk: Desk) -> None:
    edit(
        desk.folder / "summary.json",
        lambda summary: (summary.pop("weights"), summary.update(run="other-00000000")),
    )
    assert "has no 'weights'" in desk.refusal()


def test_a_summary_of_another_run(desk: Desk) -> None:
    desk.edit_summary(run="baseline-00000000")
    assert "summary.json is of baseline-00000000" in desk.refusal()


def test_a_run_that_other_code_named(desk: Desk) -> None:
    desk.edit_summary(run="old-00000000")
    desk.folder = desk.folder.rename(desk.runs / "old-00000000")
    said = desk.refusal()
    assert "was trained by other code" in said and desk.run.id in said and "check out the commit" in said


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
def test_scores_of_val_in_two_ways(desk: Desk, scores: dict[str, Any]) -> None:
    desk.edit_summary(scores=scores)
    assert "gives the scores of val in two ways" in desk.refusal()


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        (lambda rows: rows, True),
        (lambda rows: [row for row in rows if (row["event"], row["step"]) != ("step", STEPS)], False),
        (lambda rows: [row for row in rows if row["event"] != "step"], False),
        (lambda rows: [row for row in rows if row["step"] != 1], True),
        (lambda rows: [*rows, {**rows[0], "step": STEPS + 1}], False),
        (lambda rows: [*rows, {**rows[-1], "split": "dev", "step": 1}], True),
    ],
    ids=["whole", "no last step", "no step", "no first step", "one more", "dev is another matter"],
)
def test_a_log_that_does_not_reach_the_end(
    desk: Desk, change: Callable[[list[dict[str, Any]]], Any], whole: bool
) -> None:
    write_log(desk.folder / "metrics.jsonl", change(make_rows(desk.run.summary)))
    if whole:
        desk.prepare()
    else:
        assert f"does not reach the last step, {STEPS}, with its score" in desk.refusal()


def test_a_score_before_the_end_is_not_the_last(desk: Desk) -> None:
    early = score(step=STEPS - 1)
    rows = [row for row in make_rows(desk.run.summary) if row["event"] == "step"]
    write_log(desk.folder / "metrics.jsonl", [*rows, {"event": "eval", **BEST}, {"event": "eval", **early}])
    desk.edit_summary(last=early, scores={"val": {"last": early, "best": BEST}})
    assert "does not reach the last step" in desk.refusal()


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
def test_what_a_report_must_quote(run: str, official: str, full: str, missing: list[str]) -> None:
    summary = {"run": "baseline-1234", "last": {"official": 3.123456789, "full": 2.000123456}}
    names = {"ID": "baseline-1234", "I D": "base\nline-\n1234"}
    text = f"of run {names.get(run, run)}: official {official}, full {full}."
    assert submission.quotes(text, summary) == [part.replace("ID", "baseline-1234") for part in missing]


def test_no_report(desk: Desk) -> None:
    desk.report.unlink()
    assert (
        f"no report {desk.report}" in (said := desk.refusal())
        and f"mainrun report {desk.run.id} --out {desk.report}" in said
    )
    desk.report.mkdir()
    assert f"no report {desk.report}" in desk.refusal()


@pytest.mark.skipif(
    not Path("/proc/self/mem").is_file(),
    reason="needs a file that looks whole and cannot be read, as Linux has one",
)
def test_a_report_that_cannot_be_read(desk: Desk) -> None:
    desk.report = Path("/proc/self/mem")
    assert "/proc/self/mem cannot be read (Input/output error); make it: mainrun report" in desk.refusal()


def test_a_report_that_quotes_another_run(desk: Desk) -> None:
    desk.report.write_bytes(pdf(["run other", "full 2.0000"]))
    assert (
        f"it has no run {desk.run.id}, no official 3.0000; make it: mainrun report {desk.run.id}"
        in desk.refusal()
    )
    desk.report.write_bytes(b"%PDF no")
    assert f"{desk.report} is no PDF that can be read" in desk.refusal()


@pytest.mark.parametrize(("more", "refused"), [(0, False), (1, True)])
def test_a_report_that_is_too_large(
    desk: Desk, more: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "LIMIT", 20_000)
    data = desk.report.read_bytes()
    room = 20_000 + more - len(data)
    desk.report.write_bytes(data + b"\n" * room)
    if refused:
        assert "20.0 kB, a submission at most 20.0 kB" in desk.refusal()
    else:
        desk.prepare()


def test_a_key_in_the_report_or_the_run(desk: Desk) -> None:
    key = "h" + "f_" + "aB3" * 12
    good = desk.report.read_bytes()
    lines = [desk.run.id, "2.0000 3.0000", f"see {key}"]
    desk.report.write_bytes(pdf(lines))
    said = desk.refusal()
    assert "report.pdf (its text)" in said and "a Hugging Face token" in said and key not in said
    desk.report.write_bytes(good)
    edit(desk.folder / "env.json", lambda env: env.update(command=["mainrun", key]))
    said = desk.refusal()
    assert "run/env.json" in said and "a Hugging Face token" in said and key not in said


# -- the files of a run


def checkpoint(folder: Path, step: int, weights: int = 10) -> Path:
    place = folder / "checkpoints" / f"step-{step:08}"
    place.mkdir(parents=True)
    (place / "meta.json").write_text("{}")
    (place / "state.safetensors").write_bytes(b"\0" * weights)
    return place


def test_the_newest_checkpoint_goes_in(desk: Desk) -> None:
    checkpoint(desk.folder, 2)
    newest = checkpoint(desk.folder, 4)
    (newest / "notes.txt").touch()
    made = desk.prepare()
    inside = sorted(name for name in made.files if "checkpoint" in name)
    assert (
        inside == [f"run/checkpoints/{newest.name}/{name}" for name in ("meta.json", "state.safetensors")]
        and made.notes == []
    )
    assert made.files[inside[1]] == b"\0" * 10


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_a_checkpoint_that_lacks_a_file(desk: Desk, name: str) -> None:
    newest = checkpoint(desk.folder, 4)
    (newest / name).unlink()
    said = desk.refusal()
    assert str(newest) in said and name in said
    (newest / name).mkdir()
    assert str(newest / name) in desk.refusal()


@pytest.mark.parametrize(("weights", "inside"), [(998, True), (999, False)])
def test_a_checkpoint_up_to_a_size(
    desk: Desk, weights: int, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "CHECKPOINT", 1000)
    checkpoint(desk.folder, 4, weights)
    made = desk.prepare()
    assert any("checkpoint" in name for name in made.files) == inside
    assert made.notes == ([] if inside else ["without the last checkpoint: 1.0 kB, at most 1.0 kB goes in"])


def test_the_journal_goes_in(desk: Desk) -> None:
    event = {"event": "op SUCCESS", "op": "x", "name": "set_dropout", "step": 1, "tokens": 128, "value": 0.0}
    write_log(desk.folder / "growth.jsonl", [event])
    assert json.loads(desk.prepare().files["run/growth.jsonl"]) == event


@pytest.mark.parametrize(
    "name",
    [
        *RUN_FILES,
        "growth.jsonl",
        "checkpoints/step-00000004/meta.json",
        "checkpoints/step-00000004/state.safetensors",
    ],
)
def test_a_link_is_no_file_of_a_run(desk: Desk, name: str) -> None:
    checkpoint(desk.folder, 4)
    place = desk.folder / name
    if not place.exists():
        place.touch()
    place.rename(desk.runs / "elsewhere")
    place.symlink_to(desk.runs / "elsewhere")
    assert f"{place} is a link" in desk.refusal()


# -- the commit and its guards


def test_a_commit_without_the_replay(desk: Desk) -> None:
    del desk.commit.files["mainrun/replay.py"]
    assert "commit c0ffeec0ffee has no mainrun/replay.py" in desk.refusal() and len(desk.calls) == 1


@pytest.mark.parametrize("versions", [[{"mainrun": "4" * 64}], [VERSIONS, {"mainrun": "4" * 64}]])
def test_a_run_of_other_code(desk: Desk, versions: list[dict[str, str]]) -> None:
    desk.edit_summary(all_versions=versions)
    theirs = ", ".join(sorted(entry["mainrun"][:12] for entry in versions))
    said = desk.refusal()
    assert (
        f"run {desk.run.id} was trained by source {theirs}, commit c0ffeec0ffee is source 555555555555"
        in said
    )


def test_failed_guards_are_named_with_their_way_out(desk: Desk) -> None:
    desk.found["guards"] = [
        guard("coverage", "fail", "half"),
        guard("geometry", "flag"),
        guard("causality", "fail", "ahead"),
        guard("x"),
    ]
    said = desk.refusal()
    assert f"2 of 4 guards failed on {desk.run.id}:" in said
    for name, detail in (("coverage", "half"), ("causality", "ahead")):
        assert f"\n  {name}: {detail}\n    fix: {submission.FIXES[name]}" in said
    assert "geometry" not in said


@pytest.mark.parametrize("name", ["fingerprints", "tokenizer"])
def test_titles_that_are_others_now(desk: Desk, name: str) -> None:
    desk.found[name] = "other"
    assert f"the corpus gives other {name} now than run {desk.run.id} was trained on" in desk.refusal()


# -- the size and the file


@pytest.mark.parametrize(
    ("limit", "value", "refused"),
    [
        ("LIMIT", 0, False),
        ("LIMIT", -1, True),
        ("UNPACKED", 0, False),
        ("UNPACKED", -1, True),
        ("FILES", 0, False),
        ("FILES", -1, True),
    ],
)
def test_how_large_it_may_be(limit: str, value: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"b": b"1" * 300, "a": b"2" * 2000, "c": b"3" * 1000, "d": b""}
    data = bundle.pack(files)
    sizes = {"LIMIT": len(data), "UNPACKED": 3300, "FILES": 4}
    monkeypatch.setattr(bundle, limit, sizes[limit] + value)
    if not refused:
        submission._check_size(files, data)
        return
    with pytest.raises(UsageError) as caught:
        submission._check_size(files, data)
    said = str(caught.value)
    assert f"has 4 files and {bundle.size(len(data))} (3.3 kB unpacked)" in said
    assert said.endswith("the largest: a (2.0 kB), c (1.0 kB), b (0.3 kB)")
    assert (
        f"allowed are {bundle.FILES:,} and {bundle.size(bundle.LIMIT)} ({bundle.size(bundle.UNPACKED)})"
        in said
    )


def test_the_zip_is_written_whole_or_not_at_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = desk.prepare()
    desk.out.write_bytes(b"old")
    submission.write(made, desk.out)
    assert desk.out.read_bytes() == made.data

    def full(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    desk.out.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MainrunError, match="no space left"):
        submission.write(made, desk.out)
    assert desk.out.read_bytes() == b"old" and not list(desk.out.parent.glob(".*"))


def test_the_folder_of_the_zip_is_synced(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(submission, "fsync_folder", synced.append)
    monkeypatch.chdir(desk.out.parent)
    submission.write(desk.prepare(), Path("x.zip"))
    assert synced == [desk.out.parent]


def test_the_repository_is_that_of_this_code() -> None:
    assert (submission.ROOT / "reports" / "submission.py").is_file()


def test_the_reader_of_pdfs_says_nothing_itself() -> None:
    logging.getLogger("pypdf").setLevel(logging.NOTSET)
    with pytest.raises(UsageError, match="is no PDF"):
        submission.pdf_text(b"no", "x.pdf")
    assert not logging.getLogger("pypdf").isEnabledFor(logging.ERROR)


def test_what_is_fixed_is_said_for_every_guard() -> None:
    assert len(submission.FIXES) == 14 and all(
        re.search(r"[a-z]{3}", fix) for fix in submission.FIXES.values()
    )
    assert MACHINE["device"] == "cpu"
