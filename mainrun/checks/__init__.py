"""Check finished runs: run the guards, audit the store, and repeat growth operations."""
