"""Create reports of runs and studies (`evidence`), and submissions that others can verify (`submission`)."""
