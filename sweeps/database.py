"""Write the trials of a study to an Optuna database for people and dashboards.

The database is a SQLite file in the study's folder, or a PostgreSQL database. From the database, the driver
reads only the study's digest and the number of trials. If the database is lost, no results are lost. Optuna
is imported only when a database is opened.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mainrun.errors import DiskFull, MainrunError, RunError, UsageError
from sweeps.optuna_trial import frozen_trial
from sweeps.study import Study, without_password
from sweeps.trial import Trial

LOCK_TIMEOUT = 60.0  # how long to wait for a locked SQLite file, in seconds
OPTUNA_TABLES = {"studies", "version_info", "alembic_version"}  # tables that identify an Optuna database


def open_storage(url: str, file: Path) -> Any:
    """Open an Optuna storage at a URL. If the URL is empty, open the SQLite database in `file`.

    Raises UsageError if the database contains tables of another program.
    """
    import optuna

    name = without_password(url) or str(file)
    options: dict[str, Any] = {"connect_args": {"timeout": 1}}
    if url.startswith("postgresql"):
        options = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
    if url:
        # Name the database driver explicitly, because SQLAlchemy's default driver depends on its version.
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    else:
        url = f"sqlite:///{file.absolute()}"
    _check_tables(url, options, name)
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except RuntimeError as e:  # another version of Optuna created the database
        message = " ".join(str(e).split())
        raise UsageError(
            f"the storage {name} cannot be used; create a new database, or give another --storage. "
            f"Optuna reports: {message}"
        ) from None


def _check_tables(url: str, options: dict[str, Any], name: str) -> None:
    """Raise UsageError if a database contains tables that Optuna did not create."""
    from sqlalchemy import create_engine, inspect

    try:
        engine = create_engine(url, **options)
    except ImportError as e:
        raise UsageError(
            f"the storage {name} needs {e.name or 'a driver'}, which is not installed; "
            "install it with pip install 'mainrun[postgres]'"
        ) from None
    try:
        inspector = inspect(engine)
        tables = set(inspector.get_table_names())
        usable = not tables or tables >= OPTUNA_TABLES or _is_unfinished(inspector, tables)
    finally:
        engine.dispose()
    if not usable:
        examples = ", ".join(sorted(tables)[:4])
        raise UsageError(
            f"{name} is the database of another program (with the tables {examples}); "
            "create a new database for studies, or give another --storage"
        )


def _is_unfinished(inspector: Any, tables: set[str]) -> bool:
    """Return whether Optuna was stopped before it had created all of its tables.

    Optuna creates the missing tables when the database is opened again.
    """
    from optuna.storages._rdb.models import BaseModel

    schema = BaseModel.metadata.tables
    if not tables <= schema.keys():
        return False
    for name in tables:
        columns = {column["name"] for column in inspector.get_columns(name)}
        if columns != set(schema[name].columns.keys()):
            return False
    return True


def short_message(e: Exception) -> str:
    """Return the first line of an error message from SQLAlchemy or Optuna, without the name of the class."""
    first_line = str(_cause(e)).splitlines()[0]
    return re.sub(r"^\([\w.]+\) ", "", first_line)


def _cause(e: Exception) -> BaseException | None:
    from optuna.exceptions import StorageInternalError

    return e.__cause__ if isinstance(e, StorageInternalError) else e


class StudyDatabase:
    """Writes each finished trial to an Optuna database, in the order of the trial numbers."""

    def __init__(self, study: Study, folder: Path, note: Callable[[str], None]) -> None:
        self.study = study
        self.note = note
        self.file = folder / "study.db"
        self.name = without_password(study.storage) or str(self.file)
        self.on_server = study.storage.startswith("postgresql")
        self.write_failed = False  # True after a failed write, which may have stored the data anyway
        self.storage, self.optuna_study = self._retry(self._open, opening=True)
        self.written = self._retry(self._count)
        digest = self._retry(lambda: self.optuna_study.user_attrs.get("digest"))
        if digest is None and not self.written:
            self._retry(lambda: self.optuna_study.set_user_attr("digest", study.digest))
        elif digest != study.digest:
            raise UsageError(
                f"{self.name} already contains a different study called {study.name!r}; "
                "give this study another name with --as NAME, or give another --storage"
            )

    def _open(self) -> tuple[Any, Any]:
        import optuna

        storage = open_storage(self.study.storage, self.file)
        return storage, optuna.create_study(study_name=self.study.name, storage=storage, load_if_exists=True)

    @property
    def _study_id(self) -> int:
        return int(self.storage.get_study_id_from_name(self.study.name))

    def _count(self) -> int:
        return int(self.storage.get_n_trials(self._study_id))

    def _retry(self, operation: Callable[[], Any], opening: bool = False) -> Any:
        """Call a database operation, and retry the operation while the database does not answer.

        Workers continue to train during the retries. If a SQLite file is locked, the operation is retried for
        LOCK_TIMEOUT seconds. If a server cannot be reached, the operation is retried without a time limit.
        However, opening the database raises an error immediately if the server cannot be reached.
        """
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        pause = 0.2
        deadline = time.monotonic() + LOCK_TIMEOUT
        waiting = False
        while True:
            try:
                result = operation()
            except (StorageInternalError, SQLAlchemyError) as e:
                message = short_message(e)
                self.write_failed = True
                is_away = not opening and self._is_unreachable(e)
                is_locked = "is locked" in message and time.monotonic() < deadline
                if not is_away and not is_locked:
                    raise self._error(message) from e
                if not waiting:
                    self.note(f"the storage {self.name} does not answer ({message}); waiting for it")
                    waiting = True
                time.sleep(pause)
                pause = min(5.0, 2 * pause)
            except (LookupError, ValueError, AssertionError) as e:  # Optuna cannot parse a row
                message = " ".join(str(e).split())[:200]
                raise RunError(
                    f"{self.name} contains rows that Optuna cannot read ({type(e).__name__}: {message}); "
                    "restore the database, or give this study another name with --as NAME"
                ) from e
            else:
                if waiting:
                    self.note("the storage answers again")
                return result

    def _is_unreachable(self, e: Exception) -> bool:
        from sqlalchemy.exc import InterfaceError, OperationalError

        return self.on_server and isinstance(_cause(e), OperationalError | InterfaceError)

    def _error(self, message: str) -> MainrunError:
        fix = "run the same command again; nothing is lost"
        if "disk is full" in message:
            return DiskFull(f"no space left to write {self.name} ({message}); free some space and {fix}")
        if "is locked" in message:
            return UsageError(
                f"{self.name} was locked by another process for {LOCK_TIMEOUT:g} s; "
                f"end that process and {fix}"
            )
        return UsageError(
            f"the storage {self.name} cannot be used ({message}); "
            f"give another --storage, or fix this and {fix}"
        )

    def write(self, trials: Sequence[Trial], row_of: Callable[[Trial], dict[str, Any]]) -> None:
        """Write the trials that come before the first unfinished trial and are not in the database yet.

        row_of: the function `Search.row`.
        """
        while self.written < len(trials):
            trial = trials[self.written]
            if not trial.is_finished:
                return
            self._retry(partial(self._add, trial, row_of))

    def _add(self, trial: Trial, row_of: Callable[[Trial], dict[str, Any]]) -> None:
        if self.write_failed:
            self.written = self._count()
            self.write_failed = False
            if self.written > trial.number:
                return
        # Bypass Optuna's study object, because a study object keeps a copy of each trial in memory.
        template = frozen_trial(row_of(trial), self.study.space)
        self.storage.create_new_trial(self._study_id, template_trial=template)
        self.written += 1
