"""Model files: written whole or not at all; weights beside the model where it would pass 2 GiB.

A data file is named by its content, so that a model that is replaced never reads the new one's
weights: the new data is in place before the new model is, and the old data goes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import unload_from_model

EXTERNAL_BYTES = 2**31 - 2**24  # protobuf's limit, less room for the graph itself
SMALLEST_EXTERNAL = 1024  # bytes of a tensor worth moving out of the graph
DATA_HASH = "effpass.data_sha256"
DATA_NAME = "effpass.data"


class FileError(Exception):
    """A model file that cannot be written or read; the text names it, and why."""


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all constants of the graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)


@contextlib.contextmanager
def written(model: ir.Model, path: Path) -> Iterator[Path]:
    """Writes ``model`` beside ``path`` under a passing name, which the block may check.

    When the block ends well the files move to their place; otherwise they vanish and whatever was
    at ``path`` stays. Raises FileError.
    """
    if path.is_dir():
        raise FileError(f"expected a path of a file to write, found the directory {path}")
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise FileError(f"cannot write into {path.parent}: {error.strerror}") from error
    before = _data_of(path)
    with folder as name:
        try:
            draft = Path(name) / path.name
            data = _save(model, draft)
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}") from error
        yield draft
        if data is not None:
            os.replace(data, path.parent / data.name)
        os.replace(draft, path)
    if before is not None and (data is None or data.name != before.name):
        before.unlink(missing_ok=True)


def _save(model: ir.Model, path: Path) -> Path | None:
    """Writes the model, and answers its data file if it has one."""
    if weight_bytes(model) <= EXTERNAL_BYTES:
        ir.save(model, path)
        _sync(path)
        return None
    passing = "weights.data"
    unload_from_model(model, path.parent, passing, size_threshold_bytes=SMALLEST_EXTERNAL)
    digest = sha256(path.parent / passing)
    data = path.parent / f"{path.stem}-{digest[:12]}.data"
    os.replace(path.parent / passing, data)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                data.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=path.parent,
            )
    model.metadata_props.update({DATA_NAME: data.name, DATA_HASH: digest})
    ir.save(model, path)
    _sync(data)
    _sync(path)
    return data


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, metadata: dict[str, str]) -> None:
    """Raises FileError when the data file of a model is missing, or is not what was written."""
    if DATA_NAME not in metadata:
        return
    data = path.parent / metadata[DATA_NAME]
    if not data.is_file():
        raise FileError(f"{path} needs its weights in {data}, which is missing; copy both files")
    if sha256(data) != metadata[DATA_HASH]:
        raise FileError(f"{data} is not the file that {path} was written with: export again")


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a model file, without its weights. Raises FileError."""
    if not path.is_file():
        raise FileError(f"there is no model at {path}")
    try:
        return dict(ir.load(path).metadata_props)
    except Exception as error:  # protobuf's own classes
        raise FileError(f"{path} is not an ONNX model: {error}") from error


def _data_of(path: Path) -> Path | None:
    """The data file that effpass wrote for the model at ``path``."""
    if not path.is_file():
        return None
    with contextlib.suppress(FileError):
        name = metadata_of(path).get(DATA_NAME)
        return None if name is None else path.parent / name
    return None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
