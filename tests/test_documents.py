"""Test corpora of documents: texts that keep their line breaks and blanks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from mainrun.config import from_dict
from mainrun.data.corpus import Corpus, load_corpus
from mainrun.data.sources import open_source
from mainrun.data.token_cache import prepare
from mainrun.errors import CorpusError
from mainrun.store import lineage

DOCUMENTS = [
    "def f():\n\treturn 1\n",
    "  indented\n\n\nand blank lines  ",
    "CRLF\r\nand CR\rand LF\n",
    "\n\nline breaks around\n\n",
    " no-break space and \u2028 a separator",
    "one line",
]
BLANK = ["", "  ", "\n\t\r\n", "\u3000"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out)
    return out.getvalue()


def csv_file(texts: list[str]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([["text"], *([text] for text in texts)])
    return out.getvalue().encode()


FILES = {"jsonl": jsonl, "parquet": parquet, "csv": csv_file}


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return f"file:{path}#text"


def load(corpus: str, n: int, **changes: Any) -> Corpus:
    fields = {"corpus": corpus, "num_titles": n, "shuffle": False, "documents": True}
    return load_corpus(from_dict(fields | changes))


def texts_of(corpus: Corpus) -> list[str]:
    return corpus.train + corpus.dev + corpus.val


@pytest.mark.parametrize(("suffix", "encode"), FILES.items(), ids=FILES)
def test_texts_are_kept_as_they_are(
    tmp_path: Path, suffix: str, encode: Callable[[list[str]], bytes]
) -> None:
    name = write(tmp_path / f"texts.{suffix}", encode([*BLANK[:2], *DOCUMENTS, *BLANK[2:]]))
    corpus = load(name, len(DOCUMENTS))
    assert texts_of(corpus) == DOCUMENTS
    assert corpus.origin["blank"] == len(BLANK)
    titles = texts_of(load(name, len(DOCUMENTS), documents=False))
    assert titles[0] == "def f(): \treturn 1" and titles[2] == "CRLF and CR and LF"
    assert not any("\n" in title for title in titles)


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=6))
def test_any_text_is_kept(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    name = write(tmp_path_factory.mktemp("any") / "texts.jsonl", jsonl([*texts, "a", "b"]))
    kept = [text for text in [*texts, "a", "b"] if text.strip()]
    assert texts_of(load(name, len(kept))) == kept


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_has_one_text_per_line(tmp_path: Path, end: str) -> None:
    lines = ["  a\tb  ", "", "c\rd", "   ", "e\u2028f"]
    (tmp_path / "texts.txt").write_bytes((end.join(lines) + end).encode())
    corpus = load(f"file:{tmp_path}/texts.txt", 3)
    assert texts_of(corpus) == ["  a\tb  ", "c\rd", "e\u2028f"]
    assert corpus.origin["blank"] == 2


def test_a_file_of_blank_texts_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "texts.jsonl", jsonl(BLANK))
    with pytest.raises(CorpusError, match="has no titles: all 4 rows are blank"):
        load(name, 2)


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "texts.jsonl", jsonl(["fine", "bad \ud800"]))
    with pytest.raises(CorpusError, match="title 2 is not valid Unicode"):
        load(name, 2)


def test_a_mix_keeps_the_texts_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(DOCUMENTS))
    write(tmp_path / "b.txt", b" b1\nb2 \nb3\nb4\n")
    (tmp_path / "mix.toml").write_text(
        '[[source]]\npath = "a.jsonl#text"\nratio = 2\n[[source]]\npath = "b.txt"\nratio = 1\n'
    )
    texts = texts_of(load(f"mix:{tmp_path}/mix.toml", 9))
    assert [text for text in texts if text in DOCUMENTS] == DOCUMENTS
    assert [text for text in texts if text not in DOCUMENTS] == [" b1", "b2 ", "b3"]


@pytest.mark.parametrize("corpus", ["synthetic", "hn", "hn-2025"])
def test_a_corpus_of_titles_has_no_documents(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(CorpusError, match=f"corpus={corpus}, which consists of titles; set documents=false"):
        open_source(corpus, 10, documents=True)
    (tmp_path / "mix.toml").write_text(f'[[source]]\ncorpus = "{corpus}"\n')
    with pytest.raises(CorpusError, match=f"corpus={corpus}, which consists of titles"):
        load(f"mix:{tmp_path}/mix.toml", 10)


# -- what is counted


def many(n: int) -> list[str]:
    return [f"  document {i % 9}\n\tof number {i} —\r\n{DOCUMENTS[i % 6]}" for i in range(n)]


def tiny_config(corpus: str, **changes: Any) -> Any:
    return from_dict(TINY | {"corpus": corpus, "documents": True, "num_titles": 300} | changes)


def test_denominators_count_the_text_as_it_is(tmp_path: Path) -> None:
    cfg = tiny_config(write(tmp_path / "texts.jsonl", jsonl(many(300))))
    corpus = load_corpus(cfg)
    data = prepare(cfg, corpus)
    for split in ("train", "val"):
        texts = getattr(corpus, split)
        assert data.chars[split] == sum(len(text) + len("<eos>") for text in texts)
        assert data.bytes[split] == sum(len(text.encode()) + 1 for text in texts)
        assert data.tokenizer.titles(data.splits[split]) == texts


def test_fingerprints_and_keys_depend_on_the_texts_only(tmp_path: Path) -> None:
    def key(**changes: Any) -> tuple[str, str]:
        cfg = tiny_config(**changes)
        corpus = load_corpus(cfg)
        origin = lineage.origin(cfg, corpus.fingerprints, prepare(cfg, corpus).digest, {}, {})
        return corpus.fingerprints["corpus"], lineage.root(origin)

    documents = write(tmp_path / "texts.jsonl", jsonl(many(300)))
    fingerprint, root = key(corpus=documents)
    other_fingerprint, other_root = key(corpus=documents, documents=False, vocab_size=390)
    assert fingerprint != other_fingerprint and root != other_root
    titles = write(
        tmp_path / "titles.jsonl", jsonl([f"a title of number {i}, and words" for i in range(300)])
    )
    assert key(corpus=titles, vocab_size=300) == key(corpus=titles, vocab_size=300, documents=False)


def test_the_guards_of_a_run_count_the_text_as_it_is(tmp_path: Path) -> None:
    from mainrun.run.session import train

    cfg = tiny_config(write(tmp_path / "texts.jsonl", jsonl(many(300))))
    summary = train(cfg, tmp_path / "runs")
    guards = {guard["name"]: guard for guard in summary["guards"]}
    assert {guard["name"] for guard in summary["guards"] if guard["status"] == "fail"} == set()
    corpus = load_corpus(cfg)
    chars = sum(len(text) + 5 for text in corpus.val)
    assert guards["denominator"]["detail"].startswith(f"{chars:,} characters")
