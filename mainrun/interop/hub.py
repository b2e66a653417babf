"""`mainrun hub import`: check a Qwen2 checkpoint, and write a preset that starts from its weights."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.config import TrainConfig, from_dict
from mainrun.core.hardware import cache_dir
from mainrun.data.hub_files import REPOSITORY_RULE, Request, endpoint, is_repository, offline, request_errors
from mainrun.errors import HubError, UsageError
from mainrun.files import inputs
from mainrun.interop import qwen2
from mainrun.interop.routing_files import read_routing_fields
from mainrun.plan.recipes import check_name
from mainrun.store.rundir import write_text

FIRST_LINE = "# This preset was written by `mainrun hub import`."
AT_REVISION = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
BLOCK_SIZE = 1024
# the fields of a preset that do not depend on the checkpoint
TRAINING: dict[str, Any] = {
    "dtype": "bfloat16",
    "optimizer": "adamw",
    "lr": 1e-5,
    "lr_router": 1e-2,
    "lr_prior": 1e-3,
    "lr_student": 1e-3,
    "lr_lora": 1e-4,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "clip": 1.0,
    "schedule": "cosine",
    "warmup_frac": 0.01,
}


class LocatedCheckpoint(NamedTuple):
    """A checkpoint on this machine."""

    folder: Path
    about: str  # where the checkpoint comes from


def write_preset(
    source: str,
    out: Path,
    *,
    block_size: int = 0,
    pattern: str = "",
    capacity: float | None = None,
    force: bool = False,
) -> Path:
    """Check a checkpoint, write a preset that starts from it, and return the path of the preset.

    force: overwrite an earlier preset that has another text.
    """
    check_out(out)
    check_pattern(pattern, capacity)
    checkpoint = locate(source)
    fields = preset_fields(checkpoint.folder, block_size, pattern, capacity)
    text = to_toml(checkpoint.about, fields)
    if not force:
        check_unchanged(out, text)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def check_out(out: Path) -> None:
    """Raise UsageError if a file must not be overwritten, or if no preset can have its name."""
    from mainrun.ui.console import check_regular_file

    if out.suffix != ".toml":
        raise UsageError(f"got --out {out}; give a file that ends in .toml")
    check_name(out.stem, f"--out {out}")
    check_regular_file(out, "--out", FIRST_LINE.encode(), "preset of this command")


def check_unchanged(out: Path, text: str) -> None:
    """Raise UsageError if a preset exists with another text, because a user may have edited it."""
    if not out.exists():
        return
    earlier = out.read_bytes()
    if earlier and earlier != text.encode():
        raise UsageError(
            f"got --out {out}, which exists and differs from the new preset; "
            "give another file, or overwrite it with --force"
        )


def check_pattern(pattern: str, capacity: float | None) -> None:
    """Raise UsageError if a capacity has no effect, because no block of the pattern is routed."""
    if capacity is not None and pattern and set(pattern) == {"D"}:
        raise UsageError(
            f"got --capacity {capacity}, but --pattern {pattern} routes no block; "
            "give a pattern with routed blocks, such as DM, or leave out --capacity"
        )


def preset_fields(folder: Path, block_size: int, pattern: str, capacity: float | None) -> dict[str, Any]:
    """Return the fields of a preset for a checkpoint, after checking the whole checkpoint."""
    with naming(folder):
        config = qwen2.read_config(folder)
        fields = qwen2.model_fields(config)
    longest = config["max_position_embeddings"]
    if block_size > longest:
        raise UsageError(
            f"got --block-size {block_size}, but the checkpoint has {longest} positions; "
            f"give at most {longest}"
        )
    fields |= {"block_size": block_size or min(BLOCK_SIZE, longest)}
    with naming(folder):
        routing = read_routing_fields(folder)
    fields |= routing_fields(routing, folder, pattern, capacity)
    fields |= {"start": f"hf:{folder}", "tokenizer": f"hf:{folder}"} | TRAINING
    with naming(folder):
        check_tensors(folder, from_dict(fields))
    return fields


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Add to the message of a UsageError that a folder cannot be imported."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"{folder} cannot be imported: {e}") from None


def check_tensors(folder: Path, cfg: TrainConfig) -> None:
    """Raise UsageError if the tensors of a checkpoint are not those of the model of the config."""
    import torch

    from mainrun.interop.start import find_faults, read_checkpoint
    from mainrun.train import GPT

    start = read_checkpoint(folder, cfg)
    with torch.device("meta"):  # the check needs only the names and the shapes
        model = GPT(cfg, cfg.vocab_size)
    faults = find_faults(start, cfg, model)
    if faults:
        listed = "\n  ".join(faults)
        raise UsageError(
            f"its tensors are not those of the model that its config.json describes:\n  {listed}\n"
            "download the checkpoint again"
        )


def routing_fields(
    fields: dict[str, Any], folder: Path, pattern: str, capacity: float | None
) -> dict[str, Any]:
    """Return the fields of routed blocks, from the options or from the fields of an exported run."""
    if fields and pattern:
        raise UsageError(
            f"got --pattern {pattern}, but {folder} has routers for the layers {fields['block_pattern']}; "
            "leave out --pattern"
        )
    if pattern:
        # a soft gate would scale what the blocks have learnt
        fields = {"block_pattern": pattern, "gate": "straight"}
    if capacity is None:
        return fields
    if not fields:
        raise UsageError(f"got --capacity {capacity} without --pattern; add --pattern, such as --pattern DM")
    return fields | {"capacity": capacity}


# -- the preset


def to_toml(about: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a preset file."""
    table = {"about": about, **fields}
    lines = [FIRST_LINE]
    for name, value in table.items():
        lines.append(f"{name} = {_toml_value(value)}")
    text = "\n".join(lines) + "\n"
    try:
        written = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        written = {}
    if written != table:  # for example, TOML allows no DEL character in a path
        raise UsageError(f"{fields['start']} cannot be written in TOML; rename the folder")
    return text


def _toml_value(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


# -- the checkpoint


def locate(source: str) -> LocatedCheckpoint:
    """Return the checkpoint in a folder, or download a checkpoint from the hub."""
    path = inputs.expanded(source, "DIR")
    why = inputs.bad_path(source)
    if why:
        raise UsageError(f"got {inputs.shown(source, 80)}, but {why}")
    if os.path.lexists(path):
        # a full path, because a preset may be used from another folder
        folder = path.resolve()
        return LocatedCheckpoint(folder, f"starts from the Qwen2 checkpoint in {folder}")
    match = AT_REVISION.fullmatch(source)
    if match and not is_repository(match[1]):
        raise UsageError(
            f"got {inputs.shown(source, 80)}, which is neither a folder nor the name of a repository; "
            f"give the folder of a checkpoint, or {REPOSITORY_RULE}"
        )
    if not match:
        raise UsageError(
            f"got {inputs.shown(source, 80)}, which is no folder; "
            "give the folder of a checkpoint, or OWNER/NAME of a repository on the hub"
        )
    repository = match[1]
    commit = _commit(repository, match[2] or "main")
    folder = _download(repository, commit)
    return LocatedCheckpoint(folder, f"starts from {repository} at commit {commit} on the Hugging Face hub")


def _commit(repository: str, revision: str) -> str:
    """Return the full commit of a revision, after checking that its weights are safetensors."""
    from huggingface_hub import HfApi

    if COMMIT.fullmatch(revision) and offline():
        return revision
    with _hub_errors(repository, revision):
        info = HfApi(endpoint=endpoint()).model_info(repository, revision=revision, timeout=10)
    names = [file.rfilename for file in info.siblings or []]
    if not any(name.endswith(".safetensors") for name in names):
        raise HubError(
            f"{repository} at {revision} has no safetensors files, and mainrun loads no others; "
            f"its files: {', '.join(names[:10]) or 'none'}"
        )
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise HubError(
            f"{endpoint()} did not return a commit for {repository} at {revision}; check HF_ENDPOINT"
        )
    return info.sha


def _download(repository: str, commit: str) -> Path:
    """Download a checkpoint to the cache, and return its folder. The config is checked first."""
    from huggingface_hub import snapshot_download

    for patterns in (["config.json"], ["*.json", "*.safetensors"]):
        with _hub_errors(repository, commit):
            folder = snapshot_download(
                repository,
                revision=commit,
                cache_dir=cache_dir() / "hub",
                endpoint=endpoint(),
                allow_patterns=patterns,
                local_files_only=offline(),
            )
        with naming(Path(folder)):
            qwen2.read_config(Path(folder))
    return Path(folder).absolute()


def _hub_errors(repository: str, revision: str) -> AbstractContextManager[None]:
    """Convert the errors of requests for a checkpoint, as `request_errors` does."""
    instead = "give the folder or the full commit of a checkpoint that was downloaded before"
    return request_errors(Request(f"{repository} at {revision}", instead))
