"""Tests edge cases of tokenizers, of their messages and of the token cache.

General properties are tested in test_tokens.py.
"""

from __future__ import annotations

import base64
import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from mainrun.config import TrainConfig, from_dict
from mainrun.data import token_cache
from mainrun.data import tokenizer as tokens
from mainrun.data.batches import Batches
from mainrun.data.corpus import Corpus, fingerprints
from mainrun.data.foreign import byte_signs
from mainrun.data.token_cache import prepare
from mainrun.data.tokenizer import EOS, PAD, UNK, Tokenizer, fit
from mainrun.errors import ConfigError, CorpusError, RunError, UsageError

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "again", "and", "café", "x{1}")
TITLES = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 8)) + f" {i}" for i in range(300)]


@cache
def bpe() -> Tokenizer:
    return fit("bpe", TITLES, 300)


# -- byte signs


def test_byte_signs_are_those_of_the_library() -> None:
    signs = byte_signs()
    assert len(signs) == len(set(signs)) == 256
    assert set(signs) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for start in (0, 0x80, 0x400, 0x2000, 0xD000, 0xE000, 0xFF00, 0x10000, 0x10FF80):
        text = "".join(map(chr, range(start, start + 0x80)))
        [(written, _)] = split.pre_tokenize_str(text)
        assert "".join(signs[byte] for byte in text.encode()) == written


# -- escapes


@pytest.mark.parametrize(
    ("titles", "unsafe", "written"),
    [
        (["plain", "text"], "", ["plain", "text"]),
        (["a▁b", "▅"], "▁▅", ["a\\x{2581}b", "\\x{2585}"]),
        (["\\x{41}"], "", ["\\x{5c}x{41}"]),
        (["\\x41", "x{41}", "\\"], "", ["\\x41", "x{41}", "\\"]),
        (["\\x{", "é"], "é", ["\\x{5c}x{", "\\x{e9}"]),
        (["\U0010ffff"], "\U0010ffff", ["\\x{10ffff}"]),
        ([], "", []),
    ],
)
def test_unsafe_characters_are_escaped(titles: list[str], unsafe: str, written: list[str]) -> None:
    assert tokens._escape(titles, unsafe.__contains__) == written
    assert [tokens.ESCAPED.sub(tokens._unescape, text) for text in written] == titles


@pytest.mark.parametrize("code", [0xD800, 0xDBFF, 0xDC00, 0xDFFF])
def test_half_a_surrogate_pair_is_refused_with_its_title(code: int) -> None:
    char = chr(code)
    with pytest.raises(UsageError) as error:
        tokens._escape(["fine", f"bad {char}", f"worse {char}"], lambda char: False)
    assert repr(f"bad {char}") in str(error.value) and "UTF-8" in str(error.value)


@pytest.mark.parametrize("char", ["\ud7ff", "\ue000"])
def test_characters_next_to_the_surrogates_are_text(char: str) -> None:
    assert tokens._escape([char], lambda char: False) == [char]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("0", "\0"), ("41", "A"), ("d7ff", "\ud7ff"), ("e000", "\ue000"), ("10ffff", "\U0010ffff"),
        ("d800", None), ("dfff", None), ("110000", None), ("ffffff", None), ("1234567", None), ("", None),
        ("4G", None), ("AB", None),
    ],
)  # fmt: skip
def test_an_escape_of_no_character_is_kept(code: str, text: str | None) -> None:
    written = f"<\\x{{{code}}}>"
    assert tokens.ESCAPED.sub(tokens._unescape, written) == (written if text is None else f"<{text}>")


# -- streams and titles


@pytest.mark.parametrize(
    ("rows", "titles"),
    [
        ([], []),
        (["the fox", EOS], ["the fox"]),
        (["the fox"], ["the fox"]),  # the last title may lack its <eos>
        ([EOS], [""]),
        ([EOS, EOS], ["", ""]),
        (["the", EOS, "fox"], ["the", "fox"]),
        ([PAD, "the", UNK, EOS, PAD], ["the", ""]),  # special tokens have no text
    ],
)
def test_titles_end_at_eos(rows: list[Any], titles: list[str]) -> None:
    ids = [i for row in rows for i in ([row] if isinstance(row, int) else bpe().encode([row])[:-1].tolist())]
    assert bpe().titles(ids) == bpe().titles(np.array(ids, dtype=np.uint16)) == titles
    assert bpe().decode(ids) == "\n".join(titles)


@pytest.mark.parametrize(
    ("size", "dtype"), [(300, np.uint16), (65_535, np.uint16), (65_536, np.uint32), (10**6, np.uint32)]
)
def test_ids_have_two_bytes_if_they_fit(size: int, dtype: Any) -> None:
    assert Tokenizer("bpe", size, b"").dtype == dtype


# -- tokenizer.json


def test_the_json_of_a_tokenizer_is_pinned() -> None:
    """The tokenizer's digest depends on the order of the JSON keys and on spaces."""
    of_words = Tokenizer("bpe", 7, '{"é": [1, 2], "a": {}}'.encode())
    assert of_words.to_json() == '{"format":2,"kind":"bpe","model":{"a":{},"é":[1,2]},"vocab_size":7}'
    of_bytes = Tokenizer("unigram", 9, b"\0\xff")
    assert of_bytes.to_json() == '{"format":2,"kind":"unigram","model":"AP8=","vocab_size":9}'
    again = Tokenizer.from_json(of_bytes.to_json())
    assert (again.kind, again.vocab_size, again.model) == ("unigram", 9, b"\0\xff")
    assert Tokenizer.from_json(of_words.to_json()).model == '{"a":{},"é":[1,2]}'.encode()
    unsorted = '{"format":2,"kind":"bpe","vocab_size":7,"model":{"é":[1,2],"a":{}}}'
    assert Tokenizer.from_json(unsorted).digest == of_words.digest
    assert Tokenizer.from_json(unsorted).model == '{"a":{},"é":[1,2]}'.encode()
    assert of_words.digest != of_bytes.digest and len(of_words.digest) == 64


GOOD = {"format": 2, "kind": "unigram", "vocab_size": 9, "model": base64.b64encode(b"model").decode()}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1}, {"format": 3}, {"format": None}, {"kind": "words"}, {"kind": None}, {"kind": ["bpe"]},
        {"vocab_size": "9"}, {"vocab_size": 9.0}, {"vocab_size": True}, {"vocab_size": None},
        {"model": ""}, {"model": "no base64!"}, {"model": "AAA"}, {"model": None}, {"model": 5},
        {"kind": "bpe", "model": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_file_with_a_bad_entry_is_refused(change: dict[str, Any]) -> None:
    assert Tokenizer.from_json(json.dumps(GOOD)).model == b"model"
    with pytest.raises(RunError, match=r"tokenizer.json is damaged or has another version .*--fresh"):
        Tokenizer.from_json(json.dumps(GOOD | change))


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_tokenizer_file_with_a_missing_entry_is_refused(name: str) -> None:
    with pytest.raises(RunError, match="--fresh"):
        Tokenizer.from_json(json.dumps({key: value for key, value in GOOD.items() if key != name}))


@pytest.mark.parametrize(("kind", "what"), [("bpe", "no BPE model"), ("unigram", "no sentencepiece model")])
def test_a_model_that_the_library_cannot_load_is_refused(kind: str, what: str) -> None:
    with pytest.raises(RunError, match=f"{what} .*--fresh"):
        Tokenizer(kind, 300, b"{}").encode(["a"])


# -- fitting


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("size", [0, 299])
def test_the_minimum_vocabulary_size(kind: str, size: int) -> None:
    with pytest.raises(
        ConfigError,
        match=f"vocab_size={size} is too small for 3 special tokens .*use --set vocab_size=300 or more",
    ):
        fit(kind, TITLES, size)
    assert fit(kind, TITLES, 300).vocab_size == 300
    assert tokens.MIN_VOCAB_SIZE == 300


@pytest.mark.parametrize(("most", "suggested"), [(298, False), (299, False), (300, True), (12_345, True)])
def test_the_message_about_a_vocabulary_that_is_too_large(most: int, suggested: bool) -> None:
    message = str(tokens._vocabulary_error(50_000, most))
    assert (
        f"vocab_size=50,000 is larger than the text allows: these titles give at most {most:,} tokens"
        in message
    )
    assert (f"--set vocab_size={most}" in message) == suggested
    assert ("the minimum is 300" in message) != suggested
    assert "num_titles" in message and "val_frac" in message and "dev_frac" in message


def refusing(monkeypatch: pytest.MonkeyPatch, reason: str) -> list[dict[str, Any]]:
    """Make the sentencepiece trainer fail with `reason`, and return the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def train(**arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError(reason)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    return calls


@pytest.mark.parametrize(
    ("reason", "error", "shown"),
    [
        (
            "Vocabulary size too high (900). Please set it to a value <= 731.",
            ConfigError,
            ["at most 731", "--set vocab_size=731"],
        ),
        (
            "Vocabulary size is smaller than required_chars. 900 vs 1571.",
            ConfigError,
            ["take 1,571", "vocab_size=1671", "tokenizer=bpe"],
        ),
        ("input is empty", CorpusError, ["2 titles", "input is empty", "more titles"]),
    ],
)
def test_errors_of_the_unigram_trainer_are_explained(
    monkeypatch: pytest.MonkeyPatch, reason: str, error: type[Exception], shown: list[str]
) -> None:
    refusing(monkeypatch, reason)
    with pytest.raises(error) as raised:
        fit("unigram", ["a", "b"], 900)
    assert all(part in str(raised.value) for part in shown), raised.value
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("size", "candidates"), [(900, 10_000), (1_000, 10_000), (1_001, 10_010), (16_000, 160_000)]
)
def test_the_arguments_of_the_unigram_trainer_are_pinned(
    monkeypatch: pytest.MonkeyPatch, size: int, candidates: int
) -> None:
    """Every argument affects the token ids, so a changed argument needs a new FORMAT."""
    calls = refusing(monkeypatch, "stop")
    with pytest.raises(CorpusError):
        fit("unigram", ["a▁", "b\\x{"], size)
    [arguments] = calls
    assert list(arguments.pop("sentence_iterator")) == ["a\\x{2581}", "b\\x{5c}x{"]
    assert arguments.pop("model_writer").getvalue() == b""
    assert arguments == {
        "model_type": "unigram", "vocab_size": size, "hard_vocab_limit": True, "pad_id": 0, "eos_id": 1,
        "unk_id": 2, "bos_id": -1,
        "pad_piece": "<pad>", "eos_piece": "<eos>", "unk_piece": "<unk>", "byte_fallback": True,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "input_sentence_size": 0,
        "shuffle_input_sentence": False, "max_sentence_length": 2**30, "num_threads": 16,
        "seed_sentencepiece_size": candidates,
        "minloglevel": 2,
    }  # fmt: skip
    assert tokens.FORMAT == 2


def test_the_form_of_a_bpe_vocabulary_is_pinned() -> None:
    model = json.loads(bpe().model)
    assert [(entry["id"], entry["content"], entry["special"]) for entry in model["added_tokens"]] == [
        (0, "<pad>", True), (1, "<eos>", True), (2, "<unk>", True)
    ]  # fmt: skip
    assert model["model"]["unk_token"] == "<unk>"
    assert model["normalizer"] == {"type": "Prepend", "prepend": " "}
    assert (model["pre_tokenizer"]["type"], model["pre_tokenizer"]["add_prefix_space"]) == (
        "ByteLevel",
        False,
    )
    decoders = model["decoder"]["decoders"]
    assert decoders[0]["type"] == "ByteLevel"
    assert decoders[1] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    assert len(decoders) == 2
    assert set("\\x{}0123456789abcdef") <= set(model["model"]["vocab"]), "every escape has tokens"


def test_characters_without_tokens_are_escaped_by_bpe() -> None:
    """Only bytes that occur in the fitted titles have tokens."""
    for title in ("the fox", "日本", "é", "e\u0301", " the  fox "):
        stream = bpe().encode([title])
        assert bpe().titles(stream) == [title]
        assert UNK not in stream
    assert len(bpe().encode(["日"])) > len("日".encode()) + 2, "the character is escaped"
    assert not bpe()._is_unsafe("é") and bpe()._is_unsafe("日")


def test_names_of_special_tokens_are_text() -> None:
    for title in ("<eos>", "<pad>", "<unk>"):
        stream = bpe().encode([title]).tolist()
        assert stream.count(EOS) == 1 and stream[-1] == EOS and min(stream[:-1]) > UNK


# -- the cache


@pytest.fixture
def cfg() -> TrainConfig:
    return from_dict({"num_titles": 300, "vocab_size": 300, "block_size": 16, "batch_size": 2})


@pytest.fixture
def corpus() -> Corpus:
    train, dev, val = TITLES[:250], [], TITLES[250:]
    return Corpus("made by hand", train, dev, val, fingerprints(train, dev, val), {"kind": "test"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_the_name_and_files_of_an_entry_are_pinned(cfg: TrainConfig, corpus: Corpus, folder: Path) -> None:
    """An entry's name is a hash of the format, the titles, the relevant fields and the library version."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = prepare(cfg, corpus)
    [entry] = folder.iterdir()
    assert entry.name == token_cache._key(cfg, corpus) and len(entry.name) == 64
    assert {path.name for path in entry.iterdir()} == {"meta.json", "tokenizer.json", "train.npy", "val.npy"}
    assert json.loads((entry / "meta.json").read_text()) == {
        "chars": data.chars,
        "bytes": data.bytes,
        "digest": data.digest,
    }
    assert data.tokenizer.to_json() == (entry / "tokenizer.json").read_text(encoding="utf-8")
    assert data.chars == {
        "train": sum(len(t) + 5 for t in corpus.train),
        "val": sum(len(t) + 5 for t in corpus.val),
    }
    assert data.bytes == {
        "train": sum(len(t.encode()) + 1 for t in corpus.train),
        "val": sum(len(t.encode()) + 1 for t in corpus.val),
    }


def change_meta(entry: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps(change(meta)))


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: change_meta(entry, lambda meta: []),
        lambda entry: change_meta(entry, lambda meta: None),
        lambda entry: change_meta(entry, lambda meta: 5),
        lambda entry: change_meta(entry, lambda meta: {k: v for k, v in meta.items() if k != "digest"}),
        lambda entry: change_meta(entry, lambda meta: {k: v for k, v in meta.items() if k != "chars"}),
        lambda entry: change_meta(entry, lambda meta: {k: v for k, v in meta.items() if k != "bytes"}),
        lambda entry: change_meta(entry, lambda meta: meta | {"chars": None}),
        lambda entry: change_meta(entry, lambda meta: meta | {"digest": "0" * 64}),
        lambda entry: change_meta(entry, lambda meta: meta | {"chars": {"val": 5}}),
        lambda entry: (entry / "meta.json").write_bytes(b"\xff"),
        lambda entry: (entry / "tokenizer.json").write_bytes(b"\xff"),
        lambda entry: (entry / "tokenizer.json").write_text("{}"),
        lambda entry: (entry / "val.npy").write_bytes(b""),
        lambda entry: (entry / "meta.json").write_text("[" * 100_000),
        *(
            lambda entry, name=name: make_pipe(entry / name)
            for name in ("meta.json", "tokenizer.json", "val.npy")
        ),
        lambda entry: np.save(entry / "val.npy", np.array([None])),
        lambda entry: np.save(entry / "val.npy", np.load(entry / "val.npy")[None]),
        lambda entry: np.save(entry / "val.npy", np.load(entry / "val.npy").astype(np.uint32)),
    ],
)
def test_a_damaged_entry_is_rebuilt_with_a_warning(
    cfg: TrainConfig, corpus: Corpus, folder: Path, damage: Callable[[Path], Any]
) -> None:
    digest = prepare(cfg, corpus).digest
    [entry] = folder.iterdir()
    damage(entry)
    with pytest.warns(UserWarning, match=f"cached tokens {entry} are damaged .*; they are rebuilt") as seen:
        assert prepare(cfg, corpus).digest == digest
    assert [warning.filename for warning in seen] == [__file__], "the warning points to the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(cfg, corpus).digest == digest


def test_the_digest_covers_counts_dtypes_and_the_tokenizer() -> None:
    streams = {"val": np.array([3, 4, EOS], dtype=np.uint16)}
    digests = {
        token_cache._digest(Tokenizer("unigram", size, b"m"), {"val": stream}, chars, nbytes)
        for size, stream, chars, nbytes in (
            (9, streams["val"], {"val": 7}, {"val": 3}),
            (8, streams["val"], {"val": 7}, {"val": 3}),
            (9, streams["val"].astype(np.uint32), {"val": 7}, {"val": 3}),
            (9, streams["val"][:2], {"val": 7}, {"val": 3}),
            (9, streams["val"], {"val": 8}, {"val": 3}),
            (9, streams["val"], {"val": 7}, {"val": 4}),
        )
    }
    assert len(digests) == 6
    apart = np.array([3, 0, 4, 0, EOS, 0], dtype=np.uint16)[::2]
    assert (
        token_cache._digest(Tokenizer("unigram", 9, b"m"), {"val": apart}, {"val": 7}, {"val": 3}) in digests
    )


@pytest.mark.parametrize(("age", "stays"), [(86_399, True), (86_400, True), (86_401, False), (10**6, False)])
def test_temporary_folders_are_removed_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int, stays: bool
) -> None:
    for name in ("one.tmp", "another.tmp", "entry"):
        (tmp_path / name / "fresh").mkdir(parents=True)
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    monkeypatch.setattr(token_cache.time, "time", lambda: 1_000_000 + age)
    token_cache._remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == (
        {"one.tmp", "another.tmp", "entry"} if stays else {"entry"}
    )


def test_a_file_that_looks_like_a_temporary_folder_is_ignored(
    cfg: TrainConfig, corpus: Corpus, folder: Path
) -> None:
    folder.mkdir(parents=True)
    (folder / "odd.tmp").write_text("?")
    os.utime(folder / "odd.tmp", (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(prepare(cfg, corpus).splits["val"], np.memmap)


def test_streams_that_cannot_be_read_back_stay_in_memory(
    cfg: TrainConfig, corpus: Corpus, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_load", lambda entry, **options: None)
    data = prepare(cfg, corpus)
    assert data.tokenizer.titles(data.splits["val"]) == corpus.val


def test_an_unwritable_cache_gives_a_warning_with_its_path(
    cfg: TrainConfig, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "file"))
    with pytest.warns(
        UserWarning, match=f"tokens are not cached in {tmp_path / 'file' / 'tokens'} .*stay in memory"
    ) as seen:
        assert prepare(cfg, corpus).splits["val"].dtype == np.uint16
    assert [warning.filename for warning in seen] == [__file__], "the warning points to the caller"


# -- batches


def titles_of(lengths: list[int]) -> np.ndarray:
    flat = []
    for number, length in enumerate(lengths):
        flat += [10 * number + 3 + i for i in range(length)] + [EOS]
    return np.array(flat, dtype=np.uint16)


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("lengths", [[3, 4, 2, 5, 1, 6], [0, 5, 0, 9, 8], [40]])
def test_the_order_of_an_epoch_is_the_permutation_of_its_seed(lengths: list[int], epoch: int) -> None:
    cfg = from_dict(
        {
            "block_size": 4,
            "batch_size": 2,
            "seed": 77,
            "order": "shuffle_titles",
            "num_titles": 10,
            "vocab_size": 300,
        }
    )
    stream = titles_of(lengths)
    titles = np.split(stream, np.flatnonzero(stream == EOS) + 1)[:-1]
    order = np.random.default_rng((77, epoch)).permutation(len(titles))
    expected = np.concatenate([titles[i] for i in order])
    batches = Batches(cfg, stream)
    assert np.array_equal(batches._shuffled(epoch), expected)
    assert batches._shuffled(epoch) is batches._shuffled(epoch), "the order of an epoch is computed once"
    steps = (len(stream) - 1) // 8
    x, y = batches.at(epoch * steps)
    assert np.array_equal(x, expected[:8].reshape(2, 4))
    assert np.array_equal(y, expected[1:9].reshape(2, 4))
    assert x.dtype == y.dtype == np.int64


@pytest.mark.parametrize(("count", "is_enough"), [(0, False), (7, False), (8, False), (9, True)])
def test_a_step_needs_one_token_more_than_a_span(count: int, is_enough: bool) -> None:
    cfg = from_dict({"block_size": 4, "batch_size": 2, "num_titles": 10, "vocab_size": 300})
    batches = Batches(cfg, np.arange(3, 3 + count, dtype=np.uint16))
    if is_enough:
        assert batches.at(0)[1].ravel().tolist() == list(range(4, 12))
        return
    with pytest.raises(ConfigError) as error:
        batches.at(0)
    assert f"train has {count} tokens" in str(error.value) and "batch_size*block_size+1 = 9" in str(
        error.value
    )
    assert "raise num_titles" in str(error.value)
