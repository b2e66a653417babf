"""The evidence: what a run's figures are shown with, and what others need to check them."""
