"""Run tasks of lm-eval on the model of a run. This module needs the package lm-eval."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# lm-eval and its libraries read these variables when they are imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # `datasets` would count each load of a local file
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a bar would come before our error messages
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # do not start one process per core for a bootstrap

import numpy as np
import torch
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mainrun.data.tokenizer import EOS
from mainrun.errors import MainrunError, UsageError
from mainrun.files.hashing import sha256_file
from mainrun.files.inputs import first_ten, shown
from mainrun.interop.eval import Request, Scorer

# the seeds of lm-eval's own command
PYTHON_SEED = 0
OTHER_SEED = 1234
BOOTSTRAP_ITERS = 1000  # for metrics without a formula for the standard error, such as perplexity
NETWORK_LIBRARIES = ("httpcore", "httpx", "huggingface_hub", "requests", "urllib3")
# options of generation that change the sampling; greedy decoding ignores them, as in `transformers`
UNSUPPORTED = ("top_k", "top_p", "min_p", "num_beams", "repetition_penalty")


class MainrunLM(TemplateLM):  # type: ignore[misc]
    """The model of a run, as lm-eval calls it."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return EOS

    @property
    def max_length(self) -> int:
        return self.scorer.block_size

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.scorer.ids(string))

    # -- log-probabilities

    def score_requests(self, requests: list[Request]) -> list[tuple[float, bool]]:
        return [(likelihood.log_prob, likelihood.greedy) for likelihood in self.scorer.score(requests)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding gives it."""
        encoded = []
        for request in requests:
            context, continuation = request.args
            if not continuation:
                raise UsageError(
                    f"a text to score after the prompt {shown(context, 80)} is empty; repair the task"
                )
            encoded.append(self.scorer.encode(context, continuation))
        return self.score_requests(encoded)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        encoded = []
        for _texts, context, continuation in requests:
            encoded.append(Request(tuple(context), tuple(continuation)))
        return self.score_requests(encoded)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text. A long text is divided into blocks."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), EOS, self.max_length, context_len=1
            ):
                context, continuation = utils.make_disjoint_window(window)
                windows.append(Request(tuple(context), tuple(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, likelihood in zip(owners, self.scorer.score(windows), strict=True):
            totals[owner] += likelihood.log_prob
        return totals

    # -- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a stop text, <eos> or the maximum length."""
        texts = []
        for request in requests:
            context, options = request.args
            texts.append(self.generate(context, normalize_gen_kwargs(options)))
        return texts

    def generate(self, context: str, options: dict[str, Any]) -> str:
        temperature = 0.0
        if options["do_sample"]:
            temperature = options["temperature"]
        for name in UNSUPPORTED:
            if temperature and options.get(name) not in (None, 1, 1.0):
                raise UsageError(
                    f"the task samples with {name}, which is not supported; use temperature alone"
                )
        prompt = self.scorer.ids(context)
        if not prompt or not self.scorer.foreign:
            prompt = (EOS, *prompt)
        before = self.scorer.tokenizer.decode(_without_eos(prompt))
        ids = list(prompt)
        text = ""
        for _ in range(options["max_gen_toks"]):
            token = self.next_token(ids, temperature)
            if token == EOS:
                break
            ids.append(token)
            text = self.scorer.tokenizer.decode(_without_eos(ids))[len(before) :]
            if any(stop in text for stop in options["until"] if stop):
                break
        for stop in options["until"]:
            if stop:
                text = text.split(stop)[0]
        return text

    @torch.inference_mode()
    def next_token(self, ids: list[int], temperature: float) -> int:
        """Choose the token after the last block of a sequence."""
        idx = torch.tensor([ids[-self.max_length :]], device=self.scorer.device)
        logits = self.scorer.model(idx)[0, -1].float()
        if not temperature:
            return int(logits.argmax())
        return int((logits / temperature).softmax(-1).multinomial(1))


def _without_eos(ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token != EOS]


# -- tasks


class TaskResult(NamedTuple):
    """The result of one requested task, which may be a group of tasks."""

    results: dict[str, Any]  # by the name of a task: its version, the number of questions, and its metrics
    source: dict[str, Any]  # the file that defines the task, and the sha256 of the file


class Tasks:
    """The tasks that a command line names."""

    def __init__(self, names: Sequence[str], include: Path | None) -> None:
        """Find the tasks. A folder with task files comes first. If it has all tasks, no others are read."""
        self.names = list(dict.fromkeys(names))
        self.manager = TaskManager(include_path=include, include_defaults=include is None)
        if include is not None and self.unknown():
            self.manager = TaskManager(include_path=include)
        unknown = self.unknown()
        if unknown:
            raise UsageError(_unknown_task(unknown[0], self.manager.all_tasks, include))

    def unknown(self) -> list[str]:
        known = set(self.manager.all_tasks)
        return [name for name in self.names if name not in known]

    def load(self, name: str) -> dict[str, Any]:
        """Load the questions of a task. Raise UsageError if the task or its data cannot be used."""
        with _task_errors(name), redirect_stdout(sys.stderr):
            loaded = self.manager.load(name)
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=OTHER_SEED)
        return dict(loaded)

    def run(self, name: str, lm: MainrunLM, limit: int | None) -> TaskResult:
        """Evaluate the model on a task."""
        loaded = self.load(name)
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        with _task_errors(name), redirect_stdout(sys.stderr):
            for task_name, task in loaded["tasks"].items():
                check_targets(task_name, task, limit)
            answer: Any = evaluator.evaluate(
                lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=False
            )
        results = {}
        for task_name, values in answer["results"].items():
            results[task_name] = {
                "version": answer["versions"].get(task_name),
                "questions": answer["n-samples"].get(task_name, {}).get("effective"),
                "metrics": _metrics(values),
            }
        return TaskResult(results, self.source(name))

    def source(self, name: str) -> dict[str, Any]:
        """Return the name and the sha256 of the file that defines a task, if one file defines it."""
        path = self.manager.task_index[name].yaml_path
        if path is None:
            return {"task": name}
        return {"task": name, "file": path.name, "sha256": sha256_file(path)}


def check_targets(name: str, task: Any, limit: int | None) -> None:
    """Raise UsageError if the right choice of a question is none of its choices.

    lm-eval only logs a warning, and counts each answer as wrong.
    """
    own_metrics = callable(task.config.process_results)
    if own_metrics or type(task).process_results is not ConfigurableTask.process_results:
        return  # the task computes its metrics itself, and may not use the target
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(itertools.islice(task.eval_docs, limit), 1):
        choices = task.doc_to_choice(doc)
        target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        targets = target if isinstance(target, list) else [target]
        for one in targets:
            if not _is_choice(one, choices):
                raise UsageError(
                    f"task {name!r}: question {number:,} has {len(choices)} choices, but doc_to_target gives "
                    f"{shown(one, 80)}, which is the index or the text of none of them; repair the task file"
                )


def _is_choice(target: Any, choices: Sequence[str]) -> bool:
    if isinstance(target, str):
        return target in choices
    return isinstance(target, int | float | np.integer) and bool(0 <= target < len(choices))


def versions() -> dict[str, str]:
    """Return the versions of lm-eval and the library that loads its data."""
    return {name: version(name) for name in ("lm_eval", "datasets")}


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the results of lm-eval, such as {"acc,none": 0.5, "acc_stderr,none": 0.1}."""
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{filter_name}")
        if not isinstance(stderr, float):
            stderr = None
        label = name if filter_name == "none" else key
        metrics[label] = {"value": value, "stderr": stderr}
    return metrics


# -- errors of tasks


def _unknown_task(name: str, known: Sequence[str], include: Path | None) -> str:
    import difflib

    similar = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5)
    hint = ""
    if similar:
        hint = f"; similar tasks: {', '.join(similar)}"
    fix = "`lm-eval ls tasks` lists the tasks of lm-eval; name a folder with your own tasks with --include"
    lines = [f"unknown task {shown(name, 100)}{hint}; {fix}"]
    if include is not None:
        lines += first_ten(_broken_files(include), "files that cannot be read")
    return "\n".join(lines)


def _broken_files(include: Path) -> Iterator[str]:
    """Yield the reasons why task files cannot be read. lm-eval skips such files silently."""
    for path in sorted(include.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as e:  # PyYAML and lm-eval raise many kinds of errors
            yield f"{path} is no task file: {_first_line(e)}; repair it"


@contextmanager
def _task_errors(name: str) -> Iterator[None]:
    """Convert an exception that a task or its data causes to a UsageError."""
    try:
        yield
    except (MainrunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # a task is a small program, which may raise any exception
        if _any_cause(e, _is_network_error):
            raise UsageError(
                f"task {name!r} needs data from the network, which could not be loaded ({_first_line(e)}); "
                "connect to the network, or use --include with a task whose data are local files"
            ) from e
        if _any_cause(e, lambda cause: isinstance(cause, FileNotFoundError)):
            raise UsageError(
                f"task {name!r} needs a file that does not exist ({_first_line(e)}); check data_files in the "
                "task file: relative paths begin at the current folder"
            ) from e
        raise UsageError(
            f"task {name!r} cannot be evaluated: {type(e).__name__}: {_first_line(e)}; repair the task file; "
            "--debug shows the traceback"
        ) from e


def _any_cause(e: BaseException, matches: Callable[[BaseException], bool]) -> bool:
    """Return whether an exception, or one of the exceptions that led to it, matches."""
    current: BaseException | None = e
    while current is not None:
        if matches(current):
            return True
        current = current.__cause__ or current.__context__
    return False


def _is_network_error(e: BaseException) -> bool:
    library = type(e).__module__.partition(".")[0]
    return isinstance(e, ConnectionError) or library in NETWORK_LIBRARIES


def _first_line(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__
