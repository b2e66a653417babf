"""Functions that all commands use to handle errors, common options, output streams and tables.

This module does not import torch, and imports Rich only to print a table.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import threading
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
from mainrun.ui import completion

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class Group(TyperGroup):
    """A command group that turns every error into an exit code and one message on stderr."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        args = list(sys.argv[1:] if args is None else args)
        plain_warnings()
        try:
            _drop_odd_sizes()
            _check_folder()
            _check_text(args)
            _check_caches()
            # `main` returns the exit code, which is 130 after a KeyboardInterrupt.
            code = super().main(args, "mainrun", standalone_mode=False)
        except typer.TyperException as e:  # a usage error, for example an unknown option
            code = _fail(e, "error", _usage_message(e), UsageError.exit_code, args)
        except Interrupted as e:
            code = _fail(e, "interrupted", str(e), e.exit_code, args)
        except Diverged as e:
            code = _fail(e, "diverged", str(e), e.exit_code, args)
        except MainrunError as e:
            code = _fail(e, "error", str(e), e.exit_code, args)
        except OSError as e:
            # The user can fix an OSError that names a path. An OSError without a path is a bug, unless the
            # disk is full.
            if e.filename is not None or e.errno in inputs.NO_SPACE:
                code = _refuse(e, args)
            else:
                code = _crash(e, args)
        except Exception as e:
            code = _crash(e, args)
        except SystemExit as e:  # if a pipe to another process breaks, Typer exits without a message
            if not isinstance(e.__context__, OSError):
                raise
            code = _crash(e.__context__, args)
        sys.exit(_final_code(code if isinstance(code, int) else 0))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            allowed = ", ".join(self.commands)
            guess = nearest(args[0], self.commands)
            raise UsageError(
                f"unknown command {args[0]!r}{guess}; "
                f"`{ctx.command_path} --help` lists the commands: {allowed}"
            )
        return super().resolve_command(ctx, args)


def commands(help: str) -> typer.Typer:
    """Create a command group that prints its help if no subcommand is given."""
    app = typer.Typer(cls=Group, help=help, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def _root(ctx: typer.Context) -> None:
        if ctx.invoked_subcommand is None:
            print(ctx.get_help())

    return app


def is_leader() -> bool:
    """Return whether this process prints results.

    Of the processes that torchrun starts, only rank 0 prints results.
    """
    return os.environ.get("RANK", "0") == "0"


def _drop_odd_sizes() -> None:
    """Remove COLUMNS and LINES from the environment if they are not decimal numbers.

    Rich accepts any Unicode digits in these variables, such as superscripts, but fails to convert them to an
    integer.
    """
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,6}", os.environ.get(name, "0")):
            del os.environ[name]


def _check_folder() -> None:
    """Raise UsageError if the current folder was deleted."""
    try:
        os.getcwd()
    except OSError as e:
        raise UsageError(
            f"the current folder cannot be used ({e.strerror}); change to another folder"
        ) from None


PATH_OPTIONS = (
    "--choices",
    "--figures",
    "--html",
    "--include",
    "--log",
    "--out",
    "--report",
    "--run",
    "--runs",
    "--store",
    "--svg",
    "--tables",
)


def _check_text(args: Sequence[str]) -> None:
    """Raise UsageError if an argument is not valid text.

    Arguments must be valid text because they are written to JSON files, tables and PDFs.
    """
    for previous, arg in pairwise(["", *args]):
        if arg == "" and previous in PATH_OPTIONS:
            raise UsageError(f"got {previous} '', which is empty; give a path")
        if arg in [f"{option}=" for option in PATH_OPTIONS]:
            raise UsageError(f"got {arg}'', which is empty; give a path")
        if re.search("[\x00\ud800-\udfff]", arg) is None:
            continue
        encoding = sys.getfilesystemencoding()
        if encoding != "utf-8":
            fix = f"the locale supports only {encoding}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
        else:
            fix = "encode it as UTF-8, and rename files whose names are not UTF-8"
        raise UsageError(f"got the argument {inputs.shown(arg)}, which is not UTF-8 text; {fix}")


def _check_caches() -> None:
    """Check the environment variables for the cache folder.

    This early check lets the error message name the wrong variable.
    """
    for name in ("MAINRUN_CACHE", "XDG_CACHE_HOME"):
        folder = os.environ.get(name)
        if folder:
            inputs.check_path(inputs.expanded(folder, name), name)


def _crash(e: Exception, args: Sequence[str]) -> int:
    first_line = f"{type(e).__name__}: {e}".splitlines()[0].strip()
    text = "; ".join([first_line, "--debug shows the traceback", *getattr(e, "__notes__", [])])
    return _fail(e, "crash", text, MainrunError.exit_code, args)


def _refuse(e: OSError, args: Sequence[str]) -> int:
    error = inputs.refusal(e)
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    return _fail(e, kind, str(error), error.exit_code, args)


def _fail(e: BaseException, kind: str, text: str, code: int, args: Sequence[str]) -> int:
    """Print an error and return the exit code."""
    if "--debug" in args:
        traceback.print_exception(e)
    if not is_leader():
        # Rank 0 usually prints the same error and exits, and torchrun then ends this process while it waits.
        time.sleep(5)
        kind = f"{kind} in process {os.environ['RANK']}"
    print(f"{kind}: {_readable(text)}", file=sys.stderr, flush=True)
    return code


MAX_MESSAGE = 2800  # the maximum length of an error message, in characters
MAX_LINE = 1200  # the maximum length of a line of an error message


def _readable(text: str) -> str:
    """Escape the control characters in a message and shorten the message if it is too long."""
    lines = [inputs.shortened(inputs.printable(line), MAX_LINE) for line in text.split("\n")]
    kept: list[str] = []
    length = 0
    for line in lines:
        length += len(line)
        if length > MAX_MESSAGE:
            return "\n".join([*kept, f"and {len(lines) - len(kept):,} more lines"])
        kept.append(line)
    return "\n".join(kept)


def _usage_message(e: typer.TyperException) -> str:
    """Return the message of a Typer error, with a suggested option and the command that shows the help."""
    text = e.format_message().rstrip(".")
    ctx = getattr(e, "ctx", None)
    if ctx is None:
        return f"{text}; `mainrun COMMAND --help` lists what is allowed"
    known: list[str] = []
    for param in ctx.command.params:
        known += [*param.opts, *param.secondary_opts]
    got = getattr(e, "option_name", None)
    if got and got not in known:
        text = f"unknown option {got!r}{nearest(got, known)}"
    elif "extra argument" in text and "=" in text:
        text += "; each key=value needs its own --set"
    return f"{text}; `{ctx.command_path} --help` lists what is allowed"


def validate_paths(param: typer.CallbackParam, value: Any) -> Any:
    """Raise UsageError if a path is not valid. All options and arguments for paths use this callback."""
    name = param.opts[0] if param.param_type_name == "option" else param.metavar
    paths = value if isinstance(value, list | tuple) else [value]
    for path in paths:
        if path is not None:
            inputs.check_path(path, str(name))
    return value


Preset = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="NAME|FILE",
        autocompletion=completion.presets,
        help="A preset, a step of a preset (NAME:STEP), or a TOML file.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=completion.settings,
        help="Set a config field. Can be repeated.",
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        autocompletion=completion.runs,
        help="A run id, a unique prefix of a run id, or a run directory.",
    ),
]
RunNames = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        autocompletion=completion.runs,
        help="Run ids, unique prefixes of run ids, or run directories.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", callback=validate_paths, help="The folder of the run directories."),
]
# The commands ignore the value of --debug, because `_fail` searches the command-line arguments for it.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


# -- interrupts


@contextmanager
def process_group() -> Iterator[None]:
    """Tune the memory allocator before torch is imported, and destroy the process group at exit."""
    from mainrun.core.hardware import tune_allocator

    tune_allocator()
    try:
        yield
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Interrupted` at SIGTERM or at the first Ctrl-C.

    Use this context manager outside of the training steps, for example while torch is imported. During the
    training steps, `mainrun.run` installs other signal handlers. Only the main thread can catch signals, so
    nothing is changed in other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = 0

    def stop(signum: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        raise KeyboardInterrupt  # libraries that catch Exception do not catch KeyboardInterrupt

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if signals == 1:
            raise Interrupted(
                "stopped outside the training steps; nothing is lost; run the same command again to resume"
            ) from None
        print(
            "stopped immediately; run the same command again to resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# -- output


def check_regular_file(path: Path, option: str, begins: bytes, kind: str) -> None:
    """Raise UsageError if an output file would overwrite a file of another kind.

    Empty files and earlier outputs of the same kind may be overwritten.

    begins: the first bytes of every file of the expected kind.
    """
    if path.is_dir():
        what = "a folder"
    elif path.exists() and not path.is_file():
        what = "a device or a pipe, not a file"
    elif path.is_file() and path.stat().st_size and path.open("rb").read(len(begins)) != begins:
        what = "a file of another kind and would be overwritten"
    else:
        return
    raise UsageError(f"got {option} {path}, which is {what}; give a new file or an earlier {kind}")


class _Outlet(io.FileIO):
    """A raw output stream that never raises errors. After the first error, the stream drops all output."""

    fault: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as e:
                self.fault = e
        return len(data)


def guard_streams() -> None:
    """Keep the command running if stdout or stderr cannot be written.

    Call this function before printing anything.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # open the closed descriptor, so that no other file gets its number
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, fd: int) -> TextIO:
    """Return a stream that writes to an `_Outlet` and escapes characters that cannot be encoded."""
    try:
        raw = _Outlet(fd if stream is None else stream.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # the stream is in memory, for example in tests
        return stream or sys.stdout
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        getattr(stream, "encoding", None) or "utf-8",
        "backslashreplace",
        line_buffering=stream is None or bool(getattr(stream, "line_buffering", False)),
        write_through=bool(getattr(stream, "write_through", False)),
    )


def _final_code(code: int) -> int:
    """Flush stdout and return the exit code.

    A write error on stdout, such as a full disk, counts as an error of the command. A closed pipe is not
    an error, because programs such as `head` close their input early.
    """
    if sys.stdout is None:
        return code
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    fault = raw.fault if isinstance(raw, _Outlet) else None
    if fault is None or fault.errno == errno.EPIPE or code:
        return code
    text = f"stdout cannot be written ({fault.strerror}), so the results are not shown"
    print(f"error: {text}; redirect it elsewhere and run the command again", file=sys.stderr, flush=True)
    return UsageError.exit_code


def emit(value: Any) -> None:
    """Print a value as JSON."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode))


def console(width: int = 200) -> Console:
    """Return a console for tables on stdout. If stdout is not a terminal, the console has the given width."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=width)


WIDEST = 100_000  # the width of a table that no terminal limits


def show_table(head: list[str], lines: list[list[str]]) -> None:
    """Print a table on stdout. If stdout is not a terminal, each row is one line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    print_table(table, console(width=WIDEST))


def print_table(table: Table, screen: Console) -> None:
    """Print a table. If the console is not a terminal, leave out the blanks at the end of each line."""
    if screen.is_terminal or screen.record:
        screen.print(table)
        return
    with screen.capture() as captured:
        screen.print(table)
    for line in captured.get().splitlines():
        screen.file.write(f"{line.rstrip()}\n")


def forward_cost_text(cost: dict[str, Any]) -> str:
    """Describe the cost of a model with routed blocks, which is the result of `ForwardCost.table`.

    For example, the text is "4.6M FLOPs per token, 0.584 of the dense model".
    """
    from mainrun.run.progress import short

    dense = cost["forward_flops_dense"]
    scored = cost["forward_flops"]
    training = cost["forward_flops_training"]
    text = f"{short(scored)} FLOPs per token, {scored / dense:.3f} of the dense model"
    if training != scored:
        text += f"; in training {short(training)}, {training / dense:.3f}"
    return text


def memory_words(memory: int, process: int) -> str:
    """Format an estimate of memory in bytes, and say which part of it every run needs.

    process: the memory of a process without a model, or 0 if the estimate counts only the tensors on a GPU.
    """
    from mainrun.run.progress import short

    if not process:
        return f"{short(memory)}B of tensors, besides the memory of CUDA itself"
    return f"{short(memory)}B, {short(process)}B of it for the process itself"


def field_value(value: Any) -> str:
    """Format the value of a config field in the syntax of --set."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) or '""'
