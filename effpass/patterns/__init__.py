"""Raising: mathematics found in plain graphs and replaced by ops, one file an idiom.

What several idioms read a graph with lies in folders, named for what they read: ``loops``,
``scans``, ``products``, ``chunks``, ``taps``, ``blocks`` and ``softmax``.
"""
