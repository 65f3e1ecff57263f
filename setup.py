"""Builds the native tile: a plain shared library without Python's headers, loaded by ctypes. See pyproject.toml too.

CXX, CXXFLAGS and LDFLAGS are honoured. UNCORK_NATIVE=0 leaves the library out, UNCORK_NATIVE=1 insists on it; otherwise
an install that cannot build it succeeds without, and `impl="torch"` serves. `build_ext --debug` compiles with -O1 -g.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/uncork/loss/native")
FLAGS = ["-std=c++17", "-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"]
# In the order of linking: of a function of the standard library that several have compiled the first is taken.
INSTRUCTIONS = {"base": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512}
# The tile takes its threads from the OpenMP that torch has loaded; one of its own would fight with it for the cores.
OPENMP = re.compile(rb"lib(gomp|i?omp5?)[\w.-]*\.so")


class BuildError(Exception):
    """Why there is no library."""


class BuildNative(build_ext):
    """The kernels once for each instruction set, and what chooses among them, linked into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{Path(*fullname.split('.'))}.so"

    def run(self) -> None:
        wish = os.environ.get("UNCORK_NATIVE", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"UNCORK_NATIVE: expected 0, 1 or nothing, got {wish!r}")
        name = self.extensions[0].name
        library = Path(self.build_lib, self.get_ext_filename(name))
        for old in (library, Path(self.get_ext_fullpath(name))):  # one of other sources must not outlive a failure
            old.unlink(missing_ok=True)
        try:
            if wish == "0":
                raise BuildError("UNCORK_NATIVE=0")
            self._build(library)
        except (BuildError, OSError) as error:  # OSError: no room or no right to write
            if wish == "1":
                raise SystemExit(f"UNCORK_NATIVE=1, but the native tile was not built: {error}") from None
            print(f"The native tile is left out ({error}): on a CPU impl='torch' serves, several times slower.")
            return
        if self.inplace:
            self.copy_extensions_to_source()

    def _build(self, library: Path) -> None:
        if sys.platform != "linux":
            raise BuildError(f"it is made for Linux, this is {sys.platform}")
        x86 = sysconfig.get_platform() == "linux-x86_64" and sys.maxsize > 2**32
        kinds = INSTRUCTIONS if x86 else {"base": []}
        chosen = [f"-DUNCORK_HAS_{kind.upper()}" for kind in kinds if kind != "base"]
        with tempfile.TemporaryDirectory() as folder:
            units = {Path(folder, "dispatch.o"): [str(NATIVE / "dispatch.cpp"), *chosen]}
            for kind, flags in kinds.items():
                units[Path(folder, f"{kind}.o")] = [str(NATIVE / "rows.cpp"), f"-DUNCORK_ISA={kind}", *flags]
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._compile, units.values(), units))
            library.parent.mkdir(parents=True, exist_ok=True)
            flags = [*_flags("LDFLAGS"), "-shared"]
            _run([*_compiler(), *map(str, units), *flags, "-o", str(library)])
        if reason := _unusable(library):
            library.unlink(missing_ok=True)
            raise BuildError(f"{_compiler()[0]} {reason}")

    def _compile(self, arguments: list[str], output: Path) -> None:
        own = _flags("CXXFLAGS")
        level = ["-O1", "-g"] if self.debug else ["-O3"]
        _run([*_compiler(), *own, *level, *FLAGS, *arguments, "-c", "-o", str(output)])


def _unusable(library: Path) -> str:
    """Why Python could not load what the compiler made; empty if it can."""
    made = library.read_bytes() if library.exists() else b""
    if made[:4] != b"\x7fELF":
        return "made no library"
    own = Path(sys.executable).read_bytes()[:20]
    is_known = own[:4] == made[:4] and "_PYTHON_HOST_PLATFORM" not in os.environ  # which a cross build sets
    if is_known and (made[4:6], made[18:20]) != (own[4:6], own[18:20]):
        return "compiles for another kind of processor than this Python's"
    if linked := OPENMP.search(made):
        return f"linked {linked[0].decode()}, an OpenMP besides torch's: see CXX and LDFLAGS"
    return ""


def _flags(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}: {error}") from None


def _compiler() -> list[str]:
    found = _flags("CXX") or [c for c in ("g++", "c++", "clang++") if shutil.which(c)][:1]
    if not found:
        raise BuildError("no C++ compiler found")
    return found


def _run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed with status {done.returncode}")


class Wheel(bdist_wheel):
    """The library knows nothing of Python's versions, and without it the wheel fits any machine."""

    def get_tag(self) -> tuple[str, str, str]:  # asked after everything is built
        built = self.get_finalized_command("build_ext").get_outputs()
        self.root_is_pure = not any(map(os.path.exists, built))
        return "py3", "none", super().get_tag()[2]


_SOURCES, _HEADERS = (sorted(map(str, NATIVE.glob(pattern))) for pattern in ("*.cpp", "*.h"))
setup(
    ext_modules=[Extension("uncork.loss._tile_native", sources=_SOURCES, depends=_HEADERS)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
