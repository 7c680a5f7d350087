"""Normal forms of products and quotients of tensors, and the way back to operations."""
