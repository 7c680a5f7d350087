"""Raising: mathematics found in plain graphs and replaced by ops, one file an idiom.

This version raises at the front door only (``effpass.capture.known``): what arrives through no
known function is compiled as it was captured.
"""
