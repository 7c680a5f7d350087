"""Straight-line code that was a loop over time: its steps, their template, and that rolled up."""
