"""Which dim of one tensor is which of another: views, contractions, projections, activations."""
