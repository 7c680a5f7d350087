"""Parts of ``effpass.passes.packed_rows``."""
