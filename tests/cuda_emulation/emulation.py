"""Compiles CUDA sources for the CPU, where emulator.cpp runs their kernels, and loads them.

``include/`` stands in for CUDA's headers, so that g++ takes the sources as they are. One thing it cannot parse as CUDA
means it is the declaration of shared memory, so the preprocessed text passes through :func:`rewrite_shared`. The
optimiser is kept low: the compiler is to leave in place the accesses that the emulator watches.

Two builds find different things. ``"races"``: data races, uninitialised shared memory, misaligned accesses, and all
that the emulator itself refuses. ``"address"``: accesses out of bounds, by AddressSanitizer, whose library has to be in
the process from its start: see :func:`address_environment`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA_SOURCES = HERE.parent.parent / "csrc/cuda"
EMULATOR = (HERE / "emulator.cpp", HERE / "races.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # pragmas of nvcc
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS)
SANITIZERS = {
    # The names of ThreadSanitizer's functions are all that is used of it: races.cpp defines them.
    "races": ("-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0"),
    # Checks that are calls compile in half of the time, and so does what is not optimised. The emulator is spared both.
    "address": ("-O0", "-fsanitize=address,alignment", "--param=asan-instrumentation-with-call-threshold=0"),
}
_SHARED = "__emulated_shared__"
_DECLARATION = re.compile(rf"(?P<extern>\bextern\s+)?\b{_SHARED}\b(?P<what>[^;]*);")
_DECLARATOR = re.compile(r"(?P<type>.*\S)\s*\b(?P<name>\w+)\s*(?P<extents>(\[[^\]]*\]\s*)*)", re.DOTALL)


def rewrite_shared(text: str) -> str:
    """Makes ``__shared__ T x[n];`` a static variable that the emulator knows, and ``extern __shared__ T x[];`` a name
    of the dynamic shared memory. Lines keep their numbers.

    >>> rewrite_shared("__emulated_shared__ float part[32];")
    'static float part[32]; cuda_emulation::declare_shared(&part, sizeof(part), "part");'
    >>> rewrite_shared("extern __emulated_shared__ float rows[];")
    'float (&rows)[] = cuda_emulation::DynamicShared();'
    >>> rewrite_shared("__emulated_shared__ int a[2], b;")
    Traceback (most recent call last):
    ValueError: __shared__ int a[2], b: expected one variable to a declaration, without a value
    """

    def rewrite(match: re.Match[str]) -> str:
        found = _DECLARATOR.fullmatch(match["what"].strip())
        if not found or re.search(r"[\]=]|,\s*$", found["type"]):
            raise ValueError(
                f"__shared__ {match['what'].strip()}: expected one variable to a declaration, without a value"
            )
        kind, name, extents = found["type"], found["name"], found["extents"]
        if match["extern"]:
            return f"{kind} (&{name}){extents} = cuda_emulation::DynamicShared();"
        return f'static {kind} {name}{extents}; cuda_emulation::declare_shared(&{name}, sizeof({name}), "{name}");'

    return _DECLARATION.sub(rewrite, text)


def build(sources: Sequence[Path], sanitizer: str = "races") -> Path:
    """The shared object of these CUDA sources and an emulator of their own; each compiled once for its contents."""
    flags = [*FLAGS, *SANITIZERS[sanitizer], "-DSSLK_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-isystem{_torch() / 'include'}"]
    own = [flag for flag in flags if not flag.startswith(("-fsanitize=thread", "--param", "-O0"))]

    def compile_emulator(source: Path) -> Path:
        with _made_once((own, includes), [source], ".o") as (compiled, folder):
            if folder:
                _run("g++", *own, *includes, "-c", str(source), "-o", str(folder / "out"))
        return compiled

    with _made_once((flags, includes), [*sources, *EMULATOR], ".so") as (library, folder):
        if not folder:
            return library

        def compile_source(source: Path) -> Path:
            text = _run("g++", "-x", "c++", "-E", *flags, f"-D__shared__={_SHARED}", *includes, str(source)).stdout
            preprocessed, compiled = folder / f"{source.stem}.ii", folder / f"{source.stem}_cu.o"
            preprocessed.write_text(rewrite_shared(text))
            _run("g++", *flags, "-c", str(preprocessed), "-o", str(compiled))
            return compiled

        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(compile_emulator, path) for path in EMULATOR]
            jobs += [pool.submit(compile_source, path) for path in sources]
            objects = [str(job.result()) for job in jobs]
        link = ["-fsanitize=address"] if sanitizer == "address" else []
        libraries = ["-Wl,--as-needed", f"-L{_torch() / 'lib'}", "-ltorch_cpu", "-ldl"]
        _run("g++", "-shared", *link, *objects, *libraries, "-o", str(folder / "out"))
    return library


@contextlib.contextmanager
def _made_once(how: object, sources: Sequence[Path], suffix: str) -> Iterator[tuple[Path, Path | None]]:
    """A file that is kept, and the folder in which to make it as `out`; None if it is there already."""
    digest = hashlib.sha256(repr((how, _version("g++"), (_torch() / "version.py").read_text())).encode())
    headers = [*HERE.rglob("*.h"), *CUDA_SOURCES.parent.rglob("*.h")]
    for path in sorted({*sources, *headers, Path(__file__)}):
        digest.update(path.name.encode() + path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"ssl_kernels_cuda_emulation_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise PermissionError(f"{cache}: expected a folder of this user")
    kept = cache / f"{digest.hexdigest()[:24]}{suffix}"
    with kept.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache) as name:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles, and the others wait for it
        if kept.exists():
            yield kept, None
        else:
            yield kept, Path(name)
            (Path(name) / "out").replace(kept)  # whole, for another process that looks meanwhile


class Emulator:
    """A loaded library and its emulator."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self._launches, self._failure = self.library.cuda_emulation_launches, self.library.cuda_emulation_failure
        self._launches.restype, self._failure.restype = ctypes.c_uint64, ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """The order of blocks and threads from now on; 0 is that of their indices."""
        self.library.cuda_emulation_seed(ctypes.c_uint32(seed))

    @property
    def launches(self) -> int:
        """How many kernels have been launched."""
        return int(self._launches())

    def failure(self) -> str:
        """What the latest failed launch said, told once; empty if none has failed since."""
        return str(self._failure().decode())

    @contextlib.contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Runs in that order of blocks and threads what is inside, in which no launch may fail unheard."""
        self.failure()
        self.seed(seed)
        try:
            yield
        finally:
            self.seed(0)
        if failure := self.failure():
            raise AssertionError(f"nobody heard that a launch failed: {failure}")


def build_ops(sanitizer: str = "races") -> Path:
    """The project's CUDA ops, compiled."""
    return build(sorted(CUDA_SOURCES.glob("*.cu")), sanitizer)


@functools.cache
def load_ops(sanitizer: str = "races") -> Emulator:
    """The project's CUDA ops as ``torch.ops.ssl_kernels_emulated``, on CPU tensors."""
    import torch

    library = build_ops(sanitizer)
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    return Emulator(library)


def address_environment() -> dict[str, str]:
    """The environment of a process that may load an ``"address"`` build."""
    # The sanitizer takes what it finds at the start for what it wraps: the C++ library has to be there to be found.
    runtimes = [_run("g++", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "stdc++")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are not ours to judge
        "PYTHONMALLOC": "malloc",
    }


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done


@functools.cache
def _version(compiler: str) -> str:
    return _run(compiler, "--version").stdout


@functools.cache
def _torch() -> Path:
    """Its folder, without the seconds of an import."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
