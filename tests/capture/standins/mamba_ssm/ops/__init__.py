"""A stand-in for the package of this name: signatures and reference functions only."""
