"""Token reduction: which tokens leave a sequence, what becomes of them, and the graph that does it."""
