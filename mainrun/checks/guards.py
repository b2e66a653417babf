"""The guards: named checks that a run's figures are what they seem to be.

Each guard prevents one trick (its docstring says which) and says pass, flag or fail. `flag`: honest, but not to be compared as if
it were the task's own figure. `fail`: the figure is not what it claims to be. `train` runs them at the end; `submit` runs them
with all=True, which looks at every title, more positions, and scores the whole validation split once more.
"""

from __future__ import annotations

import inspect
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mainrun.config import MIN_COVERAGE, TASK, TrainConfig
from mainrun.data import scoring
from mainrun.data import sources as corpora
from mainrun.data.batches import Batches
from mainrun.data.sources import Corpus
from mainrun.data.token_cache import TokenData
from mainrun.data.tokenizer import EOS, PAD, UNK
from mainrun.plan.plan import Plan

LONGEST_WORD = 20  # characters; a longer token is not a word

Status = Literal["pass", "flag", "fail"]
Verdict = tuple[Status, str]


@dataclass(frozen=True)
class Guard:
    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Evidence:
    """What a run leaves behind. The guards take nobody's word: what can be computed again is."""

    cfg: TrainConfig
    corpus: Corpus
    data: TokenData
    model: nn.Module  # the scored weights: of an averaged run, the average
    evals: list[dict[str, Any]]  # the eval rows of metrics.jsonl, in order
    ledger: dict[
        str, Any
    ]  # train_tokens_per_epoch, presentations_per_token, forward_passes (of a batch), ensemble_members
    summary: dict[str, Any]  # at least last and best, rows of val
    initial_weights: str  # "random", or where they came from
    evaluate_hash: str  # scoring.evaluate_source_hash() when the run began


def guards(e: Evidence, *, all: bool = False) -> list[Guard]:
    """Every guard's verdict, in the order of GUARDS."""
    found = []
    for name, check in GUARDS.items():
        try:
            status, detail = check(e, all)
        except Exception as error:
            # evidence that cannot be read is no evidence; it must not end a run that took hours, and it must not pass either
            status, detail = "fail", f"the evidence cannot be read: {type(error).__name__}: {error}"
        found.append(Guard(name, status, detail))
    return found


# -- the figure


def coverage(e: Evidence, all: bool) -> Verdict:
    """Prevents a tail that is left out of the figure."""
    for split in _scored(e):
        last, n = _rows(e, split)[-1], len(e.data.splits[split])
        if last["tokens"] != n:
            return (
                "fail",
                f"the full score covers {last['tokens']:,} of {n:,} tokens of {split}; it must cover all",
            )
    n = len(e.data.splits["val"])
    share = scoring.official_coverage(n, e.cfg.geometry)
    if share < MIN_COVERAGE:
        return (
            "flag",
            f"official covers {share:.2%} of the validation tokens, below {MIN_COVERAGE:.0%}: compare the full score only",
        )
    return "pass", f"official covers {share:.1%}, full covers all {n:,} tokens"


def geometry(e: Evidence, all: bool) -> Verdict:
    """Prevents an official score whose spans, and so whose unscored tail, change during the run."""
    for split in _scored(e):
        rows = _rows(e, split)
        for row in rows:
            expected, at = (
                scoring.official_coverage(len(e.data.splits[split]), e.cfg.geometry),
                f"{split} at step {row['step']}",
            )
            if not _close(row["coverage"], expected):
                return (
                    "fail",
                    f"{at}: official covers {row['coverage']:.4f}; spans of {_x(e.cfg.geometry)} cover {expected:.4f}",
                )
            if row["tokens"] != rows[0]["tokens"]:
                return (
                    "fail",
                    f"{at}: {row['tokens']:,} tokens were scored, at step {rows[0]['step']} {rows[0]['tokens']:,}",
                )
    return "pass", f"spans of {_x(e.cfg.geometry)} tokens at every evaluation"


def denominator(e: Evidence, all: bool) -> Verdict:
    """Prevents a figure that is small because it was divided by too much: characters and bytes are counted again from raw titles."""
    for split in e.data.splits:
        titles: list[str] = getattr(e.corpus, split)
        chars = sum(map(len, titles)) + len("<eos>") * len(titles)
        nbytes = sum(len(t.encode()) + 1 for t in titles)
        for what, got, counted in (
            ("characters", e.data.chars[split], chars),
            ("bytes", e.data.bytes[split], nbytes),
        ):
            if got != counted:
                return "fail", f"{split} was divided by {got:,} {what}; its raw titles have {counted:,}"
        for row in _rows(e, split) if split != "train" else []:
            nll, at = row["loss"] * row["tokens"], f"{split} at step {row['step']}"
            for what, total in (
                ("full", row["full"] * chars),
                ("bits_per_byte", row["bits_per_byte"] * nbytes * math.log(2)),
            ):
                if not _close(total, nll):
                    return (
                        "fail",
                        f"{at}: {what} means {total:,.1f} nats, loss {nll:,.1f}: it was divided by something else",
                    )
    return (
        "pass",
        f"{e.data.chars['val']:,} characters and {e.data.bytes['val']:,} bytes, counted from the raw titles",
    )


def last_and_best(e: Evidence, all: bool) -> Verdict:
    """Prevents the best of many evaluations from being shown as the run's result."""
    plan = _plan(e)
    for split in _scored(e):
        rows = _rows(e, split)
        if rows[-1]["step"] != plan.steps:
            return (
                "fail",
                f"the last evaluation of {split} is of step {rows[-1]['step']}, the run has {plan.steps} steps",
            )
        for name, true in (("last", rows[-1]), ("best", min(rows, key=lambda row: row["full"]))):
            for shown in (e.summary["scores"][split][name], *([e.summary[name]] if split == "val" else [])):
                wrong = [k for k in ("step", "full", "official", "loss") if shown[k] != true[k]]
                if wrong:
                    got, want = (", ".join(f"{k}={row[k]}" for k in wrong) for row in (shown, true))
                    return (
                        "fail",
                        f"the summary's {name} score of {split} says {got}; metrics.jsonl says {want}",
                    )
    last, best = e.summary["last"], e.summary["best"]
    return (
        "pass",
        f"last: {last['full']:.4f} at step {last['step']}; best: {best['full']:.4f} at step {best['step']}",
    )


def same_evaluate(e: Evidence, all: bool) -> Verdict:
    """Prevents an evaluate that was edited or replaced: its file, the functions in memory and a known answer must agree."""
    now = scoring.evaluate_source_hash()
    if e.evaluate_hash != now:
        return "fail", f"the run began with evaluate {e.evaluate_hash[:12]}, scoring.py is now {now[:12]}"
    path = Path(scoring.__file__)
    module_code = compile(path.read_text(encoding="utf-8"), path, "exec", dont_inherit=True)
    for code in module_code.co_consts:
        live = vars(scoring).get(code.co_name) if isinstance(code, CodeType) else scoring.Score
        if not isinstance(live, type) and getattr(live, "__code__", None) != code:
            return "fail", f"scoring.{code.co_name} in memory is not what scoring.py says"
    for name, module in list(sys.modules.items()):
        if (
            name.split(".")[0] == "mainrun"
            and getattr(module, "evaluate", scoring.evaluate) is not scoring.evaluate
        ):
            return "fail", f"{name} has an evaluate of its own"
    got, want = _known_answer()
    if not _close(got, want):
        return "fail", f"evaluate gives {got} where the formula gives {want}: something under it was replaced"
    for split in _scored(e):
        with _as_it_was(e.model):
            row, score = _rows(e, split)[-1], asdict(_evaluate(e, e.data.splits[split], e.cfg.geometry))
        for k in (
            "loss",
            "official",
        ):  # official against full: what they were divided by is another guard's business
            then, now_ = (r[k] / (r["full"] if k == "official" else 1) for r in (row, score))
            if not _close(
                then, now_, 1e-3 if e.cfg.dtype == "bfloat16" else 1e-4
            ):  # what another machine may round
                return (
                    "fail",
                    f"on {split} the weights score {k} {score[k]:.4f}, the last evaluation says {row[k]:.4f}",
                )
    return "pass", f"evaluate {now[:12]}, from start to end"


def _known_answer() -> tuple[float, float]:
    """evaluate's full + official on a table of 8 tokens, and the same by the formula written out."""
    table = torch.linspace(-1, 1, 64).reshape(8, 8).sin()
    model = nn.Embedding.from_pretrained(table)
    tokens = np.array([3, 1, 4, 1, 5, 7, 2, 6, 5, 3, 5, 1, 7, 7, 3, 2, 3, 1], dtype=np.uint16)
    score = scoring.evaluate(model, tokens, chars=50, nbytes=40, block_size=4, geometry=(2, 3))
    log_z = table.double().exp().sum(1).log()

    def nll(before: int, token: int) -> float:
        return float(log_z[before] - table[before, token])

    stream = tokens.tolist()
    full = sum(nll(a, b) for a, b in zip([EOS, *stream], stream, strict=False))
    official = sum(nll(stream[i], stream[i + 1]) for start in (0, 7) for i in range(start, start + 6))
    return score.full + score.official, (full + official) / 50


# -- the model


def no_learning(e: Evidence, all: bool) -> Verdict:
    """Prevents a model that learns from the validation text while it is scored, in weights, buffers or hidden memory."""
    tokens = _slice(e)
    with _as_it_was(e.model) as before:
        modes = [m.training for m in e.model.modules()]
        rng = _rng_state()
        first = _evaluate(e, tokens)
        if _rng_state() != rng:
            return "fail", "evaluate moved a random generator"
        after = _tensors(e.model)
        changed = [
            n
            for n in before.keys() | after.keys()
            if n not in before or n not in after or not _same(before[n], after[n])
        ]
        if changed:
            return "fail", f"evaluate changed {len(changed)} parameters or buffers, like {min(changed)}"
        if modes != [m.training for m in e.model.modules()]:
            return "fail", "evaluate left the model in another mode"
        _evaluate(e, tokens[::-1].copy())  # something else in between: a memory would hold it now
        again = _evaluate(e, tokens)
    if again != first:
        return "fail", f"the same tokens scored {first.loss} at first and {again.loss} later"
    return "pass", "weights, buffers and random state are the same after evaluate, and so is a second score"


def targets_unseen(e: Evidence, all: bool) -> Verdict:
    """Prevents a model that is told the answer: its logits may not depend on the targets it is scored against."""
    n = min(e.cfg.block_size, len(e.data.splits["val"]))
    stream = e.data.splits["val"][:n].copy()
    other = stream.copy()
    other[-1] = (
        EOS if stream[-1] != EOS else UNK + 1
    )  # one block: the last token is a target and never an input
    seen: list[list[Tensor]] = []
    for tokens in (stream, other):
        calls: list[Tensor] = []
        hook = e.model.register_forward_hook(
            lambda module, args, output, calls=calls: calls.append(output.detach().clone())
        )
        try:
            with _as_it_was(e.model):
                _evaluate(e, tokens, (1, n - 1))
        finally:
            hook.remove()
        seen.append(calls)
    gap = max(_gap(a, b) for a, b in zip(*seen, strict=True))
    if gap > _tolerance(e, seen[0][0]):
        return "fail", f"another last target moved logits by {gap:.3g}, with the same inputs"
    takes = [
        p
        for p in list(inspect.signature(e.model.forward).parameters)[1:]
        if p in ("target", "targets", "labels", "y")
    ]
    for name in takes:
        idx = _windows(e, 1)
        pair = [_forward(e.model, idx, **{name: t}) for t in (idx.roll(-1, 1), idx.flip(1))]
        gap = max(_gap(logits, _forward(e.model, idx)) for logits in pair)
        if gap > _tolerance(e, pair[0]):
            return "fail", f"forward({name}=...) moved logits by {gap:.3g}"
    return "pass", "other targets, same logits"


def causality(e: Evidence, all: bool) -> Verdict:
    """Prevents a look at what comes later in the row, or at another row of the batch."""
    idx = _windows(e, 1, None if all else 512)  # [1, T]
    T = idx.shape[1]
    cuts = sorted(
        {p for p in (0, 1, T // 4, T // 2, 3 * T // 4, T - 2) if p < T - 1}
        if all
        else {0, T // 2 if T > 3 else 0, T - 2}
    )
    shuffled = idx[:, torch.from_numpy(np.random.default_rng(0).permutation(T))]
    futures = [
        shuffled,
        idx.flip(1) // 2,
        torch.full_like(idx, EOS),
        torch.full_like(idx, PAD),
    ]  # <eos>, <pad>: masks are made of them
    changed, kept = [], []
    for cut in cuts:
        for future in futures:
            changed.append(torch.cat([idx[:, : cut + 1], future[:, cut + 1 :]], dim=1))
            kept.append(cut + 1)
    batch = _forward(e.model, torch.cat([idx, *changed]))
    for row, cut in enumerate(kept, 1):
        gap, allowed = _gap(batch[row, :cut], batch[0, :cut]), _tolerance(e, batch)
        if gap > allowed:
            return (
                "fail",
                f"tokens after position {cut - 1} moved logits at or before it by {gap:.3g} (allowed {allowed:.1g})",
            )
    neighbours = _forward(e.model, torch.cat([idx, *(row.roll(1, 1) for row in changed)]))
    gap, allowed = _gap(neighbours[0], batch[0]), _tolerance(e, batch)
    if gap > allowed:
        return "fail", f"other rows in its batch moved a row's logits by {gap:.3g} (allowed {allowed:.1g})"
    for length in (*(p + 1 for p in cuts), T):
        gap, allowed = (
            _gap(_forward(e.model, idx[:, :length])[0], batch[0, :length]),
            _tolerance(e, batch, same_shape=False),
        )
        if gap > allowed:
            return (
                "fail",
                f"{length} of {T} tokens alone have logits that differ by {gap:.3g} (allowed {allowed:.1g})",
            )
    return (
        "pass",
        f"logits are the same under other futures at positions {', '.join(map(str, cuts))}, cut short, and in other company",
    )


def random_start(e: Evidence, all: bool) -> Verdict:
    """Prevents weights that were trained before: after one step a model knows hardly more than its batch's token counts."""
    if e.initial_weights != "random":
        return "fail", f"the weights came from {e.initial_weights}; the task starts from random ones"
    first = _rows(e)[0]
    if first["step"] != 1:
        return (
            "fail",
            f"the first evaluation is of step {first['step']}; without step 1 nothing shows that the start was random",
        )
    vocab = e.data.tokenizer.vocab_size
    counts = np.bincount(Batches(e.cfg, e.data.splits["train"]).at(0)[1].ravel(), minlength=vocab)[None]
    alpha = np.array(
        [[1.0], [0.3], [0.1], [0.03], [0.01], [0.003]]
    )  # the smoothing that suits val best: no fresh start guesses it
    losses = -np.log((counts + alpha) / (counts.sum() + alpha * vocab))[:, e.data.splits["val"]].mean(axis=1)
    floor = 0.95 * min(float(losses.min()), math.log(vocab))
    if first["loss"] < floor:
        return (
            "fail",
            f"loss {first['loss']:.3f} after step 1 is below {floor:.3f}, which is all that the first batch's counts could give",
        )
    return "pass", f"loss {first['loss']:.3f} after step 1; no fresh start is below {floor:.3f}"


# -- the data


def lossless_tokens(e: Evidence, all: bool) -> Verdict:
    """Prevents text that is made easier on its way to tokens: every title must come back, and val be stored as it is encoded."""
    tokenizer = e.data.tokenizer
    for split, stream in e.data.splits.items():
        titles: list[str] = getattr(e.corpus, split)
        if unknown := int(np.count_nonzero(stream == UNK)):
            return "fail", f"{split} holds {unknown:,} <unk>"
        if not np.array_equal(tokenizer.encode(titles), stream):
            return "fail", f"the tokens of {split} are not the encoding of its titles"
        if split == "val" or all:
            back = tokenizer.titles(stream)
        else:
            titles = titles[:: max(1, len(titles) // 1000)]
            back = tokenizer.titles(tokenizer.encode(titles))
        if len(back) != len(titles):
            return "fail", f"{len(titles):,} titles of {split} came back as {len(back):,}"
        for title, returned in zip(titles, back, strict=True):
            if title != returned:
                return "fail", f"a title of {split} came back changed: {title!r} as {returned!r}"
    return (
        "pass",
        f"{'every title' if all else 'every title of val and a sample of the others'} comes back; no <unk>",
    )


def no_val_tokens(e: Evidence, all: bool) -> Verdict:
    """Prevents a vocabulary that has learnt validation titles by heart (the tokenizer may have seen them)."""
    train, val = (np.unique(e.data.splits[split]) for split in ("train", "val"))
    text = ""
    for token in np.setdiff1d(val, train):
        word = e.data.tokenizer.decode([int(token)]).strip()
        if len(word.split()) > 1 or len(word) > LONGEST_WORD:
            text = text or "\n".join(e.corpus.train)
            if word not in text:  # a token that train merely spells in another way holds nothing of val
                return "fail", f"token {token} = {word!r} is longer than a word and occurs in validation only"
    return "pass", f"no validation-only token is longer than a word (fitted on {e.cfg.tokenizer_fit})"


def data_known(e: Evidence, all: bool) -> Verdict:
    """Prevents other data under a known name: fingerprints are taken again, and must be those of the source."""
    parts, origin = {split: getattr(e.corpus, split) for split in ("train", "dev", "val")}, e.corpus.origin
    true = corpora.fingerprints(**parts)
    for where, claimed in (
        ("the corpus", e.corpus.fingerprints),
        ("the summary", e.summary.get("fingerprints", true)),
    ):
        for name in true:
            if claimed[name] != true[name]:
                return (
                    "fail",
                    f"{where} claims fingerprint {claimed[name][:12]} for {name}; its titles have {true[name][:12]}",
                )
    kind = "hub" if e.cfg.corpus in corpora.HUB_REVISIONS else e.cfg.corpus.partition(":")[0]
    if origin["kind"] != kind:
        return "fail", f"corpus={e.cfg.corpus}, but the titles are from {origin['kind']}"
    if kind not in ("synthetic", "hub"):
        learnt = set(parts["train"]).union(parts["dev"])
        met = (
            f"; {n:,} of its {len(parts['val']):,} val titles are in train too"
            if (n := sum(t in learnt for t in parts["val"]))
            else ""
        )
        return (
            "flag",
            f"unknown data: compare only with runs of the same fingerprint, {true['corpus'][:12]}{met}",
        )
    if kind == "hub" and (
        origin["revision"] != corpora.HUB_REVISIONS[e.cfg.corpus] or origin.get("verified") is not True
    ):
        return (
            "fail",
            f"revision {origin['revision']}, verified: {origin.get('verified', False)}; {e.cfg.corpus} is pinned and verified",
        )
    if kind == "synthetic" or all:
        again = corpora.load_corpus(e.cfg).fingerprints
        if again != true:
            return (
                "fail",
                f"{e.cfg.corpus} gives {again['corpus'][:12]}, these titles are {true['corpus'][:12]}",
            )
    return "pass", f"{e.cfg.corpus}, {true['corpus'][:12]}"


def task_rules(e: Evidence, all: bool) -> Verdict:
    """Prevents a figure of another task under this one's name: epochs, seed, data, split and number of titles are given."""
    c = e.cfg
    wrong = [f"{k}={getattr(c, k)} (the task: {v})" for k, v in TASK.items() if getattr(c, k) != v]
    if not c.shuffle:
        wrong.append("shuffle=false (the task: a permutation by its seed)")
    n, n_val = TASK["num_titles"], round(TASK["num_titles"] * TASK["val_frac"])
    sizes = (len(e.corpus.train) + len(e.corpus.dev), len(e.corpus.val))
    if c.num_titles == n and c.val_frac == TASK["val_frac"] and sizes != (n - n_val, n_val):
        wrong.append(f"{sizes[0]:,} + {sizes[1]:,} titles (the task: {n - n_val:,} + {n_val:,})")
    claims = (
        all and c.corpus in corpora.HUB_REVISIONS
    )  # a study trains other seeds and sizes; to submit one is another matter
    if c.corpus not in corpora.HUB_REVISIONS:
        wrong.append(f"corpus={c.corpus} is not the task's data ({', '.join(corpora.HUB_REVISIONS)})")
    if wrong:
        return ("fail" if claims else "flag"), "; ".join(wrong)
    return (
        "pass",
        f"{TASK['epochs']} epochs, seed {TASK['seed']}, {c.corpus}, {n:,} titles, {TASK['val_frac']:.0%} held out",
    )


def presentations(e: Evidence, all: bool) -> Verdict:
    """Prevents hidden training: how often each token was shown is counted again, R-Drop's second pass and a mix's repeats included."""
    plan, got = _plan(e), e.ledger
    passes, members = e.cfg.passes, got["ensemble_members"]
    expected = {
        "train_tokens_per_epoch": plan.train_tokens,
        "forward_passes": passes,
        "presentations_per_token": plan.tokens(plan.steps) * passes * members / plan.train_tokens,
    }
    for name, value in expected.items():
        if not _close(got[name], value):
            return (
                "fail",
                f"the ledger says {name}={got[name]:.6g}; the config makes {value:.6g} (passes: {passes}, models: {members})",
            )
    shown = f"each token was shown {expected['presentations_per_token']:.2f} times in {e.cfg.epochs} epochs"
    shown += f" (passes: {passes}, models: {members})"
    train = (
        e.corpus.train
    )  # counted, whatever the corpus says of itself: a mix's titles are distinct but for its weights
    if e.cfg.corpus.startswith("mix:") and (again := len(train) - len(set(train))):
        most = Counter(train).most_common(1)[0][1]
        return (
            "flag",
            f"{shown}; {again:,} of an epoch's {len(train):,} titles are repeats by the mix's weights, up to {most} of one",
        )
    return "pass", shown


GUARDS: dict[str, Callable[[Evidence, bool], Verdict]] = {
    check.__name__: check
    for check in (
        coverage, geometry, denominator, last_and_best, same_evaluate, no_learning, targets_unseen, causality, random_start,
        lossless_tokens, no_val_tokens, data_known, task_rules, presentations,
    )
}  # fmt: skip


# -- what the guards share


def _rows(e: Evidence, split: str = "val") -> list[dict[str, Any]]:
    rows = [row for row in e.evals if row["split"] == split]
    if not rows:
        raise ValueError(f"no evaluation of {split}")
    return rows


def _scored(e: Evidence) -> list[str]:
    """The splits that are ranked by: val, and dev where there is one."""
    return [split for split in ("val", "dev") if split in e.data.splits]


def _plan(e: Evidence) -> Plan:
    return Plan(e.cfg, len(e.data.splits["train"]))


def _x(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _close(a: float, b: float, tolerance: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=tolerance)


def _slice(e: Evidence) -> np.ndarray:
    """A few blocks of val: what holds for evaluate holds on these, in seconds."""
    return e.data.splits["val"][: 8 * e.cfg.block_size + 2].copy()


def _evaluate(e: Evidence, tokens: np.ndarray, geometry: tuple[int, int] | None = None) -> scoring.Score:
    geometry = geometry or (1, min(e.cfg.block_size, len(tokens) - 1))
    chars, nbytes = (sum(len(t) + 5 for t in e.corpus.val), sum(len(t.encode()) + 1 for t in e.corpus.val))
    return scoring.evaluate(
        e.model, tokens, chars=chars, nbytes=nbytes, block_size=e.cfg.block_size, geometry=geometry
    )


def _windows(e: Evidence, rows: int, longest: int | None = None) -> Tensor:
    """`rows` blocks of real validation tokens, [rows, T]."""
    T = min(e.cfg.block_size, longest or e.cfg.block_size)
    tokens = np.resize(np.asarray(e.data.splits["val"]), rows * T).astype(np.int64)
    first = next(e.model.parameters(), None)
    return torch.from_numpy(tokens.reshape(rows, T)).to(first.device if first is not None else "cpu")


def _forward(model: nn.Module, idx: Tensor, **targets: Tensor) -> Tensor:
    """Logits [B, T, V] as evaluate would get them, from weights as they were."""
    with _as_it_was(model), torch.no_grad():
        model.eval()
        output = model(idx, **targets)
    outputs = output if isinstance(output, tuple | list) else (output,)
    return next(o for o in outputs if isinstance(o, Tensor) and o.ndim == 3).float()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's tensors before, as copies; whatever happens inside, tensors, modes and torch's random state are put back."""
    before, modes = _tensors(model), [(m, m.training) for m in model.modules()]
    try:
        with torch.random.fork_rng():
            yield before
    finally:
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in before and not _same(tensor, before[name]):
                    tensor.copy_(before[name])
        for module, mode in modes:
            module.training = mode


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _rng_state() -> list[Any]:
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    numpy_state = np.random.get_state()
    return [
        torch.get_rng_state().tolist(),
        cuda,
        [np.asarray(part).tolist() for part in numpy_state],
        random.getstate(),
    ]


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinities that are equal differ by nothing."""
    if a.shape != b.shape:
        return math.inf
    return float(torch.where(a == b, 0.0, (a.float() - b.float()).abs()).nan_to_num(nan=math.inf).max())


def _tolerance(e: Evidence, logits: Tensor, *, same_shape: bool = True) -> float:
    """Rounding may depend on the shape of a product, and in bfloat16 much; nothing that helps a score is as small as this."""
    scale = max(1.0, float(logits.float().abs().nan_to_num(posinf=0.0).max()))
    if e.cfg.dtype == "bfloat16":
        return scale * (1e-2 if same_shape else 5e-2)
    return scale * 1e-4
