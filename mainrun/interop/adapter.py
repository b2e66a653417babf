"""Export the low-rank terms of a run as an adapter, in the format of `peft`.

An adapter is only right together with the weights that it was trained with. These must be a checkpoint that
other people can load, so the run must start from a checkpoint and must not have changed its weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mainrun.errors import UsageError
from mainrun.files import inputs
from mainrun.interop.bases import Base, find_base
from mainrun.interop.card import adapter_card
from mainrun.interop.names import checkpoint_name
from mainrun.interop.qwen2_export import checkpoint_tensors
from mainrun.interop.routing_files import write_routing
from mainrun.interop.source import ExportedModel, inexpressible
from mainrun.store.checkpoint import save_tensors
from mainrun.store.rundir import to_json

PREFIX = "base_model.model."  # peft wraps the model in two modules, whose names it keeps


class Term(NamedTuple):
    """The low-rank term of one matrix."""

    name: str  # the name of the matrix in the checkpoint, without .weight
    a: Tensor  # (rank, columns)
    b: Tensor  # (rows, rank)
    alpha: float  # the term is alpha / rank * b @ a

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def kind(self) -> str:
        """The last part of the name, such as q_proj."""
        return self.name.rpartition(".")[2]


def check_adapter(source: ExportedModel, published: bool) -> Base:
    """Return the base of an adapter. Raise UsageError with all reasons if there can be no adapter.

    published: whether other people will load the adapter, so that its base must be on the hub.
    """
    reasons = inexpressible(source.cfg)
    names = [name for name, _ in source.model.named_parameters() if name.endswith(".lora_a")]
    if not names:
        reasons.append("the model has no low-rank terms (set attn_lora_rank or mlp_lora_rank)")
    if "embed.lora_a" in names:
        reasons.append(
            "embed_lora_rank is set, but peft would add the term to only one end of a model with a tied head "
            "(export without --adapter to merge it, or use the op merge_lora_weights)"
        )
    kind, _, path = source.run_cfg.start.partition(":")
    folder = inputs.expanded(path, "start")
    if kind != "hf":
        reasons.append(
            f"start={source.run_cfg.start or '(empty)'} is no checkpoint that peft can load (only runs with "
            "start=hf:DIR have a base)"
        )
    elif published and find_base(folder, published).revision is None:
        reasons.append(
            f"its base is the folder {folder}, which other people cannot load (push the base first, import "
            "it with `mainrun hub import OWNER/NAME`, and train the run again from the imported base)"
        )
    if not reasons:
        reasons += base_differences(source, folder)
    if reasons:
        raise UsageError(f"{source.run.path} cannot be exported as an adapter: {'; '.join(reasons)}")
    return find_base(folder, published)


def base_differences(source: ExportedModel, folder: Path) -> list[str]:
    """Return a reason for an error if the weights below the low-rank terms are not those of the base."""
    ours = checkpoint_tensors(source, merge=False)
    for name, original in base_tensors(folder):
        tensor = ours.get(name)
        if tensor is not None and torch.equal(original.to(tensor.dtype), tensor):
            del ours[name]
    if not ours:
        return []
    changed = ", ".join(list(ours)[:3])
    more = f" and {len(ours) - 3} more" if len(ours) > 3 else ""
    return [
        f"the run also changed {changed}{more}, which an adapter cannot contain "
        "(export without --adapter, or train with base_frozen=true)"
    ]


def base_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the tensors of a checkpoint, one tensor at a time."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UsageError(
            f"the base {folder} does not exist; restore the checkpoint that the run started from"
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (the file is no dictionary)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise UsageError(f"{path} is not a valid safetensors file ({e}); restore it") from None


def terms_of(source: ExportedModel) -> list[Term]:
    """Return the low-rank terms of the model, in the order of its parameters."""
    terms = []
    for name, a in source.model.named_parameters():
        if not name.endswith(".lora_a"):
            continue
        part = name.removesuffix(".lora_a")
        layer: Any = source.model.get_submodule(part)
        target = checkpoint_name(f"{part}.weight").removesuffix(".weight")
        if not target:
            raise UsageError(f"a Qwen2 checkpoint has no matrix for {name}; this adapter cannot be exported")
        alpha = round(layer.scale * len(a), 9)  # without the rounding error of alpha / rank
        terms.append(Term(target, a.detach(), layer.lora_b.detach(), alpha))
    return terms


def write_adapter(source: ExportedModel, base: Base, folder: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors, the routers and README.md."""
    terms = terms_of(source)
    tensors = {}
    for term in terms:
        tensors[f"{PREFIX}{term.name}.lora_A.weight"] = term.a.to(source.dtype)
        tensors[f"{PREFIX}{term.name}.lora_B.weight"] = term.b.to(source.dtype)
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config = adapter_config(terms, base, source.cfg.n_layer)
    (folder / "adapter_config.json").write_text(to_json(config), encoding="utf-8")
    write_routing(source.model, folder)
    (folder / "README.md").write_text(adapter_card(source, base), encoding="utf-8")


def adapter_config(terms: list[Term], base: Base, layers: int) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    rank = Counter(term.rank for term in terms).most_common(1)[0][0]
    alpha = Counter(term.alpha for term in terms).most_common(1)[0][0]
    return {
        "alpha_pattern": _pattern(terms, {term.name: term.alpha for term in terms}, alpha),
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _pattern(terms, {term.name: term.rank for term in terms}, rank),
        "revision": base.revision,
        "target_modules": _targets(terms, layers),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(terms: list[Term], layers: int) -> list[str]:
    """Return the kinds of matrices with a term, or the full names if a kind has no term in some layer."""
    count = Counter(term.kind for term in terms)
    if all(number == layers for number in count.values()):
        return sorted(count)
    return [term.name for term in terms]


def _pattern(terms: list[Term], values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """Return the values that differ from the usual value, by kind of matrix, or by full name if need be.

    peft reads each key as a regular expression for the end of a name.
    """
    of_kind: dict[str, set[Any]] = {}
    for term in terms:
        of_kind.setdefault(term.kind, set()).add(values[term.name])
    pattern = {}
    for term in terms:
        value = values[term.name]
        if value == usual and len(of_kind[term.kind]) == 1:
            continue
        key = term.kind if len(of_kind[term.kind]) == 1 else re.escape(term.name)
        pattern[key] = value
    return pattern
