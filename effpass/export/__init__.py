"""ONNX: unmodified models as files that ONNX Runtime runs. Needs the extra ``onnx``."""
