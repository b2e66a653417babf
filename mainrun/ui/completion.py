"""Shell completion for bash, zsh and fish, which knows presets, fields, runs and studies.

The script of a shell calls mainrun with the line that is being typed. Typer finds the option or the argument
that is incomplete, and calls one of the functions below. Typer's own scripts are not used, because they split
words such as `lr=` and `demo:baseline` in bash, and add a blank after `lr=`.

The functions read names from files and import no slow module, because they run at every press of the tab key.
"""

from __future__ import annotations

import functools
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from mainrun.errors import UsageError

PACKAGE = Path(__file__).parents[1]
VARIABLE = "_MAINRUN_COMPLETE"  # is set while a script asks for completions
Candidate = tuple[str, str]  # a value and its description

# With COLUMNS, Typer writes each description on one line.
ASK = f"COLUMNS=999 {VARIABLE}=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS"
BASH = f"""_mainrun_completion() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" candidate separator prefix="" space=""
    local word="${{line##*[[:space:]]}}"
    for separator in = :; do  # readline replaces only what follows such a character
        if [[ $COMP_WORDBREAKS == *$separator* && $word == *$separator* ]]; then
            separator="${{word%"$separator"*}}$separator"
            if (( ${{#separator}} > ${{#prefix}} )); then prefix="$separator"; fi
        fi
    done
    COMPREPLY=()
    while IFS=$'\\t' read -r candidate _; do
        if [[ -z $candidate ]]; then continue; fi
        if [[ $candidate != *[=/] ]]; then space=yes; fi
        COMPREPLY+=("${{candidate#"$prefix"}}")
    done < <(env {ASK}="$line" "$1" 2>/dev/null)
    if [[ -z $space ]]; then compopt -o nospace; fi
}}
complete -o default -F _mainrun_completion mainrun
"""
ZSH = f"""#compdef mainrun
_mainrun() {{
    local -a closed open
    local value about line="${{(j: :)words[1,CURRENT-1]}} $PREFIX"
    while IFS=$'\\t' read -r value about; do
        [[ -n $value ]] || continue
        if [[ $value == *[=/] ]]; then
            open+=("${{value//:/\\\\:}}:$about")
        else
            closed+=("${{value//:/\\\\:}}${{about:+:$about}}")
        fi
    done < <(env {ASK}="$line" $words[1] 2>/dev/null)
    if (( $#open + $#closed )); then
        _describe mainrun closed -- open -S ''
    else
        _files
    fi
}}
if [[ $funcstack[1] == _mainrun ]]; then _mainrun "$@"; else compdef _mainrun mainrun; fi
"""
FISH = f"""complete --command mainrun --arguments "(env {ASK}=(commandline -cp) mainrun 2>/dev/null)"
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


# -- the options of mainrun


def show(shell: str) -> str:
    """Return the completion script of a shell."""
    if shell not in SCRIPTS:
        raise UsageError(f"got --show-completion {shell!r}; give one of: {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def install() -> str:
    """Install the completion for the shell that started mainrun, and return a message."""
    shell = _current_shell()
    home = Path.home()
    if shell == "bash":
        data = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
        script = Path(data) / "bash-completion/completions/mainrun"
        _add_line(home / ".bashrc", f"source '{script}'")
    elif shell == "zsh":
        folder = Path(os.environ.get("ZDOTDIR") or home)
        script = folder / ".zfunc/_mainrun"
        _add_line(folder / ".zshrc", f"fpath+=('{script.parent}'); autoload -Uz compinit; compinit")
    else:
        config = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
        script = Path(config) / "fish/completions/mainrun.fish"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPTS[shell], encoding="utf-8")
    return f"{script}\nnew {shell} sessions complete the arguments of mainrun"


def _current_shell() -> str:
    import shellingham

    try:
        name, _ = shellingham.detect_shell()
    except shellingham.ShellDetectionFailure:
        name = os.environ.get("SHELL", "")
    name = Path(name).name
    if name not in SCRIPTS:
        raise UsageError(
            f"the shell {name!r} is not supported; install the output of `mainrun --show-completion SHELL`, "
            f"where SHELL is one of: {', '.join(SCRIPTS)}"
        )
    return name


def _add_line(file: Path, line: str) -> None:
    """Append a line to a start-up file of the shell, unless the file has the line."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if line in text.splitlines():
        return
    with file.open("a", encoding="utf-8") as f:
        f.write(f"\n# completion of mainrun\n{line}\n")


# -- names


def presets(incomplete: str) -> list[Candidate]:
    """Complete a preset, a step of a preset, or a TOML file."""
    name, colon, _ = incomplete.partition(":")
    candidates: list[Candidate] = []
    for path in sorted((PACKAGE / "presets").glob("*.toml")):
        if not colon:
            candidates.append((path.stem, str(_toml(path).get("about", ""))))
        elif path.stem == name:
            candidates += _steps(path)
    return starting(incomplete, [*candidates, *_toml_files(incomplete)])


def _steps(path: Path) -> Iterator[Candidate]:
    for number, step in enumerate(_toml(path).get("steps", [])):
        yield f"{path.stem}:{step.get('name', number)}", step.get("about", "")


def studies(incomplete: str) -> list[Candidate]:
    """Complete a built-in study or a TOML file."""
    folder = PACKAGE.parent / "sweeps/studies"
    built_in = [(path.stem, str(_toml(path).get("about", ""))) for path in sorted(folder.glob("*.toml"))]
    return starting(incomplete, [*built_in, *_toml_files(incomplete)])


def settings(incomplete: str) -> list[Candidate]:
    """Complete the field of KEY=VALUE, and then its value."""
    name, equals, _ = incomplete.partition("=")
    if not equals:
        return starting(incomplete, [(f"{field}=", about) for field, about in fields()])
    values = [(f"{name}={value}", "") for value in _values(_schemas().get(name, {}))]
    return starting(incomplete, values)


def runs(ctx: typer.Context, incomplete: str) -> list[Candidate]:
    """Complete the id of a run in the folder of --runs or --out."""
    folder = ctx.params.get("runs")
    if not isinstance(folder, str | Path):  # the command has no option --runs
        folder = ctx.params.get("out") or "runs"
    ids = [path.parent.name for path in sorted(Path(folder).glob("*/config.json"))]
    return starting(incomplete, [(run_id, "") for run_id in ids])


def started_studies(ctx: typer.Context, incomplete: str) -> list[Candidate]:
    """Complete the name of a study in the folder of --out."""
    folder = Path(ctx.params.get("out") or "runs/studies")
    names = [path.parent.name for path in sorted(folder.glob("*/study.json"))]
    return starting(incomplete, [(name, "") for name in names])


def starting(incomplete: str, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that start with what is already typed."""
    return [candidate for candidate in candidates if candidate[0].startswith(incomplete)]


def _toml_files(incomplete: str) -> Iterator[Candidate]:
    """Yield the TOML files and the folders that a path may lead to."""
    folder = os.path.dirname(incomplete)
    for path in sorted(Path(folder or ".").glob("[!.]*")):
        if path.is_dir():
            yield os.path.join(folder, f"{path.name}/"), ""
        elif path.suffix == ".toml":
            yield os.path.join(folder, path.name), ""


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@functools.cache
def _schemas() -> dict[str, Any]:
    text = (PACKAGE / "schemas/preset.json").read_text(encoding="utf-8")
    schemas: dict[str, Any] = json.loads(text)["$defs"]
    return schemas


def fields() -> list[Candidate]:
    """Return the names of all config fields."""
    return [(name, schema["description"]) for name, schema in _schemas().items()]


def _values(schema: dict[str, Any]) -> list[str]:
    if "enum" in schema:
        return [str(value) for value in schema["enum"]]
    if schema.get("type") == "boolean":
        return ["true", "false"]
    default = schema.get("default")
    return [] if default in (None, "", []) else [str(default)]
