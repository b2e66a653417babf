"""Tests of tools/record_gpu.sh at a tiny scale, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mainrun.data import synthetic

ROOT = Path(__file__).parents[1]
# With these settings, several runs of the stage are equal, so that only three runs are trained.
TINY = (
    "num_titles=200 tokenizer=bpe vocab_size=300 d_model=16 n_head=2 n_layer=2 block_size=16 batch_size=8 "
    "max_steps=4 eval_interval=2 dropout=0.1 rdrop=0 members=1 dtype=float32 threads=1 device=cpu"
)


def script(folder: Path, *arguments: object, work: str = "work", **variables: str) -> tuple[int, str]:
    """Run the script, and return its exit code and its output."""
    places = {"OUT": str(folder / "out"), "WORK": str(folder / work), "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "tools" / "record_gpu.sh"), *map(str, arguments)],
        env=os.environ | places | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    return done.returncode, done.stdout


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("A title\n")
    code, text = script(tmp_path)
    assert code == 2 and "TITLES=FILE tools/record_gpu.sh STAGE [ARCHIVE ...]" in text
    code, text = script(tmp_path, "everything", TITLES=str(titles))
    assert code == 2 and text.startswith("record_gpu.sh: got STAGE=everything; use probe, recipes,")
    code, text = script(tmp_path, "probe", TITLES=str(tmp_path / "nothing.txt"))
    assert code == 2 and "which is not a file; give a text file with one title per line" in text
    code, text = script(tmp_path, "probe", TITLES=str(titles), STRONG="nothing")
    assert code == 2 and text.startswith("record_gpu.sh: nothing: unknown preset 'nothing'; allowed: ")
    assert not list(tmp_path.glob("work/runs/*"))


@pytest.mark.slow
def test_finished_runs_of_an_earlier_session_are_not_trained_again(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("\n".join(synthetic.titles(250)))
    strong = tmp_path / "strong.toml"
    strong.write_text('about = "a stand-in"\nbase = "optimized"\n')
    settings = {"TITLES": str(titles), "STRONG": str(strong), "EXTRA": TINY}

    code, text = script(tmp_path, "probe", **settings, SECONDS_MAX="0")
    assert code == 0 and text.count("would be trained") == 8 and "s left" not in text
    code, text = script(tmp_path, "probe", **settings, SECONDS_MAX="soon")
    assert code == 2 and "got SECONDS_MAX=soon; give a number of seconds" in text

    code, text = script(tmp_path, "probe", **settings)
    assert code == 0 and text.count("s left") == 3, text
    (archive,) = (tmp_path / "out").glob("probe-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    for name in ("summary.json", "metrics.jsonl", "config.json", "token_scores.safetensors"):
        assert sum(path.endswith(name) for path in names) == 3, name
    assert not any("checkpoints" in path for path in names)
    (table,) = (tmp_path / "out").glob("probe-*.txt")
    assert "training" in table.read_text() and table.read_text().count("ms per step") == 3

    code, again = script(tmp_path, "probe", archive, work="other", **settings)
    assert code == 0 and "s left" not in again and again.count("is already finished") == 8, again
    assert again.count("ms per step") == 3
    assert list((tmp_path / "out").glob("*.tar.gz")) == [archive]
