"""Tests `case=marked`: the signs for capitals, and what the rest of mainrun makes of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokens import TRICKY, a_corpus, same

from mainrun.checks import guards
from mainrun.config import from_dict
from mainrun.data import token_cache
from mainrun.data.capitals import ALL, FIRST, SIGNS, mark, restore
from mainrun.data.token_cache import prepare
from mainrun.data.tokenizer import EOS, UNK, Tokenizer, fit
from mainrun.errors import ConfigError, RunError
from mainrun.interop.source import inexpressible

KINDS = ("bpe", "unigram")
WORDS = (
    "Show",
    "HN",
    "the",
    "Kernel",
    "kernel",
    "PDF",
    "iPhone",
    "of",
    "(Café",
    "A",
    "S3",
    "Don't",
    "Y-Axis",
)
ODD = ["ΟΔΟΣ", "İstanbul", "ısı", "Straße", "STRASSE", "STRAẞE", "ǅ", "ŉA", "E\u0301A", "Ⓐ", "𝐀", "ª", *SIGNS]


def some_titles(n: int = 400) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) + f" {i}" for i in range(n)]


@cache
def fitted(kind: str, case: str = "marked") -> Tokenizer:
    return fit(kind, some_titles(), 330, case)


def titles_of_any_kind() -> st.SearchStrategy[str]:
    anything = st.text(st.characters(codec="utf-8"), max_size=6)
    known = st.sampled_from([*TRICKY, *ODD, *WORDS, "\n"])
    return st.lists(st.one_of(known, anything), max_size=8).map("".join)


# -- the rule


@pytest.mark.parametrize(
    ("title", "marked"),
    [
        ("Show HN: a Thing", "# show @ hn: a # thing"),
        ("lower case", "lower case"),
        ("A", "# a"),
        ("S3 3D 4k", "# s3 @ 3d 4k"),
        ("iPhone and McDonald", "iPhone and McDonald"),
        ("(Show", "(# show"),
        ("Y-Combinator's", "# y-# combinator's"),
        ("two  Spaces", "two  # spaces"),
        (" Leading", " # leading"),
        ("line\nBreak", "line\n# break"),
        ("snake_Case", "snake_# case"),
        ("Éa ΟΔΟΣ", "# éa @ οδος"),
        ("", ""),
        *((word, word) for word in ("İstanbul", "STRAẞE", "ǅ", "ǅa", "Ⓐ")),
    ],
)
def test_capitals_are_written_as_signs(title: str, marked: str) -> None:
    marked = marked.replace("#", FIRST).replace("@", ALL)
    assert mark(title) == marked
    assert restore(marked) == title


@settings(max_examples=examples(200))
@given(st.text(st.characters(codec="utf-8", exclude_characters="".join(SIGNS))))
def test_any_text_is_restored(title: str) -> None:
    assert restore(mark(title)) == title


def test_every_character_is_restored_alone_and_in_a_word() -> None:
    chars = [chr(c) for c in (*range(0xD800), *range(0xE002, 0x20000))]
    for pattern in ("{}", "a{}", "{}a", "A{}"):
        title = " ".join(pattern.format(char) for char in chars)
        assert restore(mark(title)) == title


def test_a_sign_without_a_word_is_dropped() -> None:
    """A model may write such signs, but no title is encoded with one."""
    assert restore(f"{FIRST} yes{ALL} {FIRST}, {ALL}{FIRST}no{FIRST}") == "Yes , no"


# -- tokenizers


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(200))
@given(titles=st.lists(titles_of_any_kind(), max_size=4))
@example(titles=[f"Signs {FIRST}A {ALL} a", f"\\x{{e000}}{FIRST}"])
def test_any_title_is_restored_from_its_tokens(kind: str, titles: list[str]) -> None:
    tokenizer = fitted(kind)
    stream = tokenizer.encode(titles)
    assert tokenizer.titles(stream) == titles
    assert np.count_nonzero(stream == EOS) == len(titles)
    assert stream[stream != EOS].min(initial=3) > UNK


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_has_the_same_tokens_with_and_without_a_capital(kind: str) -> None:
    the, small, first, upper = [
        fitted(kind).encode([title]).tolist()[:-1]
        for title in ("the", "the kernel", "the Kernel", "the KERNEL")
    ]
    word = small[len(the) :]
    assert small == the + word
    for tokens in (first, upper):
        assert tokens[: len(the)] == the and tokens[-len(word) :] == word
        assert tokens != small


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_has_a_sign_and_letters(kind: str) -> None:
    tokenizer = fitted(kind)
    for number in range(3, tokenizer.vocab_size):
        text = tokenizer._library.decode([number])
        assert not SIGNS & set(text) or not any(map(str.isalpha, text)), text


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_prompt_begins_with_the_prompt(kind: str) -> None:
    """`mainrun sample` decodes the tokens of the prompt together with those of the model."""
    rng = np.random.default_rng(0)
    for prompt in ("Show HN: A", "PDF", "iPhone", "(Caf", "ends with S3"):
        start = fitted(kind).encode([prompt])[:-1]
        for _ in range(20):
            ids = np.concatenate([start, rng.integers(UNK + 1, 330, 8)])
            assert fitted(kind).decode(ids).startswith(prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_tokenizer_has_the_case(kind: str) -> None:
    tokenizer = fitted(kind)
    text = tokenizer.to_json()
    table = json.loads(text)
    assert (table["format"], table["case"]) == (4, "marked")
    assert "case" not in json.loads(fitted(kind, "kept").to_json())
    again = Tokenizer.from_json(text)
    assert (again.case, again.digest) == ("marked", tokenizer.digest)
    assert again.titles(again.encode(["Show HN"])) == ["Show HN"]
    for change in ({"format": 2}, {"case": "kept"}, {"case": "upper"}, {"case": ["marked"]}, {"kind": "hf"}):
        with pytest.raises(RunError, match="--fresh"):
            Tokenizer.from_json(json.dumps(table | change))


# -- runs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_count_the_characters_of_the_titles(kind: str, tiny) -> None:
    corpus = a_corpus()
    fields = {"tokenizer": kind, "vocab_size": 330}
    kept = prepare(tiny(**fields), corpus)
    marked = prepare(tiny(**fields, case="marked"), corpus)
    assert marked.tokenizer.case == "marked"
    assert (marked.chars, marked.bytes) == (kept.chars, kept.bytes)
    assert marked.chars["val"] == len("<eos>".join(corpus.val) + "<eos>")
    assert not np.array_equal(marked.splits["val"], kept.splits["val"])
    assert same(prepare(tiny(**fields, case="marked"), corpus), marked), "the second call reads the cache"


def test_the_key_of_the_cache_has_the_case_and_the_version_of_unicode(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> list[str]:
        return [token_cache._key(tiny(case=case), a_corpus()) for case in ("kept", "marked")]

    kept, marked = keys()
    assert kept != marked
    monkeypatch.setattr(token_cache.unicodedata, "unidata_version", "1.0")
    assert keys()[0] == kept and keys()[1] != marked


def test_a_long_word_of_train_is_known_in_another_case(tiny) -> None:
    """The guard looks for a token in train as the tokenizer writes train, which is in lower case."""
    word = "Internationalisations"
    corpus = a_corpus()
    corpus = replace(corpus, train=[*corpus.train, word], val=[*corpus.val, word])
    data = prepare(tiny(vocab_size=330, case="marked"), corpus)

    class OneToken:
        """A tokenizer whose token 999 is a whole word."""

        kind = "bpe"
        marked = staticmethod(data.tokenizer.marked)

        def decode(self, ids: list[int]) -> str:
            return word.lower() if ids == [999] else data.tokenizer.decode(ids)

    val = np.append(data.splits["val"], np.uint16(999))
    data = replace(data, tokenizer=OneToken(), splits=data.splits | {"val": val})
    evidence: Any = type("Evidence", (), {"cfg": tiny(), "corpus": corpus, "data": data})()
    assert guards.no_val_tokens(evidence, False).status == "pass"
    evidence.corpus = replace(corpus, train=corpus.train[:-1])
    assert guards.no_val_tokens(evidence, False).status == "fail"


def test_a_tokenizer_of_a_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"case=marked .* tokenizer='hf:base'.*; set case=kept"):
        from_dict({"case": "marked", "tokenizer": "hf:base", "vocab_size": 400})


def test_qwen2_cannot_express_the_signs() -> None:
    assert "case=marked (must be kept)" in inexpressible(from_dict({"case": "marked"}))
