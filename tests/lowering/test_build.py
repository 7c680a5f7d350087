"""Kernels are built once, whatever goes wrong is a reason, and no process disturbs another."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effpass.lowering.cpu import build
from effpass.ops import causal_conv1d

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


def _source(name: str, text: str = ANSWER) -> None:
    (build.SOURCES / f"{name}.cpp").write_text(text)


def _fake_compiler(folder: Path, body: str) -> str:
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("name", sorted(p.stem for p in build.SOURCES.glob("*.cpp")))
def test_every_kernel_builds(name: str, isa: str) -> None:
    assert build.unavailable(name) is None


def test_missing_compiler_is_the_reason(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    _source("one")
    expected = "no working C++ compiler (no-such-compiler: not found); unset CXX or correct it"
    assert build.unavailable("one") == expected
    with pytest.raises(build.BuildError, match="no-such-compiler: not found"):
        build.load("one")


def test_no_compiler_at_all_is_the_reason(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fresh_build))
    _source("one")
    reason = build.unavailable("one")
    assert reason is not None
    assert reason.startswith("no working C++ compiler (g++: not found; clang++: not found)")
    assert reason.endswith("install g++ or set CXX")


def test_compiler_that_does_not_run_is_the_reason(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = _fake_compiler(tmp_path, "")
    Path(path).write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("CXX", path)
    _source("one")
    expected = f"no working C++ compiler ({path} --version: exit code 3); unset CXX or correct it"
    assert build.unavailable("one") == expected


def test_broken_compiler_is_the_reason(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = _fake_compiler(tmp_path, 'echo "note: no" >&2; echo "fatal error: moon" >&2; exit 1')
    monkeypatch.setenv("CXX", path)
    _source("one")
    expected = f"{path} could not compile one.cpp (exit code 1: fatal error: moon)"
    assert build.unavailable("one") == expected


def test_wrong_source_spoils_only_itself(fresh_build: Path) -> None:
    _source("one")
    _source("wrong", "int answer( {\n")
    reason = build.unavailable("wrong")
    assert reason is not None and "could not compile wrong.cpp (exit code 1: " in reason
    assert build.load("one").answer() == 42


def test_library_that_does_not_load_is_the_reason(fresh_build: Path) -> None:
    _source("one", 'extern "C" int missing();\n' + ANSWER.replace("42", "missing()"))
    reason = build.unavailable("one")
    assert reason is not None and reason.startswith("cannot load the compiled kernel one: ")


def test_cache_that_cannot_be_written_is_the_reason(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFPASS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    _source("one")
    reason = build.unavailable("one")
    assert reason is not None and reason.startswith(f"cannot write kernels to {tmp_path}/file/")
    assert reason.endswith("set EFFPASS_CACHE_DIR")


def test_unknown_kernel_is_a_reason(fresh_build: Path) -> None:
    reason = build.unavailable("nothing")
    assert reason is not None and "nothing" in reason


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-1] + b"x"])
def test_damaged_file_is_built_again(fresh_build: Path, damage: Callable[[bytes], bytes]) -> None:
    _source("one")
    path = build._build("one", build.native_isa())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert build.load("one").answer() == 42
    assert build._intact(path)


def test_built_once_and_found_again(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _source("one")
    assert build.load("one").answer() == 42
    assert [p.suffix for p in fresh_build.iterdir()] == [".so"]
    build._load.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built again"))
    assert build.load("one").answer() == 42


def test_key_follows_sources_and_flags(fresh_build: Path) -> None:
    compiler = ("g++", "1.0")
    _source("one")
    before = {build._path("one", isa, compiler) for isa in build.ISA_FLAGS}
    assert len(before) == len(build.ISA_FLAGS)
    (build.SOURCES / "new.h").write_text("// a header\n")
    after = {build._path("one", isa, compiler) for isa in build.ISA_FLAGS}
    after |= {build._path("one", isa, ("g++", "2.0")) for isa in build.ISA_FLAGS}
    assert len(before | after) == 3 * len(build.ISA_FLAGS)


BUILD_AND_RUN = """
import sys
from pathlib import Path
from effpass.lowering.cpu import build
build.SOURCES = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(build.load("one").answer())
"""


def test_two_processes_build_at_once(fresh_build: Path) -> None:
    _source("one")
    command = [sys.executable, "-c", BUILD_AND_RUN, str(build.SOURCES)]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=100)[0] for process in both] == ["42\n", "42\n"]
    assert [p.suffix for p in fresh_build.iterdir()] == [".so"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kernels_share_the_threads_of_torch() -> None:
    torch.randn(1000, 1000).sum()
    build.load("selective_scan")
    maps = Path("/proc/self/maps").read_text().split()
    runtimes = {part for part in maps if "gomp" in part or "iomp" in part or "libomp" in part}
    assert len(runtimes) == 1, runtimes


def test_reference_runs_when_there_is_no_compiler(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    x, weight = torch.randn(1, 3, 4), torch.randn(4, 4)
    chosen, refused = causal_conv1d.choose(list(causal_conv1d.bind(x, weight).values()))
    assert chosen.target == "inline"
    assert ("cpu", build.unavailable("causal_conv1d")) in refused
    assert causal_conv1d(x, weight)[0].shape == x.shape


def test_inductors_compiler_is_used(fresh_build: Path) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    assert build.find_compiler()[0] == shutil.which(get_cpp_compiler())


def test_compiler_with_options(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _source("one")
    monkeypatch.setenv("CXX", "g++ -DUNUSED=1")
    assert build.load("one").answer() == 42


FORKED = """
import os, signal, sys
from pathlib import Path
from effpass.lowering.cpu import build
build.SOURCES = Path(sys.argv[1])
build.load("one")
child = os.fork()
if child == 0:
    signal.alarm(60)
    print(build.load("two").answer(), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_builds_with_threads_of_its_own(fresh_build: Path) -> None:
    _source("one")
    _source("two")
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(build.SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["42", "0"], done.stderr
