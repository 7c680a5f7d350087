"""What stretch of time every element of a tensor stands for: trees of combines, read back."""
