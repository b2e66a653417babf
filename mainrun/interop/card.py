"""Write README.md of an exported model: how to load it, its scores, its guards and its fingerprints.

A README may be published. It therefore names no folder of this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mainrun import __version__
from mainrun.config import TrainConfig
from mainrun.interop.bases import Base, find_base
from mainrun.interop.source import ExportedModel

SCORES = ("split", "full", "official", "loss", "bits_per_byte", "coverage", "tokens")
PATH_FIELDS = ("corpus", "start", "tokenizer")  # fields whose values may contain a path
PATH_KINDS = ("file", "mix", "hf", "run")  # what precedes the colon before a path


def checkpoint_card(source: ExportedModel) -> str:
    """Return the README of a Qwen2 checkpoint."""
    lines = [
        *_front_matter({"library_name": "transformers", "pipeline_tag": "text-generation"}),
        f"# {source.run_cfg.run_id}",
        "",
        f"A language model with {_count(source)} parameters, trained with mainrun {__version__}. It has the "
        "format of a Qwen2 checkpoint:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```",
        "",
        *_about_tokens(source),
        *_about_routing(source),
        *_results(source),
    ]
    return "\n".join(lines).rstrip() + "\n"


def adapter_card(source: ExportedModel, base: Base) -> str:
    """Return the README of an adapter. base: the checkpoint that the adapter belongs to."""
    name = base.name if base.revision else Path(base.name).name
    matter = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base.revision:
        matter["base_model"] = base.name
    lines = [
        *_front_matter(matter),
        f"# {source.run_cfg.run_id}",
        "",
        f"An adapter for {_code(name)}, trained with mainrun {__version__}. It contains low-rank terms, "
        "which peft adds to the weights of the base model:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{name}")',
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        "```",
        "",
        *_about_routing(source),
        *_results(source),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(fields: dict[str, str]) -> list[str]:
    """Return the metadata that the hub reads at the top of a README."""
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return ["---", *lines, "tags:", "- mainrun", "---", ""]


def _count(source: ExportedModel) -> str:
    return f"{sum(p.numel() for p in source.model.parameters()):,}"


# -- sections


def _about_tokens(source: ExportedModel) -> list[str]:
    """Describe what the model expects before a text, and which texts transformers encodes differently."""
    if source.tokenizer.kind == "hf":
        return ["tokenizer.json is the file of the checkpoint that the run took its tokenizer from.", ""]
    lines = ["In training, each text followed the token `<eos>` (id 1). Begin each prompt with this token."]
    if source.tokenizer.kind == "bpe":
        lines.append(
            "The vocabulary has tokens only for the bytes of its training texts. mainrun writes other "
            "characters as `\\x{HEX}`, and `transformers` replaces them with `<unk>`."
        )
    else:
        lines.append(
            "`transformers` encodes texts as mainrun does, except texts with `<pad>`, `<eos>`, `<unk>`, "
            "`\\x{` or the characters U+2581 and U+2585."
        )
    lines.append("Load the tokenizer without `trust_remote_code`, because the folder contains no code.")
    return [" ".join(lines), ""]


def _about_routing(source: ExportedModel) -> list[str]:
    cfg = source.cfg
    if not cfg.routed_layers:
        return []
    return [
        "## Routing",
        "",
        f"The blocks of this model have the kinds {_code(cfg.letters)} and the capacity {cfg.capacity:g}. D "
        "is dense. A block of kind M, S or T has a router and processes only the tokens that it selects.",
        "",
        "**`transformers` runs the model dense.** It ignores the routers, and each block processes all "
        "tokens. Its loss therefore differs from the scores below, which mainrun measured with the routers. "
        "The routers are in routing.safetensors and routing.json, which `mainrun hub import` reads.",
        "",
    ]


def _results(source: ExportedModel) -> Iterator[str]:
    """Yield the sections about scores, guards and fingerprints."""
    yield from ["## Scores", ""]
    rows = scores(source)
    if rows:
        yield from _table(SCORES, [[_number(row[name]) for name in SCORES] for row in rows])
        yield ""
        yield (
            f"`full` and `official` are in nats per character, and `loss` is in nats per token. The scores "
            f"are those of step {source.step:,}, on held-out texts, computed in {source.cfg.dtype}. "
            f"{_about_dtype(source)}"
        )
    else:
        yield f"There are no scores for the weights of step {source.step:,}, because {_no_summary(source)}."
    yield from ["", "## Guards", ""]
    if source.summary and source.summary.get("guards"):
        guards = source.summary["guards"]
        rows_of_guards = []
        for guard in guards:
            detail = without_folders(guard["detail"], source.run_cfg)
            rows_of_guards.append([guard["name"], guard["status"], detail])
        yield from _table(("guard", "status", "detail"), rows_of_guards)
    elif source.summary:
        yield "The run has no guards."
    else:
        yield f"The guards have not checked these weights, because {_no_summary(source)}."
    yield from ["", "## Fingerprints", ""]
    yield from _table(("of", "value"), list(_fingerprints(source)))


def _no_summary(source: ExportedModel) -> str:
    """Return the reason why the summary of the run says nothing about the weights."""
    if source.finished:
        return "these weights differ from those that were scored"
    return "the run is not finished"


def _about_dtype(source: ExportedModel) -> str:
    name = str(source.dtype).removeprefix("torch.")
    if name == "float32":
        return "The exported weights are the scored weights, in float32."
    return f"The exported weights are rounded to {name}, so their scores differ slightly."


def scores(source: ExportedModel) -> list[dict[str, Any]]:
    """Return the scores of the exported weights, one row per split.

    Only summary.json tells by a hash which weights were scored.
    """
    if source.summary is None:
        return []
    splits = source.summary["scores"]
    return [splits[split]["last"] for split in ("val", "dev") if split in splits]


def _fingerprints(source: ExportedModel) -> Iterator[list[str]]:
    cfg = source.run_cfg
    file = source.run.config_file()
    yield ["config", cfg.digest]
    yield ["tokenizer", source.tokenizer.digest]
    for name, value in sorted(file.get("fingerprints", {}).items()):
        yield [f"data: {name}", str(value)]
    for name in PATH_FIELDS:
        value = getattr(cfg, name)
        if value:
            yield [name, without_folders(value, cfg)]
    if source.summary is None:
        return
    yield ["weights", source.summary["weights"]]
    for name, value in sorted(source.summary.get("versions", {}).items()):
        yield [f"version of {name}", str(value)]
    machine = source.summary.get("machine_class", {})
    yield ["machine", ", ".join(f"{name} {value}" for name, value in sorted(machine.items()))]


def without_folders(text: str, cfg: TrainConfig) -> str:
    """Shorten the paths of the config to the names of files, or of checkpoints on the hub."""
    for name in PATH_FIELDS:
        kind, _, path = getattr(cfg, name).partition(":")
        if kind not in PATH_KINDS or "/" not in path:
            continue
        base = find_base(Path(path), published=True)
        short = f"{base.name}@{base.revision}" if base.revision else base.name
        text = text.replace(path, short)
    return text


# -- Markdown


def _code(text: str) -> str:
    return f"`{text}`"


def _number(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row]
        yield "| " + " | ".join(cells) + " |"
