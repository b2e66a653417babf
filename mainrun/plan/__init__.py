"""Modules that plan a run without training. No module in this folder imports torch."""
