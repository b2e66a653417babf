"""Draw the figures of a report. Each figure has its own module, and `registry.py` lists all figures."""
