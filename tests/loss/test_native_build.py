"""The build of the native tile: what a wheel and an sdist hold, and what becomes of them without a compiler."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    """A copy of what a build needs, in which a wheel has been built before."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT / "src", tree / "src", ignore=left_out)
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
    assert LIBRARY in names
    assert "uncork/py.typed" in names
    assert "uncork/lab/report_template.html" in names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert "Root-Is-Purelib: false" in about


def test_sdist_holds_the_sources(tree, tmp_path):
    code = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    status, output = run([sys.executable, "-c", code], tree)
    assert status == 0, output
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (sdist,) = (path for path in tmp_path.iterdir() if path.is_dir())
    native = Path("src/uncork/loss/native")
    assert sorted(path.name for path in (sdist / native).iterdir()) == sorted(
        path.name for path in (ROOT / native).iterdir()
    )
    assert (sdist / "setup.py").exists()


def test_library_exports_the_interface_alone(library):
    status, output = run(["nm", "-D", "--defined-only", library], library.parent)
    assert status == 0, output
    exported = {line.split()[2].split("@")[0] for line in output.splitlines()}
    declared = set(re.findall(r"(uncork_\w+)\(", (ROOT / "src/uncork/loss/native/interface.h").read_text()))
    assert exported == declared


def test_library_shares_the_openmp_of_torch(library):
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(library)!r})\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print('\\n'.join(sorted({word for word in maps if 'omp' in word.rsplit('/')[-1]})))\n"
        "print(torch.__path__[0])\n"
    )
    status, output = run([sys.executable, "-c", code], library.parent)
    assert status == 0, output
    *loaded, torch_folder = output.split()
    assert loaded == [f"{torch_folder}/lib/libgomp.so.1"]


@pytest.mark.parametrize("variables", [{"CXX": "/bin/false"}, {"CXX": "/no/such/compiler"}, {"UNCORK_NATIVE": "0"}])
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


def test_another_openmp_is_refused(tree, fake_compiler):
    script, _ = fake_compiler
    status, output = run([sys.executable, "setup.py", "build_ext"], tree, CXX=str(script))
    assert status == 0, output
    assert re.search(r"The native tile is left out .*libgomp\.so\.1", output)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_one_binary_for_every_machine_of_a_kind(tree, fake_compiler, machine):
    script, log = fake_compiler
    code = f"import platform, runpy; platform.machine = lambda: {machine!r}; runpy.run_path('setup.py')"
    status, output = run([sys.executable, "-c", code, "build_ext"], tree, CXX=str(script), CXXFLAGS="-DPACKAGER")
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
