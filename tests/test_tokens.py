"""Tests properties of tokenizers, of the token cache and of batches."""

import importlib.metadata
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mainrun.config import from_dict
from mainrun.data import token_cache
from mainrun.data import tokenizer as tokens
from mainrun.data.batches import Batches
from mainrun.data.corpus import Corpus
from mainrun.data.token_cache import prepare
from mainrun.data.tokenizer import EOS, UNK, Tokenizer, fit
from mainrun.errors import ConfigError, RunError, UsageError
from mainrun.plan.plan import Plan

KINDS = ("bpe", "unigram")
SYLLABLES = (["ker", "ban", "sho", "lu"], ["", "pyt", "ro", "mi"], ["st", "nel", "ng", "o"])
WORDS = ["café", "€50", "—", "10x", *map("".join, itertools.product(*SYLLABLES))]
TRICKY = ["<eos>", "<pad>", "<unk>", "<0x41>", "▁", "▅", "\\x{", "\\x{41}", "\\", "x{", "}"]
TRICKY += ["\t", "\0", "\r", " ", "  ", "é", "e\u0301", "😀", "\x7f", " ⁇ "]


def some_titles(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))).capitalize() + f" {i}" for i in range(n)]


def a_corpus(n: int = 300, dev: int = 20, seed: int = 0) -> Corpus:
    titles = some_titles(n, seed)
    cut = n * 9 // 10
    parts = {"train": titles[: cut - dev], "dev": titles[cut - dev : cut], "val": titles[cut:]}
    prints = {split: f"{split} {n} {dev} {seed}" for split in (*parts, "corpus")}
    return Corpus(name="test", fingerprints=prints, origin={"kind": "test"}, **parts)


@cache
def fitted(kind: str, vocab_size: int = 400) -> Tokenizer:
    return fit(kind, some_titles(400), vocab_size)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, and return the folder of its entries."""
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes every later fit fail, so that vocabularies must come from the cache."""

    def refuse(*_: object) -> None:
        raise AssertionError("fitted again")

    return lambda: monkeypatch.setattr(token_cache, "fit", refuse)


def same(a: token_cache.TokenData, b: token_cache.TokenData) -> bool:
    equal = all(
        np.array_equal(a.splits[s], b.splits[s]) and a.splits[s].dtype == b.splits[s].dtype for s in a.splits
    )
    return (
        equal
        and list(a.splits) == list(b.splits)
        and (a.chars, a.bytes, a.digest) == (b.chars, b.bytes, b.digest)
    )


# -- lossless


def titles_of_any_kind() -> st.SearchStrategy[str]:
    anything = st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=8)
    return st.lists(st.one_of(st.sampled_from(TRICKY), st.sampled_from(WORDS), anything), max_size=8).map(
        "".join
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(300))
@given(titles=st.lists(titles_of_any_kind(), max_size=4))
def test_any_title_is_restored_from_its_tokens(kind: str, titles: list[str]) -> None:
    tokenizer = fitted(kind)
    stream = tokenizer.encode(titles)
    assert tokenizer.titles(stream) == titles
    assert np.count_nonzero(stream == EOS) == len(titles), "each title has exactly one <eos>"
    assert stream.size == 0 or (
        stream[stream != EOS].min(initial=3) > UNK and stream.max() < tokenizer.vocab_size
    )
    for title in titles:
        assert tokenizer.decode(tokenizer.encode([title])) == title
        assert tokenizer.decode(tokenizer.encode([title])[:-1]) == title, "the last title may lack its <eos>"


@pytest.mark.parametrize("kind", KINDS)
def test_characters_of_all_unicode_are_restored(kind: str) -> None:
    chars = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 17))]
    titles = ["".join(chars[i : i + 256]) for i in range(0, len(chars), 256)]
    stream = fitted(kind).encode(titles)
    assert fitted(kind).titles(stream) == titles
    assert stream[stream != EOS].min() > UNK


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_are_text_even_after_a_fit_on_them(kind: str) -> None:
    titles = [f"{a}{b} {a} {i % 7}" for i, (a, b) in enumerate(itertools.product(TRICKY, repeat=2))]
    tokenizer = fit(kind, [*titles, *some_titles(200)], 320)
    stream = tokenizer.encode(titles)
    assert tokenizer.titles(stream) == titles
    assert np.count_nonzero(stream <= UNK) == np.count_nonzero(stream == EOS) == len(titles)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_can_be_decoded(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert isinstance(fitted(kind).decode(rng.integers(0, 400, 30)), str)
    assert fitted(kind).decode([]) == ""
    assert fitted(kind).titles([UNK, tokens.PAD, EOS, EOS]) == ["", ""]
    for written in (
        "\\x{110000}",
        "\\x{d800}",
        "\\x{}",
        "\\x{gg}",
    ):  # A model may generate these invalid escapes, but no title is encoded as an invalid escape.
        raw = fitted("bpe")._library.encode(written).ids
        assert fitted("bpe").decode(raw) == written


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        fitted(kind).encode(["fine", "bad \udc80"])


# -- fitting


def test_bpe_gives_as_many_tokens_as_the_public_baseline(real_titles: Path) -> None:
    with open(real_titles, encoding="utf-8", newline="\n") as file:
        titles = [line.rstrip("\n") for line in itertools.islice(file, 20_000)]
    tokenizer = fit("bpe", titles, 16_000)
    stream = tokenizer.encode(titles[:18_000])
    assert len(stream) == 228_354
    assert tokenizer.vocab_size == 16_000
    assert tokenizer.titles(stream) == titles[:18_000]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first(kind: str) -> None:
    library = fitted(kind)._library
    name = library.id_to_token if kind == "bpe" else library.id_to_piece
    assert [name(i) for i in range(3)] == ["<pad>", "<eos>", "<unk>"]
    assert (tokens.PAD, tokens.EOS, tokens.UNK) == (Tokenizer.PAD, Tokenizer.EOS, Tokenizer.UNK) == (0, 1, 2)
    assert (
        fitted(kind).vocab_size
        == 400
        == (library.get_vocab_size() if kind == "bpe" else library.get_piece_size())
    )


def test_unigram_adds_no_prefix() -> None:
    assert (
        not fitted("unigram")
        ._library.id_to_piece(int(fitted("unigram").encode(["kerst"])[0]))
        .startswith("▁")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_is_too_large_suggests_the_largest_size(kind: str) -> None:
    titles = some_titles(300)
    with pytest.raises(ConfigError, match=r"vocab_size=30,000 is larger") as error:
        fit(kind, titles, 30_000)
    most = int(re.search(r"--set vocab_size=(\d+)", str(error.value))[1])
    assert fit(kind, titles, most).vocab_size == most
    with pytest.raises(ConfigError, match=f"at most {most:,} "):
        fit(kind, titles, most + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_text_for_any_vocabulary_suggests_no_size(kind: str) -> None:
    for titles in (["ab"] * 9, [""] * 9, []):
        with pytest.raises(UsageError, match=r"num_titles|more titles") as error:
            fit(kind, titles, 300)
        assert "--set vocab_size" not in str(error.value)


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ConfigError, match="too small for 3 special tokens and 256 bytes"):
            fit(kind, some_titles(300), 258)
    many = ["".join(chr(c) for c in range(0x4E00, 0x4E00 + 200))] * 3
    with pytest.raises(ConfigError, match="too small for tokenizer=unigram") as error:
        fit("unigram", many, 300)
    assert (
        fit(
            "unigram",
            [*many, *some_titles(300)],
            int(re.search(r"--set vocab_size=(\d+)", str(error.value))[1]),
        ).vocab_size
        > 450
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_prints_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    fit(kind, some_titles(300), 330).encode(some_titles(5))
    with pytest.raises(ConfigError):
        fit(kind, some_titles(60), 30_000)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("extra", ["", "\t", "\0", "▁▅", "\r"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_and_odd_titles_are_part_of_the_fit(kind: str, extra: str) -> None:
    tokenizer = fit(kind, [*some_titles(300), "ж " * 5_000 + extra], 350)
    assert len(tokenizer.encode(["ж"])) == 2, (
        "one token and <eos>; a character that was not in the fit would take at least two byte tokens"
    )


FIT = """
import sys
from mainrun.data.tokenizer import fit
titles = sys.stdin.read().split("\\n")
for kind in ("bpe", "unigram"):
    t = fit(kind, titles, 900)
    print(kind, t.digest, t.encode(titles).sum())
"""


def test_processes_and_threads_do_not_change_a_vocabulary() -> None:
    """The order of tied merges or pieces must not depend on the hash seed or on threads."""
    rng = random.Random(1)
    text = "\n".join("".join(rng.choices("abcdefgh ", k=40)) for _ in range(1_000))
    found = set()
    for threads, seed in (("1", "1"), ("2", "2"), ("4", "3")):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        env["TOKENIZERS_PARALLELISM"] = "false" if threads == "1" else "true"
        found.add(
            subprocess.run(
                [sys.executable, "-c", FIT], input=text, env=env, check=True, capture_output=True, text=True
            ).stdout
        )
    assert len(found) == 1
    assert len(found.pop().splitlines()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_restored_from_json(kind: str) -> None:
    one = fitted(kind)
    two = Tokenizer.from_json(one.to_json())
    titles = [*some_titles(30), *TRICKY]
    assert (two.kind, two.vocab_size, two.digest) == (one.kind, one.vocab_size, one.digest)
    assert two.to_json() == one.to_json()
    assert np.array_equal(two.encode(titles), one.encode(titles))
    assert two.titles(one.encode(titles)) == titles
    assert fitted(kind).digest != fitted(kind, 401).digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_tokenizer_file_is_one_clear_error(kind: str) -> None:
    good = fitted(kind).to_json()
    table = json.loads(good)
    for text in (
        "",
        "[]",
        "null",
        good[:-9],
        '{"kind": "bpe"}',
        json.dumps(table | {"format": 99}),
        json.dumps(table | {"kind": "words"}),
    ):
        with pytest.raises(RunError, match="--fresh"):
            Tokenizer.from_json(text)
    for model in ({}, "", "AAAA", 5, None):
        with pytest.raises(RunError, match="--fresh"):
            Tokenizer.from_json(json.dumps(table | {"model": model})).encode(["a"])


# -- streams and their cache


@pytest.mark.parametrize("kind", KINDS)
def test_streams_contain_every_title_of_every_split(kind: str, tiny, own_cache: Path) -> None:
    corpus = a_corpus()
    data = prepare(tiny(tokenizer=kind), corpus)
    assert list(data.splits) == ["train", "dev", "val"]
    for split, stream in data.splits.items():
        titles = getattr(corpus, split)
        assert isinstance(stream, np.memmap)
        assert not stream.flags.writeable
        assert stream.dtype == np.uint16
        assert stream[-1] == EOS
        assert data.tokenizer.titles(stream) == titles
        assert data.chars[split] == len("<eos>".join(titles) + "<eos>")
        assert data.bytes[split] == len("".join(title + "\n" for title in titles).encode())
    assert list(prepare(tiny(tokenizer=kind), a_corpus(dev=0)).splits) == ["train", "val"]


def test_tokenizer_fit_decides_which_titles_are_fitted_on(
    tiny, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, seen = a_corpus(), []
    monkeypatch.setattr(
        token_cache, "fit", lambda kind, titles, *more: seen.append(list(titles)) or fit(kind, titles, *more)
    )
    prepare(tiny(tokenizer_fit="train"), corpus)
    prepare(tiny(tokenizer_fit="train+val"), corpus)
    assert seen == [corpus.train, corpus.train + corpus.val]


def test_large_vocabularies_have_wider_ids() -> None:
    assert [Tokenizer("bpe", size, b"").dtype for size in (65_535, 65_536)] == [np.uint16, np.uint32]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_reads_the_cache(kind: str, tiny, own_cache: Path, no_fit) -> None:
    first = prepare(tiny(tokenizer=kind), a_corpus())
    no_fit()
    second = prepare(tiny(tokenizer=kind), a_corpus())
    assert same(first, second)
    assert second.tokenizer.digest == first.tokenizer.digest
    assert prepare(tiny(tokenizer=kind, lr=0.5, seed=7, preset="other"), a_corpus()).digest == first.digest


def test_everything_that_changes_the_streams_changes_the_key(
    tiny, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, base = a_corpus(), tiny()
    keys = {token_cache._key(base, corpus)}
    for change in (
        {"vocab_size": 401},
        {"tokenizer": "unigram"},
        {"tokenizer_fit": "train+val"},
        {"case": "marked"},
    ):
        keys.add(token_cache._key(tiny(**change), corpus))
    for split in ("train", "dev", "val"):
        other = Corpus(
            corpus.name,
            corpus.train,
            corpus.dev,
            corpus.val,
            corpus.fingerprints | {split: "another"},
            corpus.origin,
        )
        keys.add(token_cache._key(base, other))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.0")
    keys |= {token_cache._key(base, corpus), token_cache._key(tiny(tokenizer="unigram"), corpus)}
    monkeypatch.setattr(token_cache, "FORMAT", 99)
    keys.add(token_cache._key(base, corpus))
    assert len(keys) == 11


def test_the_digest_covers_every_stream(tiny, own_cache: Path) -> None:
    data = prepare(tiny(), a_corpus())
    for split in data.splits:
        edited = {s: stream.copy() for s, stream in data.splits.items()}
        edited[split][0] += 1
        assert token_cache._digest(data.tokenizer, edited, data.chars, data.bytes) != data.digest


def flip(path: Path, where: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, 1),
    "middle byte": lambda path: flip(path, 0.5),
    "removed": Path.unlink,
    "not a file": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.npy", "dev.npy", "val.npy"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_rebuilt(name: str, how: str, tiny, own_cache: Path) -> None:
    good = prepare(tiny(), a_corpus())
    good = token_cache.TokenData(
        good.tokenizer,
        {s: stream.copy() for s, stream in good.splits.items()},
        good.chars,
        good.bytes,
        good.digest,
    )
    [entry] = own_cache.iterdir()
    DAMAGE[how](entry / name)
    with pytest.warns(UserWarning, match="damaged") as seen:
        assert same(prepare(tiny(), a_corpus()), good)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = prepare(tiny(), a_corpus())
    assert same(again, good)
    assert isinstance(again.splits["train"], np.memmap)
    assert [path.name for path in own_cache.iterdir()] == [entry.name], "no temporary files are left"


def test_a_valid_edit_of_an_entry_counts_as_damage(tiny, own_cache: Path) -> None:
    good = prepare(tiny(), a_corpus())
    [entry] = own_cache.iterdir()
    edits = [
        ("meta.json", f'"val":{table["val"]}', f'"val":{table["val"] + 1}')
        for table in (good.chars, good.bytes)
    ]
    for name, old, new in [*edits, ("tokenizer.json", '"vocab_size":400', '"vocab_size":401')]:
        edit(entry / name, old, new)
        with pytest.warns(UserWarning, match="checksum"):
            assert same(prepare(tiny(), a_corpus()), good)


def test_a_file_with_the_name_of_an_entry_is_replaced(tiny, own_cache: Path) -> None:
    good = prepare(tiny(), a_corpus())
    [entry] = own_cache.iterdir()
    entry.rename(own_cache.parent / "aside")
    entry.write_text("?")
    with pytest.warns(UserWarning, match="damaged"):
        assert same(prepare(tiny(), a_corpus()), good)
    assert entry.is_dir()


PREPARE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import test_tokens
from conftest import TINY
from mainrun.config import from_dict
from mainrun.data.token_cache import prepare
print("ready", flush=True)
sys.stdin.readline()
warnings.simplefilter("error" if sys.argv[2] == "empty" else "ignore")
data = prepare(from_dict(TINY), test_tokens.a_corpus())
print(data.digest, type(data.splits["train"]).__name__)
"""


@pytest.mark.parametrize("state", ["empty", "damaged"])
def test_processes_that_fill_the_cache_at_the_same_time_agree(state: str, tiny, own_cache: Path) -> None:
    if state == "damaged":
        prepare(tiny(), a_corpus())
        [entry] = own_cache.iterdir()
        os.truncate(entry / "train.npy", 100)
    command = [sys.executable, "-c", PREPARE, str(Path(__file__).parent), state]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    found = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 4
    assert {line.split()[0] for line in found} == {prepare(tiny(), a_corpus()).digest}
    assert len(list(own_cache.iterdir())) == 1


Act = Callable[[], object]


def run_interrupted(call: Act, line: int, act: Act) -> bool:
    """Run `call`, and interrupt it to run `act`.

    The interruption comes before `call` executes its n-th line in token_cache.py, where n is `line`. Return
    False if `call` executes fewer lines.
    """
    left, before = line, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if (
            frame.f_code.co_filename != token_cache.__file__ or "." in frame.f_code.co_qualname
        ):  # do not count lines of methods, which do not access files
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                act()
        return trace if left > 0 else None

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return left <= 0


def damage_an_entry(folder: Path) -> None:
    os.truncate(next(folder.iterdir()) / "train.npy", 100)


@pytest.mark.parametrize(
    ("state", "act"),
    [
        ("empty", "publishes"),
        pytest.param("damaged", "publishes", marks=pytest.mark.slow),
        pytest.param("empty", "cleans up", marks=pytest.mark.slow),
    ],
)
def test_another_process_may_act_at_any_line(
    state: str, act: str, tiny, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process acts between two lines of the process that fills the cache.

    Both processes get the same data, every warning is true, and the cache has one entry at the end.
    """
    cfg, corpus = tiny(), a_corpus()
    built = token_cache._build(cfg, corpus)
    monkeypatch.setattr(token_cache, "_build", lambda *_: built)
    other = own_cache / "killed.tmp"

    def publish() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(prepare(cfg, corpus), built)

    def clean_up() -> None:
        shutil.rmtree(other, ignore_errors=True)

    results: list[token_cache.TokenData] = []
    reached, line = True, 0
    while reached:
        line += 1
        shutil.rmtree(own_cache, ignore_errors=True)
        if state == "damaged":
            prepare(cfg, corpus)
            damage_an_entry(own_cache)
        if act == "cleans up":
            other.mkdir(parents=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            reached = run_interrupted(
                lambda: results.append(prepare(cfg, corpus)),
                line,
                publish if act == "publishes" else clean_up,
            )
        assert same(results.pop(), built)
        untrue = [str(w.message) for w in seen if state == "empty" or "damaged" not in str(w.message)]
        assert not untrue, f"at line {line}: {untrue}"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = prepare(cfg, corpus)
            assert same(data, built)
            assert isinstance(data.splits["train"], np.memmap), f"at line {line} the entry is missing"
        clean_up()
        assert len(list(own_cache.iterdir())) == 1, f"at line {line} temporary files are left"
    assert line > 20, "the lines of token_cache.py were traced"


def test_a_late_process_puts_an_intact_entry_back(
    tiny, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes replace a damaged entry.

    The slower process moves the new entry aside and puts it back.
    """
    cfg, corpus = tiny(), a_corpus()
    data = token_cache._build(cfg, corpus)
    prepare(cfg, corpus)
    damage_an_entry(own_cache)
    [entry] = own_cache.iterdir()
    rename, published = Path.rename, []

    def rename_late(path: Path, target: Path) -> Path:
        if path == entry and not published:
            monkeypatch.setattr(Path, "rename", rename)
            token_cache._store(entry, data)
            published.append((entry / "train.npy").stat().st_ino)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(token_cache._store(entry, data), data)
    assert [(entry / "train.npy").stat().st_ino] == published
    assert list(own_cache.iterdir()) == [entry]


def test_a_damaged_entry_may_disappear_before_it_is_moved_aside(
    tiny, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process moves the damaged entry aside first."""
    cfg, corpus = tiny(), a_corpus()
    data = token_cache._build(cfg, corpus)
    prepare(cfg, corpus)
    damage_an_entry(own_cache)
    [entry] = own_cache.iterdir()
    rename = Path.rename

    def rename_after_another(path: Path, target: Path) -> Path:
        if path == entry:
            shutil.rmtree(entry)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_after_another)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(token_cache._store(entry, data), data)
    assert list(own_cache.iterdir()) == [entry]


def test_the_second_process_uses_the_entry_of_the_first(tiny, own_cache: Path) -> None:
    built = token_cache._build(tiny(), a_corpus())
    token_cache._store(own_cache / "entry", built)
    before = (own_cache / "entry" / "train.npy").stat()
    found = token_cache._store(own_cache / "entry", built)
    assert (own_cache / "entry" / "train.npy").stat().st_ino == before.st_ino
    assert isinstance(found.splits["train"], np.memmap)
    assert same(found, built)


def test_files_of_killed_processes_are_removed_after_a_day(tiny, own_cache: Path) -> None:
    for name, age in (("old.tmp", 90_000), ("new.tmp", 60)):
        (own_cache / name / "fresh").mkdir(parents=True)
        os.utime(own_cache / name, (time.time() - age,) * 2)
    prepare(tiny(), a_corpus())
    assert {path.name for path in own_cache.iterdir() if path.suffix == ".tmp"} == {"new.tmp"}


def test_a_full_disk_only_disables_the_cache(tiny, own_cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.warns(UserWarning, match="not cached"):
            data = prepare(tiny(), a_corpus())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(own_cache.iterdir()) == []
    assert same(data, prepare(tiny(), a_corpus()))


def test_an_unwritable_cache_only_disables_the_cache(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="not cached"):
        data = prepare(tiny(), a_corpus())
    assert data.tokenizer.titles(data.splits["val"]) == a_corpus().val


# -- batches


def a_stream(lengths: list[int]) -> np.ndarray:
    """Return titles of the given lengths in which every token is unique and so identifies its position."""
    flat, token = [], 3
    for length in lengths:
        flat += [*range(token, token + length), EOS]
        token += length
    return np.array(flat, dtype=np.uint16)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    block, batch = draw(st.integers(2, 9)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=60))
    stream = a_stream(lengths)
    if draw(st.booleans()):  # edge case: the stream length is a multiple of the span
        fill = -len(stream) % (block * batch) or block * batch
        stream = a_stream([*lengths, fill - 1])
    if len(stream) <= block * batch:
        stream = a_stream([*lengths, block * batch])
    return stream, batch, block


@settings(max_examples=examples(200))
@given(geometry=geometries(), epochs=st.integers(1, 4))
def test_sequential_order_matches_the_loop_of_the_task(
    geometry: tuple[np.ndarray, int, int], epochs: int
) -> None:
    from conftest import TINY

    from mainrun.config import from_dict
    from mainrun.plan.plan import Plan

    stream, batch, block = geometry
    cfg = from_dict(TINY | {"block_size": block, "batch_size": batch, "epochs": epochs})
    batches, plan = Batches(cfg, stream), Plan(cfg, len(stream))
    assert plan.steps == epochs * (len(stream) // (block * batch))
    pointer = 0
    for step in range(plan.steps):
        if pointer + block * batch + 1 > len(stream):
            pointer = 0
        x = stream[pointer : pointer + block * batch].reshape(batch, block)
        y = stream[pointer + 1 : pointer + block * batch + 1].reshape(batch, block)
        pointer += block * batch
        got_x, got_y = batches.at(step)
        assert got_x.dtype == got_y.dtype == np.int64
        assert np.array_equal(got_x, x)
        assert np.array_equal(got_y, y)


@settings(max_examples=examples(200))
@given(geometry=geometries(), seed=st.integers(0, 2**32 - 1), asked=st.randoms(use_true_random=False))
def test_a_shuffled_epoch_contains_each_title_once(
    geometry: tuple[np.ndarray, int, int], seed: int, asked: random.Random
) -> None:
    from conftest import TINY

    from mainrun.config import from_dict

    stream, batch, block = geometry
    span = batch * block
    cfg = from_dict(
        TINY | {"block_size": block, "batch_size": batch, "seed": seed, "order": "shuffle_titles"}
    )
    batches, steps = Batches(cfg, stream), len(stream) // span
    in_order = [batches.at(step) for step in range(3 * steps)]

    titles = Counter(tuple(t) for t in np.split(stream, np.flatnonzero(stream == EOS) + 1)[:-1])
    for epoch in range(3):
        # If the stream length is a multiple of the span, the last span lacks its final target. That batch is
        # read from position 0 instead.
        spans = (len(stream) - 1) // span
        rows = in_order[epoch * steps : epoch * steps + spans]
        x, y = (np.concatenate([row[i].ravel() for row in rows]) for i in (0, 1))
        assert np.array_equal(x[1:], y[:-1]), "in an epoch, y is x shifted by one token"
        read = np.append(x, y[-1])
        assert len(stream) - len(read) < span, "less than one span is left out"
        *closed, cut = np.split(read, np.flatnonzero(read == EOS) + 1)
        missing = titles.copy()
        missing.subtract(tuple(t) for t in closed)
        assert min(missing.values()) >= 0, "no title occurs twice, and no title is invented"
        assert cut.size == 0 or any(t[: len(cut)] == tuple(cut) for t in missing if missing[t] > 0)

    order = list(range(3 * steps))
    asked.shuffle(order)
    for step in order:
        assert all(np.array_equal(a, b) for a, b in zip(batches.at(step), in_order[step], strict=True))
        assert all(
            np.array_equal(a, b) for a, b in zip(Batches(cfg, stream).at(step), in_order[step], strict=True)
        )


@st.composite
def growing(draw: st.DrawFn, order: str) -> tuple[np.ndarray, Plan, Batches]:
    """Draw a stream and a run whose batch size changes.

    The learning rate also changes, but affects no batch.
    """
    from conftest import TINY

    block, sizes = draw(st.integers(2, 5)), draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    trigger = st.one_of(
        st.integers(1, 40).map(lambda s: {"step": s}), st.floats(0.01, 0.99).map(lambda f: {"budget_frac": f})
    )  # fmt: skip
    ops = [{"name": "set_batch_size", "value": size, "trigger": draw(trigger)} for size in sizes[1:]]
    ops.insert(draw(st.integers(0, len(ops))), {"name": "set_lr", "value": 0.5, "trigger": draw(trigger)})
    lengths = draw(st.lists(st.integers(0, 12), min_size=8, max_size=60))
    # Edge case: the stream length is a multiple of the span.
    fill = draw(st.sampled_from([0, *sizes])) * block
    stream = a_stream([*lengths, -sum(n + 1 for n in lengths) % fill + fill - 1] if fill else lengths)
    fields = {
        "block_size": block,
        "batch_size": sizes[0],
        "epochs": draw(st.integers(1, 4)),
        "order": order,
        "growth": {"ops": ops},
    }
    try:
        cfg = from_dict(TINY | fields)
        return stream, Plan(cfg, len(stream)), Batches(cfg, stream)
    except ConfigError:
        assume(False)
        raise


@settings(max_examples=examples(100))
@given(growing("sequential"))
def test_sequential_order_continues_when_the_batch_size_changes(
    run: tuple[np.ndarray, Plan, Batches],
) -> None:
    stream, plan, batches = run
    pointer = 0
    for step in range(plan.steps):
        rows = plan.at(step).batch_size
        span = rows * plan.cfg.block_size
        if pointer + span + 1 > len(stream):
            pointer = 0
        x, y = batches.at(step, plan.segment_at(step))
        assert np.array_equal(x, stream[pointer : pointer + span].reshape(rows, -1))
        assert np.array_equal(y, stream[pointer + 1 : pointer + span + 1].reshape(rows, -1))
        pointer += span


@settings(max_examples=examples(100))
@given(growing("shuffle_titles"), st.randoms(use_true_random=False))
def test_shuffled_epochs_repeat_no_title_when_the_batch_size_changes(
    run: tuple[np.ndarray, Plan, Batches], asked: random.Random
) -> None:
    stream, plan, batches = run
    epoch = pointer = 0
    seen: set[int] = set()
    in_order = [batches.at(step, plan.segment_at(step)) for step in range(plan.steps)]
    for step, (x, y) in enumerate(in_order):
        rows = plan.at(step).batch_size
        span = rows * plan.cfg.block_size
        # If the stream length is a multiple of the span, the last span of an epoch lacks its final target.
        # That batch is read from position 0 instead.
        divisible = len(stream) % span == 0
        if pointer + span + (not divisible) > len(stream):
            epoch, pointer, seen = epoch + 1, 0, set()
        start = pointer if pointer + span < len(stream) else 0
        shuffled = batches._shuffled(epoch)
        assert np.array_equal(x, shuffled[start : start + span].reshape(rows, -1))
        assert np.array_equal(y, shuffled[start + 1 : start + span + 1].reshape(rows, -1))
        fresh = set(x.ravel().tolist()) - {EOS}  # every token except <eos> identifies its position
        assert start < pointer or not fresh & seen
        pointer, seen = pointer + span, seen | fresh
    for step in asked.sample(range(plan.steps), min(plan.steps, 8)):
        assert all(
            np.array_equal(a, b)
            for a, b in zip(batches.at(step, plan.segment_at(step)), in_order[step], strict=True)
        )


def test_a_batch_size_change_after_a_full_epoch_starts_the_next_epoch(tiny) -> None:
    stream = a_stream([4, 4])
    ops = [{"name": "set_batch_size", "value": 2, "trigger": {"step": 5}}]
    cfg = tiny(block_size=2, batch_size=1, epochs=3, order="shuffle_titles", growth={"ops": ops})
    plan = Plan(cfg, len(stream))
    places = [plan.segment_at(step).place(step, len(stream)) for step in range(plan.steps)]
    assert places == [*((0, 2 * i) for i in range(4)), (0, 0), (1, 0), (1, 4), (2, 0), (2, 4), (3, 0)]


def test_the_order_depends_on_epoch_and_seed_only(tiny) -> None:
    stream = a_stream([5] * 200)
    firsts = [
        Batches(tiny(order="shuffle_titles", seed=seed), stream).at(step)[0]
        for seed in (1, 2)
        for step in (0, 9, 18)
    ]
    assert len({first.tobytes() for first in firsts}) == 6
    assert np.array_equal(firsts[0], Batches(tiny(order="shuffle_titles", seed=1, lr=0.5), stream).at(0)[0])
    plain = [Batches(tiny(seed=seed), stream).at(3)[0] for seed in (1, 2)]
    assert np.array_equal(*plain)


def test_no_validation_token_is_in_a_batch(tiny, own_cache: Path) -> None:
    """The held-out titles consist of tokens that the training titles lack."""
    train, held = some_titles(200), ["qvd dvq"] * 20
    prints = {"corpus": "c", "train": "t", "dev": "d", "val": "v"}
    corpus = Corpus(name="test", train=train, dev=held, val=held, fingerprints=prints, origin={})
    for order in ("sequential", "shuffle_titles"):
        cfg = tiny(
            order=order,
            tokenizer="unigram",
            tokenizer_fit="train+val",
            vocab_size=350,
            block_size=4,
            batch_size=2,
        )
        data = prepare(cfg, corpus)
        only_held = set(data.splits["val"].tolist()) - set(data.splits["train"].tolist())
        assert only_held
        batches = Batches(cfg, data.splits["train"])
        for step in range(3 * len(data.splits["train"]) // 8):
            assert only_held.isdisjoint(np.stack(batches.at(step)).ravel().tolist())


@pytest.mark.parametrize("order", ["sequential", "shuffle_titles"])
def test_a_stream_shorter_than_a_step_is_refused(tiny, order: str) -> None:
    with pytest.raises(ConfigError, match="batch_size\\*block_size\\+1 = 129"):
        Batches(tiny(order=order), a_stream([127])).at(0)
    assert Batches(tiny(order=order), a_stream([128])).at(0)[0].shape == (8, 16)


def test_tokenizer_libraries_are_imported_on_first_use() -> None:
    """The command line imports the tokenizer module, which must not load the tokenizer libraries or torch."""
    code = (
        "import sys, mainrun.data.tokenizer; "
        "print([m for m in ('torch', 'tokenizers', 'sentencepiece') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "[]\n"
    )
