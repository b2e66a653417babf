"""Train configs in the processes of one torchrun: `shard_worker.py JOBS.json`, for tests/test_shard.py.

JOBS.json contains a list of [config, out, until]. If `until` is -1, the worker measures the state after one
step instead of training, and each process writes its measurements to OUT.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mainrun.config import from_dict
from mainrun.core.sharding import exact_copy, trained_tensors
from mainrun.data.batches import Batches
from mainrun.errors import Interrupted
from mainrun.run.session import train
from mainrun.train import TrainStep, set_up


def measure(config: dict[str, Any], out: Path) -> None:
    """Write the numbers of weights, gradients and moments that this process holds after a training step."""
    setup = set_up(from_dict(config))
    state = setup.start()
    step = TrainStep(state, setup.device)
    x, y = Batches(setup.cfg, setup.data.splits["train"]).at(0)
    inputs = setup.plan.at(0)
    step.gradients(setup.device.put(x), setup.device.put(y), inputs)
    step.update(inputs)
    parts = trained_tensors(state.model)
    moments = 0
    for name, tensor in state.optimizers.state().items():
        if not name.endswith("/step"):
            moments += tensor.untyped_storage().nbytes() // 4
    held = {
        "whole": sum(p.numel() for p in state.model.parameters()),
        "weights": sum(p.numel() for p in parts.values()),
        "gradients": sum(p.grad.numel() for p in parts.values() if p.grad is not None),
        "moments": moments,
        "gathered": [name for name, p in state.model.named_parameters() if not hasattr(p, "placements")],
    }
    exact = exact_copy(state.model.eval())
    exact.cfg = setup.cfg
    with torch.no_grad():
        exact_logits = exact.eval()(setup.device.put(x))
        logits = state.model(setup.device.put(x))
    assert exact_logits.dtype == torch.float64
    held["gap"] = float((exact_logits - logits).abs().max())
    out.mkdir(exist_ok=True)
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(held))


def main(jobs: Path) -> None:
    for config, out, until in json.loads(jobs.read_text()):
        if until < 0:
            measure(config, Path(out))
            continue
        try:
            train(from_dict(config), Path(out), until=until)
        except Interrupted:
            assert until


if __name__ == "__main__":
    main(Path(sys.argv[1]))
