# The types of the public names. They are not in __init__.py, because modules that import `mainrun` would then
# import each other.
from mainrun.api.documents import report as report
from mainrun.api.runs import Run as Run
from mainrun.api.runs import compare as compare
from mainrun.api.runs import run as run
from mainrun.api.runs import runs as runs
from mainrun.api.studies import Study as Study
from mainrun.api.studies import study as study
from mainrun.api.studies import sweep as sweep
from mainrun.api.training import train as train
from mainrun.config import TrainConfig as TrainConfig
from mainrun.config import from_dict as from_dict
from mainrun.errors import ConfigError as ConfigError
from mainrun.errors import CorpusError as CorpusError
from mainrun.errors import Diverged as Diverged
from mainrun.errors import Interrupted as Interrupted
from mainrun.errors import MainrunError as MainrunError
from mainrun.errors import RunError as RunError
from mainrun.errors import UsageError as UsageError
from mainrun.plan.recipes import load as load

__version__: str
__all__: list[str]
