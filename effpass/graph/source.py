"""Where a node came from: the layer of the user's model and the line of the user's source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

OWN_FOLDERS = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
# "L['self']", "L['model'].x", "self": how Dynamo spells the root of a module path
ROOT = re.compile(r"^(L\['\w+'\]|self|G\['\w+'\])\.?")


def layer(node: torch.fx.Node) -> str:
    """Path of the innermost module that made ``node``, e.g. ``backbone.layers.0.mixer``."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"(?:_modules)?\['?(\w+)'?\]", r".\1", ROOT.sub("", path))
    return path.replace("._modules", "").replace("..", ".").strip(".")


def line(node: torch.fx.Node) -> str:
    """``file:line`` of the innermost frame that is neither effpass's nor torch's."""
    frames = [
        match
        for match in FRAME.finditer(node.meta.get("stack_trace") or "")
        if not _own(match["file"])
    ]
    return f"{Path(frames[-1]['file']).name}:{frames[-1]['line']}" if frames else ""


def keep_source(node: torch.fx.Node, made: torch.fx.Node) -> torch.fx.Node:
    """Gives ``made`` the layer and line of ``node``, which it stands for."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in node.meta:
            made.meta[key] = node.meta[key]
    return made


def modules(gm: torch.fx.GraphModule) -> set[str]:
    """Names of the Python modules that define the layers of a graph."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes)
    classes = (entry[1] for stack in stacks for entry in stack.values())
    return {c.__module__ if isinstance(c, type) else str(c).rpartition(".")[0] for c in classes}


def _own(file: str) -> bool:
    return file.startswith(OWN_FOLDERS) or file.startswith("<")
