"""What holds for the package as a whole: a light import, and a README that is true."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from modes import not_interpreted

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", README)))


def test_import_is_light():
    """At most 0.3 s beyond what PyTorch itself takes, of the processor's time, which a busy machine does not stretch.

    Nearly all of it is Triton's import, which the registration of FLOP formulas brings with it.
    """
    code = (
        "import sys, time, torch; before = set(sys.modules); begin = time.process_time(); import fuzzytok_kernels, fuzzytok_kernels.cli;"
        "print(time.process_time() - begin, *{'tqdm', 'fuzzytok_kernels.launch'} & (set(sys.modules) - before))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(3)]
    seconds, *imported = zip(*(run.stdout.split() for run in runs), strict=True)
    assert imported == []
    assert min(map(float, seconds)) <= 0.3


def test_readme_has_its_snippets_and_references():
    assert len(SNIPPETS) >= 4
    assert len(REFERENCES) >= 15


@not_interpreted
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet):
    if "torch.compile" in snippet and shutil.which("g++") is None:
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    needed = ["transformers"] * ("import GPT2" in snippet) + ["huggingface_hub", "safetensors"] * ("_pretrained" in snippet)
    for package in needed:
        pytest.importorskip(package)
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize(("file", "name"), REFERENCES, ids=lambda value: value)
def test_what_the_readme_points_to_exists(file, name):
    scope: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in scope if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        assert found, f"{file} has no {name}"
        scope = found[0].body


def test_every_feature_is_shown_by_a_test():
    rows = (
        README.partition("| what | PyTorch's `conv1d` | this package | shown by |\n|---|---|---|---|\n")[2]
        .partition("\n\n")[0]
        .splitlines()
    )
    assert len(rows) >= 20
    assert [row for row in rows if not re.fullmatch(r"(\| [^|]+ ){3}\| (`tests/\w+\.py::test_\w+`(, )?)+ \|", row)] == []


def test_every_equation_is_in_the_readme():
    for number in range(1, 9):
        assert re.search(rf"^\| Eq\. .*\b{number}\b.*\|", README, re.MULTILINE)
    assert "| Listing 1" in README
