"""Tests of the n-gram model: its probabilities, what it may see, and the runs that are scored with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mainrun.data.corpus import load_corpus
from mainrun.data.ngram import DISCOUNT, Mixture, NGram
from mainrun.data.token_cache import prepare
from mainrun.data.tokenizer import EOS
from mainrun.errors import ConfigError, UsageError
from mainrun.interop.source import check_expressible
from mainrun.run.session import train
from mainrun.store import token_scores
from mainrun.store.rundir import RunDir
from mainrun.train import set_up
from mainrun.ui import compare

V = 7
Context = tuple[int, ...]
Counts = dict[Context, Counter[int]]


def titles(count: int, seed: int = 0) -> np.ndarray:
    """Return a stream of random titles. The tokens are not equally frequent, so contexts repeat."""
    rng = np.random.default_rng(seed)
    stream: list[int] = []
    for _ in range(count):
        stream += [*rng.choice([2, 3, 4, 5, 6], rng.integers(0, 8), p=[0.4, 0.3, 0.15, 0.1, 0.05]), EOS]
    return np.array(stream, dtype=np.uint16)


def with_contexts(tokens: np.ndarray, longest: int) -> list[tuple[Context, int]]:
    """Return each token with the longest context that the model may use."""
    pairs = []
    context: Context = (EOS,)
    for token in tokens.tolist():
        pairs.append((context[-longest:] if longest else (), token))
        context = (EOS,) if token == EOS else (*context, token)
    return pairs


def kneser_ney(tokens: np.ndarray, order: int) -> dict[Context, np.ndarray]:
    """Return the probabilities after each context, computed from sets and dicts."""
    longer: dict[Context, set[tuple[Context, int]]] = defaultdict(set)
    counts: Counts = defaultdict(Counter)
    for context, token in with_contexts(tokens, order - 1):
        counts[context][token] += 1
        for start in range(len(context)):
            longer[context[start + 1 :]].add((context[start:], token))
    for context, pairs in longer.items():
        counts[context].update(token for _, token in pairs)
    probabilities: dict[Context, np.ndarray] = {}
    for context in sorted(counts, key=len):
        shorter = probabilities[context[1:]] if context else np.full(V, 1 / V)
        count = np.array([counts[context][token] for token in range(V)])
        left = DISCOUNT * (count > 0).sum() * shorter
        probabilities[context] = (np.maximum(count - DISCOUNT, 0) + left) / count.sum()
    return probabilities


def row_of(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens])


# -- the probabilities


@pytest.mark.parametrize("order", [1, 2, 3, 5, 20])
def test_the_probabilities_are_those_of_kneser_ney(order: int) -> None:
    tokens = titles(60)
    model = NGram(tokens, V, order)
    expected = kneser_ney(tokens, order)
    held_out = titles(30, seed=1)
    inputs = np.concatenate([[EOS], held_out[:-1]]).astype(np.int64)
    got = model(torch.from_numpy(inputs)[None])[0].numpy()
    assert got.shape == (len(held_out), V)
    for i, (context, _) in enumerate(with_contexts(held_out, order - 1)):
        while context not in expected:
            context = context[1:]
        np.testing.assert_allclose(got[i], expected[context], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)


def test_the_entries_are_the_pairs_of_a_context_and_a_token() -> None:
    tokens = titles(20)
    pairs = set()
    for context, token in with_contexts(tokens, 2):
        pairs |= {(context[start:], token) for start in range(len(context) + 1)}
    assert NGram(tokens, V, 3).entries == len(pairs)


def test_a_prediction_depends_on_its_title_and_its_row_only() -> None:
    model = NGram(titles(60), V, 4)
    same_title = model(row_of(2, 3, EOS, 4, 2))[0], model(row_of(5, 6, EOS, 4, 2))[0]
    assert torch.equal(same_title[0][2:], same_title[1][2:])
    assert not torch.equal(same_title[0][1], same_title[1][1])
    later = model(row_of(2, 3, 4, 4, 6))[0], model(row_of(2, 3, 4, 4, 2))[0]
    assert torch.equal(later[0][:4], later[1][:4])
    both = model(torch.cat([row_of(2, 3, 4), row_of(5, 5, 5)]))
    assert torch.equal(both[0], model(row_of(2, 3, 4))[0])
    assert model(row_of(2)).shape == (1, 1, V)  # a row that is shorter than a context


def test_a_mixture_is_the_weighted_mean_of_the_probabilities() -> None:
    ngram = NGram(titles(60), V, 3)
    torch.manual_seed(0)
    logits = nn.Embedding(V, V)
    idx = row_of(EOS, 2, 3, 4)
    mixed = Mixture(logits, ngram, 0.25)(idx)
    expected = 0.75 * logits(idx).softmax(-1) + 0.25 * ngram(idx)
    torch.testing.assert_close(mixed.exp(), expected)


# -- runs


def run(tiny: Any, out: Path, **changes: Any) -> dict[str, Any]:
    cfg = tiny(token_scores=True, **changes)
    summary: dict[str, Any] = train(cfg, out)
    return summary | {"directory": RunDir(out / cfg.run_id)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run with members and the same run with an n-gram model."""
    from conftest import TINY

    from mainrun.config import from_dict

    out = tmp_path_factory.mktemp("ngram")

    def tiny(**changes: Any) -> Any:
        return from_dict(TINY | {"members": 2, "dev_frac": 0.2} | changes)

    return run(tiny, out), run(tiny, out, ngram=4)


def test_an_n_gram_model_changes_the_scores_but_no_weight(runs: Any) -> None:
    plain, mixed = runs
    assert mixed["weights"] == plain["weights"]
    for split in ("val", "dev"):
        last = mixed["scores"][split]["last"]
        assert last["alone"] == plain["scores"][split]["last"]["full"]
        assert last["full"] < last["alone"]
        assert "alone" not in plain["scores"][split]["last"]
        written = token_scores.read(mixed["directory"])[split]
        assert -written.full.sum(dtype=np.float64) / written.chars == pytest.approx(last["full"], rel=1e-6)


def test_compare_states_the_size_of_the_n_gram_model(runs: Any) -> None:
    plain, mixed = runs
    entries = f"{mixed['ngram_entries']:,}"
    (note,) = (note for note in compare._notes(compare.rows([plain, mixed])) if "mixture" in note)
    assert mixed["run"] in note and f"an n-gram model of {entries} entries" in note


def test_a_run_with_an_n_gram_model_passes_every_guard(runs: Any) -> None:
    _, mixed = runs
    verdicts = {guard["name"]: guard for guard in mixed["guards"]}
    assert [name for name, guard in verdicts.items() if guard["status"] == "fail"] == []
    assert "counted once for the n-gram model" in verdicts["presentations"]["detail"]


def test_the_n_gram_model_is_counted_from_train_only(tiny: Any, runs: Any) -> None:
    cfg = tiny(ngram=4, dev_frac=0.2, tokenizer_fit="train+val")
    data = prepare(cfg, load_corpus(cfg))
    ngram = set_up(cfg).ngram
    assert ngram is not None
    expected = NGram(data.splits["train"], data.tokenizer.vocab_size, 4)
    for level, counted in zip(ngram.levels, expected.levels, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(level, counted, strict=True))
    assert runs[1]["ngram_entries"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"growth": {"ops": [{"name": "set_lr", "value": 0.1, "trigger": {"budget_frac": 0.5}}]}},
            "ngram=3 and a growth schedule cannot be combined; set ngram=0, or remove the growth schedule",
        ),
        ({"shard": True}, "ngram=3 and shard=true cannot be combined; set ngram=0 or shard=false"),
        (
            {"block_pattern": "DM"},
            "ngram=3 and block_pattern=DM cannot be combined; set ngram=0 or block_pattern=D",
        ),
        ({"ngram_weight": 1.0}, "ngram_weight=1.0 is not allowed"),
    ],
)
def test_what_cannot_be_combined_is_refused(tiny: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(ngram=3, **fields)
    assert message in str(caught.value)


def test_a_run_with_an_n_gram_model_is_not_exported(tiny: Any) -> None:
    with pytest.raises(UsageError) as caught:
        check_expressible(tiny(ngram=3))
    assert "ngram=3 (must be 0)" in str(caught.value)
