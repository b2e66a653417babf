"""The errors that mainrun raises for users, and the exit codes of mainrun's commands.

    MainrunError            1   the command failed
    ├── UsageError          2   the request is invalid; the message says what is allowed and how to fix it
    │   ├── ConfigError         a field or a preset is invalid, or several fields do not fit together
    │   ├── CorpusError         the corpus is missing, empty, binary or too small
    │   ├── HubError            a download failed, or the downloaded file is damaged
    │   └── RunError            the run directory belongs to another run, or is locked, damaged or read-only
    ├── Diverged            3   the loss is NaN or infinite
    └── Interrupted        75   the run stopped between two steps; the same command resumes the run
        └── DiskFull            the disk is full, but no file is damaged; the same command resumes the run

`mainrun.files.inputs.refusal` converts an OSError about a path to a MainrunError. An exception of any other
class is a bug in mainrun, and the command exits with code 1.
"""

import difflib
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

LONGEST_GUESS = 100  # longer names get no suggestion


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Return a suggestion for a misspelled name, such as " (did you mean 'lr'?)".

    Return an empty string if no valid name is similar. Case and leading dashes are ignored.
    """
    if len(got) > LONGEST_GUESS:  # comparing long names would be slow
        return ""
    plain = {name.lower().lstrip("-"): name for name in allowed}
    matches = difflib.get_close_matches(got.lower().lstrip("-"), plain, n=1, cutoff=0.6)
    if not matches:
        return ""
    return f" (did you mean {plain[matches[0]]!r}?)"


def plain_warnings() -> None:
    """Print every warning from mainrun and its libraries as one line on stderr."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(message))
        print(f"warning: {text}", file=sys.stderr, flush=True)

    warnings.showwarning = show


class MainrunError(Exception):
    exit_code = 1


class UsageError(MainrunError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class CorpusError(UsageError):
    pass


class HubError(UsageError):
    pass


class RunError(UsageError):
    pass


class Diverged(MainrunError):
    exit_code = 3


class Interrupted(MainrunError):
    exit_code = 75


class DiskFull(Interrupted):
    pass
