"""The guards: checks that a run has computed its scores correctly and honestly.

Each guard detects one trick, which the docstring of the guard describes. A guard returns one of three
verdicts:

    pass: the guard found no problem
    flag: the run is honest, but its score cannot be compared with the scores of the task
    fail: the score is wrong or was obtained by a trick

Every run calls all guards when training has finished. `mainrun submit` calls the guards with all=True. With
all=True, the guards check every title and more token positions, and reload the corpus.

To add a guard, write a function whose docstring begins with "Detect", and add the function to GUARDS.
The package reports/submission explains how to fix each failure.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mainrun.config import MIN_COVERAGE, TASK, TrainConfig
from mainrun.core.members import members_of
from mainrun.core.sharding import exact_copy, shards_of
from mainrun.data import corpus as corpora
from mainrun.data import scoring, sources
from mainrun.data.batches import Batches
from mainrun.data.corpus import Corpus
from mainrun.data.hub import HUB_REVISIONS
from mainrun.data.ngram import neural_part
from mainrun.data.token_cache import TokenData
from mainrun.data.tokenizer import EOS, PAD, UNK
from mainrun.plan.plan import Plan

GUARD_LOGITS = 128_000_000  # the guard `causality` computes fewer logits at once
LONGEST_WORD = 20  # a token with more characters is treated as a phrase
TARGET_NAMES = ("target", "targets", "labels", "y")  # the names that a target argument of `forward` may have

Status = Literal["pass", "flag", "fail"]
EvalRow = dict[str, Any]  # a row of metrics.jsonl that contains an evaluation


@dataclass(frozen=True)
class Evidence:
    """The results of a run that the guards check. Where possible, the guards recompute the results."""

    cfg: TrainConfig
    corpus: Corpus
    data: TokenData
    model: nn.Module  # the model with the scored weights, which are averages in a run with EMA or SWA
    evals: list[EvalRow]  # the rows of all evaluations, in the order of the steps
    # The ledger has the keys train_tokens_per_epoch, presentations_per_token, forward_passes and
    # ensemble_members.
    ledger: dict[str, Any]
    summary: dict[str, Any]  # the run's summary, with at least the keys last, best and scores
    initial_weights: str  # the source of the initial weights, or "random" for random weights
    evaluate_hash: str  # the value of scoring.evaluate_source_hash() at the start of the run


class Verdict(NamedTuple):
    """The status and the explanation that a guard function returns."""

    status: Status
    detail: str


@dataclass(frozen=True)
class Guard:
    """The name of a guard and the verdict that the guard returned."""

    name: str
    status: Status
    detail: str


def guards(e: Evidence, *, all: bool = False) -> list[Guard]:
    """Run all guards in the order of GUARDS."""
    results = []
    for name, check in GUARDS.items():
        try:
            status, detail = check(e, all)
        except Exception as error:
            # A guard that raises an error counts as failed, so that a long run does not end with a traceback.
            status = "fail"
            detail = f"the evidence cannot be read: {type(error).__name__}: {error}"
        results.append(Guard(name, status, detail))
    return results


def passed(detail: str) -> Verdict:
    return Verdict("pass", detail)


def flag(detail: str) -> Verdict:
    return Verdict("flag", detail)


def fail(detail: str) -> Verdict:
    return Verdict("fail", detail)


# -- the score


def coverage(e: Evidence, all: bool) -> Verdict:
    """Detect a score that ignores the tokens at the end of a split."""
    for split in _scored_splits(e):
        last = _eval_rows(e, split)[-1]
        n = len(e.data.splits[split])
        if last["tokens"] != n:
            return fail(
                f"the full score of {split} covers {last['tokens']:,} tokens, but must cover all {n:,} tokens"
            )
    n = len(e.data.splits["val"])
    share = scoring.official_coverage(n, e.cfg.geometry)
    if share < MIN_COVERAGE:
        return flag(
            f"the official score covers {share:.2%} of the validation tokens, "
            f"which is below {MIN_COVERAGE:.0%}; compare only the full score"
        )
    return passed(f"the official score covers {share:.1%} of val, and the full score covers all {n:,} tokens")


def geometry(e: Evidence, all: bool) -> Verdict:
    """Detect official scores that are computed over different tokens at different steps of the run."""
    spans = "{}x{}".format(*e.cfg.geometry)
    for split in _scored_splits(e):
        rows = _eval_rows(e, split)
        expected = scoring.official_coverage(len(e.data.splits[split]), e.cfg.geometry)
        for row in rows:
            where = _where(row)
            if not _close(row["coverage"], expected):
                return fail(
                    f"{where}: the official score covers {row['coverage']:.4f}, "
                    f"but spans of {spans} tokens cover {expected:.4f}"
                )
            if row["tokens"] != rows[0]["tokens"]:
                return fail(
                    f"{where}: {row['tokens']:,} tokens were scored, "
                    f"but at step {rows[0]['step']} {rows[0]['tokens']:,} tokens were scored"
                )
    return passed(f"every evaluation used spans of {spans} tokens")


def denominator(e: Evidence, all: bool) -> Verdict:
    """Detect a score that is too small because it was divided by too many characters or bytes."""
    for split in e.data.splits:
        titles: list[str] = getattr(e.corpus, split)
        chars = sum(map(len, titles)) + len("<eos>") * len(titles)
        n_bytes = sum(len(title.encode()) + 1 for title in titles)
        if e.data.chars[split] != chars:
            return fail(
                f"{split} counts {e.data.chars[split]:,} characters, but its raw titles have {chars:,}"
            )
        if e.data.bytes[split] != n_bytes:
            return fail(f"{split} counts {e.data.bytes[split]:,} bytes, but its raw titles have {n_bytes:,}")
        if split == "train":
            continue
        for row in _eval_rows(e, split):
            nats = row["loss"] * row["tokens"]
            totals = {
                "full": row["full"] * chars,
                "bits_per_byte": row["bits_per_byte"] * n_bytes * math.log(2),
            }
            for name, total in totals.items():
                if not _close(total, nats):
                    return fail(
                        f"{_where(row)}: {name} corresponds to {total:,.1f} nats, but the loss to "
                        f"{nats:,.1f} nats: the score was divided by a wrong number"
                    )
    val_chars = e.data.chars["val"]
    val_bytes = e.data.bytes["val"]
    return passed(f"{val_chars:,} characters and {val_bytes:,} bytes, counted from the raw titles")


def last_and_best(e: Evidence, all: bool) -> Verdict:
    """Detect a run that reports the best of many evaluations as its final result."""
    steps = _plan(e).steps
    for split in _scored_splits(e):
        rows = _eval_rows(e, split)
        if rows[-1]["step"] != steps:
            return fail(
                f"the last evaluation of {split} is at step {rows[-1]['step']}, but the run has {steps} steps"
            )
        best = min(rows, key=lambda row: row["full"])
        for name, row in (("last", rows[-1]), ("best", best)):
            shown = [e.summary["scores"][split][name]]
            if split == "val":
                shown.append(e.summary[name])
            for score in shown:
                wrong = [key for key in ("step", "full", "official", "loss") if score[key] != row[key]]
                if wrong:
                    return fail(
                        f"the summary's {name} score of {split} says {_listed(score, wrong)}; "
                        f"metrics.jsonl says {_listed(row, wrong)}"
                    )
    last = e.summary["last"]
    best = e.summary["best"]
    return passed(
        f"last: {last['full']:.4f} at step {last['step']}; best: {best['full']:.4f} at step {best['step']}"
    )


def same_evaluate(e: Evidence, all: bool) -> Verdict:
    """Detect an `evaluate` function that was edited in scoring.py or replaced in memory."""
    now = scoring.evaluate_source_hash()
    if e.evaluate_hash != now:
        return fail(
            f"the hash of scoring.py was {e.evaluate_hash[:12]} when the run began; it is {now[:12]} now"
        )
    replaced = _replaced_function()
    if replaced:
        return fail(replaced)
    result, formula = _known_answer()
    if not _close(result, formula):
        return fail(
            f"evaluate gives {result}, but the formula gives {formula}: evaluate calls a replaced function"
        )
    # The tolerance allows for different rounding on different machines.
    tolerance = 1e-3 if e.cfg.dtype == "bfloat16" else 1e-4
    for split in _scored_splits(e):
        row = _eval_rows(e, split)[-1]
        with _restored(e.model):
            score = asdict(_evaluate(e, e.data.splits[split], e.cfg.geometry))
        # Only the ratio of the official score to the full score is compared. The guard `denominator` checks
        # the numbers that both scores are divided by.
        ratio = score["official"] / score["full"]
        row_ratio = row["official"] / row["full"]
        for name, agrees in (
            ("loss", _close(row["loss"], score["loss"], tolerance)),
            ("official", _close(row_ratio, ratio, tolerance)),
        ):
            if not agrees:
                return fail(
                    f"on {split}, the weights have {name} {score[name]:.4f}, "
                    f"but the last evaluation says {row[name]:.4f}"
                )
    return passed(f"the hash of scoring.py was {now[:12]} from start to end")


def _replaced_function() -> str:
    """Return a message if a function in memory differs from scoring.py, otherwise an empty string."""
    path = Path(scoring.__file__)
    module_code = compile(path.read_text(encoding="utf-8"), path, "exec", dont_inherit=True)
    for code in module_code.co_consts:
        if not isinstance(code, CodeType):
            continue
        live = vars(scoring).get(code.co_name)
        if isinstance(live, type):
            continue  # Python discards the code of a class body after running it
        if getattr(live, "__code__", None) != code:
            return f"the function scoring.{code.co_name} in memory differs from the file scoring.py"
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "mainrun":
            continue
        if getattr(module, "evaluate", scoring.evaluate) is not scoring.evaluate:
            return f"the module {name} has a different function named evaluate"
    return ""


def _known_answer() -> tuple[float, float]:
    """Score a small model with `evaluate`, and again with an explicit formula.

    For each method, return the sum of the full score and the official score.
    """
    table = torch.linspace(-1, 1, 64).reshape(8, 8).sin()
    model = nn.Embedding.from_pretrained(table)
    tokens = np.array([3, 1, 4, 1, 5, 7, 2, 6, 5, 3, 5, 1, 7, 7, 3, 2, 3, 1], dtype=np.uint16)
    score = scoring.evaluate(model, tokens, chars=50, nbytes=40, block_size=4, geometry=(2, 3))
    log_z = table.double().exp().sum(1).log()

    def nll(context: int, token: int) -> float:
        return float(log_z[context] - table[context, token])

    stream = tokens.tolist()
    full = sum(nll(a, b) for a, b in zip([EOS, *stream], stream, strict=False))
    official = sum(nll(stream[i], stream[i + 1]) for start in (0, 7) for i in range(start, start + 6))
    return score.full + score.official, (full + official) / 50


# -- the model


def no_learning(e: Evidence, all: bool) -> Verdict:
    """Detect a model that learns from the validation text while it is scored."""
    tokens = _val_slice(e)
    with _restored(e.model) as before:
        modes = [module.training for module in e.model.modules()]
        rng = _rng_state()
        first = _evaluate(e, tokens)
        if _rng_state() != rng:
            return fail("evaluate changed the state of a random generator")
        changed = _changed(before, _tensors(e.model))  # without copies, because the model may be large
        if changed:
            return fail(f"evaluate changed {len(changed)} parameters or buffers, such as {min(changed)}")
        if modes != [module.training for module in e.model.modules()]:
            return fail("evaluate changed a module from training to evaluation mode, or back")
        _evaluate(e, tokens[::-1].copy())  # a model that learns while it is scored would learn from this
        second = _evaluate(e, tokens)
    if second != first:
        return fail(f"the same tokens had loss {first.loss} at first and loss {second.loss} later")
    return passed("evaluate changes no weights, buffers or random state, and a second score is the same")


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    changed = []
    # all processes of a sharded run compare the tensors together, and therefore in the same order
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not _same(before[name], after[name]):
            changed.append(name)
    return changed


def targets_unseen(e: Evidence, all: bool) -> Verdict:
    """Detect a model that uses the targets to compute its logits."""
    n = min(e.cfg.block_size, len(e.data.splits["val"]))
    stream = e.data.splits["val"][:n].copy()
    other = stream.copy()
    # The last token of a block is a target, but it is never an input.
    other[-1] = EOS if stream[-1] != EOS else UNK + 1
    outputs = _logits_during_evaluate(e, stream, n)
    outputs_with_other_target = _logits_during_evaluate(e, other, n)
    gap = max(_gap(a, b) for a, b in zip(outputs, outputs_with_other_target, strict=True))
    if gap > _tolerance(e, outputs[0]):
        return fail(f"changing the last target changed logits by {gap:.3g}, but no input was changed")
    for name in list(inspect.signature(e.model.forward).parameters)[1:]:
        if name not in TARGET_NAMES:
            continue
        idx = _windows(e, 1)
        logits = [_forward(e.model, idx, **{name: targets}) for targets in (idx.roll(-1, 1), idx.flip(1))]
        gap = max(_gap(with_targets, _forward(e.model, idx)) for with_targets in logits)
        if gap > _tolerance(e, logits[0]):
            return fail(f"forward({name}=...) changed logits by {gap:.3g}")
    return passed("the logits do not depend on the targets")


def _logits_during_evaluate(e: Evidence, tokens: np.ndarray, n: int) -> list[Tensor]:
    """Score one block of n tokens, and return the logits from each of the model's forward passes."""
    outputs: list[Tensor] = []
    hook = e.model.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    try:
        with _restored(e.model):
            _evaluate(e, tokens, (1, n - 1))
    finally:
        hook.remove()
    return outputs


def causality(e: Evidence, all: bool) -> Verdict:
    """Detect a model whose predictions depend on later tokens in a row, or on other rows in the batch."""
    verdict = _causality(e, all)
    cfg = getattr(e.model, "cfg", None)
    if verdict.status == "pass" or not isinstance(cfg, TrainConfig) or not cfg.routed_layers:
        return verdict
    # Rounding can change the order of two scores of a router, and a token then takes another path. In
    # float64, this does not happen.
    exact = _exact_copy(e.model)
    exact.cfg = cfg.model_copy(update={"dtype": "float32"})
    with _restored(e.model):
        e.model.eval()  # the hooks of the copy refer to the original model
        verdict = _causality(replace(e, model=exact, cfg=e.cfg.model_copy(update={"dtype": "float32"})), all)
    return verdict._replace(detail=f"{verdict.detail}; checked in float64, because routers amplify rounding")


def _exact_copy(model: Any) -> Any:
    """Return a float64 copy of a model."""
    if shards_of(model):
        return exact_copy(model)
    return copy.deepcopy(model).double()


def _causality(e: Evidence, all: bool) -> Verdict:
    vocabulary = e.data.tokenizer.vocab_size
    # the logits of a long row would take too much memory with a large vocabulary
    idx = _windows(e, 1, None if all else min(512, max(16, GUARD_LOGITS // (4 * vocabulary))))  # (1, T)
    T = idx.shape[1]
    cuts = _cuts(T, all)
    shuffled = idx[:, torch.from_numpy(np.random.default_rng(0).permutation(T))]
    # A model may derive attention masks from <eos> and <pad>. Therefore, some of the changed rows continue
    # with only <eos> tokens, and others with only <pad> tokens.
    futures = [shuffled, idx.flip(1) // 2, torch.full_like(idx, EOS), torch.full_like(idx, PAD)]
    changed = []
    kept = []  # for each changed row, the number of leading tokens that were not changed
    for cut in cuts:
        for future in futures:
            changed.append(torch.cat([idx[:, : cut + 1], future[:, cut + 1 :]], dim=1))
            kept.append(cut + 1)
    most = max(1, GUARD_LOGITS // (2 * T * vocabulary) - 1)  # changed rows in a batch
    for first in range(0, len(changed), most):
        rows = changed[first : first + most]
        batch = _forward(e.model, torch.cat([idx, *rows]))
        problem = _leak_of_later_tokens(e, batch, kept[first : first + most])
        problem = problem or _leak_of_other_rows(e, batch, idx, rows)
        if problem:
            return fail(problem)
    problem = _leak_of_length(e, batch, idx, [*(cut + 1 for cut in cuts), T])
    if problem:
        return fail(problem)
    positions = ", ".join(map(str, cuts))
    return passed(
        f"the logits do not depend on later tokens (checked after positions {positions}), "
        "on the length of the row, or on other rows in the batch"
    )


def _leak_of_later_tokens(e: Evidence, batch: Tensor, kept: list[int]) -> str:
    """Return how later tokens change earlier logits, or "".

    batch: the logits of a row, followed by those of rows with the same first tokens.
    kept: for each changed row, the number of leading tokens that were not changed.
    """
    allowed = _tolerance(e, batch)
    for row, n in enumerate(kept, 1):
        gap = _gap(batch[row, :n], batch[0, :n])
        if gap > allowed:
            return (
                f"tokens after position {n - 1} changed logits up to that position by {gap:.3g} "
                f"(allowed {allowed:.1g})"
            )
    return ""


def _leak_of_other_rows(e: Evidence, batch: Tensor, idx: Tensor, rows: list[Tensor]) -> str:
    """Return how other rows of a batch change the logits of the row `idx`, or ""."""
    other_rows = _forward(e.model, torch.cat([idx, *(row.roll(1, 1) for row in rows)]))
    allowed = _tolerance(e, batch)
    gap = _gap(other_rows[0], batch[0])
    if gap <= allowed:
        return ""
    return f"other rows of the batch changed a row's logits by {gap:.3g} (allowed {allowed:.1g})"


def _leak_of_length(e: Evidence, batch: Tensor, idx: Tensor, lengths: list[int]) -> str:
    """Return how the length of the row `idx` changes its logits, or "". `batch` begins with this row."""
    T = idx.shape[1]
    allowed = _tolerance(e, batch, same_shape=False)
    for length in lengths:
        logits = _forward(e.model, idx[:, :length])
        gap = _gap(logits[0], batch[0, :length])
        if gap > allowed:
            return (
                f"cutting a row to {length} of {T} tokens changed logits by {gap:.3g} (allowed {allowed:.1g})"
            )
    return ""


def _cuts(T: int, all: bool) -> list[int]:
    """Return the positions in a row of T tokens after which the guard `causality` changes all tokens."""
    if all:
        return sorted({p for p in (0, 1, T // 4, T // 2, 3 * T // 4, T - 2) if p < T - 1})
    return sorted({0, T // 2 if T > 3 else 0, T - 2})


def random_start(e: Evidence, all: bool) -> Verdict:
    """Detect a run that starts from trained weights, which give a very low loss after the first step."""
    if e.initial_weights != "random":
        source = f"the initial weights are from {e.initial_weights}"
        # a start that the config declares is honest, but the task does not allow it
        declared = bool(e.cfg.start) and e.initial_weights == e.cfg.start
        if all or not declared:
            return fail(f"{source}; the task requires random weights")
        return flag(f"{source}, as the config says: compare only with runs that start from weights")
    first = _eval_rows(e)[0]
    if first["step"] != 1:
        return fail(
            f"the first evaluation is at step {first['step']}; "
            "only an evaluation at step 1 can show that the start was random"
        )
    vocab = e.data.tokenizer.vocab_size
    _, targets = Batches(e.cfg, e.data.splits["train"]).at(0)
    counts = np.bincount(targets.ravel(), minlength=vocab)[None]
    # After one training step, a model that started from random weights has learned at most the token counts
    # of the first batch. The floor is therefore slightly below the val loss of a unigram model of this batch.
    # Use the smoothing value that gives the lowest loss.
    alpha = np.array([[1.0], [0.3], [0.1], [0.03], [0.01], [0.003]])
    losses = -np.log((counts + alpha) / (counts.sum() + alpha * vocab))[:, e.data.splits["val"]].mean(axis=1)
    floor = 0.95 * min(float(losses.min()), math.log(vocab))
    loss: float = first["alone_loss" if e.cfg.ngram else "loss"]  # an n-gram model predicts well at once
    if loss < floor:
        return fail(
            f"loss {loss:.3f} after step 1 is below {floor:.3f}, "
            "the lowest loss that the token counts of the first batch allow"
        )
    return passed(f"loss {loss:.3f} after step 1; a random start cannot be below {floor:.3f}")


# -- the data


def lossless_tokens(e: Evidence, all: bool) -> Verdict:
    """Detect a tokenizer that changes or drops text, which would make the text easier to predict."""
    tokenizer = e.data.tokenizer
    for split, stream in e.data.splits.items():
        titles: list[str] = getattr(e.corpus, split)
        unknown = int(np.count_nonzero(stream == UNK))
        if unknown:
            return fail(f"{split} contains {unknown:,} <unk> tokens")
        if not np.array_equal(tokenizer.encode(titles), stream):
            return fail(f"the tokens of {split} are not the encoding of its titles")
        if split == "val" or all:
            decoded = tokenizer.titles(stream)
        else:
            titles = titles[:: max(1, len(titles) // 1000)]
            decoded = tokenizer.titles(tokenizer.encode(titles))
        if len(decoded) != len(titles):
            return fail(f"{len(titles):,} titles of {split} were decoded to {len(decoded):,} titles")
        for title, returned in zip(titles, decoded, strict=True):
            if title != returned:
                return fail(f"a title of {split} changed: {title!r} was decoded to {returned!r}")
    checked = "every title" if all else "every title of val and a sample of the others"
    return passed(f"{checked} is decoded without changes; no token is <unk>")


def no_val_tokens(e: Evidence, all: bool) -> Verdict:
    """Detect a vocabulary that contains whole phrases of validation titles."""
    train = np.unique(e.data.splits["train"])
    val = np.unique(e.data.splits["val"])
    text = ""
    for token in np.setdiff1d(val, train):
        word = e.data.tokenizer.decode([int(token)]).strip()
        if len(word.split()) > 1 or len(word) > LONGEST_WORD:
            text = text or "\n".join(e.data.tokenizer.marked(e.corpus.train))
            # A token reveals nothing about val if its text also occurs in train. In train, the text may be
            # split into several tokens.
            if word not in text:
                problem = f"token {token} = {word!r} is longer than a word and occurs only in validation"
                if e.data.tokenizer.kind == "hf" and not all:
                    return flag(f"{problem}; the tokenizer of the checkpoint may have been fitted on val")
                return fail(problem)
    fitted = f"tokenizer_fit={e.cfg.tokenizer_fit}"
    if e.data.tokenizer.kind == "hf":
        fitted = f"tokenizer={e.cfg.tokenizer}"
    return passed(f"no validation-only token is longer than a word ({fitted})")


def data_known(e: Evidence, all: bool) -> Verdict:
    """Detect a run whose titles differ from the corpus that the config names."""
    fingerprints = corpora.fingerprints(e.corpus.train, e.corpus.dev, e.corpus.val)
    for where, claimed in (
        ("the corpus", e.corpus.fingerprints),
        ("the summary", e.summary.get("fingerprints", fingerprints)),
    ):
        for name, fingerprint in fingerprints.items():
            if claimed[name] != fingerprint:
                return fail(
                    f"{where} claims fingerprint {claimed[name][:12]} for {name}, "
                    f"but the titles have fingerprint {fingerprint[:12]}"
                )
    corpus = e.cfg.corpus
    origin = e.corpus.origin
    kind = sources.kind(corpus)
    if origin["kind"] != kind:
        return fail(f"corpus={corpus}, but the titles come from {origin['kind']}")
    identity = fingerprints["corpus"][:12]
    if not sources.is_fixed(corpus):
        train_titles = set(e.corpus.train).union(e.corpus.dev)
        repeated = sum(title in train_titles for title in e.corpus.val)
        note = f"; {repeated:,} of {len(e.corpus.val):,} val titles are also in train" if repeated else ""
        return flag(f"unknown data: compare only with runs that have the fingerprint {identity}{note}")
    if kind == "hub":
        verified = origin.get("verified", False)
        if origin["revision"] != HUB_REVISIONS[corpus] or verified is not True:
            return fail(
                f"the titles are of revision {origin['revision']} (verified: {verified}); "
                f"{corpus} must be verified and of revision {HUB_REVISIONS[corpus]}"
            )
    if kind == "synthetic" or all:
        loaded = corpora.load_corpus(e.cfg).fingerprints
        if loaded != fingerprints:
            return fail(
                f"{corpus} has the fingerprint {loaded['corpus'][:12]}, but these titles have {identity}"
            )
    return passed(f"{corpus}, {identity}")


def task_rules(e: Evidence, all: bool) -> Verdict:
    """Detect a run whose epochs, corpus, number of titles, split or seed differ from the task's values."""
    cfg = e.cfg
    is_task_data = cfg.corpus in HUB_REVISIONS
    wrong = []
    for name, value in TASK.items():
        if getattr(cfg, name) != value:
            wrong.append(f"{name}={getattr(cfg, name)} (the task: {value})")
    if not cfg.shuffle:
        wrong.append("shuffle=false (the task: true)")
    n = TASK["num_titles"]
    n_val = round(n * TASK["val_frac"])
    known = len(e.corpus.train) + len(e.corpus.dev)
    val = len(e.corpus.val)
    if cfg.num_titles == n and cfg.val_frac == TASK["val_frac"] and (known, val) != (n - n_val, n_val):
        wrong.append(f"{known:,} train and {val:,} val titles (the task: {n - n_val:,} and {n_val:,})")
    if not is_task_data:
        wrong.append(f"corpus={cfg.corpus} is not the task's data ({', '.join(HUB_REVISIONS)})")
    if wrong:
        # A study may use other seeds and corpus sizes than the task. A submission that uses the task's data
        # must use the task's seed and corpus size.
        verdict = fail if all and is_task_data else flag
        return verdict("; ".join(wrong))
    return passed(
        f"{TASK['epochs']} epochs, seed {TASK['seed']}, {cfg.corpus}, {n:,} titles, "
        f"{TASK['val_frac']:.0%} held out"
    )


def presentations(e: Evidence, all: bool) -> Verdict:
    """Detect hidden training, by counting how many times each token was presented to the model."""
    plan = _plan(e)
    passes = e.cfg.passes
    members = e.cfg.members
    models = len(members_of(neural_part(e.model)))
    if models != members:
        return fail(f"the run has {models} models, but the config says members={members}")
    per_token = plan.tokens(plan.steps) * e.cfg.presentations / plan.train_tokens
    expected = {
        "train_tokens_per_epoch": plan.train_tokens,
        "forward_passes": passes,
        "ensemble_members": members,
        "presentations_per_token": per_token,
    }
    counted_as = f"(passes: {passes}, models: {members})"
    for name, value in expected.items():
        if not _close(e.ledger[name], value):
            return fail(
                f"the ledger says {name}={e.ledger[name]:.6g}; the config gives {value:.6g} {counted_as}"
            )
    detail = f"each token was shown {per_token:.2f} times in {e.cfg.epochs} epochs {counted_as}"
    if e.cfg.ngram:
        detail += ", and was counted once for the n-gram model"
    # The sources of a mix contain distinct titles, so titles are repeated only because of the mix's weights.
    # Count the repeated titles here, because the number in the run's records may be wrong.
    train = e.corpus.train
    repeats = len(train) - len(set(train))
    if e.cfg.corpus.startswith("mix:") and repeats:
        most = Counter(train).most_common(1)[0][1]
        return flag(
            f"{detail}; the weights of the mix repeat {repeats:,} of an epoch's {len(train):,} titles, "
            f"and one title occurs {most} times"
        )
    return passed(detail)


GUARDS: dict[str, Callable[[Evidence, bool], Verdict]] = {
    check.__name__: check
    for check in (
        coverage,
        geometry,
        denominator,
        last_and_best,
        same_evaluate,
        no_learning,
        targets_unseen,
        causality,
        random_start,
        lossless_tokens,
        no_val_tokens,
        data_known,
        task_rules,
        presentations,
    )
}


# -- helpers


def _eval_rows(e: Evidence, split: str = "val") -> list[EvalRow]:
    rows = [row for row in e.evals if row["split"] == split]
    if not rows:
        raise ValueError(f"no evaluation of {split}")
    return rows


def _scored_splits(e: Evidence) -> list[str]:
    """Return the splits on which a model is scored: val, and also dev if the corpus has this split."""
    return [split for split in ("val", "dev") if split in e.data.splits]


def _plan(e: Evidence) -> Plan:
    return Plan(e.cfg, len(e.data.splits["train"]))


def _where(row: EvalRow) -> str:
    return f"{row['split']} at step {row['step']}"


def _listed(row: EvalRow, keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={row[key]}" for key in keys)


def _close(a: float, b: float, tolerance: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=tolerance)


def _val_slice(e: Evidence) -> np.ndarray:
    """Return the first few blocks of val, which a model can score in seconds."""
    return e.data.splits["val"][: 8 * e.cfg.block_size + 2].copy()


def _evaluate(e: Evidence, tokens: np.ndarray, geometry: tuple[int, int] | None = None) -> scoring.Score:
    geometry = geometry or (1, min(e.cfg.block_size, len(tokens) - 1))
    chars = sum(len(title) + 5 for title in e.corpus.val)
    n_bytes = sum(len(title.encode()) + 1 for title in e.corpus.val)
    return scoring.evaluate(
        e.model, tokens, chars=chars, nbytes=n_bytes, block_size=e.cfg.block_size, geometry=geometry
    )


def _windows(e: Evidence, rows: int, longest: int | None = None) -> Tensor:
    """Return blocks of validation tokens as a tensor of shape (rows, T)."""
    T = min(e.cfg.block_size, longest or e.cfg.block_size)
    tokens = np.resize(np.asarray(e.data.splits["val"]), rows * T).astype(np.int64)
    first = next(e.model.parameters(), None)
    device = "cpu" if first is None else first.device
    return torch.from_numpy(tokens.reshape(rows, T)).to(device)


def _forward(model: nn.Module, idx: Tensor, **targets: Tensor) -> Tensor:
    """Return the logits that `evaluate` would use, with shape (B, T, V). Restore the model afterward."""
    with _restored(model), torch.no_grad():
        model.eval()
        output = model(idx, **targets)
    outputs = output if isinstance(output, tuple | list) else (output,)
    return next(o for o in outputs if isinstance(o, Tensor) and o.ndim == 3).float()


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Restore the model's tensors, its training modes and torch's random state after a `with` block.

    The context manager yields copies of the tensors, which are made before the block runs.
    """
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng():
            yield before
    finally:
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                if name in before and not _same(tensor, before[name]):
                    tensor.copy_(before[name])
        for module, mode in modes:
            module.training = mode


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, including non-persistent buffers."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _rng_state() -> list[Any]:
    """Return the states of all random number generators that a model could use."""
    cuda: list[Any] = []
    if torch.cuda.is_available():
        cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    numpy_state = [np.asarray(part).tolist() for part in np.random.get_state()]
    return [torch.get_rng_state().tolist(), cuda, numpy_state, random.getstate()]


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference between two tensors.

    The difference between equal infinities is 0. The difference between tensors of different shapes is
    infinite.
    """
    if a.shape != b.shape:
        return math.inf
    return float(torch.where(a == b, 0.0, (a.float() - b.float()).abs()).nan_to_num(nan=math.inf).max())


def _tolerance(e: Evidence, logits: Tensor, *, same_shape: bool = True) -> float:
    """Return the largest difference between logits that rounding can cause.

    Matrix products of different shapes are rounded differently, especially in bfloat16. If a model
    illegally depends on a token, the logits change by much more than this tolerance.
    """
    scale = max(1.0, float(logits.float().abs().nan_to_num(posinf=0.0).max()))
    if e.cfg.dtype == "bfloat16":
        return scale * (1e-2 if same_shape else 5e-2)
    return scale * 1e-4
