"""Count the training tokens in an epoch. The count determines the number of steps of every trial."""

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

TOKENS_JSON = {"train_tokens": records.at_least_one, "fingerprints?": records.table}


def count_train_tokens(study: Study, base: TrainConfig, folder: Path) -> int:
    """Return the number of training tokens in an epoch.

    The first driver of a study counts the tokens and writes the number to tokens.json. Later drivers read
    tokens.json. Raises UsageError if the data has changed since tokens.json was written.
    """
    file = folder / "tokens.json"
    fingerprints = load_corpus(base).fingerprints
    document = records.load(file, TOKENS_JSON, "remove the file and run the same command again")
    if not document:
        train_tokens = _dry_run(study, base)
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
        raise RunError(
            f"{file} is damaged: it has train_tokens = {train_tokens:,} ({e}); "
            "remove the file and run the same command again"
        ) from None
    return train_tokens


def _dry_run(study: Study, base: TrainConfig) -> int:
    """Run `mainrun train --dry-run` to tokenize the data, and return the number of training tokens.

    If the process is killed, the command is run again.
    """
    command = [sys.executable, "-m", "mainrun", "train", "--preset", study.preset]
    for setting in set_arguments(study, base):
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
    raise error(f"the base config of the study cannot be trained: {message.removeprefix('error: ')}")
