"""Bundle a run with its code and report, and verify bundles."""
