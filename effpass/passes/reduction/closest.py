"""For every source token its most similar destination: the op ``token_matching``."""

from __future__ import annotations

from effpass.ops.token_matching import closest

__all__ = ["closest"]
