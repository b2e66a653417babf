"""Read what a finished run cost from its summary. Summaries of older versions lack some of the facts."""

from __future__ import annotations

from typing import Any

Summary = dict[str, Any]


def forward_flops(summary: Summary) -> float | None:
    """Return the number of FLOPs per token in a forward pass of the scored model.

    The number of a routed model is based on the shares of tokens that its routers selected. The number is
    None if the summary does not contain the FLOPs of the run.
    """
    if "routing" in summary:
        return float(summary["routing"]["forward_flops"])
    if summary.get("segments"):
        return summary["segments"][-1]["flops_per_token"] / 3  # a training step costs three forward passes
    if "flops" not in summary:
        return None
    return summary["flops"] / (3 * _passes(summary) * summary["tokens"])


def members(summary: Summary) -> int:
    """Return the number of models whose probabilities are averaged for the score."""
    return int(summary["presentations"].get("ensemble_members", 1))


def presentations_per_epoch(summary: Summary) -> int:
    """Return how often an epoch shows each token of train to the models of the run, taken together."""
    return _passes(summary) * members(summary)


def derived_costs(summary: Summary) -> Summary:
    """Return the costs that a new summary contains so that its readers need not derive them."""
    return {
        "forward_flops": forward_flops(summary),
        "presentations_per_epoch": presentations_per_epoch(summary),
    }


def _passes(summary: Summary) -> int:
    """Return the number of forward passes of each model in a training step. R-Drop makes two."""
    return int(summary["presentations"].get("forward_passes", 1))


def machine(summary: Summary) -> str:
    """Describe the machine that trained a run: its processor, its threads, its number format.

    If the sessions of a run had different machines, all of them are described.
    """
    classes = summary.get("machine_classes") or [summary.get("machine_class") or {}]
    return "; ".join(dict.fromkeys(map(_describe, classes)))


def _describe(machine_class: dict[str, Any]) -> str:
    parts = [str(machine_class.get("device", "unknown"))]
    processes = machine_class.get("processes", 1)
    if processes != 1:
        parts.append(f"{processes} processes")
    threads = machine_class.get("threads")
    if threads is not None:
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if "dtype" in machine_class:
        parts.append(str(machine_class["dtype"]))
    if machine_class.get("compile"):
        parts.append("compiled")
    return ", ".join(parts)
