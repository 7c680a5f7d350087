"""ONNX Runtime: every op as ONNX nodes, and sessions that read and write torch's memory.

Needs the extra ``onnx`` (``pip install 'effpass[onnx]'``); nothing outside imports this package
before it is asked for.
"""
