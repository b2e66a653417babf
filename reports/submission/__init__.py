"""Submissions: bundle a run with its code and report, and verify such a bundle."""
