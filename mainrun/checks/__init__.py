"""Checks of finished work: the guards of a score, the audit of a store, and repeated growth operations."""
