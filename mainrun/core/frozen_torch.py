"""Imports torch, and takes its objects out of garbage collection.

They live as long as the process. Without this, importing mainrun.train walks over all of them, which takes
a tenth of the time that torch's own import takes.
"""

import gc

import torch  # noqa: F401

gc.freeze()
