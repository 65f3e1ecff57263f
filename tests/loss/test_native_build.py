"""The build of the native tile: what a wheel and an sdist hold, and what becomes of them without a compiler.

And its threads, which are torch's, whatever torch's OpenMP is called.
"""

import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import uncork
from uncork.loss import tile_native

ROOT = Path(__file__).parents[2]
LIBRARY = "uncork/loss/_tile_native.so"
COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0])

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="the native tile needs Linux and g++"
)


def run(command, folder, **variables):
    """(exit status, output) of a command in a folder, under the given environment variables."""
    environment = {k: v for k, v in os.environ.items() if k not in ("UNCORK_NATIVE", "CXX", "CXXFLAGS", "LDFLAGS")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def build_wheel(tree, into, **variables):
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-v", "-w", into]
    return run([sys.executable, "-m", "pip", "wheel", tree, *options], tree, **variables)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An unpacked sdist, in which a wheel has been built."""
    checkout, into = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, checkout)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT / "src", checkout / "src", ignore=left_out)
    checkout.joinpath("tests").mkdir()
    checkout.joinpath("tests", "test_something.py").touch()
    code = f"import setuptools.build_meta as build; build.build_sdist({str(into)!r})"
    status, output = run([sys.executable, "-c", code], checkout)
    assert status == 0, output
    (archive,) = into.glob("*.tar.gz")
    shutil.unpack_archive(archive, into, filter="data")
    (tree,) = (path for path in into.iterdir() if path.is_dir())
    status, output = build_wheel(tree, tree / "wheels", UNCORK_NATIVE="1")
    assert status == 0, output
    return tree


@pytest.fixture(scope="module")
def library(tree, tmp_path_factory):
    """The library of the wheel."""
    (wheel,) = (tree / "wheels").glob("*.whl")
    return Path(zipfile.ZipFile(wheel).extract(LIBRARY, tmp_path_factory.mktemp("wheel")))


@pytest.fixture
def fake_compiler(tmp_path):
    """(a compiler that makes empty files, the file with its command lines)."""
    script, log = tmp_path / "compiler", tmp_path / "commands"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    script.chmod(0o755)
    return script, log


def test_wheel_holds_the_library_and_not_its_sources(tree):
    (wheel,) = (tree / "wheels").glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (archive.read(name).decode() for name in names if name.endswith("/WHEEL"))
    wanted = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/uncork").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not re.search(r"__pycache__|/native/|\.so$", name)} | {LIBRARY}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {"uncork/py.typed", "uncork/lab/report/template.html"} <= wanted
    assert "Root-Is-Purelib: false" in about


def test_sdist_holds_what_builds_the_wheel(tree):
    names = {path.relative_to(tree).as_posix() for path in tree.rglob("*")}
    native = {f"src/{path.relative_to(ROOT / 'src').as_posix()}" for path in (ROOT / "src").rglob("native/*")}
    assert len(native) > 5
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "setup.py", "src/uncork/py.typed", *native} <= names
    assert not any(name.startswith("tests") for name in names)


def test_version_stands_in_one_place(tree):
    (wheel,) = (tree / "wheels").glob("*.whl")
    assert wheel.name.split("-")[1] == uncork.__version__


def test_library_exports_the_interface_alone(library):
    status, output = run(["nm", "-D", "--defined-only", library], library.parent)
    assert status == 0, output
    exported = {line.split()[2].split("@")[0] for line in output.splitlines()}
    declared = set(re.findall(r"(uncork_\w+)\(", (ROOT / "src/uncork/loss/native/interface.h").read_text()))
    assert exported == declared


def test_the_tile_brings_no_openmp_and_runs_in_the_threads_of_torch(library):
    code = (
        "import sys\n"
        "import torch\n"
        "def runtimes():\n"
        "    lines = [line.split() for line in open('/proc/self/maps')]\n"
        "    return {x[5] for x in lines if len(x) > 5 and 'omp' in x[5].rsplit('/')[-1]}\n"
        "def threads():\n"
        "    return int(open('/proc/self/status').read().split('Threads:')[1].split()[0])\n"
        "torch.set_num_threads(3)\n"
        "x, w, y = torch.randn(600, 64), torch.randn(5000, 64), torch.randint(5000, (600,))\n"
        "torch.nn.functional.cross_entropy(x @ w.T, y)\n"
        "before, running = runtimes(), threads()\n"
        "from pathlib import Path\n"
        "from uncork.loss import linear_cross_entropy, tile_native as tile\n"
        f"tile.LIBRARY = Path({str(library)!r})\n"
        "tile._library, tile.missing = tile._load()\n"
        "assert not tile.missing, tile.missing\n"
        "linear_cross_entropy(x, w, y, impl='native')\n"
        "assert runtimes() == before, (before, runtimes())\n"
        "assert threads() == running, (running, threads())\n"
        "ranges = [line.split() for line in open('/proc/self/maps')]\n"
        "(home,) = (r[5] for r in ranges if len(r) > 5 and int(r[0].split('-')[0], 16) <= tile._PARALLEL\n"
        "           < int(r[0].split('-')[1], 16))\n"
        "assert home in before, home\n"
    )
    status, output = run([sys.executable, "-c", code], library.parent, PYTHONPATH=str(ROOT / "src"))
    assert status == 0, output


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    """Makes fake libraries: link(name, *libraries that it asks for, has_threads=...)."""
    folder = tmp_path_factory.mktemp("libraries")

    def make(name, *needs, has_threads=True):
        source = folder / f"{name}.c"
        source.write_text(f"void {'GOMP_parallel' if has_threads else 'something'}(void) {{}}\n")
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", f"-Wl,-rpath,{folder}"]
        needs = [folder / need for need in needs]
        status, output = run([COMPILER, "-x", "c", source, "-x", "none", *flags, *needs, "-o", folder / name], folder)
        assert status == 0, output
        return folder / name

    return make


def found_parallel(module, before="", **variables):
    """The file in which `_find_parallel` finds torch's threads, in a process where `module` stands for torch's."""
    code = (
        f"import ctypes, os\n{inspect.getsource(tile_native._find_parallel)}\n{before}\n"
        f"maps = lambda: [line.split() for line in open('/proc/self/maps')]\n"
        f"files = lambda: {{line[5] for line in maps() if len(line) > 5}}\n"
        f"loaded = files()\n"
        f"address = _find_parallel({str(module)!r})\n"
        "assert files() == loaded, files() - loaded\n"
        "for span, *_, file in maps():\n"
        "    low, high = (int(end, 16) for end in span.split('-'))\n"
        "    if low <= address < high: print(os.path.basename(file))\n"
        "if not address: print('none')\n"
    )
    status, output = run([sys.executable, "-S", "-c", code], ROOT, **variables)
    assert status == 0, output
    return output.strip()


@pytest.mark.parametrize("name", ["libgomp.so.1", "libgomp-1a2b3c4d.so.1", "libomp.so", "libiomp5.so"])
def test_threads_are_found_in_what_torch_was_linked_with(link, name):
    link(name)
    torch = link(f"torch-{name}", name, has_threads=False)
    other = link("libgomp-of-another-package.so.1")
    load_torch, load_other = f"ctypes.CDLL({str(torch)!r})", f"ctypes.CDLL({str(other)!r})"
    assert found_parallel(torch, load_torch) == name
    assert found_parallel(torch, f"{load_other}; {load_torch}") == name  # another package's, loaded before it
    globally = f"ctypes.CDLL({str(torch)!r}, ctypes.RTLD_GLOBAL); ctypes.CDLL({str(other)!r}, ctypes.RTLD_GLOBAL)"
    assert found_parallel(torch, globally) == name
    # the linker gives torch the preloaded one
    assert found_parallel(torch, load_torch, LD_PRELOAD=str(other)) == other.name


def test_no_threads_where_torch_has_no_openmp(link, monkeypatch, library):
    torch, other = link("torch-alone.so", has_threads=False), link("libgomp-of-another-package.so.1")
    assert found_parallel(torch, f"ctypes.CDLL({str(torch)!r}); ctypes.CDLL({str(other)!r})") == "none"
    assert found_parallel(torch) == "none"  # it is not loaded for the question
    monkeypatch.setattr(tile_native, "LIBRARY", library)
    monkeypatch.setattr(tile_native, "_PARALLEL", 0)
    assert "this torch has none (libgomp, libomp or libiomp5)" in tile_native._load()[1]


@pytest.mark.parametrize("variables", [{"CXX": "/bin/false"}, {"UNCORK_NATIVE": "0"}])
def test_wheel_without_the_library(tree, tmp_path, variables):
    status, output = build_wheel(tree, tmp_path, **variables)
    assert status == 0, output
    assert "The native tile is left out" in output
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:  # the tree has a library of a former build
        names = archive.namelist()
        (about,) = (archive.read(name).decode() for name in names if name.endswith("/WHEEL"))
    assert LIBRARY not in names
    assert "uncork/loss/tile_torch.py" in names
    assert "Root-Is-Purelib: true" in about


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/bin/false"}, "/bin/false failed with status 1"),
        ({"CXX": "/bin/true"}, "/bin/true made no library"),
        ({"CXX": "/no/such/compiler"}, "/no/such/compiler: No such file or directory"),
        ({"CXX": "/"}, "/: Permission denied"),
        ({"CXX": "g++ '-O2"}, "CXX: No closing quotation"),
        ({"CXX": "/bin/true", "CXXFLAGS": "'"}, "CXXFLAGS: No closing quotation"),
        ({"PATH": "/no/such/folder"}, "no C++ compiler found"),
        ({"UNCORK_NATIVE": "0"}, "UNCORK_NATIVE=0"),
    ],
)
def test_why_it_is_left_out(tree, variables, reason):
    status, output = run([sys.executable, "setup.py", "build_ext"], tree, **variables)
    assert status == 0, output
    assert f"The native tile is left out ({reason})" in output


def test_insisting_fails_without_a_compiler(tree, tmp_path):
    status, output = build_wheel(tree, tmp_path, CXX="/bin/false", UNCORK_NATIVE="1")
    assert status != 0
    assert "UNCORK_NATIVE=1, but the native tile was not built: /bin/false failed with status 1" in output
    assert not list(tmp_path.glob("*.whl"))


def test_wish_that_is_not_one(tree):
    status, output = run([sys.executable, "setup.py", "build_ext"], tree, UNCORK_NATIVE="yes")
    assert status != 0
    assert "UNCORK_NATIVE: expected 0, 1 or nothing, got 'yes'" in output


def test_failed_build_in_place_leaves_no_old_library(tree):
    old = tree / "src" / LIBRARY
    old.write_bytes(b"of other sources")
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, CXX="/bin/false")
    assert status == 0, output
    assert not old.exists()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_than_on_linux_it_is_left_out(tree, system):
    code = f"import sys, runpy; from setuptools.command import build_ext; sys.platform = {system!r}"
    status, output = run([sys.executable, "-c", f"{code}; runpy.run_path('setup.py')", "build_ext"], tree)
    assert status == 0, output
    assert f"The native tile is left out (it is made for Linux, this is {system})" in output


def copier(compiler, library):
    """Turns the fake compiler into one that makes copies of a library."""
    script, _ = compiler
    script.write_text(script.read_text().replace(': > "$2"', f'cp {library} "$2"'))
    return script


def test_code_for_another_processor_is_refused(tree, fake_compiler, tmp_path):
    """A cross compiler in CXX, or -m32: what Python could not load. A cross build of Python's own is let be."""
    other = bytearray(Path(sys.executable).read_bytes()[:64])
    other[18] ^= 1  # the kind of processor
    tmp_path.joinpath("library").write_bytes(other)
    script = copier(fake_compiler, tmp_path / "library")
    command = [sys.executable, "setup.py", "build_ext"]
    status, output = run(command, tree, CXX=str(script))
    assert status == 0, output
    assert f"left out ({script} compiles for another kind of processor than this Python's)" in output
    status, output = run(command, tree, CXX=str(script), _PYTHON_HOST_PLATFORM="linux-aarch64")
    assert status == 0, output
    assert "left out" not in output


@pytest.mark.parametrize("name", ["libgomp.so.1", "libomp.so", "libomp.so.5", "libiomp5.so"])
def test_an_openmp_beside_torchs_is_refused(tree, fake_compiler, link, name):
    link(name)
    script = copier(fake_compiler, link("tile-with-openmp.so", name, has_threads=False))
    status, output = run([sys.executable, "setup.py", "build_ext"], tree, CXX=str(script))
    assert status == 0, output
    assert f"left out ({script} linked {name.removesuffix('.1').removesuffix('.5')}" in output
    assert "an OpenMP besides torch's: see CXX and LDFLAGS" in output


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_one_binary_for_every_machine_of_a_kind(tree, fake_compiler, machine):
    script, log = fake_compiler
    variables = {"CXX": str(script), "CXXFLAGS": "-DPACKAGER", "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    status, output = run([sys.executable, "setup.py", "build_ext"], tree, **variables)
    assert status == 0, output
    *compiled, linked = log.read_text().splitlines()
    kinds = {re.findall(r"UNCORK_ISA=(\w+)", line)[0]: line for line in compiled if "rows.cpp" in line}
    (dispatch,) = (line for line in compiled if "dispatch.cpp" in line)
    assert set(kinds) == ({"avx512", "avx2", "base"} if machine == "x86_64" else {"base"})
    assert set(re.findall(r"UNCORK_HAS_(\w+)", dispatch)) == {kind.upper() for kind in kinds} - {"BASE"}
    for portable in (kinds["base"], dispatch):
        assert not re.search(r" -m\w", portable)
    assert all("-DPACKAGER" in line for line in compiled)
    assert not re.search("march=native|fast-math", log.read_text())
    # of a function that several have compiled the linker takes the first: it must run anywhere
    objects = re.findall(r"/(\w+)\.o", linked)
    assert objects.index("base") == min(objects.index(kind) for kind in kinds)
