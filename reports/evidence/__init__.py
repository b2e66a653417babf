"""Implement `mainrun report`, which writes a PDF that compares finished runs and exported studies."""
