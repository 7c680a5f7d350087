"""Rewrites of ops into ops, one file an idea: each says if it is exact, and what it declined."""
