"""Bundle a run with its code and its report, and verify bundles."""
