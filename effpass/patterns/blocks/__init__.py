"""Parts of Transformer blocks: projections, activations by name, layouts of heads."""
