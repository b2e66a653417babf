"""What every command has in common: how it ends, its usual options, what it prints. No torch; Rich when there is a table."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from mainrun.errors import Diverged, Interrupted, MainrunError, UsageError, nearest, plain_warnings
from mainrun.files import inputs

if TYPE_CHECKING:
    from rich.console import Console


class Group(TyperGroup):
    """Turns every way a command can end into an exit code and at most one message on stderr."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        args = list(sys.argv[1:] if args is None else args)
        plain_warnings()
        try:
            _drop_odd_sizes()
            _check_folder()
            _check_text(args)
            _check_caches()
            code = super().main(
                args, "mainrun", standalone_mode=False
            )  # a KeyboardInterrupt comes back as 130
        except typer.TyperException as e:  # unknown command or option, a missing or misshapen argument
            code = _fail(e, "error", _usage(e), UsageError.exit_code, args)
        except Interrupted as e:
            code = _fail(e, "interrupted", str(e), e.exit_code, args)
        except Diverged as e:
            code = _fail(e, "diverged", str(e), e.exit_code, args)
        except MainrunError as e:
            code = _fail(e, "error", str(e), e.exit_code, args)
        except OSError as e:  # a path that the system refuses; what names no path is a bug
            known = e.filename is not None or e.errno in inputs.NO_SPACE
            code = _refuse(e, args) if known else _crash(e, args)
        except Exception as e:
            code = _crash(e, args)
        except SystemExit as e:  # how Typer ends, without a word, when a pipe to another process breaks
            if not isinstance(e.__context__, OSError):
                raise
            code = _crash(e.__context__, args)
        sys.exit(_final_code(code if isinstance(code, int) else 0))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            allowed = ", ".join(self.commands)
            known = f"`{ctx.command_path} --help` lists them: {allowed}"
            raise UsageError(f"unknown command {args[0]!r}{nearest(args[0], self.commands)}; {known}")
        return super().resolve_command(ctx, args)


def commands(help: str) -> typer.Typer:
    """Create a command group. Without a subcommand it prints its help."""
    app = typer.Typer(cls=Group, help=help, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def _root(ctx: typer.Context) -> None:
        if ctx.invoked_subcommand is None:
            print(ctx.get_help())

    return app


def is_leader() -> bool:
    """Whether this process prints. Of the processes that torchrun starts, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def _drop_odd_sizes() -> None:
    """Ignore terminal sizes that are not numbers. Rich accepts digits such as a superscript, which `int` refuses."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,6}", os.environ.get(name, "0")):
            del os.environ[name]


def _check_folder() -> None:
    """Refuse a current folder that was removed."""
    try:
        os.getcwd()
    except OSError as e:
        raise UsageError(f"the current folder cannot be used ({e.strerror}); change to another one") from None


PATH_OPTIONS = ("--figures", "--log", "--out", "--report", "--run", "--runs", "--store", "--svg", "--tables")


def _check_text(args: Sequence[str]) -> None:
    """Refuse arguments that are not valid text, because they end up in JSON, tables and PDFs."""
    for before, arg in pairwise(["", *args]):
        if arg == "" and before in PATH_OPTIONS:
            raise UsageError(f"got {before} '', which is empty; give a path")
        if arg in [f"{option}=" for option in PATH_OPTIONS]:
            raise UsageError(f"got {arg}'', which is empty; give a path")
        if re.search("[\x00\ud800-\udfff]", arg) is None:
            continue
        if sys.getfilesystemencoding() != "utf-8":
            fix = (
                f"the locale supports only {sys.getfilesystemencoding()}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
            )
        else:
            fix = "write it in UTF-8, and rename a file whose name is not"
        raise UsageError(f"got the argument {inputs.shown(arg)}, which is not UTF-8 text; {fix}")


def _check_caches() -> None:
    """Check the cache variables first, so that the error names the variable."""
    for name in ("MAINRUN_CACHE", "XDG_CACHE_HOME"):
        place = os.environ.get(name)
        if place:
            inputs.check_path(inputs.expanded(place, name), name)


def _crash(e: Exception, args: Sequence[str]) -> int:
    text = (f"{type(e).__name__}: {e}".strip().splitlines() or [""])[0]
    hints = ", ".join(["--debug shows the traceback", *getattr(e, "__notes__", [])])
    return _fail(e, "crash", f"{text}; {hints}", MainrunError.exit_code, args)


def _refuse(e: OSError, args: Sequence[str]) -> int:
    known = inputs.refusal(e)
    return _fail(
        e, "interrupted" if isinstance(known, Interrupted) else "error", str(known), known.exit_code, args
    )


def _fail(e: BaseException, kind: str, text: str, code: int, args: Sequence[str]) -> int:
    if "--debug" in args:
        traceback.print_exception(e)
    if not is_leader():  # rank 0 usually prints the same error; wait so that torchrun can end this process
        time.sleep(5)
        kind = f"{kind} in process {os.environ['RANK']}"
    print(f"{kind}: {_readable(text)}", file=sys.stderr, flush=True)
    return code


MOST_TEXT, MOST_LINE = 2800, 1200  # characters of a message, and of a line of it


def _readable(text: str) -> str:
    """A message as a terminal may show it: no control characters, and no more than a person reads."""
    lines = [inputs.shortened(inputs.printable(line), MOST_LINE) for line in text.split("\n")]
    kept: list[str] = []
    for line in lines:
        if sum(map(len, kept)) + len(line) > MOST_TEXT:
            return "\n".join([*kept, f"and {len(lines) - len(kept):,} more lines"])
        kept.append(line)
    return "\n".join(kept)


def _usage(e: typer.TyperException) -> str:
    """Rewrite Typer's errors: what was given, a suggestion, and where to look."""
    ctx = getattr(e, "ctx", None)
    command = ctx.command_path if ctx else "mainrun COMMAND"
    text = e.format_message().rstrip(".")
    got = getattr(e, "option_name", None)
    known = [name for p in ctx.command.params for name in (*p.opts, *p.secondary_opts)] if ctx else []
    if got and ctx and got not in known:
        text = f"unknown option {got!r}{nearest(got, known)}"
    elif "extra argument" in text and "=" in text:
        text += "; each key=value needs its own --set"
    return f"{text}; `{command} --help` lists what is allowed"


def validate_paths(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of every option and argument that is a path: refuse a name that no file can have."""
    name = param.opts[0] if param.param_type_name == "option" else param.metavar
    for path in value if isinstance(value, list | tuple) else [value]:
        if path is not None:
            inputs.check_path(path, str(name))
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", callback=validate_paths, help="The folder of the run directories."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read by _fail


# -- how it ends


@contextmanager
def process_group() -> Iterator[None]:
    """Set up the allocator before torch starts, and shut down the process group at the end."""
    from mainrun.core.hardware import tune_allocator

    tune_allocator()
    try:
        yield
    finally:
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and the first Ctrl-C outside the steps (torch is still loading, say) end like those between two steps.

    While it steps, the training has its own handlers in place of these.
    """
    asked = 0

    def stop(signum: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        # a BaseException: no `except Exception` of a library that is being imported can swallow it
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if asked == 1:
            raise Interrupted(
                "stopped outside the training steps; nothing is lost, start the same command again"
            ) from None
        print(
            "stopped at once; the same command goes on from the last checkpoint", file=sys.stderr, flush=True
        )
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def check_place(path: Path, option: str, begins: bytes, kind: str) -> None:
    """Refuse to overwrite anything but an earlier output of the same kind."""
    if path.is_dir():
        what = "a folder"
    elif path.exists() and not path.is_file():
        what = "a device or a pipe, not a file"
    elif path.is_file() and path.stat().st_size and path.open("rb").read(len(begins)) != begins:
        what = "a file of another kind, which would be overwritten"
    else:
        return
    raise UsageError(f"got {option} {path}, {what}; give the name of a new file, or of an earlier {kind}")


# -- where it prints


class _Outlet(io.FileIO):
    """stdout or stderr. It drops what cannot be written and remembers the error, so that the command can finish."""

    fault: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as e:
                self.fault = e
        return len(data)


def guard_streams() -> None:
    """A full disk, a closed pipe or a closed descriptor must not end a training. Called once, before anything is printed."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # else the next file that is opened would become stdout
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, fd: int) -> TextIO:
    """The same stream with an outlet that does not raise, and with escapes for what its encoding lacks."""
    try:
        raw = _Outlet(fd if stream is None else stream.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # somebody's own stream, in memory
        return stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = stream is None or bool(getattr(stream, "line_buffering", False))
    through = bool(getattr(stream, "write_through", False))
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=lines, write_through=through)


def _final_code(code: int) -> int:
    """Flush stdout and return the exit code. A closed pipe (`| head`) is not an error; a full disk is."""
    if sys.stdout is None:
        return code
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    fault = raw.fault if isinstance(raw, _Outlet) else None
    if fault is None or fault.errno == errno.EPIPE or code:
        return code
    text = f"stdout cannot be written ({fault.strerror}), so the results are not shown; send it elsewhere and run the command again"
    print(f"error: {text}", file=sys.stderr, flush=True)
    return UsageError.exit_code


# -- what it prints


def emit(value: Any) -> None:
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode))


def console() -> Console:
    """For tables on stdout. In a pipe or a file they are 200 columns wide."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def show_table(head: list[str], lines: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console().print(table)
