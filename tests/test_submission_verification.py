"""Tests `verify` after one change to a good bundle or to the result of its fake replay."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence import MACHINE, STEPS, VERSIONS, failing, make_rows, make_run, score, write_run
from submitting import make_pdf, make_report

from mainrun.errors import MainrunError, RunError
from reports.submission import bundle, finished_run, verification
from reports.submission.bundle import FORMAT, MANIFEST, BundleError, pack, sha256

Files = dict[str, bytes]
CODE_FILE = "code/mainrun/replay.py"
RUN_FILES = ("config.json", "env.json", "status.json", "metrics.jsonl", "summary.json", "tokenizer.json")
BEST = score(step=2, full=1.9)


def run_files(folder: Path) -> Files:
    return {f"run/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make_manifest(files: Files, summary: dict[str, Any], **changes: Any) -> dict[str, Any]:
    same = ("run", "preset", "fingerprints", "tokenizer", "geometry", "machine_class", "versions", "guards")
    return {
        "format": FORMAT, "commit": "c0ffee" * 6, **{name: summary[name] for name in same},
        "figures": {name: summary[name] for name in ("last", "best", "steps", "params", "weights")},
        "files": {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return all files of a bundle except the manifest."""
    return make_files(tmp_path_factory.mktemp("good"))


def make_files(folder: Path, **fields: Any) -> Files:
    run = make_run(best=BEST, last=score(), fields=fields)
    summary = run.summary
    return run_files(write_run(folder, run)) | {"report.pdf": make_report(summary), CODE_FILE: b"replay"}


def replayed(**changes: Any) -> dict[str, Any]:
    """Return the result of a replay of the run's first two steps."""
    summary = make_run(best=BEST, last=score()).summary
    rows = [row for row in make_rows(summary) if row["step"] <= 2]
    same = ("fingerprints", "tokenizer", "params", "tokens", "flops")
    result = {
        "machine_class": MACHINE,
        "versions": VERSIONS,
        "steps": 2,
        "of": STEPS,
        "rows": rows,
        "weights": "3" * 64,
    }
    return copy.deepcopy(result | {name: summary[name] for name in same} | changes)


class Case:
    """A good bundle and the result of its replay. Each test changes one of them."""

    def __init__(self, folder: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "x.zip"
        self.files = dict(files)
        self.result: Any = replayed()
        self.manifest: dict[str, Any] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.notes: list[str] = []
        monkeypatch.setattr(verification, "run_replay", self.run_replay)
        monkeypatch.setattr(verification, "ROOT", folder)
        (folder / "mainrun").mkdir()
        (folder / "mainrun" / "replay.py").write_bytes(b"replay")

    def run_replay(self, *args: Any) -> Any:
        self.calls.append(args)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        value = json.loads(self.files[name])
        change(value)
        self.files[name] = json.dumps(value).encode()

    def edit_rows(self, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        rows = [json.loads(line) for line in self.files["run/metrics.jsonl"].splitlines()]
        change(rows)
        self.files["run/metrics.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def write(self, dishonest: Files | None = None) -> Path:
        """Write the bundle. The manifest is updated with `self.manifest`, and omits the `dishonest` files."""
        summary = json.loads(self.files.get("run/summary.json", b"null"))
        if summary is None:
            summary = make_run(best=BEST, last=score()).summary
        manifest = make_manifest(self.files, summary) | self.manifest
        files = self.files | {MANIFEST: json.dumps(manifest).encode()}
        self.path.write_bytes(pack(files | (dishonest or {})))
        return self.path

    def verify(self, steps: int = 2, dishonest: Files | None = None) -> verification.Verdict:
        return verification.verify(self.write(dishonest), steps, self.notes.append)

    def refusal(self) -> str:
        """Verify the bundle, and return the only difference."""
        (difference,) = self.verify().differences
        return difference


@pytest.fixture
def case(tmp_path: Path, good: Files, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, good, monkeypatch)


def test_a_good_bundle(case: Case) -> None:
    run = make_run(best=BEST)
    verdict = case.verify()
    assert verdict == verification.Verdict(
        run.id, [],
        [
            "9 files against their sha256 in the manifest",
            "the summary, the log, the manifest and the report against each other",
            "2 of 4 steps trained again, scored after 2",
        ],
        same_class=True, machine_differences=[], tolerance=0.0, steps=2, total_steps=4, changed_code=[],
    )  # fmt: skip
    assert verdict.verified
    ((code, command, path, steps),) = case.calls
    assert (code.name, command, path.name, steps) == ("code", "steps", "run", "2") and not path.exists()
    assert code.parent == path.parent and code.parent.name.startswith("mainrun-verify-")
    (note,) = case.notes
    assert "(commit c0ffeec0ffee)" in note and "at most 2 steps" in note


def test_the_verdict_lists_what_was_scored(case: Case) -> None:
    case.result = replayed(
        rows=make_rows(make_run().summary)[:2], steps=2, last=[score() | {"event": "eval"}]
    )
    assert case.verify().checked[2:] == [
        "2 of 4 steps trained again, scored after none",
        "the last weights scored again",
    ]
    case.result = replayed(rows=[{"event": "eval", **BEST}, {"event": "eval", **score()}])
    assert case.verify().checked[2:] == ["2 of 4 steps trained again, scored after 2, 4"]


# -- files


@pytest.mark.parametrize("name", [*(f"run/{name}" for name in RUN_FILES), "report.pdf", CODE_FILE])
def test_a_changed_or_missing_file(case: Case, name: str) -> None:
    changed = case.verify(dishonest={name: case.files[name] + b" "})
    assert len(changed.differences) == 1 and changed.differences[0].startswith(
        f"{name} was changed: its sha256 is "
    )
    assert not changed.verified and changed.checked == ["9 files against their sha256 in the manifest"]
    assert changed.same_class and changed.machine_differences == []
    assert changed.tolerance == changed.steps == changed.total_steps == 0
    del case.files[name]
    assert case.refusal() == f"the bundle has no {name}"
    assert case.calls == [] and case.notes == []


def test_a_file_that_is_not_in_the_manifest(case: Case) -> None:
    extra = case.verify(dishonest={"code/evil.py": b""}).differences
    assert extra == ["code/evil.py is in the bundle, but not in its manifest"] and case.calls == []


def test_a_file_that_is_only_in_the_manifest(case: Case) -> None:
    listed = make_manifest(case.files, make_run(best=BEST, last=score()).summary)["files"]
    case.manifest = {"files": listed | {"code/lost.py": {"sha256": "0" * 64, "bytes": 1}}}
    assert case.refusal() == "code/lost.py is in the manifest, but not in the bundle" and case.calls == []


def test_the_error_names_the_file(case: Case) -> None:
    case.manifest = {"format": 99}
    with pytest.raises(BundleError, match=r"x\.zip is refused: .*format 99") as caught:
        case.verify()
    assert str(caught.value).count(";") == 1  # the message must suggest only one fix


# -- manifest, run and report


@pytest.mark.parametrize(
    "name", ["run", "preset", "fingerprints", "tokenizer", "geometry", "machine_class", "versions"]
)
def test_a_manifest_that_contradicts_the_run(case: Case, name: str) -> None:
    true = make_run(best=BEST).summary[name]
    case.manifest = {name: "other"}
    assert case.refusal() == f"{name} is 'other' in the manifest, {true!r} in the run" and case.calls == []


@pytest.mark.parametrize("name", ["last", "best", "steps", "params", "weights"])
def test_a_figure_that_contradicts_the_summary(case: Case, name: str) -> None:
    summary = make_run(best=BEST, last=score()).summary
    figures = {k: summary[k] for k in ("last", "best", "steps", "params", "weights")}
    case.manifest = {"figures": figures | {name: 17}}
    assert case.refusal() == f"the figure {name} is 17 in the manifest, {summary[name]!r} in the summary"
    del figures[name]
    case.manifest = {"figures": figures}
    assert case.refusal().startswith(f"the figure {name} is None in the manifest") and case.calls == []


@pytest.mark.parametrize("state", ["running", "interrupted", None])
def test_a_run_that_is_not_finished(case: Case, state: str | None) -> None:
    case.edit("run/status.json", lambda status: status.update(state=state) if state else status.clear())
    assert case.refusal().startswith(f"status.json says {state!r}") and case.calls == []


def test_a_guard_that_failed(case: Case) -> None:
    case.manifest = {"guards": [*failing("it looks ahead"), {"name": "x", "status": "flag", "detail": "y"}]}
    assert case.refusal() == "guard causality failed: it looks ahead"


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (b"no pdf", "report.pdf is not a readable PDF"),
        (make_pdf(["run x", "full 2.0000"]), "report.pdf does not quote this run: it lacks run "),
    ],
    ids=["not a PDF", "another run"],
)
def test_a_report_that_does_not_quote_the_run(case: Case, report: bytes, problem: str) -> None:
    case.files["report.pdf"] = report
    refusal = case.refusal()
    assert refusal.startswith(problem) and case.calls == []
    assert ("official 3.0000" in refusal) == ("quote" in problem)


def test_all_differences_are_listed_at_once(case: Case) -> None:
    case.manifest = {"preset": "x", "tokenizer": "y"}
    case.edit("run/status.json", lambda status: status.update(state="running"))
    verdict = case.verify()
    assert [line.split()[0] for line in verdict.differences] == ["preset", "tokenizer", "status.json"]
    assert verdict.checked[-1] == "the summary, the log, the manifest and the report against each other"


def test_a_contradictory_run(case: Case) -> None:
    case.edit("run/summary.json", lambda summary: summary["scores"]["val"]["last"].update(full=1.0))
    message = case.refusal()
    assert message.startswith("the run: ") and "run/summary.json" in message and "/tmp" not in message
    assert case.calls == []


@pytest.mark.parametrize(
    ("change", "error"),
    [({"guards": [{}]}, "KeyError"), ({"guards": None}, "TypeError"), ({"guards": [3]}, "TypeError")],
)
def test_a_manifest_of_another_shape(case: Case, change: dict[str, Any], error: str) -> None:
    case.manifest = change
    assert case.refusal().startswith(f"the run cannot be read ({error}") and case.calls == []


@pytest.mark.parametrize("error", [LookupError, TypeError, AttributeError, ValueError, RecursionError])
def test_a_run_that_cannot_be_read(
    case: Case, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any) -> None:
        raise error("so")

    monkeypatch.setattr(verification, "complete_summary", fail)
    assert case.refusal() == f"the run cannot be read ({error.__name__}: so)"


# -- the replay


@pytest.mark.parametrize("error", [MainrunError, RunError])
def test_a_replay_that_fails(case: Case, error: type[MainrunError]) -> None:
    case.result = error("no such thing")
    assert case.refusal() == "the replay failed: no such thing"


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, ValueError])
def test_an_unreadable_result(case: Case, error: type[Exception]) -> None:
    case.result = error("x")
    assert case.refusal().startswith(f"the result of the replay cannot be read ({error.__name__}: ")


def test_an_incomplete_result(case: Case) -> None:
    del case.result["machine_class"]
    assert case.refusal() == "the result of the replay cannot be read (KeyError: 'machine_class')"


def test_another_number_of_steps(case: Case) -> None:
    case.result["of"] = 5
    assert case.refusal() == "the config of the run implies 5 steps, but the summary says 4"
    del case.result["of"]
    assert case.verify().verified


@pytest.mark.parametrize("name", ["fingerprints", "tokenizer", "params", "tokens", "flops"])
def test_facts_that_follow_from_code_and_config(case: Case, name: str) -> None:
    true = make_run(best=BEST).summary[name]
    case.result[name] = "other"
    assert case.refusal() == f"{name} is {true!r} in the run, 'other' according to its code and config"
    del case.result[name]
    assert case.verify().verified


def test_another_source(case: Case) -> None:
    case.result["versions"] = VERSIONS | {"mainrun": "6" * 64}
    assert case.refusal() == "the run was trained by source 555555555555, but the code is source 666666666666"


def test_two_sources(case: Case) -> None:
    case.edit(
        "run/summary.json", lambda summary: summary["all_versions"].append(VERSIONS | {"mainrun": "4" * 64})
    )
    sources = "444444444444, 555555555555"
    assert case.refusal() == f"the run was trained by source {sources}, but the code is source 555555555555"


def test_other_weights(case: Case) -> None:
    case.result["weights"] = "4" * 64
    assert case.refusal() == "the checkpoint's weights are 444444444444, the summary says 333333333333"
    case.result |= {"weights": "3" * 64, "trained_weights": "4" * 64}
    assert case.refusal() == "the replay's weights are 444444444444, the summary says 333333333333"
    case.result |= {"trained_weights": "3" * 64}
    assert case.verify().verified
    case.result |= {"machine_class": MACHINE | {"device": "cuda"}, "trained_weights": "4" * 64}
    assert case.verify().verified  # another machine rounds differently when it trains the run again
    case.result["weights"] = "4" * 64
    assert case.refusal().startswith("the checkpoint's weights are ")
    del case.result["weights"]
    assert case.verify().verified


def test_unusable_weights(case: Case) -> None:
    case.result["unusable"] = "torn"
    assert case.refusal() == "the last weights are in the bundle, but cannot be used: torn"
    case.result["last"] = []
    assert case.verify().verified


# -- another machine


def differ(name: str, of_run: Any, current: Any) -> str:
    return f"{name}: the run had {of_run}, this machine has {current}"


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({"machine_class": MACHINE | {"device": "cuda"}}, [differ("device", "cpu", "cuda")]),
        ({"machine_class": MACHINE | {"threads": 8}}, [differ("threads", None, 8)]),
        (
            {"machine_class": {k: MACHINE[k] for k in ("device", "dtype", "processes")}},
            [differ("instructions", "AVX2", None)],
        ),
        ({"versions": VERSIONS | {"torch": "2.1"}}, [differ("version of torch", "2.0", "2.1")]),
        ({"versions": VERSIONS | {"numpy": "1"}}, [differ("version of numpy", None, "1")]),
        ({"versions": {"mainrun": VERSIONS["mainrun"]}}, [differ("version of torch", "2.0", None)]),
        (
            {"machine_class": MACHINE | {"device": "x"}, "versions": VERSIONS | {"torch": "9"}},
            [differ("device", "cpu", "x"), differ("version of torch", "2.0", "9")],
        ),
        (
            {"machine_class": MACHINE | {"dtype": "x", "device": "y"}},
            [differ("device", "cpu", "y"), differ("dtype", "float32", "x")],
        ),
    ],
)
def test_differences_between_the_machines(case: Case, change: dict[str, Any], differences: list[str]) -> None:
    case.result |= change
    verdict = case.verify()
    assert verdict.verified and verdict.machine_differences == differences
    assert (verdict.same_class, verdict.tolerance) == (False, 1e-3)


@pytest.mark.parametrize("name", ["machine_classes", "all_versions"])
def test_a_run_that_was_resumed_elsewhere(case: Case, name: str) -> None:
    case.edit("run/env.json", lambda env: env[name].append({"mainrun": "9" * 64}))
    verdict = case.verify()
    assert verdict.verified and not verdict.same_class
    (difference,) = verdict.machine_differences
    assert "was resumed on another machine class" in difference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tolerance_depends_on_the_dtype(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = Case(tmp_path, make_files(tmp_path_factory.mktemp("files"), dtype=dtype), monkeypatch)
    case.result["machine_class"] = MACHINE | {"device": "cuda"}
    tolerance = {"float32": 1e-3, "bfloat16": 1e-2}[dtype]
    assert case.verify().tolerance == tolerance
    for name, value, share in (("loss", 5.0, 1), ("lr", 0.1, 1), ("grad_norm", 1.0, 10)):
        for factor, verified in ((1 - 0.98 * share * tolerance, True), (1 - 1.02 * share * tolerance, False)):
            case.result["rows"][0][name] = value * factor
            verdict = case.verify()
            assert verdict.verified == verified
            if not verified:
                assert verdict.differences == [
                    f"step 1: {name} is {value!r} in the log, {value * factor!r} in the replay"
                ]
        case.result["rows"][0][name] = value


def test_the_tolerance_applies_to_the_gradient_norm_of_each_layer(case: Case) -> None:
    case.edit_rows(lambda rows: rows[0].update(grad_norms={"embedding": 1.0, "head": 0.0}))
    for change, same_class, verified in (
        (1.0, True, True),
        (1.001, True, False),
        (1.005, False, True),
        (1.02, False, False),
    ):
        case.result["rows"][0]["grad_norms"] = {"embedding": change, "head": 0.0}
        case.result["machine_class"] = MACHINE if same_class else MACHINE | {"device": "cuda"}
        assert case.verify().verified == verified, (change, same_class)
    case.result["rows"][0]["grad_norms"] = {"embedding": 1.0, "head": 0.0, "block_0": 0.0}
    assert "step 1: grad_norms is" in case.refusal()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tolerance_of_the_last_weights(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = Case(tmp_path, make_files(tmp_path_factory.mktemp("files"), dtype=dtype), monkeypatch)
    case.result["machine_class"] = MACHINE | {"device": "cuda"}
    for factor, verified in ((1.00098, True), (1.00102, False)):
        case.result["last"] = [{"event": "eval", **score(full=2.0 * factor)}]
        verdict = case.verify()
        assert verdict.verified == verified
    assert verdict.differences == [f"step 4, val: full is 2.0 in the log, {2.0 * 1.00102!r} in the replay"]


# -- the rows

ULP = 1 + 2**-52


def drop(row: dict[str, Any], name: str) -> None:
    del row[name]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda rows: rows[0].update(loss=5.0 * ULP),
            f"step 1: loss is 5.0 in the log, {5.0 * ULP!r} in the replay",
        ),
        (lambda rows: rows[1].update(lr=0.2), "step 2: lr is 0.1 in the log, 0.2 in the replay"),
        (
            lambda rows: rows[1].update(grad_norm=1.0 * ULP),
            f"step 2: grad_norm is 1.0 in the log, {ULP!r} in the replay",
        ),
        (lambda rows: rows[1].update(tokens=257), "step 2: tokens is 256 in the log, 257 in the replay"),
        (lambda rows: rows[1].update(tokens=256.0), "step 2: tokens is 256 in the log, 256.0 in the replay"),
        (lambda rows: rows[1].update(new=1), "step 2: new is None in the log, 1 in the replay"),
        (lambda rows: drop(rows[1], "lr"), "step 2: lr is 0.1 in the log, None in the replay"),
        (lambda rows: rows[2].update(full=1.8), "step 2, val: full is 1.9 in the log, 1.8 in the replay"),
        (lambda rows: rows[2].update(split="dev"), "step 2, dev: the log has no score"),
        (lambda rows: rows[2].update(step=1), "step 1, val: the log has no score"),
        (lambda rows: rows[1].update(seconds=99.0), ""),
        (lambda rows: rows[1].update(reused=True), ""),
        (lambda rows: drop(rows[1], "seconds"), ""),
        (lambda rows: rows.clear(), ""),
    ],
)
def test_each_row_is_compared(
    case: Case, change: Callable[[list[dict[str, Any]]], Any], difference: str
) -> None:
    change(case.result["rows"])
    assert case.verify().differences == ([difference] if difference else [])


def test_a_step_that_is_not_logged_is_not_compared(case: Case) -> None:
    case.edit_rows(lambda rows: rows.pop(0))
    case.result["rows"][1]["lr"] = 0.2
    assert case.refusal() == "step 2: lr is 0.1 in the log, 0.2 in the replay"


@pytest.mark.parametrize(
    ("logged", "replayed_value"), [(True, 1), (None, 5.0), ("5.0", 5.0), (5, 5.0), (5.0, 5)]
)
def test_only_floats_have_a_tolerance(case: Case, logged: Any, replayed_value: Any) -> None:
    case.result["machine_class"] = MACHINE | {"device": "cuda"}
    case.edit_rows(lambda rows: rows[0].update(extra=logged))
    case.result["rows"][0]["extra"] = replayed_value
    assert case.refusal() == f"step 1: extra is {logged!r} in the log, {replayed_value!r} in the replay"


# -- the code


def test_code_that_differs_from_the_installed_code(case: Case, tmp_path: Path) -> None:
    (tmp_path / "mainrun" / "sub").mkdir()
    (tmp_path / "mainrun" / "sub" / "here.py").write_bytes(b"1")
    (tmp_path / "mainrun" / "notes.md").write_bytes(b"1")
    (tmp_path / "mainrun" / "both.py").write_bytes(b"1")
    case.files |= {
        "code/mainrun/there.py": b"2",
        "code/mainrun/both.py": b"3",
        "code/mainrun/data.md": b"2",
        "code/sweeps/x.py": b"2",
    }
    verdict = case.verify()
    assert verdict.verified and verdict.changed_code == [
        "mainrun/both.py",
        "mainrun/sub/here.py",
        "mainrun/there.py",
    ]


def test_the_files_of_a_run() -> None:
    assert finished_run.RUN_FILES == RUN_FILES and bundle.REPORT == "report.pdf"
