"""What every command has in common: how it ends, its usual options, what it prints. No torch; Rich when there is a table."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mainrun.errors import Diverged, Interrupted, MainrunError, UsageError, nearest, plain_warnings

if TYPE_CHECKING:
    from rich.console import Console


class Group(TyperGroup):
    """Turns every way a command can end into an exit code and at most one message on stderr."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        args = list(sys.argv[1:] if args is None else args)
        plain_warnings()
        try:
            code = super().main(args, "mainrun", standalone_mode=False)  # a KeyboardInterrupt comes back as 130
        except typer.TyperException as e:  # unknown command or option, a missing or misshapen argument
            code = _fail(e, "error", _usage(e), UsageError.exit_code, args)
        except Interrupted as e:
            code = _fail(e, "interrupted", str(e), e.exit_code, args)
        except Diverged as e:
            code = _fail(e, "diverged", str(e), e.exit_code, args)
        except MainrunError as e:
            code = _fail(e, "error", str(e), e.exit_code, args)
        except Exception as e:
            text = f"{type(e).__name__}: {e}".strip().splitlines()[0]
            hints = ", ".join(["--debug shows the traceback", *getattr(e, "__notes__", [])])
            code = _fail(e, "crash", f"{text}; {hints}", MainrunError.exit_code, args)
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            allowed = ", ".join(self.commands)
            known = f"`{ctx.command_path} --help` lists them: {allowed}"
            raise UsageError(f"unknown command {args[0]!r}{nearest(args[0], self.commands)}; {known}")
        return super().resolve_command(ctx, args)


def commands(help: str) -> typer.Typer:
    """A command that has commands of its own; alone it shows its help."""
    app = typer.Typer(cls=Group, help=help, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def _root(ctx: typer.Context) -> None:
        if ctx.invoked_subcommand is None:
            print(ctx.get_help())

    return app


def leads() -> bool:
    """Of the processes that torchrun starts one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _fail(e: BaseException, kind: str, text: str, code: int, args: Sequence[str]) -> int:
    if "--debug" in args:
        traceback.print_exception(e)
    if not leads():  # the leader mostly says the same, and torchrun then ends the others while they wait here
        time.sleep(5)
        kind = f"{kind} in process {os.environ['RANK']}"
    print(f"{kind}: {text}", file=sys.stderr, flush=True)
    return code


def _usage(e: typer.TyperException) -> str:
    """Typer's own errors in our form: got, nearest, where the allowed ones are listed."""
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


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the run directories.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read by _fail


# -- how it ends


@contextmanager
def process_group() -> Iterator[None]:
    """Memory before torch takes any; and the processes that torchrun started part in order."""
    from mainrun.host import tune_allocator

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
            raise Interrupted("stopped outside the training steps; nothing is lost, start the same command again") from None
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def check_place(path: Path, option: str, begins: bytes, kind: str) -> None:
    """What is written whole replaces what lies there: that may be an earlier one, never a folder, a device or somebody's other file."""
    if path.is_dir():
        what = "a folder"
    elif path.exists() and not path.is_file():
        what = "a device or a pipe, not a file"
    elif path.is_file() and path.stat().st_size and path.open("rb").read(len(begins)) != begins:
        what = f"a file that is no {kind}, and would be lost"
    else:
        return
    raise UsageError(f"got {option} {path}, {what}; give the name of a new file, or of an earlier {kind}")


# -- what it prints


def emit(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def console() -> Console:
    """For tables on stdout. In a pipe or a file nothing is wrapped to a width that nobody has."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def show_table(head: list[str], lines: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console().print(table)
