"""effpass.patterns."""
