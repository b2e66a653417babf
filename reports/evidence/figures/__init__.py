"""The figures of a report: one module per figure, and a registry of all of them."""
