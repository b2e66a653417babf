"""Implement `mainrun report`, which compares finished runs and exported studies in a PDF."""
