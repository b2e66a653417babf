"""The report of `mainrun report`: finished runs and exported studies are read, compared and set as one PDF."""
