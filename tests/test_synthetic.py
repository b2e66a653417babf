"""Tests that synthetic titles are reproducible, distinct, fast to write, and statistically like real ones."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean, pstdev

import pytest

from mainrun.data.synthetic import LONGEST, TOPIC_LISTS, inflect, titles

FIRST_1000 = "e6b6f8c3170587cf629a70c4152454a3f46270d7afd43c7cc02862f0c3178b07"


@pytest.fixture(scope="module")
def many() -> list[str]:
    return titles(20_000)


def test_the_first_thousand_titles_are_pinned() -> None:
    """A change to the grammar changes every score, so record an intended change in docs/log/data.md."""
    assert hashlib.sha256("\n".join(titles(1000)).encode()).hexdigest() == FIRST_1000


def test_another_hash_seed_gives_the_same_titles() -> None:
    code = (
        "import hashlib; from mainrun.data.synthetic import titles; "
        "print(hashlib.sha256('\\n'.join(titles(1000)).encode()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == FIRST_1000


def test_a_longer_list_begins_with_the_shorter_one(many: list[str]) -> None:
    assert titles(700) == many[:700] and titles(0) == []


def test_titles_are_distinct_clean_lines(many: list[str]) -> None:
    assert len(set(many)) == len(many)
    for t in many:
        assert (
            0 < len(t) <= LONGEST and t == t.strip() and "  " not in t and not set("\n\r\t~_{}|") & set(t)
        ), t


def test_speed(many: list[str]) -> None:
    """An idle core writes 100,000 titles in 3 s. The limit is twice that, because a core may be shared."""
    start = time.process_time()
    titles(10_000)
    assert time.process_time() - start < 0.6


FORMS = {  # maps a pattern to the minimum share of titles that match it
    r"^Ask HN: ": 0.11,
    r"^Show HN: ": 0.05,
    r"^Tell HN: ": 0.001,
    r"^Launch HN: .+ \(YC [SW]\d\d\) – ": 0.0005,
    r"\?$": 0.13,
    r"\d": 0.18,
    r" \((?:1[89]|20)\d\d\)$": 0.03,
    r" \[pdf\]$": 0.007,
    '[“"‘]': 0.02,
    r"\b[A-Z]{2,}\b": 0.25,
    ": ": 0.25,
    r"[$€]\d": 0.02,
    r" v?\d+\.\d": 0.01,
    r"\w\.(?:js|io)\b": 0.01,
    r"['’]s ": 0.05,
    r" (?:more|less|better|cheaper) ": 0.005,
}


@pytest.mark.parametrize("pattern", FORMS)
def test_each_form_has_its_share_of_titles(many: list[str], pattern: str) -> None:
    share = sum(bool(re.search(pattern, t)) for t in many) / len(many)
    assert FORMS[pattern] < share < 5 * FORMS[pattern], share


def capitals(title: str) -> float:
    words = [w for w in title.split()[1:] if len(w) > 3 and w[0].isalpha()]
    return sum(w[0].isupper() for w in words) / len(words) if words else 0.5


def test_a_third_of_the_titles_is_in_title_case(many: list[str]) -> None:
    assert 0.25 < mean(capitals(t) == 1 for t in many) < 0.5


def test_articles_fit_their_nouns(many: list[str]) -> None:
    text = "\n".join(many).lower()
    assert not re.search(r"\ba (?:[aeio]\w+)", text) and not re.search(
        r"\ban [bcdfgjklmnpqrstvwxyz][aeiou]", text
    )


INFLECTED = "stop+ed:stopped try+ed:tried make+ed:made debug+ing:debugging bundle+ing:bundling "
INFLECTED += "see+ing:seeing open+ed:opened fix+:fix "
INFLECTED += "go+s:goes city+s:cities box+s:boxes boy+s:boys person+s:people"


@pytest.mark.parametrize("case", INFLECTED.split())
def test_inflection(case: str) -> None:
    word, ending, expected = re.split("[+:]", case)
    assert inflect(word, ending) == expected


def test_words_of_a_topic_occur_together(many: list[str]) -> None:
    """A noun and an adjective occur together more often than by chance only if they share a topic."""

    def having(topic: int, part: int) -> set[int]:
        words = {w for w in TOPIC_LISTS[topic][part] if sum(w in lists[part] for lists in TOPIC_LISTS) == 1}
        return {i for i, t in enumerate(many) if words & set(t.lower().split())}

    nouns, adjectives = [having(topic, 0) for topic in range(6)], [having(topic, 3) for topic in range(6)]
    for a in range(6):
        for b in range(6):
            lift = len(nouns[a] & adjectives[b]) * len(many) / (len(nouns[a]) * len(adjectives[b]))
            assert lift > 3 if a == b else lift < 1.2, (a, b, lift)


def statistics(sample: list[str]) -> dict[str, float]:
    words = [w for t in sample for w in t.split()]
    counts = Counter(words)
    head = "\n".join(sample[:10_000]).encode()
    chars = sum(len(t) + 1 for t in sample[:10_000])
    return {
        "chars": mean(map(len, sample)),
        "chars_sd": pstdev(map(len, sample)),
        "words": len(words) / len(sample),
        "words_sd": pstdev(len(t.split()) for t in sample),
        "types": len(counts),
        "types_1000": len({w for t in sample[:1000] for w in t.split()}),
        "once": sum(c == 1 for c in counts.values()) / len(counts),
        "top_100": sum(c for _, c in counts.most_common(100)) / len(words),
        "top_1000": sum(c for _, c in counts.most_common(1000)) / len(words),
        "gzip": 8 * len(gzip.compress(head, 9)) / chars,
        "xz": 8 * len(lzma.compress(head, preset=9)) / chars,
    }


# These statistics describe 20,000 real titles, which are not part of this repository.
REAL = {
    "chars": 51.1,
    "chars_sd": 17.8,
    "words": 8.45,
    "words_sd": 3.14,
    "types": 36_491,
    "types_1000": 4_272,
    "once": 0.652,
    "top_100": 0.330,
    "top_1000": 0.543,
    "gzip": 3.693,
    "xz": 3.101,
}
TOLERANCE = {"types": 0.2, "top_100": 0.2, "types_1000": 0.15}


@pytest.fixture(scope="module")
def measured(many: list[str]) -> dict[str, float]:
    return statistics(many)


@pytest.mark.parametrize("name", REAL)
def test_statistics_are_close_to_those_of_real_titles(measured: dict[str, float], name: str) -> None:
    assert abs(measured[name] / REAL[name] - 1) < TOLERANCE.get(name, 0.1), (
        f"{name}: {measured[name]:.3f}, real titles have {REAL[name]}"
    )


def test_the_reference_statistics_are_those_of_the_real_file(real_titles: Path) -> None:
    real = statistics(real_titles.read_text(encoding="utf-8").split("\n")[:20_000])
    for name, value in REAL.items():
        assert real[name] == pytest.approx(value, rel=0.02), name


def test_the_vocabulary_keeps_growing(many: list[str]) -> None:
    types, seen = [], set[str]()
    for start in range(0, 20_000, 5_000):
        seen |= {w for t in many[start : start + 5_000] for w in t.split()}
        types.append(len(seen))
    assert types[3] - types[2] > 0.5 * (types[1] - types[0]) > 2_000


@pytest.mark.slow
def test_bpe_tokens_per_title(many: list[str]) -> None:
    """20,000 real titles average 11.9 tokens with a vocabulary of 16,000 that is fitted on these titles."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        many, trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False)
    )
    tokens = mean(len(e.ids) for e in bpe.encode_batch(many))
    assert abs(tokens / 11.9 - 1) < 0.1, tokens
