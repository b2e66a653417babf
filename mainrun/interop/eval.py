"""Score continuations of texts with the model of a run, and evaluate the run on multiple-choice questions.

The model is the one that the run was scored with: it has the averaged weights if the run averages weights,
the sharpness and the capacity of its last step, and routers that look back only.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mainrun.core import machine_class
from mainrun.core.device import best_attention, choose_device, make_deterministic
from mainrun.core.hardware import cores
from mainrun.data.scoring import LOGITS
from mainrun.data.tokenizer import EOS, PAD, Tokenizer
from mainrun.errors import RunError, UsageError
from mainrun.files.hashing import sha256_file, sha256_json
from mainrun.interop.choice_files import Question
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.rundir import RunDir, disk_errors, write_json
from mainrun.train import Model
from mainrun.ui.sample import load_scored_state

REPORT_EVERY = 10.0  # seconds between two reports of the progress
LONGEST_NAME = 80  # the maximum number of characters of a task or a file in the name of a result


# -- log-probabilities


class Request(NamedTuple):
    """The token ids of a text. The log-probability of the continuation after the context is wanted."""

    context: tuple[int, ...]  # at least one id
    continuation: tuple[int, ...]  # at least one id


class Likelihood(NamedTuple):
    """The answer to a request."""

    log_prob: float  # the sum over the tokens of the continuation, in nats
    greedy: bool  # whether each token of the continuation is the likeliest one


class Scorer:
    """Computes the log-probabilities of texts with a model."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.embed.weight.device

    @property
    def block_size(self) -> int:
        return self.model.cfg.block_size

    @property
    def foreign(self) -> bool:
        """Whether the vocabulary comes from a checkpoint, which was not trained to begin texts with <eos>."""
        return self.tokenizer.kind == "hf"

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, without the <eos> at the end."""
        return tuple(int(token) for token in self.tokenizer.encode([text])[:-1])

    def encode(self, prompt: str, continuation: str) -> Request:
        """Encode a prompt and its continuation as one text. The continuation must not be empty.

        Blanks at the end of the prompt are moved to the continuation, because a token begins with a blank.
        With our own vocabularies, <eos> comes first, as before each title in training.
        """
        text = prompt.rstrip()
        continuation = prompt[len(text) :] + continuation
        if not text:
            if not self.foreign:
                # a title does not begin with the blank that separates a prompt from a choice
                continuation = continuation.removeprefix(" ")
            return Request((EOS,), self.ids(continuation))
        whole = self.ids(text + continuation)
        # A tokenizer may join the end of the prompt and the continuation. At least one token is scored.
        split = min(len(self.ids(text)), len(whole) - 1)
        start = () if self.foreign else (EOS,)
        return Request(start + whole[:split], whole[split:])

    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Return the log-probabilities of the continuations, in the order of the requests.

        Equal requests are computed once, so that their scores are equal to the last bit.
        """
        for request in requests:
            if len(request.continuation) > self.block_size:
                raise UsageError(self.too_long(len(request.continuation)))
        unique = sorted(set(requests), key=lambda request: (-len(sum(request, ())), request))
        likelihoods: dict[Request, Likelihood] = {}
        started = time.monotonic()
        for batch in self.batches(unique):
            likelihoods |= zip(batch, self.score_batch(batch), strict=True)
            if time.monotonic() - started > REPORT_EVERY:
                print(f"scored {len(likelihoods):,} of {len(unique):,} texts", file=sys.stderr, flush=True)
                started = time.monotonic()
        return [likelihoods[request] for request in requests]

    def too_long(self, tokens: int) -> str:
        return (
            f"a text to score has {tokens:,} tokens, but a block of the model has only {self.block_size:,}; "
            "shorten the text, or evaluate a run with a larger block_size"
        )

    def batches(self, requests: list[Request]) -> Iterable[list[Request]]:
        """Divide requests, which are sorted by length, into batches for one forward pass each."""
        start = 0
        while start < len(requests):
            logits_per_row = len(self.sequence(requests[start])) * self.model.embed.num_embeddings
            rows = max(1, LOGITS[self.device.type] // logits_per_row)
            yield requests[start : start + rows]
            start += rows

    def sequence(self, request: Request) -> tuple[int, ...]:
        """Return the input of the model. A sequence that is longer than a block loses its left end."""
        ids = request.context + request.continuation
        return ids[-(self.block_size + 1) :][:-1]

    @torch.inference_mode()
    def score_batch(self, batch: list[Request]) -> list[Likelihood]:
        """Score requests in one forward pass. Rows are padded on the right, where no scored token looks."""
        sequences = [self.sequence(request) for request in batch]
        idx = torch.full((len(batch), max(map(len, sequences))), PAD)
        rows: list[int] = []
        positions: list[int] = []
        for row, (request, sequence) in enumerate(zip(batch, sequences, strict=True)):
            idx[row, : len(sequence)] = torch.tensor(sequence)
            rows += [row] * len(request.continuation)
            positions += range(len(sequence) - len(request.continuation), len(sequence))
        targets = torch.tensor([token for request in batch for token in request.continuation])
        logits = self.model(idx.to(self.device))[rows, positions]  # (N, V)
        log_probs, greedy = _at_targets(logits, targets.to(self.device))
        likelihoods = []
        start = 0
        for request in batch:
            stop = start + len(request.continuation)
            likelihoods.append(Likelihood(math.fsum(log_probs[start:stop]), all(greedy[start:stop])))
            start = stop
        if not all(math.isfinite(likelihood.log_prob) for likelihood in likelihoods):
            raise RunError(
                "the weights of the run give no valid probabilities, because the run diverged or the weights "
                "were changed; train the run again with --fresh"
            )
        return likelihoods


def _at_targets(logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each target (N), and whether each target has the largest logit (N, V)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = F.log_softmax(wide, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return log_probs.tolist(), (wide.argmax(-1) == targets).tolist()


# -- questions


def evaluate_questions(
    scorer: Scorer, questions: Sequence[Question], file: str = "the questions"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the metrics of the model on questions, and one row per question.

    acc chooses the largest score, and acc_norm the largest score per character. Of equal choices, both choose
    the first.

    file: the name of the file with the questions, for an error message.
    """
    requests = []
    for question in questions:
        for number, choice in enumerate(question.choices):
            request = scorer.encode(question.prompt, f" {choice}")
            if len(request.continuation) > scorer.block_size:
                where = f"{file}, line {question.line}, choice {number}"
                raise UsageError(f"{where}: {scorer.too_long(len(request.continuation))}")
            requests.append(request)
    scores = iter(scorer.score(requests))
    items = []
    for question in questions:
        log_probs = [next(scores).log_prob for _ in question.choices]
        per_character = []
        for log_prob, choice in zip(log_probs, question.choices, strict=True):
            per_character.append(log_prob / len(choice))
        items.append(
            {
                "line": question.line,
                "answer": question.answer,
                "acc": log_probs.index(max(log_probs)),
                "acc_norm": per_character.index(max(per_character)),
                "scores": log_probs,
            }
        )
    metrics = {}
    for name in ("acc", "acc_norm"):
        right = sum(item[name] == item["answer"] for item in items)
        metrics[name] = share_with_error(right, len(items))
    return metrics, items


def share_with_error(right: int, n: int) -> dict[str, float | None]:
    """Return the share of right answers and its standard error, which one question does not have."""
    p = right / n
    stderr = None
    if n > 1:
        stderr = math.sqrt(p * (1 - p) / (n - 1))
    return {"value": p, "stderr": stderr}


# -- the model of a run


@dataclass(frozen=True)
class ScoredRun:
    """A run that is ready to be evaluated."""

    scorer: Scorer
    finished: bool
    run_info: dict[str, Any]  # what every result records about the run


def load(run: RunDir, route: str | None) -> ScoredRun:
    """Load the model of a run's newest checkpoint, with the weights and the settings that were scored.

    route: what selects the tokens of routed blocks, "own" or "student", or None for the run's own setting.
    """
    state, tokenizer = load_scored_state(run)
    model = state.model
    cfg = model.cfg
    if route is not None:
        set_route(model, route)
    weights = sha256_tensors(iter(model.named_parameters()))
    threads = cfg.threads or cores()
    make_deterministic(threads)
    device = "cpu"
    if torch.cuda.is_available():
        device = choose_device(cfg)
    attention: str = cfg.attention
    if attention == "auto":
        attention = best_attention(cfg, device)
    for block in model.blocks:
        block.attn.fused = attention == "sdpa"
    finished = run.summary() is not None
    run_info = {
        "run": run.config().run_id,
        "config": run.config().digest,
        "step": state.step,
        "finished": finished,
        "weights": {"sha256": weights, "averaged": state.average.on},
        "tokenizer": tokenizer.digest,
        "route": routes(model) or None,
        "machine": {"device": device, "threads": threads, "dtype": cfg.dtype, "attention": attention},
        "versions": machine_class.versions() | {"eval": sha256_file(Path(__file__))},
    }
    return ScoredRun(Scorer(model.to(device), tokenizer), finished, run_info)


def set_route(model: Model, route: str) -> None:
    """Let either the routers or their students select the tokens of all routed blocks."""
    for block in model.blocks:
        if block.router is not None:
            block.router.by_student = route == "student"


def routes(model: Model) -> dict[str, str]:
    """Return what selects the tokens of each routed layer: "own" or "student"."""
    names = {}
    for layer, block in enumerate(model.blocks):
        if block.router is not None:
            names[str(layer)] = "student" if block.router.by_student else "own"
    return names


# -- results


def write_result(run: RunDir, kind: str, name: str, result: dict[str, Any], identity: dict[str, Any]) -> Path:
    """Write a result to RUN/eval, and return its path. Only a repeated evaluation has the same path.

    identity: what tells the evaluation apart from others of the same weights and the same route.
    """
    key = identity | {"kind": kind, "weights": result["weights"]["sha256"], "route": result["route"]}
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:LONGEST_NAME]
    path = run.path / "eval" / f"{kind}-{readable}-{sha256_json(key)[:8]}.json"
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    return path
