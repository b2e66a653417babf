"""Import torch and exclude its objects from garbage collection.

The objects of torch live as long as the process. If the garbage collector visited all of them, importing
torch would take a tenth longer.
"""

import gc

import torch  # noqa: F401

gc.freeze()
