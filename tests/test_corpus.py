"""Test the order, splits, fingerprints and error messages of corpora that are not on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainrun.config import from_dict
from mainrun.core.hardware import cache_dir
from mainrun.data.corpus import Corpus, fingerprint, load_corpus
from mainrun.errors import CorpusError

TITLES = [f"Title {i}, “quoted” and plain" for i in range(50)]


def load(corpus: object, n: int = 50, **changes: Any) -> Corpus:
    return load_corpus(from_dict({"corpus": str(corpus), "num_titles": n, "shuffle": False} | changes))


def refused(corpus: object, n: int = 50, **changes: Any) -> str:
    with pytest.raises(CorpusError) as e:
        load(corpus, n, **changes)
    return str(e.value)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return f"file:{path}"


def titles_of(c: Corpus) -> list[str]:
    return c.train + c.dev + c.val


@pytest.fixture
def txt(tmp_path: Path) -> str:
    return write(tmp_path / "titles.txt", "\n".join(TITLES) + "\n")


# -- order and splits


def test_without_shuffle_the_file_order_is_kept_and_val_is_the_last_tenth(txt: str) -> None:
    c = load(txt)
    assert (c.name, c.train, c.dev, c.val) == (txt, TITLES[:45], [], TITLES[45:])


def test_shuffle_permutes_all_titles_by_the_seed_of_the_task(txt: str) -> None:
    expected = [TITLES[i] for i in np.random.default_rng(1337).permutation(50)]
    assert titles_of(load(txt, shuffle=True)) == expected
    assert titles_of(load(txt, 20, shuffle=True)) == expected[:20]
    assert titles_of(load(txt, 20, shuffle=True, seed=1)) == expected[:20], (
        "the seed of a run does not change the order"
    )


def test_dev_is_the_end_of_train_and_does_not_change_val(txt: str) -> None:
    c, without = load(txt, dev_frac=0.2), load(txt)
    assert (c.train, c.dev, c.val) == (TITLES[:36], TITLES[36:45], without.val)
    assert (
        c.fingerprints["val"] == without.fingerprints["val"]
        and c.fingerprints["corpus"] == without.fingerprints["corpus"]
    )
    assert c.fingerprints["train"] != without.fingerprints["train"]


@pytest.mark.parametrize(
    ("n", "val_frac", "dev_frac", "sizes"),
    [
        (20_000, 0.1, 0.0, (18_000, 0, 2_000)),
        (100_000, 0.1, 0.05, (85_500, 4_500, 10_000)),
        (100, 0.34, 0.0, (66, 0, 34)),  # 100 * (1 - 0.34) is 65.999... in floating point
        (1_000, 0.1, 0.3, (630, 270, 100)),
        (2, 0.1, 0.0, (1, 0, 1)),
    ],
)
def test_split_sizes_are_exact(
    tmp_path: Path, n: int, val_frac: float, dev_frac: float, sizes: tuple[int, ...]
) -> None:
    c = load(
        write(tmp_path / "n.txt", "\n".join(map(str, range(n)))), n, val_frac=val_frac, dev_frac=dev_frac
    )
    assert (len(c.train), len(c.dev), len(c.val)) == sizes


def test_a_split_without_train_titles_is_refused(txt: str) -> None:
    for fracs in ({"val_frac": 0.99}, {"dev_frac": 0.99}):
        message = refused(txt, 20, **fracs)
        assert (
            "no title to train on" in message
            and "num_titles=20" in message
            and "lower val_frac or dev_frac" in message
        )


def test_val_titles_that_are_also_in_train_are_kept_and_counted(tmp_path: Path) -> None:
    c = load(write(tmp_path / "a.txt", "\n".join([*TITLES[:9], TITLES[0]])), 10)
    assert c.val == [TITLES[0]] and c.origin["val_in_train"] == 1


# -- fingerprints


def test_fingerprints_depend_only_on_content_and_order(txt: str, tmp_path: Path) -> None:
    one = load(txt).fingerprints
    assert set(one) == {"corpus", "train", "dev", "val"} and all(len(f) == 64 for f in one.values())
    assert load(write(tmp_path / "same.txt", "\r\n".join(TITLES))).fingerprints == one
    for other in (
        [*TITLES[1:], TITLES[0]],
        [TITLES[0] + "!", *TITLES[1:]],
        [TITLES[1], TITLES[0], *TITLES[2:]],
    ):
        changed = load(write(tmp_path / "other.txt", "\n".join(other))).fingerprints
        assert changed["corpus"] != one["corpus"] and changed["train"] != one["train"]
    swapped_val = load(
        write(tmp_path / "val.txt", "\n".join([*TITLES[:48], TITLES[49], TITLES[48]]))
    ).fingerprints
    assert (
        swapped_val["train"] == one["train"]
        and swapped_val["val"] != one["val"]
        and swapped_val["corpus"] != one["corpus"]
    )


def test_a_fingerprint_is_the_sha256_of_lengths_and_bytes() -> None:
    assert (
        fingerprint(["é", ""])
        == hashlib.sha256(struct.pack("<Q", 2) + "é".encode() + struct.pack("<Q", 0)).hexdigest()
    )


LISTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=6)


@given(LISTS, LISTS)
def test_only_equal_lists_have_the_same_fingerprint(a: list[str], b: list[str]) -> None:
    assert (fingerprint(a) == fingerprint(b)) == (a == b)


@given(LISTS, st.text("ab", max_size=4), st.text("ab", max_size=4), st.integers(0, 8))
def test_moving_text_between_two_titles_changes_the_fingerprint(
    before: list[str], one: str, two: str, at: int
) -> None:
    whole = one + two
    moved = (whole[:at], whole[at:])
    assert (fingerprint([*before, one, two]) == fingerprint([*before, *moved])) == ((one, two) == moved)
    assert fingerprint([*before, one, two]) != fingerprint([*before, whole])


# -- synthetic


def test_synthetic_has_as_many_titles_as_wanted() -> None:
    c = load("synthetic", 300, shuffle=True)
    assert len(set(titles_of(c))) == 300 and len(c.val) == 30 and c.origin["val_in_train"] == 0
    assert c == load("synthetic", 300, shuffle=True)
    json.dumps(c.origin)


# -- files


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    c = load(write(tmp_path / "a.txt", b"\xef\xbb\xbf one \r\n\r\n  \t\r\ntwo\r\nthr\xc3\xa9e"), 3)
    assert titles_of(c) == ["one", "two", "thrée"]
    assert c.origin["blank"] == 2 and c.origin["kind"] == "file"


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    lines = ["a\u2028b", "c\x0bd", "e\x85f"]
    assert titles_of(load(write(tmp_path / "a.txt", "\n".join(lines)), 3)) == lines


@pytest.mark.parametrize("column", ["title", "headline"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_is_read_from_each_table_format(tmp_path: Path, kind: str, column: str) -> None:
    rows = ['with, comma and "quotes"', "two\nlines", "", " plain "]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        quoted = "\r\n".join(f'{i},"{t.replace(chr(34), chr(34) * 2)}"' for i, t in enumerate(rows))
        path.write_bytes(f"id,{column}\r\n{quoted}\r\n".encode("utf-8-sig"))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, column: t or None}) + "\n" for i, t in enumerate(rows)))
    else:
        pq.write_table(pa.table({"id": range(4), column: [t or None for t in rows]}), path)
    c = load(f"file:{path}" + ("" if column == "title" else "#headline"), 3)
    assert titles_of(c) == ['with, comma and "quotes"', "two lines", "plain"]
    assert c.origin["blank"] == 1 and c.origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    json.dumps(c.origin)


def test_a_file_name_may_contain_a_hash_sign(tmp_path: Path) -> None:
    assert len(titles_of(load(write(tmp_path / "a#b.txt", "\n".join(TITLES))))) == 50


def test_a_missing_file_suggests_a_similar_name(txt: str, tmp_path: Path) -> None:
    message = refused(f"file:{tmp_path}/title.txt")
    assert "does not exist" in message and "did you mean 'titles.txt'" in message and ".parquet" in message


def test_directories_pipes_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "is a directory" in refused(f"file:{tmp_path}")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(f"file:{tmp_path}/pipe")
    locked = tmp_path / "locked.txt"
    locked.write_text("a\nb\n")
    locked.chmod(0)
    if not os.access(locked, os.R_OK):  # root can read every file
        assert "permissions" in refused(f"file:{locked}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["is empty"]),
        (b"\n \n\r\n", ["no titles", "all 3 rows are blank"]),
        (b"one\ntwo\nth\x00ree\n", ["binary", "offset 10", "line 3", "UTF-8"]),
        ("\ufeffone\ntwo".encode("utf-16-le"), ["UTF-16", "offset 3", "UTF-8"]),
        (b"one\ncaf\xe9\n", ["not UTF-8", "0xe9", "offset 7", "line 2"]),
        (b"\xef\xbb\xbfone\ncaf\xe9\n", ["0xe9", "offset 10", "line 2"]),
        (b"only one\n", ["1 title,", "at least two"]),
        (b"one\ntwo\nthree", ["3 titles", "num_titles=50", "--set num_titles=3"]),
    ],
)
def test_bad_text_files_are_refused(tmp_path: Path, content: bytes, says: list[str]) -> None:
    message = refused(write(tmp_path / "bad.txt", content))
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.csv",
            "id,titel\n1,x\n",
            ["no column 'title'", "did you mean 'titel'", "'id', 'titel'", "#COLUMN"],
        ),
        ("a.csv", "id,title\n1,x\n2\n", ["line 3", "1 fields", "'title' is field 2"]),
        ("a.csv", 'title\nx\n"open', ["line 3", "not valid CSV"]),
        ("a.csv", "id,title\n", ["no titles"]),
        ("a.jsonl", '{"title": "x"}\n\n{"title": \n', ["line 3", "not valid JSON"]),
        ("a.jsonl", '{"title": "x"}\n["y"]\n', ["line 2", "JSON list"]),
        (
            "a.jsonl",
            '{"title": "x"}\n{"titles": "y"}\n',
            ["line 2", "no key 'title'", "did you mean 'titles'"],
        ),
        ("a.jsonl", '{"title": "x"}\n{"title": 3}\n', ["line 2", "must be a string, got 3"]),
        ("a.jsonl", '{"title": "x"}\n{"title": "\\ud83d"}\n', ["title 2", "surrogate"]),
        ("a.jsonl", "[" * 100_000, ["line 1", "not valid JSON"]),
        ("a.json", '[{"title": "x"}]', [".jsonl"]),
        ("a.parquet", "PAR1 but not really", ["not a readable parquet"]),
    ],
)
def test_bad_csv_json_and_parquet_files_are_refused(
    tmp_path: Path, name: str, content: str, says: list[str]
) -> None:
    message = refused(write(tmp_path / name, content))
    assert all(part in message for part in says), message


def test_parquet_files_with_bad_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"headline": TITLES, "id": range(50)}), path)
    assert "no column 'title'" in refused(f"file:{path}")
    assert "did you mean 'headline'" in refused(f"file:{path}#headlin")
    assert "must contain strings" in refused(f"file:{path}#id")
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable parquet" in refused(f"file:{path}#headline")


def test_a_parquet_file_with_duplicate_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(TITLES), pa.array(TITLES)], names=["title", "title"]), path)
    assert "more than one column called 'title'; rename all but one" in refused(f"file:{path}")


def test_a_parquet_column_may_be_dictionary_encoded(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": pa.array(TITLES).dictionary_encode()}), path)
    loaded = load_corpus(from_dict({"corpus": f"file:{path}", "num_titles": len(TITLES)}))
    assert sorted([*loaded.train, *loaded.dev, *loaded.val]) == sorted(TITLES)


@pytest.mark.parametrize(
    ("titles", "said"),
    [([], "has no titles; give"), (["", " "], "has no titles: all 2 rows are blank; give")],
)
def test_a_parquet_file_without_titles_is_refused(titles: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": pa.array(titles, pa.string())}), path)
    assert said in refused(f"file:{path}")


def test_a_column_of_a_text_file_is_refused(txt: str) -> None:
    assert "lines and no columns" in refused(txt + "#title")


# -- mixes


def mix(tmp_path: Path, text: str) -> str:
    write(tmp_path / "mix.toml", text)
    return f"mix:{tmp_path}/mix.toml"


def two_files(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\n".join(f"a{i}" for i in range(100)))
    write(tmp_path / "b.txt", "\n".join(f"b{i}" for i in range(100)))


RATIO_3_1 = '[[source]]\npath = "a.txt"\nratio = 3\n[[source]]\npath = "b.txt"\nratio = 1\n'


def test_a_mix_has_its_ratios_in_every_split(tmp_path: Path) -> None:
    two_files(tmp_path)
    c = load(mix(tmp_path, RATIO_3_1), 80, val_frac=0.2, dev_frac=0.25)
    for split in (c.train, c.dev, c.val):
        assert sum(t[0] == "a" for t in split) == 3 * sum(t[0] == "b" for t in split) > 0
    assert [t for t in titles_of(c) if t[0] == "a"] == [f"a{i}" for i in range(60)], (
        "each source keeps its order"
    )
    assert [s["titles"] for s in c.origin["sources"]] == [60, 20]
    json.dumps(c.origin)


def test_each_source_of_a_mix_is_shuffled_separately(tmp_path: Path) -> None:
    two_files(tmp_path)
    c = load(mix(tmp_path, RATIO_3_1), 80, shuffle=True)
    assert [t for t in titles_of(c) if t[0] == "a"] == [
        f"a{i}" for i in np.random.default_rng(1337).permutation(100)[:60]
    ]


def test_a_weight_repeats_only_train_titles(tmp_path: Path) -> None:
    two_files(tmp_path)
    plain = load(mix(tmp_path, RATIO_3_1), 80, dev_frac=0.1)
    c = load(mix(tmp_path, RATIO_3_1.replace("ratio = 1", "ratio = 1\nweight = 3")), 80, dev_frac=0.1)
    assert (c.dev, c.val) == (plain.dev, plain.val)
    b = [t for t in plain.train if t[0] == "b"]
    assert c.train == plain.train + b + b
    assert not set(c.train) & set(c.val + c.dev)
    assert c.origin["train_repeats"] == 2 * len(b) and plain.origin["train_repeats"] == 0


def test_a_mix_contains_each_title_once(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\n".join(["x", "y", "x", "z", "u"]))
    write(tmp_path / "b.txt", "\n".join(["y", "v", "x", "w", "q"]))
    c = load(mix(tmp_path, '[[source]]\npath = "a.txt"\n[[source]]\npath = "b.txt"\n'), 6, val_frac=0.5)
    assert sorted(titles_of(c)) == ["q", "v", "w", "x", "y", "z"] and c.origin["val_in_train"] == 0


def test_paths_in_a_mix_are_relative_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.csv", "headline\n" + "\n".join(f"a{i}" for i in range(20)))
    monkeypatch.chdir(tmp_path)
    name = mix(
        tmp_path / "sub", '[[source]]\ncorpus = "synthetic"\n[[source]]\ncorpus = "file:a.csv#headline"\n'
    )
    c = load(name, 40)
    assert [t for t in titles_of(c) if t[0] == "a" and t[1:].isdecimal()] == [f"a{i}" for i in range(20)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["is empty"]),
        ("x = 1", ["names no sources", "[[source]]"]),
        ("[[source", ["not valid TOML"]),
        ("[[source]]\nratio = 1", ["source 1", "neither path nor corpus"]),
        ('[[source]]\npath = "a.txt"\ncorpus = "hn"', ["both path and corpus"]),
        ('[[source]]\npath = "a.txt"\nwieght = 2', ["unknown key 'wieght'", "did you mean 'weight'"]),
        ('[[source]]\npath = "a.txt"\nratio = 0', ["ratio must be a number above 0, got 0"]),
        ('[[source]]\npath = "a.txt"\nratio = nan', ["ratio must be a number above 0, got nan"]),
        (
            '[[source]]\npath = "a.txt"\nweight = 1.5',
            ["the weight says", "whole number from 1 to 1000, got 1.5"],
        ),
        ('[[source]]\npath = "a.txt"\nweight = true', ["whole number from 1 to 1000, got True"]),
        ('[[source]]\ncorpus = "mix:a.toml"', ["cannot be part of a mix"]),
        ("[[source]]\ncorpus = 3", ["cannot be part of a mix"]),
        ('[[source]]\ncorpus = "hnn"', ["'hnn' is unknown", "did you mean 'hn'"]),
        ('[[source]]\npath = "c.txt"', ["c.txt does not exist"]),
        (
            '[[source]]\npath = "a.txt"\nratio = 1000\n[[source]]\npath = "b.txt"',
            ["source 2", "gets no title"],
        ),
        (
            '[[source]]\npath = "a.txt"\n[[source]]\npath = "a.txt"',
            ["source 2", "0 titles that no earlier source has"],
        ),
    ],
)
def test_bad_mixes_are_refused(tmp_path: Path, text: str, says: list[str]) -> None:
    write(tmp_path / "a.txt", "\n".join(f"a{i}" for i in range(50)))
    write(tmp_path / "b.txt", "\n".join(f"b{i}" for i in range(50)))
    message = refused(mix(tmp_path, text), 100 if text.count("a.txt") == 2 else 50)
    assert all(part in message for part in says), message


def test_a_mix_that_is_too_small_suggests_num_titles(tmp_path: Path) -> None:
    two_files(tmp_path)
    name = mix(tmp_path, RATIO_3_1)
    assert "--set num_titles=133" in refused(name, 200)
    assert len(titles_of(load(name, 133))) == 133


# -- mixes by characters


BY_CHARACTERS = 'by = "characters"\n' + RATIO_3_1


def sources_of_lengths(tmp_path: Path, a: list[int], b: list[int]) -> str:
    """Write two files of different titles with these lengths, and return a mix of them."""
    for name, lengths in (("a", a), ("b", b)):
        titles = [f"{name}{i:04}".ljust(length, name) for i, length in enumerate(lengths)]
        write(tmp_path / f"{name}.txt", "\n".join(titles))
    return mix(tmp_path, BY_CHARACTERS)


def characters(titles: list[str], source: str) -> int:
    return sum(len(title) for title in titles if title[0] == source)


def test_the_next_title_comes_from_the_source_that_is_furthest_behind(tmp_path: Path) -> None:
    name = sources_of_lengths(tmp_path, [6, 9, 30, 6, 6], [10, 5, 5])
    # characters / ratio of a and b: 0 0, 2 0, 2 10, 5 10, 15 10, 15 15 (a tie: a), 17 15
    assert [title[:5] for title in titles_of(load(name, 7))] == [
        "a0000", "b0000", "a0001", "a0002", "b0001", "a0003", "b0002",
    ]  # fmt: skip


def test_every_prefix_of_a_mix_by_characters_has_its_ratios(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = ([int(n) for n in rng.integers(5, 200, 400)] for _ in range(2))
    name = sources_of_lengths(tmp_path, a, b)
    c = load(name, 300, val_frac=0.2, dev_frac=0.25)
    titles = titles_of(c)
    for end in range(300):
        in_a, in_b = characters(titles[:end], "a"), characters(titles[:end], "b")
        assert -600 < in_a - 3 * in_b < 600, "the longest title of b counts three times"
    for split in (c.train, c.dev, c.val):
        assert characters(split, "a") / characters(split, "b") == pytest.approx(3, abs=0.5)
    assert c.origin["by"] == "characters"
    for source, file in zip(c.origin["sources"], "ab", strict=True):
        assert source["characters"] == characters(titles, file)
        assert source["titles"] == sum(title[0] == file for title in titles)
    assert titles_of(load(name, 120, val_frac=0.2)) == titles[:120], "a smaller mix is a prefix"


def test_the_ratios_of_a_mix_by_characters_are_exact(tmp_path: Path) -> None:
    """With floats, 21 / 0.7 is above 3 / 0.1, so the wrong source would come first."""
    assert 21 / 0.7 > 3 / 0.1
    write(tmp_path / "a.txt", "\n".join(f"a{i:02}" for i in range(80)))
    write(tmp_path / "b.txt", "\n".join(f"b{i:02}" for i in range(80)))
    text = BY_CHARACTERS.replace("ratio = 3", "ratio = 0.7").replace("ratio = 1", "ratio = 0.1")
    order = "".join(title[0] for title in titles_of(load(mix(tmp_path, text), 80)))
    assert order == "abaaaaaa" * 10


def test_a_mix_by_characters_shuffles_skips_and_repeats_like_a_mix_by_texts(tmp_path: Path) -> None:
    two_files(tmp_path)
    write(tmp_path / "b.txt", "\n".join([*(f"a{i}" for i in range(50)), *(f"b{i}" for i in range(50))]))
    text = BY_CHARACTERS.replace("ratio = 1", "ratio = 1\nweight = 3")
    c = load(mix(tmp_path, text), 80, shuffle=True, dev_frac=0.1)
    titles = list(dict.fromkeys(titles_of(c)))
    assert len(titles) == 80, "a title of two sources is placed once"
    order = np.random.default_rng(1337).permutation(100)
    b_titles = [t for t in titles if t[0] == "b"]
    assert b_titles == [f"b{i - 50}" for i in order if i >= 50][: len(b_titles)]
    repeated = [t for t in dict.fromkeys(c.train) if c.train.count(t) == 3]
    assert set(repeated) >= {t for t in c.train if t[0] == "b"}
    assert c.origin["train_repeats"] == 2 * len(repeated) > 0
    assert len({*c.dev, *c.val}) == len(c.dev + c.val)


def test_a_source_that_runs_out_says_how_many_texts_were_placed(tmp_path: Path) -> None:
    name = sources_of_lengths(tmp_path, [10] * 30, [10] * 100)
    message = refused(name, 60)
    assert "source 1" in message and "no more texts after 30" in message
    assert "when 40 of num_titles=60 texts were placed" in message and "--set num_titles=40" in message
    assert len(titles_of(load(name, 40))) == 40


def test_a_source_without_a_text_is_refused(tmp_path: Path) -> None:
    two_files(tmp_path)
    three = '[[source]]\npath = "a.txt"\n[[source]]\npath = "b.txt"\n[[source]]\ncorpus = "synthetic"\n'
    assert "source 3 (synthetic): the source gets no title" in refused(
        mix(tmp_path, f'by = "characters"\n{three}'), 2
    )


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ('"character"', "did you mean 'characters'"),
        ("3", "by = 3 is not allowed"),
        ("[]", "texts, characters"),
    ],
)
def test_a_mix_counts_texts_or_characters(tmp_path: Path, by: str, says: str) -> None:
    two_files(tmp_path)
    assert says in refused(mix(tmp_path, f"by = {by}\n{RATIO_3_1}"))


def test_a_mix_by_texts_is_the_default(tmp_path: Path) -> None:
    two_files(tmp_path)
    plain = load(mix(tmp_path, RATIO_3_1), 80)
    named = load(mix(tmp_path, f'by = "texts"\n{RATIO_3_1}'), 80)
    assert named == plain
    assert list(plain.origin) == ["kind", "path", "sources", "titles", "train_repeats", "val_in_train"]


# -- the cache and real titles


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINRUN_CACHE", "/x")
    assert cache_dir() == Path("/x")
    monkeypatch.delenv("MAINRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert cache_dir() == Path("/y/mainrun")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "mainrun"


def test_real_titles(real_titles: Path) -> None:
    c = load(f"file:{real_titles}", 20_000)
    lines = real_titles.read_text(encoding="utf-8").split("\n")[:20_000]
    assert (c.train, c.val) == (lines[:18_000], lines[18_000:])
    assert c.origin["blank"] == 0 and c.origin["val_in_train"] == 0


def test_too_few_real_titles_suggest_num_titles(real_titles: Path) -> None:
    assert "--set num_titles=150000" in refused(f"file:{real_titles}", 200_000)
