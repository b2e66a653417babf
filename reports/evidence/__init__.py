"""`mainrun report`: read finished runs and exported studies, compare them and write one PDF."""
