"""`import uncork` needs torch alone, from any folder that holds the sources, on any system."""

import ast
import graphlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import uncork

SOURCES = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the sources without native tile and metadata."""
    folder = tmp_path_factory.mktemp("bare") / "src"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so"))
    return folder


def python(code, folder, *options):
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


NO_METADATA = """
import importlib.metadata

def hidden(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.distribution = importlib.metadata.version = hidden
"""
USE = """
import torch, uncork
head = uncork.build_head("plif", 4, 9)
x, y = torch.randn(3, 4), torch.tensor([1, 2, 8])
head.loss(x, y).backward()
with torch.no_grad():
    head.log_prob(x), head.predict(x), head.topk(x, 2)
uncork.build_head("mos", 4, 9, num_components=2).loss(x, y).backward()
"""


def test_sources_run_without_metadata_and_native_tile(bare):
    out = python(f"{NO_METADATA}\n{USE}\nprint(uncork.__file__, uncork.__version__, head.implementation())", bare)
    assert out.count("UserWarning: uncork: the native tile is missing, so impl='torch' serves") == 1
    assert out.count("there is no _tile_native.so, which an install of uncork builds") <= 1
    file, version, implementation = out.splitlines()[-1].split()
    assert Path(file).is_relative_to(bare)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", version)
    assert implementation == "torch"


def test_import_loads_nothing_but_uncork_and_touches_no_gpu(bare):
    code = """
import sys, torch

def touched(*_):
    raise AssertionError("the GPU was touched")

torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.is_available = touched
before = set(sys.modules)
import uncork
new = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
print(sorted(name for name in new if not name.startswith("uncork")))
print(sorted(name for name in sys.modules if name.startswith("uncork.lab") or name == "uncork.cli"))
"""
    assert python(code, bare).splitlines() == ["[]", "[]"]


def test_it_works_where_nothing_but_torch_is_installed(bare):
    project = tomllib.loads((SOURCES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lab = [re.split(r"[^\w-]", name)[0] for name in extras["lab"] + extras["hf"]]
    assert {"numpy", "accelerate", "pydantic", "transformers"} <= {*lab}
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({lab!r}))"
    out = python(f"{blocked}\n{USE}\nprint(head.implementation())", bare, "-W", "ignore:.*NumPy:UserWarning")
    assert out.splitlines()[-1] == "torch"
    code = "try:\n    import uncork.hf\nexcept ModuleNotFoundError as error:\n    print(error)"
    out = python(f"{blocked}\n{code}", bare, "-W", "ignore:.*NumPy:UserWarning")
    assert out.splitlines()[-1].startswith("uncork.hf needs transformers (")
    assert out.splitlines()[-1].endswith("pip install 'uncork[hf]'")


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_it_works_elsewhere_than_on_linux(bare, system):
    """What Windows lacks of Python's own library is taken away; macOS has it."""
    code = "import sys, torch, os, signal\n"
    if system == "win32":
        code += "sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'pwd', 'grp', 'termios']))\n"
        code += "for name in ('register_at_fork', 'fork', 'sched_getaffinity', 'geteuid', 'getloadavg', 'RTLD_NOW'):\n"
        code += "    delattr(os, name)\n"
        code += "for name in ('SIGKILL', 'SIGHUP', 'SIGUSR1'): delattr(signal, name)\n"
    code += f"sys.platform = {system!r}\n{USE}\nfrom uncork.loss import tile_native\nprint(tile_native.missing)"
    out = python(code, bare, "-W", "error::DeprecationWarning")
    assert out.splitlines()[-1] == f"it is made for Linux, and this is {system}"
    assert out.count("UserWarning: uncork: the native tile is missing") == 1


# From the lowest floor to the highest: what a room imports stands below it, never on its own floor.
FLOORS = [
    {"arguments", "functional", "messages"}, {"logit_functions"}, {"loss"}, {"heads"},
    {"optim", "diagnose", "hf", "versions"},
    {"uncork"},
    {"lab", "lab.errors", "lab.layers", "lab.machine"}, {"lab.terminal", "lab.validated"}, {"lab.run"},
    {"lab.data", "lab.models"}, {"lab.train"},
    {"lab.report"}, {"lab.experiments"}, {"lab.command_line"}, {"lab.settings"}, {"cli"}, {"__main__"},
]  # fmt: skip


def imports():
    """By module, the modules of uncork that it imports, wherever in the file."""
    paths = {
        ".".join(path.relative_to(SOURCES).with_suffix("").parts): path for path in SOURCES.rglob("uncork/**/*.py")
    }
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "uncork":
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {one if one in paths else str(node.module) for one in whole}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in paths}
    return found


def room(module):
    first, *rest = module.split(".")[1:] or ["uncork"]
    return ".".join([first, *rest[:1]]) if first == "lab" else first


def test_imports_run_one_way_and_there_is_no_circle():
    graph = imports()
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    upwards = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if room(name) != room(other) and floor[room(name)] <= floor[room(other)]
    ]
    assert upwards == []
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_the_loss_knows_that_hardware_exists():
    knows = {
        name for name, others in imports().items() if any("native" in other or "triton" in other for other in others)
    }
    assert {room(name) for name in knows} <= {"loss", "lab.experiments", "lab.run", "versions"}  # they say what ran


def test_versions_for_a_bug_report(monkeypatch, capsys):
    monkeypatch.setattr("uncork.loss.tile_native.missing", "there is none")
    uncork.show_versions()
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("native tile", "tile").splitlines())
    assert said["uncork"] == uncork.__version__
    assert said["torch"].startswith(torch.__version__)
    assert said["tile"] == "none: there is none"
    assert said["GPU"]
    assert {"Python", "platform", "triton", "transformers", "trl"} <= set(said)


def test_the_citation_and_the_changelog_are_of_this_version():
    changes = (SOURCES.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, (version, date), *_ = re.findall(r"^## (\S+)(?: \((\d{4}-\d\d-\d\d)\))?$", changes, re.MULTILINE)
    assert unreleased == ("Unreleased", "")
    assert version == uncork.__version__
    citation = (SOURCES.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_a_program_that_type_checkers_read_from_outside_runs(capsys):
    runpy.run_path(str(Path(__file__).parent / "typing" / "consumer.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("uncork ")
