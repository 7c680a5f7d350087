"""Rows: sequences packed end to end without padding, their boundaries, and the way back."""

from effpass.rows.dataset import PackedDataset
from effpass.rows.packed import Rows, pack, padding_rate
from effpass.rows.plan import Plan
from effpass.rows.policies import POLICIES
from effpass.rows.row import Row, check_row

__all__ = [
    "POLICIES",
    "PackedDataset",
    "Plan",
    "Row",
    "Rows",
    "check_row",
    "pack",
    "padding_rate",
]
