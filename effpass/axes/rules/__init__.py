"""What ATen operations and effpass's ops do to axes, by family."""

from effpass.axes.rules import mixing, products, views

__all__ = ["mixing", "products", "views"]
