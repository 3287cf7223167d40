"""What is built and what it asks for: wheel and sdist carry the tuning files, and every import is a declared dependency."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from modes import not_interpreted

ROOT = Path(__file__).parents[1]
CACHE = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tuning_cache").rglob("*") if path.is_file()}
SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fuzzytok_kernels").rglob("*.py")}
OPTIONAL = {"huggingface_hub", "safetensors"}  # the extra `hub`

pytestmark = not_interpreted


def build(what: str, project: Path, out: Path) -> Path:
    pytest.importorskip("hatchling")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(out)], check=True, cwd=project, capture_output=True)
    (built,) = out.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> zipfile.ZipFile:
    """Built from the sdist, as a packager of a distribution would."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (project,) = folder.iterdir()
    return zipfile.ZipFile(build("wheel", project, folder / "dist"))


def test_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "fuzzytok_kernels/py.typed", *SOURCES, *CACHE} <= names
    assert {"tests/conftest.py", "Makefile"} <= names  # so that a packager can test it


def test_wheel(wheel):
    names = set(wheel.namelist())
    assert len(CACHE) > 30
    assert {"fuzzytok_kernels/py.typed", *SOURCES} | {f"fuzzytok_kernels/{name}" for name in CACHE} <= names
    assert all(name.startswith(("fuzzytok_kernels/", "fuzzytok_kernels-")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_what_the_wheel_asks_for(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    text = wheel.read(name).decode()
    asked = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", text, re.MULTILINE)
    always = {name: rest for name, rest in asked if "extra ==" not in rest}
    assert always.keys() == {"torch", "triton", "numpy", "tqdm", "filelock"}
    assert (">=2.11" in always["torch"], ">=3.6" in always["triton"]) == (True, True)
    assert set(re.findall(r"^Provides-Extra: (\w+)$", text, re.MULTILINE)) == {"test", "bench", "hub", "paper"}
    assert {name.replace("-", "_") for name, rest in asked if "extra == 'hub'" in rest} == OPTIONAL
    assert "Requires-Python: >=3.10\n" in text


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


def test_every_import_is_declared():
    everything = set().union(*(imported(ROOT / file) for file in SOURCES)) - sys.stdlib_module_names - {"fuzzytok_kernels"}
    assert everything - OPTIONAL == {"torch", "triton", "tqdm", "filelock"}


def test_the_oldest_python_can_read_it():
    """Syntax and names of newer ones would fail at import: ruff and mypy look at 3.10 too, this at the syntax alone."""
    for file in SOURCES:
        ast.parse((ROOT / file).read_text("utf-8"), feature_version=(3, 10))


def test_the_workflow_runs_what_ci_runs():
    assert "run: bash .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text("utf-8")


@pytest.mark.parametrize("walk", ["a kernel", "an activation", "a GPU"])
def test_contributing_names_files_that_exist(walk):
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition(f"## How to add {walk}\n")[2].partition("\n## ")[0]
    files = re.findall(r"`([\w/]+\.py)`", text)
    folders = (ROOT, ROOT / "fuzzytok_kernels", ROOT / "tests")
    assert len(files) >= 2
    assert [file for file in files if not any((folder / file).is_file() for folder in folders)] == []
