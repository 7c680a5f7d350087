"""Chunked scans read back: dims as factors, decays, sums of products, and the roles of tensors."""
