"""Red-team tests: every trick trips exactly the guard that prevents it, and honest runs trip no guard.

A trick is a function that returns the evidence of a dishonest run. The docstring of a trick describes how the
run cheats.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mainrun.checks import guards as guards_module
from mainrun.checks.guards import GUARDS, Evidence, Guard, guards
from mainrun.config import TrainConfig, from_dict
from mainrun.core.members import Ensemble
from mainrun.data import scoring
from mainrun.data.corpus import Corpus, fingerprint, load_corpus
from mainrun.data.hub import HUB_REVISIONS
from mainrun.data.scoring import evaluate, evaluate_source_hash
from mainrun.data.token_cache import TokenData, prepare
from mainrun.data.tokenizer import EOS, PAD
from mainrun.plan.plan import Plan

SMALL: dict[str, Any] = {
    "num_titles": 3000, "vocab_size": 600, "block_size": 16, "batch_size": 4, "epochs": 7, "device": "cpu",
    "threads": 1,
}  # fmt: skip


class Attention(nn.Module):
    """An honest model with one causal attention layer and learned positions."""

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(cfg.seed)
        self.half = cfg.dtype == "bfloat16"
        self.embed = nn.Embedding(vocab_size, 32)
        self.positions = nn.Embedding(cfg.block_size, 32)
        self.qkv = nn.Linear(32, 96)
        self.drop = nn.Dropout(0.1)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            x = self.drop(self.embed(idx) + 0.1 * self.positions.weight[: idx.shape[1]])
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return F.linear(x + F.scaled_dot_product_attention(q, k, v, is_causal=True), self.embed.weight)


class Gru(Attention):
    """An honest model with a GRU and a bigram table."""

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__(cfg, vocab_size)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.bigram = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.bigram.weight)

    def forward(self, idx: Tensor) -> Tensor:
        return self.gru(self.embed(idx))[0] @ self.embed.weight.T + self.bigram(idx)


def fit(model: nn.Module, train: np.ndarray, block_size: int, steps: int = 30, lr: float = 3e-3) -> None:
    """Train a model long enough to change its score."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(steps):
        at = rng.integers(0, len(train) - block_size - 1, 32)
        rows = torch.from_numpy(np.stack([train[i : i + block_size + 1] for i in at]).astype(np.int64))
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()


def row(
    cfg: TrainConfig, data: TokenData, model: nn.Module, step: int, split: str = "val", **changes: Any
) -> dict[str, Any]:
    args: dict[str, Any] = {
        "chars": data.chars[split], "nbytes": data.bytes[split], "block_size": cfg.block_size,
        "geometry": cfg.geometry,
    }  # fmt: skip
    return {
        "event": "eval",
        "step": step,
        "split": split,
        **asdict(evaluate(model, data.splits[split], **args | changes)),
        "seconds": 0.1,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mine = {split: [r for r in rows if r["split"] == split] for split in ("val", "dev")}
    scores = {
        split: {"last": found[-1], "best": min(found, key=lambda r: r["full"])}
        for split, found in mine.items()
        if found
    }
    return {**scores["val"], "scores": scores}


def run(
    cfg: TrainConfig,
    corpus: Corpus,
    data: TokenData,
    make: Callable[[TrainConfig, int], nn.Module] = Attention,
    *,
    warm: bool = False,
) -> Evidence:
    """Return the truthful evidence of a run of this model."""
    plan, began = Plan(cfg, len(data.splits["train"])), evaluate_source_hash()
    model = make(cfg, data.tokenizer.vocab_size)
    if warm:
        fit(model, data.splits["train"], cfg.block_size, steps=60, lr=1e-2)
    rows = []
    for step in sorted({1, plan.steps // 2, plan.steps}):
        rows += [row(cfg, data, model, step, split) for split in ("val", "dev") if split in data.splits]
        if step < plan.steps:
            fit(model, data.splits["train"], cfg.block_size)
    passes = 2 if cfg.rdrop else 1
    ledger = {
        "train_tokens_per_epoch": plan.train_tokens,
        "presentations_per_token": plan.steps * cfg.batch_size * cfg.block_size * passes / plan.train_tokens,
        "forward_passes": passes,
        "ensemble_members": 1,
    }
    summary = summarise(rows) | {"fingerprints": dict(corpus.fingerprints)}
    return Evidence(cfg, corpus, data, model, rows, ledger, summary, "random", began)


Honest = Callable[..., Evidence]


@cache
def _material(digest: str, fields: str) -> tuple[TrainConfig, Corpus, TokenData]:
    cfg = from_dict(json.loads(fields))
    corpus = load_corpus(cfg)
    return cfg, corpus, prepare(cfg, corpus)


def material(**fields: Any) -> tuple[TrainConfig, Corpus, TokenData]:
    """Return the config, the titles and the tokens of SMALL after these fields are changed."""
    cfg = from_dict(SMALL | fields)
    return _material(cfg.digest, cfg.model_dump_json())


@pytest.fixture(scope="module")
def honest() -> Honest:
    """Return a function that makes the evidence of an honest run of SMALL with the given config fields."""

    made: dict[tuple[str, bool, str], Evidence] = {}

    def evidence(
        make: Callable[[TrainConfig, int], nn.Module] = Attention, *, warm: bool = False, **fields: Any
    ) -> Evidence:
        cfg, corpus, data = material(**fields)
        key = make.__name__, warm, cfg.digest
        if key not in made:
            made[key] = run(cfg, corpus, data, make, warm=warm)
        return replace(made[key], model=copy.deepcopy(made[key].model))

    return evidence


def of(found: list[Guard], status: str) -> set[str]:
    return {g.name for g in found if g.status == status}


def fingerprints(train: list[str], dev: list[str], val: list[str]) -> dict[str, str]:
    parts = {"corpus": [*train, *dev, *val], "train": train, "dev": dev, "val": val}
    return {name: fingerprint(part) for name, part in parts.items()}


def verdict(e: Evidence, name: str, *, all: bool = False) -> Guard:
    return next(g for g in guards(e, all=all) if g.name == name)


# -- honest runs


BASELINE = {"tokenizer_fit": "train+val", "dropout": 0.1}
OPTIMIZED = {
    "tokenizer": "unigram", "tokenizer_fit": "train+val", "optimizer": "muon", "rdrop": 1.0, "dropout": 0.1,
    "ema": 0.99, "schedule": "wsd",
    "order": "shuffle_titles", "title_mask": True, "position": "rope", "dev_frac": 0.05,
}  # fmt: skip


@pytest.mark.parametrize("all", [False, True])
@pytest.mark.parametrize("make", [Attention, Gru])
@pytest.mark.parametrize(
    "fields",
    [BASELINE, OPTIMIZED, OPTIMIZED | {"dtype": "bfloat16"}],
    ids=["baseline", "optimized", "bfloat16"],
)
def test_honest_runs_never_fail(honest: Honest, fields: dict[str, Any], make: Any, all: bool) -> None:
    e = honest(make, **fields)
    weights = {k: v.clone() for k, v in e.model.state_dict().items()}
    found = guards(e, all=all)
    assert [g for g in found if g.status == "fail"] == []
    assert of(found, "flag") == {"task_rules"}  # synthetic titles are not the data set of the task
    assert [g.name for g in found] == list(GUARDS)
    assert all_detailed(found)
    assert all_equal(weights, e.model.state_dict())


def all_detailed(found: list[Guard]) -> bool:
    return all(len(g.detail) > 10 and "\n" not in g.detail for g in found)


def all_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in b)


def test_a_run_of_the_task_passes(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(claim(honest()), "task_rules").status == "pass"


def test_titles_from_a_file_are_flagged_as_unknown_data(honest: Honest, tmp_path: Path) -> None:
    path = tmp_path / "titles.txt"
    path.write_text("\n".join(material()[1].train), encoding="utf-8")
    found = guards(honest(corpus=f"file:{path}", num_titles=2500, shuffle=False))
    assert of(found, "fail") == set()
    assert of(found, "flag") - {"coverage"} == {"task_rules", "data_known"}


def test_guards_change_neither_the_model_nor_random_state(honest: Honest) -> None:
    e = honest()
    e.model.train()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    guards(e, all=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert random.getstate() == states[2]
    assert all(m.training for m in e.model.modules())


def test_the_docstring_of_every_guard_says_what_it_prevents() -> None:
    for name, check in GUARDS.items():
        doc = check.__doc__ or ""
        assert doc.startswith("Detect "), name
        assert "\n" not in doc, name


# -- tricks


TRICKS: dict[str, tuple[str, str, Callable[..., Evidence]]] = {}


def trick(guard: str, status: str = "fail") -> Callable[[Callable[..., Evidence]], Callable[..., Evidence]]:
    def register(play: Callable[..., Evidence]) -> Callable[..., Evidence]:
        TRICKS[play.__name__] = guard, status, play
        return play

    return register


def with_rows(e: Evidence, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Evidence:
    """Change the rows of the evaluations, and make the summary agree with them."""
    rows = [change(dict(r)) for r in e.evals]
    return replace(e, evals=rows, summary=e.summary | summarise(rows))


def with_titles(e: Evidence, **titles: list[str]) -> Evidence:
    return replace(e, corpus=replace(e.corpus, **titles))


# coverage, geometry, denominator, last_and_best


@trick("coverage", "flag")
def drops_the_tail(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The official score uses spans so large that it leaves out a third of val."""
    n = len(honest().data.splits["val"])
    e = honest(official_geometry=f"{int(n * 0.65 / 16)}x16")
    assert 0.6 < e.evals[-1]["coverage"] < 0.67
    return e


@trick("coverage")
def leaves_the_end_out_of_the_full_score(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The full score leaves out the tokens after the last complete block."""
    e = honest()

    def shorter(r: dict[str, Any]) -> dict[str, Any]:
        part = r["tokens"] // 16 * 16 / r["tokens"]
        return r | {
            "tokens": round(r["tokens"] * part),
            "full": r["full"] * part,
            "bits_per_byte": r["bits_per_byte"] * part,
        }

    return with_rows(e, shorter)


def with_dev(honest: Honest, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Evidence:
    """Change only the rows of the dev split, which ranks the trials of a search."""
    return with_rows(honest(dev_frac=0.2), lambda r: change(r) if r["split"] == "dev" else r)


@trick("coverage")
def leaves_the_end_out_of_the_dev_score(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The full score of dev leaves out six tokens."""

    def shorter(r: dict[str, Any]) -> dict[str, Any]:
        part = (r["tokens"] - 6) / r["tokens"]
        return r | {
            "tokens": r["tokens"] - 6,
            "full": r["full"] * part,
            "bits_per_byte": r["bits_per_byte"] * part,
        }

    return with_dev(honest, shorter)


@trick("geometry")
def uses_another_geometry_for_dev(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The official score of dev covers a different share of dev than the config requires."""
    return with_dev(honest, lambda r: r | {"coverage": r["coverage"] * 0.9})


@trick("denominator")
def divides_dev_by_more(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The scores of dev are divided by more characters than its titles have."""
    return with_dev(honest, lambda r: r | {"full": r["full"] * 0.9, "official": r["official"] * 0.9})


@trick("last_and_best")
def invents_a_best_of_dev(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The summary contains a dev score that no evaluation produced."""
    e = honest(dev_frac=0.2)
    scores = copy.deepcopy(e.summary["scores"])
    scores["dev"]["last"]["full"] -= 0.1
    return replace(e, summary=e.summary | {"scores": scores})


@trick("lossless_tokens")
def trains_on_val(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run trains on repeated copies of val."""
    e = honest()
    stream = np.resize(e.data.splits["val"], len(e.data.splits["train"]))
    return replace(e, data=replace(e.data, splits=e.data.splits | {"train": stream}))


@trick("geometry")
def changes_the_geometry_during_the_run(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """A later evaluation uses longer spans than the first one."""
    e = honest()
    at = e.evals[1]["step"]
    rows = [e.evals[0], row(e.cfg, e.data, e.model, at, geometry=(300, 16)), e.evals[2]]
    return replace(e, evals=rows, summary=e.summary | summarise(rows))


@trick("geometry")
def uses_the_geometry_of_another_run(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """All evaluations use the same spans, but not the spans of the config."""
    e = honest()
    other = row(e.cfg, e.data, e.model, 1, geometry=(300, 16))
    return with_rows(e, lambda r: r | {k: other[k] for k in ("official", "coverage")})


@trick("denominator")
def counts_more_characters(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run divides by 20% more characters than the titles have."""
    cfg, corpus, data = material()
    return run(cfg, corpus, replace(data, chars=data.chars | {"val": data.chars["val"] * 6 // 5}))


@trick("denominator")
def counts_bytes_as_characters(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run divides bits_per_byte by too many bytes."""
    cfg, corpus, data = material()
    return run(cfg, corpus, replace(data, bytes=data.bytes | {"val": data.bytes["val"] + 1}))


@trick("denominator")
def divides_the_rows_by_more(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The recorded counts are correct, but the scores in the rows are divided by larger counts."""
    return with_rows(honest(), lambda r: r | {"full": r["full"] * 0.9, "official": r["official"] * 0.9})


@trick("last_and_best")
def shows_the_best_as_the_last(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The summary reports an earlier, better score as the last score."""
    e = honest()
    # Overfit the model, so that the last score is worse than the middle one.
    fit(e.model, e.data.splits["train"][:200], 16, steps=80, lr=1e-2)
    rows = [*e.evals[:-1], row(e.cfg, e.data, e.model, e.evals[-1]["step"])]
    assert rows[-1]["full"] > rows[-2]["full"]
    best = summarise(rows)["best"]
    return replace(e, evals=rows, summary=e.summary | {"last": best, "best": best})


@trick("last_and_best")
def stops_at_the_best(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run removes the rows after its best score."""
    e = honest()
    return replace(e, evals=e.evals[:-1], summary=e.summary | summarise(e.evals[:-1]))


@trick("last_and_best")
def invents_a_best(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The summary contains a best score that no evaluation produced."""
    e = honest()
    return replace(
        e, summary=e.summary | {"best": e.summary["best"] | {"full": e.summary["best"]["full"] - 0.1}}
    )


# same_evaluate


@trick("same_evaluate")
def replaces_evaluate(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """A function that halves all scores replaces scoring.evaluate."""
    e = honest()
    true = scoring.evaluate

    def kinder(*args: Any, **kwargs: Any) -> scoring.Score:
        s = true(*args, **kwargs)
        return replace(
            s, loss=s.loss / 2, official=s.official / 2, full=s.full / 2, bits_per_byte=s.bits_per_byte / 2
        )

    monkeypatch.setattr(scoring, "evaluate", kinder)
    return e


@trick("same_evaluate")
def replaces_the_sum(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run replaces a function that `evaluate` calls."""
    e, true = honest(), scoring._nll
    monkeypatch.setattr(scoring, "_nll", lambda *args: 0.9 * true(*args))
    return e


@trick("same_evaluate")
def replaces_the_cross_entropy(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run replaces a torch function that `evaluate` calls."""
    e, true = honest(), F.cross_entropy
    monkeypatch.setattr(scoring.F, "cross_entropy", lambda *args, **kwargs: 0.9 * true(*args, **kwargs))
    return e


@trick("same_evaluate")
def adds_another_evaluate(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """Another module of the package has a function named `evaluate`."""
    module = ModuleType("mainrun.cheat")
    module.evaluate = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mainrun.cheat", module)
    return honest()


@trick("same_evaluate")
def edits_scoring_while_running(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run changes scoring.py while it is training."""
    return replace(honest(), evaluate_hash=hashlib.sha256(b"def evaluate(): return 1.1").hexdigest())


# no_learning


class Learner(Attention):
    """A model that takes a gradient step on the tokens that it is scored on."""

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        if not self.training and idx.shape[1] > 1:
            with torch.enable_grad():
                loss = F.cross_entropy(super().forward(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
                grads = torch.autograd.grad(loss, list(self.parameters()))
            with torch.no_grad():
                for p, g in zip(self.parameters(), grads, strict=True):
                    p -= 0.1 * g
        return logits


class Counter(Attention):
    """A model that counts tokens in a buffer while it is scored, and predicts from the counts."""

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__(cfg, vocab_size)
        self.register_buffer("counts", torch.zeros(vocab_size), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx) + 0.1 * self.counts.log1p()
        if not self.training:
            self.counts += idx.flatten().bincount(minlength=len(self.counts))
        return logits


class Memory(Attention):
    """A model that counts tokens in a plain attribute, which comparing weights and buffers would miss."""

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__(cfg, vocab_size)
        self.seen = [0.0] * vocab_size

    def forward(self, idx: Tensor) -> Tensor:
        # The effect is so small that other guards take it for a rounding error.
        logits = super().forward(idx) + 1e-5 * torch.tensor(self.seen).log1p()
        if not self.training:
            for token in idx.flatten().tolist():
                self.seen[token] += 1
        return logits


class Gambler(Attention):
    """A model that uses the global random generator while it is scored, which changes the later training."""

    def forward(self, idx: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(idx)


@trick("no_learning")
def trains_while_scored(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return honest(Learner)


@trick("no_learning")
def counts_while_scored(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return honest(Counter)


@trick("no_learning")
def remembers_what_it_scored(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return honest(Memory)


@trick("no_learning")
def moves_the_random_state(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return honest(Gambler)


def test_an_evaluate_that_trains_trips_three_guards(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replaced `evaluate` differs from the package's, and it trains the model on the targets."""
    e, true = honest(), scoring.evaluate

    def training(model: nn.Module, tokens: np.ndarray, **kwargs: Any) -> scoring.Score:
        if isinstance(model, Attention):
            fit(model, tokens, 16, steps=3)
        return true(model, tokens, **kwargs)

    monkeypatch.setattr(scoring, "evaluate", training)
    before = {k: v.clone() for k, v in e.model.state_dict().items()}
    assert of(guards(e), "fail") == {"same_evaluate", "no_learning", "targets_unseen"}
    assert all_equal(before, e.model.state_dict()), "the guards must restore the weights"


# targets_unseen


class FramePeeker(Attention):
    """A model that searches the frames of its callers for the targets."""

    def forward(self, idx: Tensor) -> Tensor:
        logits, frame = super().forward(idx), sys._getframe()
        while frame is not None:
            y = frame.f_locals.get("y")
            if isinstance(y, Tensor) and y.shape == idx.shape:
                return logits + 0.3 * F.one_hot(y, logits.shape[-1])
            frame = frame.f_back  # type: ignore[assignment]
        return logits


class TargetTaker(Attention):
    """A model whose forward(idx, targets) returns better logits if it is given the targets."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(idx)
        if targets is None:
            return logits
        logits = logits + F.one_hot(targets, logits.shape[-1])
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class HonestTargetTaker(Attention):
    """A model whose forward(idx, targets) returns the same logits and a loss, as in nanoGPT."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(idx)
        return (
            logits if targets is None else (logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        )


@trick("targets_unseen")
def looks_into_the_frame_of_evaluate(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return honest(FramePeeker)


@trick("targets_unseen")
def takes_targets_and_uses_them(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return honest(TargetTaker)


def test_a_model_may_take_targets_for_its_loss(honest: Honest) -> None:
    assert of(guards(honest(HonestTargetTaker)), "fail") == set()


# causality


class PeekOne(Attention):
    """A model that uses the next token."""

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        logits[:, :-1] += 0.2 * F.one_hot(idx[:, 1:], logits.shape[-1])
        return logits


class PeekAtTheEnd(Attention):
    """A model that uses the next token only at the last position that has a next token."""

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        if idx.shape[1] > 1:
            logits[:, -2] += F.one_hot(idx[:, -1], logits.shape[-1])
        return logits


class WholeRowMask(Attention):
    """A model whose mask covers the complete row, so early positions see later <eos> or <pad> tokens."""

    token = EOS

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        logits[..., self.token] += 0.5 * (idx == self.token).sum(1, keepdim=True)
        return logits


class WholeRowPadding(WholeRowMask):
    token = PAD


class Length(Attention):
    """A model that uses the length of the row."""

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        logits[..., EOS] += 0.1 * idx.shape[1]
        return logits


class BatchStatistics(Attention):
    """A model that subtracts the mean of the batch."""

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        return logits - 0.5 * logits.mean(0, keepdim=True)


class NextRow(Attention):
    """A model that uses the first input of the next row, which is the last target of this row."""

    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx)
        logits[:-1, -1] += 2 * F.one_hot(idx[1:, 0], logits.shape[-1])
        return logits


def _causality_trick(model: type[Attention]) -> None:
    def play(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
        return honest(model)

    play.__name__ = f"model_{model.__name__}"
    trick("causality")(play)


for _model in (PeekOne, PeekAtTheEnd, WholeRowMask, WholeRowPadding, Length, BatchStatistics, NextRow):
    _causality_trick(_model)


def test_a_leak_is_detected_in_bfloat16(honest: Honest) -> None:
    assert of(guards(honest(PeekOne, dtype="bfloat16")), "fail") == {"causality"}


# random_start


@trick("random_start")
def starts_from_trained_weights(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The weights were trained before step 1, but the evidence claims that they are random."""
    return honest(warm=True)


@trick("random_start")
def names_the_source_of_its_weights(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    return replace(honest(), initial_weights="hub:gpt2")


@trick("random_start")
def hides_its_first_score(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run omits the row of step 1."""
    e = honest(warm=True)
    return replace(e, evals=e.evals[1:])


# lossless_tokens


class Wrapped:
    """A tokenizer that changes the text before it encodes it."""

    def __init__(self, inner: Any, change: Callable[[str], str] = str) -> None:
        self.inner, self.change = inner, change
        self.kind, self.vocab_size, self.digest = inner.kind, inner.vocab_size, inner.digest

    def encode(self, titles: Sequence[str]) -> np.ndarray:
        return self.inner.encode([self.change(t) for t in titles])

    def titles(self, stream: Any) -> list[str]:
        return self.inner.titles(stream)

    def decode(self, ids: Any) -> str:
        return "\n".join(self.titles(ids))


def retokenised(data: TokenData, corpus: Corpus, tokenizer: Any) -> TokenData:
    return replace(
        data,
        tokenizer=tokenizer,
        splits={split: tokenizer.encode(getattr(corpus, split)) for split in data.splits},
    )


def with_tokenizer(change: Callable[[str], str]) -> Evidence:
    """Return a run whose tokenizer changes the text but whose denominators belong to the original titles."""
    cfg, corpus, data = material()
    return run(cfg, corpus, retokenised(data, corpus, Wrapped(data.tokenizer, change)))


@trick("lossless_tokens")
def lowercases(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The tokenizer removes capitals, which makes the text easier to predict."""
    return with_tokenizer(str.lower)


@trick("lossless_tokens")
def drops_rare_characters(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The tokenizer removes digits, which makes the text easier to predict."""
    return with_tokenizer(lambda t: "".join(c for c in t if not c.isdigit()))


@trick("lossless_tokens")
def replaces_hard_tokens_by_unk(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run replaces rare tokens of val with <unk>."""
    e = honest()
    val = e.data.splits["val"].copy()
    counts = np.bincount(val, minlength=600)
    val[counts[val] <= 2] = 2
    return run(e.cfg, e.corpus, replace(e.data, splits=e.data.splits | {"val": val}))


@trick("lossless_tokens")
def stores_an_easier_val(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The tokenizer is lossless, but the stored val tokens encode titles of train."""
    e = honest()
    val = e.data.tokenizer.encode(e.corpus.train[: len(e.corpus.val)])
    return run(e.cfg, e.corpus, replace(e.data, splits=e.data.splits | {"val": val}))


def test_nfkc_normalisation_is_detected() -> None:
    """NFKC normalisation loses information if a title contains ligatures, superscripts or wide letters."""
    cfg, corpus, _ = material()
    corpus = replace(corpus, val=[*corpus.val[:-1], "A ﬁne x² for Ｗｉｄｅ ideas"])
    data = prepare_uncached(cfg, corpus)
    e = run(
        cfg,
        corpus,
        retokenised(data, corpus, Wrapped(data.tokenizer, lambda t: unicodedata.normalize("NFKC", t))),
    )
    assert verdict(e, "lossless_tokens").status == "fail"
    assert verdict(run(cfg, corpus, data), "lossless_tokens").status == "pass"


def prepare_uncached(cfg: TrainConfig, corpus: Corpus) -> TokenData:
    """Return the tokens of changed titles, because the cache would return the tokens of the old titles."""
    _, _, data = _material(cfg.digest, cfg.model_dump_json())
    return replace(
        retokenised(data, corpus, data.tokenizer),
        chars={s: sum(len(t) + 5 for t in getattr(corpus, s)) for s in data.splits},
        bytes={s: sum(len(t.encode()) + 1 for t in getattr(corpus, s)) for s in data.splits},
    )


# no_val_tokens


class Memoriser(Wrapped):
    """A tokenizer that encodes each of the known titles as one token."""

    def __init__(self, inner: Any, known: list[str]) -> None:
        super().__init__(inner)
        self.known = {t: inner.vocab_size + i for i, t in enumerate(known)}
        self.back = {i: t for t, i in self.known.items()}
        self.vocab_size = inner.vocab_size + len(known)

    def encode(self, titles: Sequence[str]) -> np.ndarray:
        return np.concatenate(
            [[self.known[t], EOS] if t in self.known else self.inner.encode([t]) for t in titles]
        ).astype(np.uint16)

    def titles(self, stream: Any) -> list[str]:
        rows = np.split(np.asarray(stream), np.flatnonzero(np.asarray(stream) == EOS) + 1)
        rows = [r for r in rows if len(r)]
        return [self.back[int(r[0])] if int(r[0]) in self.back else self.inner.titles(r)[0] for r in rows]


def memorised(known: Callable[[Corpus], list[str]], **titles: Callable[[Corpus], list[str]]) -> Evidence:
    cfg, corpus, _ = material(tokenizer_fit="train+val")
    corpus = replace(corpus, **{split: change(corpus) for split, change in titles.items()})
    data = prepare_uncached(cfg, corpus)
    return run(cfg, corpus, retokenised(data, corpus, Memoriser(data.tokenizer, known(corpus))))


@trick("no_val_tokens")
def puts_validation_titles_into_the_vocabulary(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The vocabulary contains fifty titles of val as single tokens."""
    return memorised(lambda c: [t for t in c.val if t not in c.train][:50])


def test_long_tokens_of_train_and_words_of_val_are_honest() -> None:
    e = memorised(lambda c: c.train[:50])
    assert verdict(e, "no_val_tokens").status == "pass"
    word = "Zyxwvutism"
    e = memorised(lambda c: [word], val=lambda c: [*c.val[:-1], word])
    assert verdict(e, "no_val_tokens").status == "pass"


@pytest.mark.parametrize("text", ["{}", "{}!", "she says {}"])
def test_a_phrase_without_spaces_is_not_a_word(text: str) -> None:
    """The phrase is either a complete validation title or a part of one."""
    phrase = "本日は晴天なりと彼女は言ったがすぐに雨が降り出した"
    cfg, corpus, _ = material(tokenizer_fit="train+val")
    corpus = replace(corpus, val=[*corpus.val[:-1], phrase])
    data = prepare_uncached(cfg, corpus)
    data = retokenised(data, corpus, Memoriser(data.tokenizer, [phrase]))
    corpus = replace(corpus, val=[*corpus.val[:-1], text.format(phrase)])
    assert verdict(run(cfg, corpus, data), "no_val_tokens").status == "fail"


# data_known


@trick("data_known")
def swaps_titles_after_the_fingerprint(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run replaces the hard half of val with copies of the easy half, and keeps the old fingerprints."""
    cfg, corpus, _ = material()
    half = sorted(corpus.val, key=len)[: len(corpus.val) // 2]
    corpus = replace(corpus, val=half + half)
    return run(cfg, corpus, prepare_uncached(cfg, corpus))


def other_titles() -> tuple[TrainConfig, Corpus, TokenData]:
    """Return titles in another order with correct fingerprints."""
    cfg, corpus, _ = material()
    train, val = corpus.train[::-1], corpus.val[::-1]
    corpus = replace(corpus, train=train, val=val)
    corpus = replace(corpus, fingerprints=fingerprints(train, corpus.dev, val))
    return cfg, corpus, prepare_uncached(cfg, corpus)


@trick("data_known")
def presents_other_titles_as_synthetic(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The run claims that other titles, with correct fingerprints, come from the synthetic generator."""
    return run(*other_titles())


@trick("data_known")
def reports_another_fingerprint(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The summary claims that the run used other data."""
    e = honest()
    return replace(e, summary=e.summary | {"fingerprints": dict(e.corpus.fingerprints) | {"val": "0" * 64}})


@trick("data_known")
def takes_titles_from_another_source(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The config says that the corpus is synthetic, but the titles come from a file."""
    e = honest()
    return replace(e, corpus=replace(e.corpus, origin={"kind": "file", "path": "titles.txt"}))


HUB = {"kind": "hub", "revision": HUB_REVISIONS["hn"], "verified": True}


@pytest.mark.parametrize(
    ("origin", "source", "all", "status"),
    [
        (HUB, "same", True, "pass"),
        (HUB, "unreachable", False, "pass"),
        (HUB, "other", True, "fail"),
        (HUB | {"verified": False}, "same", False, "fail"),
        (HUB | {"revision": HUB_REVISIONS["hn-2025"]}, "same", False, "fail"),
        ({"kind": "mix"}, "same", False, "fail"),
    ],
)
def test_the_hub_corpus(
    honest: Honest,
    monkeypatch: pytest.MonkeyPatch,
    origin: dict[str, Any],
    source: str,
    all: bool,
    status: str,
) -> None:
    """Data is known if its checksum was verified. With all=True, the guard also loads the titles again."""
    e = honest()
    e = replace(e, cfg=from_dict(SMALL | {"corpus": "hn"}), corpus=replace(e.corpus, origin=origin))
    if source != "unreachable":
        other = replace(e.corpus, fingerprints=fingerprints(["another"], [], ["title"]))
        monkeypatch.setattr(
            guards_module.corpora, "load_corpus", lambda cfg: e.corpus if source == "same" else other
        )
    assert GUARDS["data_known"](e, all)[0] == status


# task_rules


def claim(e: Evidence, **fields: Any) -> Evidence:
    """Return evidence that claims to be a run of the task, for checking the guard task_rules only."""
    cfg = from_dict(SMALL | {"corpus": "hn", "num_titles": 100_000} | fields)
    corpus = replace(e.corpus, train=["a"] * 90_000, dev=[], val=["b"] * 10_000)
    return replace(e, cfg=cfg, corpus=corpus)


@pytest.mark.parametrize(
    "fields", [{"epochs": 8}, {"seed": 1338}, {"val_frac": 0.05}, {"num_titles": 99_999}, {"shuffle": False}]
)
def test_rules_of_the_task(honest: Honest, fields: dict[str, Any]) -> None:
    """A submission must follow every rule of the task. For a study, the guard only flags differences."""
    name = next(iter(fields))
    for all, expected in ((True, "fail"), (False, "flag")):
        status, detail = GUARDS["task_rules"](claim(honest(), **fields), all)
        assert status == expected
        assert f"{name}=" in detail.replace("shuffle=false", "shuffle=")
    found = verdict(honest(**(fields | ({"num_titles": 2900} if name == "num_titles" else {}))), "task_rules")
    assert found.status == "flag"
    assert f"{name}=" in found.detail
    assert "corpus=synthetic" in found.detail


def test_fewer_titles_than_the_task_has(honest: Honest) -> None:
    e = claim(honest())
    assert GUARDS["task_rules"](e, True)[0] == "pass"
    assert GUARDS["task_rules"](replace(e, corpus=replace(e.corpus, val=["b"] * 5_000)), True)[0] == "fail"


# presentations


@trick("presentations")
def counts_r_drop_once(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """Every token passes through the model twice, but the ledger counts one pass."""
    e = honest(rdrop=1.0, dropout=0.1)
    half = e.ledger["presentations_per_token"] / 2
    return replace(e, ledger=e.ledger | {"forward_passes": 1, "presentations_per_token": half})


@trick("presentations")
def does_not_count_the_tokens_of_r_drop(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The ledger counts both passes of R-Drop, but not the additional presentations."""
    e = honest(rdrop=1.0, dropout=0.1)
    return replace(e, ledger=e.ledger | {"presentations_per_token": e.ledger["presentations_per_token"] / 2})


@trick("presentations")
def counts_an_ensemble_once(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """An ensemble has five members, but the ledger counts the presentations of one member."""
    e = honest()
    return replace(e, ledger=e.ledger | {"ensemble_members": 5})


@trick("presentations")
def hides_an_ensemble(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """Two models are scored together, but the config and the ledger name one."""
    e = honest()
    return replace(e, model=Ensemble(e.cfg, [e.model, copy.deepcopy(e.model)]))


@trick("presentations")
def claims_a_larger_train(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """The ledger claims that an epoch has more tokens than train."""
    e = honest()
    return replace(e, ledger=e.ledger | {"train_tokens_per_epoch": 2 * e.ledger["train_tokens_per_epoch"]})


@pytest.mark.parametrize(("weight", "status"), [(1, "pass"), (5, "flag")])
def test_titles_repeated_by_a_mix_are_presentations(
    honest: Honest, tmp_path: Path, weight: int, status: str
) -> None:
    (tmp_path / "mix.toml").write_text(f'[[source]]\ncorpus = "synthetic"\nweight = {weight}\n')
    found = verdict(honest(corpus=f"mix:{tmp_path / 'mix.toml'}"), "presentations")
    assert found.status == status
    assert (
        "the weights of the mix repeat 10,800 of an epoch's 13,500 titles, and one title occurs 5 times"
        in found.detail
    ) == (weight > 1)


def test_val_titles_in_train_are_counted(honest: Honest) -> None:
    e = honest()
    leak = replace(e.corpus, train=[*e.corpus.train, *e.corpus.val[:7]])
    cfg = from_dict(SMALL | {"corpus": "file:titles.txt"})
    leak = replace(leak, origin={"kind": "file"}, fingerprints=fingerprints(leak.train, leak.dev, leak.val))
    leaking = replace(e, cfg=cfg, corpus=leak, summary=e.summary | {"fingerprints": leak.fingerprints})
    found = verdict(leaking, "data_known")
    assert found.status == "flag" and f"7 of {len(leak.val)} val titles are also in train" in found.detail


# all tricks


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_trips_exactly_its_guard(name: str, honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, status, play = TRICKS[name]
    found = guards(play(honest, monkeypatch))
    # The changed rows and weights contradict each other, so same_evaluate may fail too.
    assert of(found, "fail") - {"same_evaluate"} == ({guard} if status == "fail" else set()) - {
        "same_evaluate"
    }, found
    assert next(g for g in found if g.name == guard).status == status
    assert all_detailed(found)


def test_every_guard_has_a_trick() -> None:
    assert {guard for guard, _, _ in TRICKS.values()} | {"task_rules"} == set(GUARDS)


@pytest.mark.parametrize("split", ["val", "dev"])
def test_rows_that_the_weights_do_not_give_are_detected(honest: Honest, split: str) -> None:
    """The rows agree with each other but contradict the weights."""
    e = honest(dev_frac=0.2)
    figures = ("loss", "official", "full", "bits_per_byte")
    better = with_rows(
        e, lambda r: r | {k: r[k] * 0.9 for k in figures} if r["step"] > 1 and r["split"] == split else r
    )
    assert of(guards(better), "fail") == {"same_evaluate"}
    assert f"on {split}, the weights have" in verdict(better, "same_evaluate").detail


def test_every_stored_token_is_checked(honest: Honest) -> None:
    """The stored tokens of train encode one title that differs from the corpus."""
    e = honest()
    train = e.data.tokenizer.encode([*e.corpus.train[:-1], "Something else"])
    broken = replace(e, data=replace(e.data, splits=e.data.splits | {"train": train}))
    assert verdict(broken, "lossless_tokens").status == "fail"


@pytest.mark.parametrize("lost", ["evals", "ledger", "summary"])
def test_evidence_that_cannot_be_read_does_not_pass(honest: Honest, lost: str) -> None:
    found = guards(replace(honest(), **{lost: [] if lost == "evals" else {}}))
    assert of(found, "fail") <= {
        "coverage",
        "geometry",
        "denominator",
        "last_and_best",
        "same_evaluate",
        "random_start",
        "presentations",
    }
    assert all("cannot be read" in g.detail for g in found if g.status == "fail")
    assert of(found, "fail")
