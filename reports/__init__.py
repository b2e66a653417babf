"""Reports of finished runs and studies (`evidence`), and submissions that others can check (`submission`)."""
