"""The plan of a run, computed before the run starts. No module in this folder imports torch."""
