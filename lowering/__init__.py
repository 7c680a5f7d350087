"""Lowerings: where the doing is."""
