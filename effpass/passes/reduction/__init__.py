"""Token reduction: which tokens leave, what becomes of them, and the graph that does it."""
