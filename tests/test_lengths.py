"""Test that a run whose splits are too short is refused before training, with all faults at once."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import TINY

from mainrun.config import from_dict
from mainrun.data.corpus import load_corpus
from mainrun.data.lengths import check_lengths, most_rows
from mainrun.data.token_cache import prepare
from mainrun.errors import ConfigError
from mainrun.train import set_up

LONG = {"train": range(129), "val": range(129), "dev": range(129)}  # just enough for 8 rows of 16 tokens


@pytest.mark.parametrize(
    ("short", "words"),
    [
        ("train", "train has 128 tokens, but one step needs"),
        ("val", "the val split is too short: "),
        ("dev", "the dev split is too short: "),
    ],
)
def test_each_split_that_is_too_short_is_refused(short: str, words: str) -> None:
    cfg = from_dict(TINY)
    check_lengths(cfg, LONG)
    check_lengths(cfg, {"train": LONG["train"], "val": LONG["val"]})
    with pytest.raises(ConfigError, match=words) as error:
        check_lengths(cfg, LONG | {short: range(128)})
    assert len(str(error.value).splitlines()) == 1


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_lengths(from_dict(TINY), dict.fromkeys(LONG, range(9)))
    assert len(str(error.value).splitlines()) == 3


def test_a_batch_of_a_growth_schedule_counts() -> None:
    op = {"name": "set_batch_size", "value": 16, "trigger": {"step": 1}}
    cfg = from_dict(TINY | {"growth": {"ops": [op]}})
    with pytest.raises(ConfigError, match=r"needs .* = 257"):
        check_lengths(cfg, LONG)


def test_the_most_rows_of_each_split() -> None:
    assert most_rows(from_dict(TINY), LONG) == {"train": 8, "val": 8, "dev": 8}
    assert most_rows(from_dict(TINY), {"train": range(17), "val": range(16)}) == {"train": 1, "val": 0}
    assert most_rows(from_dict(TINY | {"official_geometry": "2x16"}), LONG) == {"train": 8}


FEW: dict[str, Any] = {"num_titles": 30, "dev_frac": 0.1, "vocab_size": 16_000}


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
def test_a_vocabulary_that_is_too_large_names_what_is_refused_next(tokenizer: str) -> None:
    cfg = from_dict(TINY | FEW | {"tokenizer": tokenizer, "batch_size": 64})
    with pytest.raises(ConfigError) as error:
        set_up(cfg)
    first, *others = str(error.value).splitlines()
    assert first.startswith("vocab_size=16,000 is larger than the text allows")
    largest = int(first.partition("at most ")[2].partition(" ")[0].replace(",", ""))
    assert f"use --set vocab_size={largest}" in first
    smaller = cfg.changed(vocab_size=largest)
    with pytest.raises(ConfigError) as next_error:
        check_lengths(smaller, prepare(smaller, load_corpus(smaller)).splits)
    expected = [f"with vocab_size={largest:,}, {line}" for line in str(next_error.value).splitlines()]
    assert others == expected and len(others) >= 2


def test_a_vocabulary_that_is_the_only_fault_is_named_alone() -> None:
    with pytest.raises(ConfigError) as error:
        set_up(from_dict(TINY | {"vocab_size": 100_000}))
    assert len(str(error.value).splitlines()) == 1


def test_a_run_is_refused_with_all_faults_before_it_is_planned() -> None:
    with pytest.raises(ConfigError) as error:
        set_up(from_dict(TINY | {"batch_size": 2000}))
    first, second = str(error.value).splitlines()
    assert first.startswith("train has ") and second.startswith("the val split is too short: ")
