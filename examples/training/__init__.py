"""The parts of ``train_packed_mamba.py``."""
