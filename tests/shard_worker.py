"""Train several configs in the processes of one torchrun: `shard_worker.py JOBS.json`, for tests/test_shard.py.

JOBS.json is a list of [config, out, until]. The errors of process 0 are written to JOBS.json.errors.
"""

import json
import os
import sys
from pathlib import Path

from mainrun.config import from_dict
from mainrun.errors import Interrupted, MainrunError
from mainrun.run.session import train


def main(jobs: Path) -> None:
    errors = []
    for config, out, until in json.loads(jobs.read_text()):
        try:
            train(from_dict(config), Path(out), until=until)
        except Interrupted:
            pass
        except MainrunError as e:
            errors.append(str(e))
    if os.environ["RANK"] == "0":
        jobs.with_suffix(".errors").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
