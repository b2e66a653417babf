"""Count the training tokens in an epoch. The count determines the number of steps of a trial.

All trials of a study have the same titles. They have different numbers of tokens if the study searches over
fields of the tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mainrun.config import TrainConfig
from mainrun.data.corpus import load_corpus
from mainrun.errors import ConfigError, Interrupted, MainrunError, RunError, UsageError
from mainrun.plan.plan import Plan
from mainrun.store import records
from mainrun.store.rundir import write_text
from sweeps.engine.worker import MAX_DEATHS
from sweeps.study import Study, set_arguments

TOKENIZER_FIELDS = ("tokenizer", "vocab_size", "case")  # the searchable fields that change the tokens
TOKENS_JSON = {
    "train_tokens": records.at_least_one,
    "fingerprints?": records.table,
    "other_tokenizers?": records.table_of(records.at_least_one),
}
FIX = "remove the file and run the same command again"


def count_train_tokens(study: Study, base: TrainConfig, folder: Path) -> int:
    """Return the number of training tokens in an epoch of the base config.

    The first driver of a study counts the tokens and writes the number to tokens.json. Later drivers read
    tokens.json. Raises UsageError if the data has changed since tokens.json was written.
    """
    file = folder / "tokens.json"
    fingerprints = load_corpus(base).fingerprints
    document = records.load(file, TOKENS_JSON, FIX)
    if not document:
        train_tokens = _dry_run(study, base, "the base config of the study")
        write_text(file, json.dumps({"train_tokens": train_tokens, "fingerprints": fingerprints}))
        return train_tokens
    if document.get("fingerprints", fingerprints) != fingerprints:
        raise UsageError(
            f"the titles of {base.corpus} have changed since the study in {folder} was started; "
            "restore the titles, or start a new study with --as NAME"
        )
    train_tokens = int(document["train_tokens"])
    try:
        Plan(base, train_tokens)
    except ConfigError as e:
        raise RunError(f"{file} is damaged: it has train_tokens = {train_tokens:,} ({e}); {FIX}") from None
    return train_tokens


def count_with_tokenizer(study: Study, cfg: TrainConfig, folder: Path) -> int:
    """Return the number of training tokens in an epoch of a trial that has another tokenizer than the base.

    The number is added to tokens.json. Raises ConfigError if the trial cannot be trained, for example because
    the titles are too few for its vocabulary.
    """
    file = folder / "tokens.json"
    document = records.load(file, TOKENS_JSON, FIX)
    counts = document.setdefault("other_tokenizers", {})
    name = " ".join(f"{field}={getattr(cfg, field)}" for field in TOKENIZER_FIELDS)
    if name not in counts:
        try:
            counts[name] = _dry_run(study, cfg, "the trial")
        except UsageError as e:
            raise ConfigError(str(e)) from None
        write_text(file, json.dumps(document))
    return int(counts[name])


def _dry_run(study: Study, cfg: TrainConfig, what: str) -> int:
    """Run `mainrun train --dry-run` to tokenize the data, and return the number of training tokens.

    If the process is killed, the command is run again.
    """
    command = [sys.executable, "-m", "mainrun", "train", "--preset", study.preset]
    for setting in set_arguments(study, cfg):
        command += ["--set", setting]
    command += ["--dry-run", "--json"]
    for _ in range(MAX_DEATHS):
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode >= 0:
            break
    if process.returncode == 0:
        return int(json.loads(process.stdout)["plan"]["train_tokens"])
    lines = process.stderr.strip().splitlines()
    message = lines[-1] if lines else "the process ended without a message"
    if process.returncode == Interrupted.exit_code:  # the command was interrupted, for example by a full disk
        raise Interrupted(message.removeprefix("interrupted: "))
    error = UsageError if process.returncode == UsageError.exit_code else MainrunError
    raise error(f"{what} cannot be trained: {message.removeprefix('error: ')}")
