"""Evaluations of runs: questions with choices, tasks of lm-eval, and the files that they write."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import TINY
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.data import scoring
from mainrun.data.tokenizer import EOS, Tokenizer
from mainrun.errors import RunError, UsageError
from mainrun.files.hashing import sha256_file
from mainrun.interop import eval as evaluation
from mainrun.interop.choice_files import Question, read_questions
from mainrun.interop.eval import Likelihood, Request, Scorer, evaluate_questions, load, share_with_error
from mainrun.interop.names import checkpoint_name
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir

ROOT = Path(__file__).parents[1]
BLOCK = 16
# the shape of a Qwen2 checkpoint
DENSE: dict[str, Any] = {
    "num_titles": 150, "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False,
    "qkv_bias": True, "n_kv_head": 1, "optimizer": "adamw", "lr": 0.01, "dropout": 0.0, "ema": 0.9,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "n_layer": 4, "block_pattern": "DSMT", "capacity": 0.4, "sharpness_end": 5.0,
}  # fmt: skip
PROMPTS = (
    "Show HN:", "Ask HN: ", "Google to", "", "  ", "The new", "Why", 'How "X" is\n',
    "A prompt that has many more tokens than a block of the model, so that its left end is lost", "é 東",
)  # fmt: skip
CHOICES = (
    ["My new app", "the end of the web", "A"],
    ["buy", "sell two"],
    ["of the year", "in 2024", " spaced", "of the year"],
)


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | DENSE | changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished dense run."""
    out = tmp_path_factory.mktemp("dense")
    train(config(), out)
    return out / config().run_id


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with blocks of every kind."""
    out = tmp_path_factory.mktemp("routed")
    train(config(**ROUTED), out)
    return out / config(**ROUTED).run_id


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of questions, with prompts of all kinds."""
    return write_questions(tmp_path_factory.mktemp("questions") / "hn.jsonl", PROMPTS)


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    """Return a copy of the dense run without evaluations."""
    shutil.copytree(dense, tmp_path / "copy", ignore=shutil.ignore_patterns("eval"))
    return tmp_path / "copy"


def write_questions(path: Path, prompts: Sequence[str]) -> Path:
    lines = []
    for prompt in prompts:
        for choices in CHOICES:
            row = {"prompt": prompt, "choices": choices, "answer": len(lines) % len(choices)}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def answer(*args: object) -> list[dict[str, Any]]:
    """Return the evaluations that `mainrun eval ... --json` prints."""
    result = invoke("eval", *args, "--json")
    assert result.exit_code == 0, result.output
    evaluations: list[dict[str, Any]] = json.loads(result.stdout)["evaluations"]
    return evaluations


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def scorer_of(run: Path, route: str | None = None) -> Scorer:
    return load(RunDir(run), route).scorer


# -- log-probabilities


def plain_log_prob(scorer: Scorer, prompt: str, choice: str) -> float:
    """Compute the score of a choice token by token, each with a forward pass of its own."""
    model = scorer.model
    stripped = prompt.rstrip()
    text = prompt + " " + choice
    if not stripped:
        # the first word of a title has no blank before it
        text = text[1:]
    ids = [EOS, *scorer.tokenizer.encode([text]).tolist()[:-1]]
    scored = len(ids) - 1
    if stripped:
        scored = len(ids) - 1 - (len(scorer.tokenizer.encode([stripped])) - 1)
    ids = ids[-(BLOCK + 1) :]
    total = 0.0
    for t in range(len(ids) - scored, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:t]]))[0, -1].double()
        total += float(logits[ids[t]] - logits.exp().sum().log())
    return total


@pytest.mark.parametrize("route", [None, "own", "student"])
def test_scores_are_those_of_a_plain_loop(dense: Path, routed: Path, file: Path, route: str | None) -> None:
    run = dense if route is None else routed
    scorer = scorer_of(run, route)
    questions = read_questions(file)
    if route is not None:
        questions = questions[::2]  # the loop is slow for routed blocks
    metrics, items = evaluate_questions(scorer, questions)
    right = {"acc": 0, "acc_norm": 0}
    for question, item in zip(questions, items, strict=True):
        expected = [plain_log_prob(scorer, question.prompt, choice) for choice in question.choices]
        assert item["scores"] == pytest.approx(expected, abs=2e-5)
        lengths = [len(choice) for choice in question.choices]
        assert item["acc"] == int(np.argmax(expected))
        assert item["acc_norm"] == int(np.argmax(np.array(expected) / lengths))
        right["acc"] += item["acc"] == question.answer
        right["acc_norm"] += item["acc_norm"] == question.answer
        assert (item["line"], item["answer"]) == (question.line, question.answer)
    for name, count in right.items():
        assert 0 < count < len(questions), "the questions can tell wrong scores from right ones"
        assert metrics[name]["value"] == pytest.approx(count / len(questions), abs=1e-12)


def all_requests(scorer: Scorer) -> list[Request]:
    return [
        scorer.encode(prompt, f" {choice}") for prompt in PROMPTS for choices in CHOICES for choice in choices
    ]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("route", [None, "own", "student"])
def test_a_score_does_not_depend_on_the_other_rows_of_a_batch(
    dense: Path, routed: Path, route: str | None, dtype: torch.dtype, most: float
) -> None:
    scorer = scorer_of(dense if route is None else routed, route)
    scorer.model.to(dtype)
    requests = all_requests(scorer)
    assert len({len(scorer.sequence(request)) for request in requests}) > 5, "rows are padded"
    assert len(list(scorer.batches(sorted(set(requests), key=lambda r: -len(sum(r, ())))))) == 1
    together = scorer.score(requests)
    for request, likelihood in zip(requests, together, strict=True):
        alone = scorer.score([request])[0]
        # 1e-6 per token, because the sum of a long choice has more rounding errors
        assert abs(alone.log_prob - likelihood.log_prob) <= most * len(request.continuation)
        assert alone.greedy == likelihood.greedy


def test_batches_hold_a_limited_number_of_logits(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(dense)
    requests = all_requests(scorer)
    expected = scorer.score(requests)
    monkeypatch.setitem(scoring.LOGITS, "cpu", 3 * BLOCK * scorer.model.embed.num_embeddings)
    sizes = []
    original = Scorer.score_batch

    def watched(self: Scorer, batch: list[Request]) -> list[Likelihood]:
        sizes.append(len(batch))
        return original(self, batch)

    monkeypatch.setattr(Scorer, "score_batch", watched)
    split = scorer.score(requests)
    assert sizes[0] == 3 and len(sizes) > 5
    for one, other in zip(split, expected, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)


def test_a_long_evaluation_reports_its_progress(
    dense: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "REPORT_EVERY", -1.0)
    result = invoke("eval", dense, "--choices", file, "--limit", 1, "--json")
    assert result.stderr == "scored 3 of 3 texts\n" and json.loads(result.stdout)


def test_the_prompt_and_the_choice_are_one_text_that_begins_like_a_title(dense: Path) -> None:
    scorer = scorer_of(dense)
    title = tuple(scorer.tokenizer.encode(["Show HN: a new app"]).tolist()[:-1])
    prompt = tuple(scorer.tokenizer.encode(["Show HN:"]).tolist()[:-1])
    expected = Request((EOS, *prompt), title[len(prompt) :])
    assert scorer.encode("Show HN:", " a new app") == expected
    assert scorer.encode("Show HN: ", "a new app") == expected, "blanks are moved to the choice"
    assert scorer.encode("", " Show HN: a new app") == Request((EOS,), title)
    double = scorer.encode("Show HN: ", " a new app")
    assert scorer.tokenizer.decode(double.continuation) == " a new app"
    assert double.context == expected.context
    assert scorer.encode("\n ", " a") == Request((EOS,), scorer.ids("\n  a"))


class ForeignTokenizer:
    """A tokenizer with the interface of a foreign vocabulary, which has no leading blank."""

    kind = "hf"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        (text,) = texts
        return np.array([*(byte + 3 for byte in text.encode()), EOS])


def test_a_foreign_vocabulary_gets_eos_for_an_empty_prompt_only(dense: Path) -> None:
    tokenizer: Any = ForeignTokenizer()
    scorer = Scorer(scorer_of(dense).model, tokenizer)
    ids = lambda text: tuple(byte + 3 for byte in text.encode())  # noqa: E731
    assert scorer.encode("ab", " cd") == Request(ids("ab"), ids(" cd"))
    assert scorer.encode("ab ", " cd") == Request(ids("ab"), ids("  cd"))
    assert scorer.encode("", " cd") == Request((EOS,), ids(" cd"))
    assert scorer.encode("  ", " cd") == Request((EOS,), ids("   cd"))


def test_a_long_prompt_loses_its_left_end(dense: Path) -> None:
    scorer = scorer_of(dense)
    tail = " ".join(["and the end of a long prompt"] * 4)
    request = scorer.encode(f"First {tail}", " yes")
    sequence = scorer.sequence(request)
    assert len(request.context) > BLOCK and len(sequence) == BLOCK
    assert sequence == (request.context + request.continuation)[-BLOCK - 1 : -1]
    other = scorer.encode(f"Another start {tail}", " yes")
    assert request.context != other.context
    assert scorer.score([request, other])[0] == scorer.score([request, other])[1]
    assert scorer.score([scorer.encode(f"{tail} or", " yes")]) != scorer.score([request])


def test_of_equal_choices_the_first_is_taken(dense: Path) -> None:
    scorer = scorer_of(dense)
    questions = []
    for answer_ in range(3):
        questions.append(Question(answer_ + 1, "Show HN:", ["the same", "the same", "the same"], answer_))
    metrics, items = evaluate_questions(scorer, questions)
    assert [item["acc"] for item in items] == [item["acc_norm"] for item in items] == [0, 0, 0]
    assert metrics["acc"]["value"] == metrics["acc_norm"]["value"] == pytest.approx(1 / 3)
    with torch.no_grad():
        scorer.model.embed.weight.zero_()  # every token is then equally likely
    _, (item,) = evaluate_questions(scorer, [Question(1, "Show HN:", ["a b", "a b c", "c a"], 0)])
    assert item["scores"][0] == item["scores"][2] > item["scores"][1]
    assert item["acc"] == 0


def test_the_standard_error_is_that_of_a_mean() -> None:
    for right, n in ((3, 10), (0, 4), (7, 7), (1, 2)):
        values = np.array([1.0] * right + [0.0] * (n - right))
        expected = values.std(ddof=1) / math.sqrt(n)
        assert share_with_error(right, n) == pytest.approx({"value": right / n, "stderr": expected})
    assert share_with_error(1, 1) == {"value": 1.0, "stderr": None}


def test_weights_without_valid_probabilities_are_refused(dense: Path) -> None:
    scorer = scorer_of(dense)
    with torch.no_grad():
        scorer.model.norm.weight.fill_(math.nan)
    with pytest.raises(RunError, match="no valid probabilities"):
        evaluate_questions(scorer, [Question(1, "a", ["b", "c"], 0)])


def test_a_choice_that_is_longer_than_a_block_is_refused(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a", "choices": ["b", "word " * 40], "answer": 0}))
    result = invoke("eval", dense, "--choices", path)
    refused(result, f"{path}, line 1, choice 1: ", "a block of the model has only 16")
    scorer = scorer_of(dense)
    with pytest.raises(UsageError, match="a text to score has 17 tokens"):
        scorer.score([Request((EOS,), (5,) * 17)])
    assert scorer.score([Request((EOS,), (5,) * 16)])[0].log_prob < 0


# -- the model of a run


def test_the_model_has_the_averaged_weights_and_the_inputs_of_the_last_step(
    dense: Path, routed: Path
) -> None:
    loaded = checkpoint.load_newest(RunDir(routed).checkpoints, checkpoint.fault, print)
    assert loaded is not None
    tensors, meta = loaded
    scored = load(RunDir(routed), None)
    model = scored.scorer.model
    for name, p in model.named_parameters():
        assert torch.equal(p, tensors[f"average/{name}"])
        assert not torch.equal(p, tensors[f"model/{name}"]) or "router" in name
    assert float(model.sharpness) == 5.0 and not model.training
    assert scored.run_info["step"] == meta["step"]
    assert scored.run_info["weights"]["averaged"] is True
    digest = scored.run_info["weights"]["sha256"]
    assert digest == load(RunDir(routed), "own").run_info["weights"]["sha256"]
    assert digest != load(RunDir(dense), None).run_info["weights"]["sha256"]
    assert digest == json.loads((routed / "summary.json").read_text())["weights"]


def test_the_route_is_the_runs_own_unless_another_is_given(routed: Path, file: Path) -> None:
    scores = {}
    for route in (None, "own", "student"):
        scored = load(RunDir(routed), route)
        scores[route] = evaluate_questions(scored.scorer, read_questions(file))[1]
        expected = {"1": route, "2": route, "3": route}
        if route is None:
            expected = {"1": "own", "2": "own", "3": "student"}
        assert scored.run_info["route"] == expected
    assert len({json.dumps(items) for items in scores.values()}) == 3
    assert config(**ROUTED, route="own").run_id != config(**ROUTED).run_id


def test_a_route_is_refused_for_a_dense_run(dense: Path, file: Path) -> None:
    refused(invoke("eval", dense, "--choices", file, "--route", "own"), "is dense", "omit --route")
    refused(invoke("eval", dense, "--choices", file, "--route", "Own"), "use own or student")


# -- the command and its files


def test_the_command_prints_a_table_and_writes_a_file(copied: Path, file: Path) -> None:
    result = invoke("eval", copied, "--choices", file)
    assert result.exit_code == 0 and result.stderr == ""
    (path,) = (copied / "eval").iterdir()
    written = json.loads(path.read_text())
    lines = [line.split() for line in result.stdout.splitlines()]
    for name in ("acc", "acc_norm"):
        values = written["results"]["hn"]["metrics"][name]
        cells = ["hn", name, f"{values['value']:.4f}", f"{values['stderr']:.4f}", "30"]
        assert cells in lines
    assert lines[-1] == ["wrote", str(path)]
    assert written["kind"] == "choices" and written["run"] == config().run_id
    assert written["config"] == config().digest and written["finished"] is True
    assert written["source"] == {"file": "hn.jsonl", "sha256": sha256_file(file), "questions": 30}
    assert written["route"] is None and written["limit"] is None
    assert {"python", "torch", "tokenizers", "mainrun", "eval"} <= written["versions"].keys()
    tokenizer = Tokenizer.from_json((copied / "tokenizer.json").read_text())
    assert written["tokenizer"] == tokenizer.digest
    assert [item["line"] for item in written["items"]] == [*range(1, 31)]
    assert str(copied) not in path.read_text(), "no path of this machine"


def test_a_repeat_overwrites_only_itself(copied: Path, file: Path, tmp_path: Path) -> None:
    first = answer(copied, "--choices", file)
    files = {path: path.read_bytes() for path in (copied / "eval").iterdir()}
    assert answer(copied, "--choices", file) == first
    assert {path: path.read_bytes() for path in (copied / "eval").iterdir()} == files
    other = write_questions(tmp_path / "hn.jsonl", PROMPTS[:2])
    paths = {
        answer(copied, "--choices", file)[0]["path"],
        answer(copied, "--choices", file, "--limit", 2)[0]["path"],
        answer(copied, "--choices", other)[0]["path"],
    }
    assert len(paths) == 3 == len([*(copied / "eval").iterdir()])


def test_a_limit_selects_the_first_questions(copied: Path, file: Path) -> None:
    (whole,) = answer(copied, "--choices", file)
    (limited,) = answer(copied, "--choices", file, "--limit", 5)
    items = json.loads(Path(limited["path"]).read_text())["items"]
    all_items = json.loads(Path(whole["path"]).read_text())["items"]
    assert limited["results"]["hn"]["questions"] == len(items) == 5
    for item, full in zip(items, all_items[:5], strict=True):
        assert item["scores"] == pytest.approx(full["scores"], abs=1e-5)
    (more,) = answer(copied, "--choices", file, "--limit", 1000)
    assert more["results"] == whole["results"]
    refused(invoke("eval", copied, "--choices", file, "--limit", 0), "--limit")


def test_a_run_that_is_not_finished_is_evaluated_with_a_note(copied: Path, file: Path) -> None:
    (copied / "summary.json").unlink()
    result = invoke("eval", copied, "--choices", file, "--json")
    assert result.exit_code == 0
    step = json.loads(result.stdout)["evaluations"][0]["step"]
    assert f"is not finished; its newest checkpoint, of step {step}" in result.stderr
    assert json.loads(result.stdout)["evaluations"][0]["finished"] is False
    shutil.rmtree(copied / "checkpoints")
    refused(invoke("eval", copied, "--choices", file), "no usable checkpoint")


def test_evaluations_do_not_hinder_a_run(copied: Path, file: Path, tmp_path: Path) -> None:
    """A run with evaluations can be resumed and repeated, and keeps the evaluations."""
    run = tmp_path / config().run_id
    copied.rename(run)
    (path,) = answer(run, "--choices", file)
    train(config(), tmp_path)
    train(config(), tmp_path, fresh=True)
    assert Path(path["path"]).is_file()


GOOD = '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n'
WRONG = [
    ("", "is empty"),
    ("\n \n", "has no questions"),
    (GOOD + "{", "line 2: "),
    (GOOD + "\n" + "[1]\n", "line 3: got a JSON list"),
    (GOOD + '{"prompt": "a", "choices": ["b", "c"]}', "line 2: the key 'answer' is missing"),
    (GOOD + '{"prompt": "a", "choices": ["b", "c"], "answr": 0}', "did you mean 'answer'?"),
    ('{"prompt": "a", "prompt": "b", "choices": ["b", "c"], "answer": 0}', "line 1: the key 'prompt'"),
    ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 1: answer=2 is out of range"),
    ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', "0 to 1"),
    ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer must be an integer"),
    ('{"prompt": "a", "choices": ["b", "c"], "answer": "B"}', "answer must be an integer"),
    ('{"prompt": "a", "choices": ["b", "c"], "answer": 0.0}', "answer must be an integer"),
    ('{"prompt": "a", "choices": ["b"], "answer": 0}', "give at least two choices"),
    ('{"prompt": "a", "choices": "bc", "answer": 0}', "choices must be a list"),
    ('{"prompt": "a", "choices": ["b", " "], "answer": 0}', "choice 1 is blank"),
    ('{"prompt": "a", "choices": ["b", 1], "answer": 0}', "choice 1 must be a string"),
    ('{"prompt": null, "choices": ["b", "c"], "answer": 0}', "prompt must be a string"),
    ('{"prompt": "\\ud800", "choices": ["b", "c"], "answer": 0}', "line 1: a string contains half"),
    ('{"prompt": "\\u0000", "choices": ["b", "c"], "answer": 0}', "line 1: a string contains a NUL"),
    (GOOD + GOOD.replace("a", "\0"), "(line 2)"),
    (GOOD.encode("utf-16"), "is UTF-16"),
    (GOOD.encode() + b"\xff\xfe", "(line 2)"),
    (GOOD + "\ufeff" + GOOD, "line 2: "),
    ("[" * 3000, "line 1: it is nested too deep"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_a_wrong_file_of_questions_is_refused(
    dense: Path, tmp_path: Path, content: str | bytes, words: str
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(dense.rglob("*"))
    refused(invoke("eval", dense, "--choices", path), str(path), words)
    assert sorted(dense.rglob("*")) == before, "nothing is written"


def test_line_ends_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n\r\n").encode() + GOOD.replace('"a"', '"\u2028"').encode()
    )
    first, second = read_questions(path)
    assert first == Question(1, "a", ["b", "c"], 0)
    assert second.line == 3 and second.prompt == "\u2028"


def test_a_wrong_command_line_is_refused(dense: Path, file: Path, tmp_path: Path) -> None:
    refused(invoke("eval", dense), "--choices FILE.jsonl, --tasks A,B")
    refused(invoke("eval", dense, "--choices", tmp_path / "nothing.jsonl"), "does not exist")
    refused(invoke("eval", dense, "--choices", tmp_path), "is a directory")
    refused(invoke("eval", dense, "--choices", ""), "--choices", "empty")
    refused(invoke("eval", "no-such-run", "--choices", file, "--out", tmp_path), "no run 'no-such-run'")
    refused(invoke("eval", dense, "--choices", file, "--include", tmp_path), "without --tasks")
    refused(invoke("eval", dense, "--tasks", "a,,b"), "an empty name")
    refused(invoke("eval", dense, "--tasks", "a", "--include", file), "not a folder")


def test_tasks_without_lm_eval_are_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mainrun.interop.lm_eval_model", raising=False)
    refused(invoke("eval", dense, "--tasks", "arc_easy"), "pip install 'mainrun[eval]'")


def test_choices_import_none_of_the_extras(dense: Path, file: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom mainrun.cli import app\n"
        f"result = CliRunner().invoke(app, ['eval', {str(dense)!r}, '--choices', {str(file)!r}])\n"
        "print(result.exit_code, *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    code, *modules = done.stdout.split()
    assert code == "0", done.stderr
    assert not {"lm_eval", "transformers", "datasets", "peft", "huggingface_hub"} & {*modules}


# -- lm-eval

TASK = """\
task: local_hn
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}} {{{{choices[0]}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
GENERATION = """\
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the library `datasets` use a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def write_tasks(folder: Path, questions: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate((TASK, ROLLING, GENERATION)):
        (folder / f"{number}.yaml").write_text(text.format(file=questions))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("route", [None, "own", "student"])
def test_choices_equal_a_task_of_lm_eval(
    cache: None, dense: Path, routed: Path, file: Path, tmp_path: Path, route: str | None
) -> None:
    folder = write_tasks(tmp_path / "tasks", file)
    args: list[object] = [dense]
    if route is not None:
        args = [routed, "--route", route]
    for limit in ([], ["--limit", 7]):
        choices, task = answer(*args, "--choices", file, "--tasks", "local_hn", "--include", folder, *limit)
        ours = choices["results"]["hn"]
        theirs = task["results"]["local_hn"]
        assert ours["questions"] == theirs["questions"] == (limit or [0, 30])[1]
        for name in ("acc", "acc_norm"):
            assert 0 < ours["metrics"][name]["value"] < 1
            assert theirs["metrics"][name] == pytest.approx(ours["metrics"][name], abs=1e-9)
        assert task["route"] == choices["route"] and task["weights"] == choices["weights"]
        assert {"lm_eval", "datasets"} <= task["versions"].keys()
        assert task["source"]["sha256"] == sha256_file(folder / "0.yaml")


def exported(run: Path, folder: Path) -> Any:
    """Return the model of a run and its tokenizer as lm-eval's own model class reads them from a folder."""
    from lm_eval.models.huggingface import HFLM
    from transformers import Qwen2Config, Qwen2ForCausalLM

    scorer = scorer_of(run)
    cfg = scorer.model.cfg
    settings = Qwen2Config(
        vocab_size=scorer.model.embed.num_embeddings,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.ff_width,
        num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.kv_heads,
        max_position_embeddings=cfg.block_size,
        rope_theta=cfg.rope_theta,
        tie_word_embeddings=cfg.tie_head,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(settings)
    weights = {checkpoint_name(name): p.detach() for name, p in scorer.model.named_parameters()}
    # the tied head has no tensor of its own; the next line checks that nothing else is missing
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(scorer.tokenizer.model)
    names = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]},
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | names))
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, add_bos_token=True)


@pytest.fixture(scope="module")
def hf(cache: None, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(dense, tmp_path_factory.mktemp("exported"))


@pytest.mark.slow
def test_choices_equal_the_model_class_of_lm_eval(hf: Any, dense: Path, tmp_path: Path) -> None:
    from lm_eval import evaluator

    from mainrun.interop.lm_eval_model import MainrunLM, Tasks

    # lm-eval encodes "" and the choice with two blanks before the choice, and does not know the escapes of
    # characters that the vocabulary lacks
    prompts = [prompt for prompt in PROMPTS if prompt.strip() and prompt.isascii() and "\n" not in prompt]
    questions = write_questions(tmp_path / "hn.jsonl", prompts)
    folder = write_tasks(tmp_path / "tasks", questions)
    choices, rolling = answer(dense, "--choices", questions, "--tasks", "local_rolling", "--include", folder)
    tasks = Tasks(["local_hn", "local_rolling", "local_generation"], folder)
    theirs: Any = {}
    for name in tasks.names:
        loaded = tasks.load(name)
        # with its own <eos>, the class would score a second <eos> at the start of a whole text
        hf.add_bos_token = name != "local_rolling"
        theirs[name] = evaluator.evaluate(hf, loaded, bootstrap_iters=0, log_samples=True)
    for name in ("acc", "acc_norm"):
        value = theirs["local_hn"]["results"]["local_hn"][f"{name},none"]
        assert choices["results"]["hn"]["metrics"][name]["value"] == pytest.approx(value, abs=1e-9)
    items = json.loads(Path(choices["path"]).read_text())["items"]
    for item, sample in zip(items, theirs["local_hn"]["samples"]["local_hn"], strict=True):
        scores = [response[0][0] for response in sample["resps"]]
        assert item["scores"] == pytest.approx(scores, abs=1e-4)
    for name in ("word_perplexity", "bits_per_byte"):
        value = theirs["local_rolling"]["results"]["local_rolling"][f"{name},none"]
        assert rolling["results"]["local_rolling"]["metrics"][name]["value"] == pytest.approx(value, rel=1e-5)

    lm = MainrunLM(scorer_of(dense))
    for sample in theirs["local_generation"]["samples"]["local_generation"]:
        context, options = sample["arguments"][0]
        if len(lm.tok_encode(context)) < BLOCK - 4:
            text = lm.generate_until([Instance(context, options)])[0]
            # the tokenizer drops the first blank of a text
            assert text.removeprefix(" ") == sample["resps"][0][0]


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["own", "foreign"])
def test_choices_equal_the_model_class_of_lm_eval_on_an_export(
    cache: None, tmp_path: Path, vocabulary: str
) -> None:
    import exporting
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from mainrun.interop import export
    from mainrun.interop.lm_eval_model import Tasks

    changes = {}
    prompts = [prompt for prompt in PROMPTS if prompt.strip() and prompt.isascii() and "\n" not in prompt]
    add_bos = True
    if vocabulary == "foreign":
        changes = exporting.from_base(exporting.make_base(tmp_path / "base"))
        prompts = [prompt for prompt in PROMPTS if prompt != "  "]  # lm-eval cannot score a blank prompt
        add_bos = None
    run = exporting.trained(tmp_path, **changes)
    export.export_run(run, tmp_path / "export")
    questions = write_questions(tmp_path / "hn.jsonl", prompts)
    (ours,) = answer(run.path, "--choices", questions)
    model = HFLM(
        pretrained=str(tmp_path / "export"),
        device="cpu",
        dtype="float32",
        batch_size=4,
        add_bos_token=add_bos,
    )
    task = Tasks(["local_hn"], write_tasks(tmp_path / "tasks", questions)).load("local_hn")
    theirs: Any = evaluator.evaluate(model, task, bootstrap_iters=10, log_samples=True)
    for name in ("acc", "acc_norm"):
        for kind, label in (("value", name), ("stderr", f"{name}_stderr")):
            value = theirs["results"]["local_hn"][f"{label},none"]
            assert ours["results"]["hn"]["metrics"][name][kind] == pytest.approx(value, abs=1e-9)
    items = json.loads(Path(ours["path"]).read_text())["items"]
    for item, sample in zip(items, theirs["samples"]["local_hn"], strict=True):
        scores = [response[0][0] for response in sample["resps"]]
        assert item["scores"] == pytest.approx(scores, abs=1e-4)


class Instance:
    """A request of lm-eval."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def greedy_text(scorer: Scorer, context: str) -> str:
    """Return at most 30 tokens after a context, of which each is the likeliest after the last block."""
    ids = [EOS, *scorer.ids(context)]
    for _ in range(30):
        with torch.no_grad():
            token = int(scorer.model(torch.tensor([ids[-BLOCK:]]))[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return scorer.tokenizer.decode(ids[1:]).removeprefix(context)


@pytest.mark.slow
def test_text_is_generated_token_by_token_up_to_a_stop(cache: None, dense: Path) -> None:
    from mainrun.interop.lm_eval_model import MainrunLM

    scorer = scorer_of(dense)
    lm = MainrunLM(scorer)
    text = greedy_text(scorer, "Show HN")
    assert len(text) > 5
    (whole,) = lm.generate_until([Instance("Show HN", {"max_gen_toks": 30, "until": []})])
    assert whole == text
    stop = text[3:5]
    (cut,) = lm.generate_until([Instance("Show HN", {"max_gen_toks": 30, "until": [stop]})])
    assert cut == text.partition(stop)[0]
    (empty,) = lm.generate_until([Instance("", {"max_gen_toks": 0, "until": []})])
    assert empty == ""
    for p in scorer.model.parameters():  # a short training predicts the same token after every text
        with torch.no_grad():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    generator = np.random.default_rng(0)
    differ = 0
    for _ in range(20):
        ids = generator.integers(3, scorer.tokenizer.vocab_size, 3 * BLOCK).tolist()
        with torch.no_grad():
            last, first = scorer.model(torch.tensor([ids[-BLOCK:], ids[:BLOCK]]))[:, -1].argmax(-1).tolist()
        assert lm.next_token(ids, 0.0) == last
        differ += first != last
    assert differ > 0
    sampling = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
    texts = set()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.add(lm.generate_until([Instance("Show HN", sampling)])[0])
    assert len(texts) == 2
    with pytest.raises(UsageError, match="top_p"):
        lm.generate_until([Instance("Show HN", sampling | {"top_p": 0.5})])


@pytest.mark.slow
def test_wrong_tasks_are_refused(cache: None, dense: Path, file: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", file)
    (folder / "broken.yaml").write_text("task: [")
    args = ("eval", dense, "--include", folder, "--tasks")
    refused(invoke(*args, "local_nh"), "unknown task 'local_nh'", "local_hn", "broken.yaml is no task file")
    (folder / "data.yaml").write_text(TASK.format(file=tmp_path / "no.jsonl").replace("local_hn", "no_data"))
    refused(invoke(*args, "no_data"), "'no_data' needs a file that does not exist", "no.jsonl")
    wrong = TASK.format(file=file).replace("local_hn", "no_column").replace("prompt", "question.text")
    (folder / "column.yaml").write_text(wrong)
    refused(invoke(*args, "no_column"), "'no_column' cannot be evaluated: UndefinedError")
    assert not (dense / "eval").exists() or not list((dense / "eval").glob("*no_*"))


@pytest.mark.slow
def test_a_target_that_is_no_choice_is_refused(cache: None, dense: Path, file: Path, tmp_path: Path) -> None:
    # lm-eval itself checks the first question only, and takes -1 for the last choice
    late = "\"{{answer if prompt == 'Show HN:' else 3}}\""
    for target, number in ((late, 4), ("-1", 1)):
        folder = write_tasks(tmp_path / "tasks", file)
        task = TASK.format(file=file).replace("local_hn", "no_target")
        task = task.replace("doc_to_target: answer", f"doc_to_target: {target}")
        (folder / "target.yaml").write_text(task)
        result = invoke("eval", dense, "--include", folder, "--tasks", "no_target")
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        error = f"error: task 'no_target': question {number} has 3 choices, but doc_to_target gives"
        assert error in result.stderr, result.stderr


# This program refuses and prints every use of the network.
OFFLINE = """\
import sys

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("NETWORK", event, args, file=sys.stderr, flush=True)
        raise ConnectionRefusedError("this test has no network")

sys.addaudithook(hook)
sys.argv = ["mainrun", *sys.argv[1:]]
from mainrun.cli import main
main()
"""


def offline(*args: object, home: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env["HF_HOME"] = str(home)
    command = [sys.executable, "-c", OFFLINE, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.slow
def test_local_tasks_use_no_network_and_others_fail_clearly(dense: Path, file: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", file)
    args = ("eval", dense, "--include", folder, "--json", "--tasks")
    done = offline(*args, "local_hn", home=tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    assert json.loads(done.stdout)["evaluations"][0]["results"]["local_hn"]["questions"] == 30
    (folder / "hub.yaml").write_text(
        "task: needs_hub\ndataset_path: some/dataset\ntest_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "a"\ndoc_to_target: "b"\n'
    )
    done = offline(*args, "needs_hub", home=tmp_path / "hf")
    assert done.returncode == 2 and done.stdout == ""
    assert "task 'needs_hub' needs data from the network" in done.stderr
    assert "Traceback" not in done.stderr
