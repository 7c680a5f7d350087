"""Compiles the C++ kernels beside this file on first use and loads them with ctypes.

One shared library a ``.cpp``, plain ``extern "C"``, without torch's headers (which take longer to
read than all kernels to compile). A library is compiled when its op is first wanted (``start``, in
the background) or needed. They are cached in ``$EFFPASS_CACHE_DIR``, else
``$XDG_CACHE_HOME/effpass``, else ``~/.cache/effpass``, under a name made of sources, flags,
compiler and instruction set. A file appears there by an atomic rename and ends in its own SHA-256,
so processes may build side by side and a damaged file is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
COMMON_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
    # what is safe of -ffast-math: NaN and infinities must come through
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
_forced: str | None = None


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded; the text is the reason."""


def native_isa() -> str:
    """The widest instruction set of ISA_FLAGS that torch found on this CPU."""
    found = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(found, "portable")


def supported_isas() -> list[str]:
    """Every instruction set of ISA_FLAGS that this CPU can run, widest first."""
    order = list(ISA_FLAGS)
    return order[order.index(native_isa()) :]


@contextlib.contextmanager
def force_isa(isa: str) -> Iterator[None]:
    """Inside, kernels are those of ``isa`` (a key of ISA_FLAGS); for tests."""
    global _forced
    before, _forced = _forced, isa
    try:
        yield
    finally:
        _forced = before


def load(name: str) -> ctypes.CDLL:
    """The library of kernel ``name``; raises BuildError with the reason when there can be none."""
    return _load(name, _forced or native_isa())


def start(name: str) -> None:
    """Begins to build kernel ``name`` in the background, if the cache lacks it; never raises."""
    _building(name, _forced or native_isa())


def unavailable(name: str) -> str | None:
    """Why kernel ``name`` cannot be used here, or None. Builds it if need be; never raises."""
    return _unavailable(name, _forced or native_isa())


@functools.cache
def _unavailable(name: str, isa: str) -> str | None:
    try:
        _load(name, isa)
    except Exception as error:
        return str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _load(name: str, isa: str) -> ctypes.CDLL:
    path = _building(name, isa).result()
    if not _intact(path):  # gone or damaged since
        path = _build(name, isa)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load the compiled kernel {name}: {error}") from error


@functools.cache
def find_compiler() -> tuple[str, str]:
    """``(command, version text)`` of the compiler: $CXX alone when set, else Inductor's, else g++
    or clang++ on PATH. BuildError when none runs."""
    chosen = os.environ.get("CXX")
    tried = []
    for command in dict.fromkeys([chosen] if chosen else _known_compilers()):
        program, *options = shlex.split(command) or [command]
        path = shutil.which(program)
        if path is None:
            tried.append(f"{command}: not found")
            continue
        done = subprocess.run([path, *options, "--version"], capture_output=True, text=True)
        if done.returncode == 0:
            return shlex.join([path, *options]), done.stdout
        tried.append(f"{command} --version: exit code {done.returncode}")
    hint = "unset CXX or correct it" if chosen else "install g++ or set CXX"
    raise BuildError(f"no working C++ compiler ({'; '.join(tried)}); {hint}")


def _known_compilers() -> list[str]:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    with contextlib.suppress(InvalidCxxCompiler):
        return [get_cpp_compiler(), "g++", "clang++"]
    return ["g++", "clang++"]


def cache_dir() -> Path:
    """Where compiled kernels are kept; made on demand."""
    chosen = os.environ.get("EFFPASS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effpass"


def _path(name: str, isa: str, compiler: tuple[str, str]) -> Path:
    headers = sorted(SOURCES.glob("*.h"))
    parts = [*(p.read_bytes() for p in [SOURCES / f"{name}.cpp", *headers])]
    parts += ["\n".join((*COMMON_FLAGS, *ISA_FLAGS[isa], *compiler)).encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    return cache_dir() / f"{name}-{isa}-{key}.so"


def _intact(path: Path) -> bool:
    """Whether a whole library is there; its last 32 bytes are the digest of the others."""
    try:
        content = path.read_bytes()
    except OSError:  # building it will say what is wrong
        return False
    return len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]


@functools.cache
def _building(name: str, isa: str) -> Future[Path]:
    """The library's path once it is there, or the BuildError that says why it cannot be."""
    return _builders().submit(_build, name, isa)


def _forget_builds() -> None:
    """A forked child has none of the parent's threads: it begins again."""
    _builders.cache_clear()
    _building.cache_clear()


os.register_at_fork(after_in_child=_forget_builds)


@functools.cache
def _builders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "effpass-build")


def _build(name: str, isa: str) -> Path:
    compiler = find_compiler()
    path = _path(name, isa, compiler)
    if _intact(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            _compile(name, isa, compiler[0], Path(folder) / "out.so", path)
    except OSError as error:
        hint = "set EFFPASS_CACHE_DIR"
        raise BuildError(f"cannot write kernels to {path.parent} ({error}); {hint}") from error
    return path


def _compile(name: str, isa: str, compiler: str, out: Path, final: Path) -> None:
    source = str(SOURCES / f"{name}.cpp")
    command = [*shlex.split(compiler), *COMMON_FLAGS, *ISA_FLAGS[isa], source, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next(
            (line for line in lines if "error" in line), lines[0] if lines else "no message"
        )
        why = f"exit code {done.returncode}: {first.strip()}"
        raise BuildError(f"{compiler} could not compile {name}.cpp ({why})")
    with out.open("ab") as file:
        file.write(hashlib.sha256(out.read_bytes()).digest())
    out.rename(final)
