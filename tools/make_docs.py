"""Write the generated pages of docs: the commands and the config fields.

    python tools/make_docs.py            # write docs/cli.md, cli-results.md, cli-groups.md and config.md
    python tools/make_docs.py --check    # exit with code 1 if a page is not current

The pages come from the help of the command line and from the fields of `TrainConfig`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.ui.console import field_value
from mainrun.ui.presets_cli import describe_field

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- tools/make_docs.py writes this page. Edit the help texts in the code instead. -->"
EVERYWHERE = ("--json", "--debug", "--help")  # described once, at the top of docs/cli.md
# the commands of docs/cli-results.md
RESULTS = ("ls", "compare", "ensemble", "report", "board", "submit", "verify")

CLI = f"""{NOTE}

# Commands

This page lists the commands that train and use models. [Commands for results](cli-results.md)
compare, report, show, submit and verify. [Groups of commands](cli-groups.md) work on stores,
studies, benchmarks, growth and the Hugging Face hub. `mainrun COMMAND --help` prints the same text.

Results go to stdout, progress and errors to stderr. These options work with most commands:

| option | meaning |
|---|---|
| `--json` | print only JSON on stdout |
| `--debug` | show the traceback of an error |
| `-h`, `--help` | show the help of the command |
| `--version` | print the version (`mainrun --version`) |

[Exit codes](reproducibility.md#exit-codes) have the same meaning for all commands.
"""

RESULTS_PAGE = f"""{NOTE}

# Commands for results

[Commands](cli.md) lists the commands that train and use models, and the options that all commands
share.
"""

GROUPS = f"""{NOTE}

# Groups of commands

[Commands](cli.md) lists the commands that train and use models, and the options that all commands
share.
"""

CONFIG = f"""{NOTE}

# Config fields

`mainrun presets --fields` prints the same table, and `mainrun presets NAME` the fields that a
preset sets. [Training](training.md#a-run-is-a-config) explains the three classes.
[Options](options.md), [data](data.md), [growth](growth.md), [dynamic depth](dynamic.md) and
[low-rank terms](low-rank.md) explain most of the fields.

| field | default | allowed | class | meaning |
|---|---|---|---|---|
"""


def cell(text: str) -> str:
    """Return text as the cell of a table on one line."""
    words = re.sub(r"\s+", " ", text).strip()
    return words.replace("<", "&lt;").replace("|", r"\|").replace("*", r"\*")


def code(text: str) -> str:
    """Return text as code in a cell."""
    return f"`{text}`".replace("|", r"\|")


def option_rows(command: Any) -> Iterator[str]:
    """Yield a row for each argument and option of a command."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if not record:
            continue
        names = re.sub(r" <[^>]*>$", "", record[0])  # Typer's name of a type, such as <str>
        if not set(EVERYWHERE) & set(names.split(", ")):
            yield f"| {code(names)} | {cell(record[1])} |"


def help_text(command: Any) -> str:
    return re.sub(r"\s*\n\s*", " ", (command.help or "").replace("\f", "").strip())


def paragraph(command: Any) -> str:
    return textwrap.fill(help_text(command), 100, break_long_words=False, break_on_hyphens=False)


def command_section(name: str, command: Any) -> str:
    """Return the section of a command without subcommands."""
    rows = list(option_rows(command))
    table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows]) + "\n"
    return f"\n## mainrun {name}\n\n{paragraph(command)}\n" + (f"\n{table}" if rows else "")


def group_section(name: str, group: Any) -> str:
    """Return the section of a group, with one table for all its commands."""
    rows = []
    for sub, command in group.commands.items():
        rows.append(f"| **{code(f'{name} {sub}')}** | **{cell(help_text(command))}** |")
        rows += option_rows(command)
    table = "\n".join(["| command, argument or option | meaning |", "|---|---|", *rows])
    return f"\n## mainrun {name}\n\n{paragraph(group)}\n\n{table}\n"


def field_rows() -> Iterator[str]:
    for name in TrainConfig.model_fields:
        record = describe_field(name)
        default = code(str(field_value(record["default"])))
        yield (
            f"| `{name}` | {default} | {cell(record['allowed'])} | {record['class']} | "
            f"{cell(record['about'])} |"
        )


def pages() -> dict[str, str]:
    """Return the text of each generated page."""
    root: Any = typer.main.get_command(app)
    commands = {name: command for name, command in root.commands.items() if not command.hidden}
    groups = {name: command for name, command in commands.items() if hasattr(command, "commands")}
    results = {name: commands[name] for name in RESULTS}
    others = {name: command for name, command in commands.items() if name not in groups | results}
    return {
        "cli.md": CLI + "".join(command_section(*item) for item in others.items()),
        "cli-results.md": RESULTS_PAGE + "".join(command_section(*item) for item in results.items()),
        "cli-groups.md": GROUPS + "".join(group_section(*item) for item in groups.items()),
        "config.md": CONFIG + "\n".join(field_rows()) + "\n",
    }


def stale(folder: Path) -> list[str]:
    """Return the names of the pages in a folder that are missing or not current."""
    return [
        name
        for name, text in pages().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def main() -> None:
    if "--check" in sys.argv[1:]:
        old = stale(DOCS)
        if old:
            sys.exit(f"not current: {', '.join(old)}; run python tools/make_docs.py")
        return
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
