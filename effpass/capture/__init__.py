"""effpass.capture."""
