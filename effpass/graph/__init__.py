"""effpass.graph."""
