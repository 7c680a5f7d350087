"""effpass."""
