"""Packing: which tokens are padding, what may run on the others alone, and the graph that does."""
