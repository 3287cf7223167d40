"""What SECURITY.md promises: nothing is unpickled, no code is evaluated from a file, hostile tuning files change no result."""

import ast
import io
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from places import CONFIG, GPU, OP, PROBLEM, Places

import fuzzytok_kernels
from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer, ResidualCausalBlock, tuning
from fuzzytok_kernels.tuning import lookup, store
from fuzzytok_kernels.tuning.space import default_config

PACKAGE = Path(fuzzytok_kernels.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
UNPICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "codeop"}
EVALUATES = {"eval", "exec", "compile", "__import__", "execfile"}
IMPORTS_BY_NAME = {
    "registration.py",
    "cli.py",
    "tuning/warmup.py",
    "tuning/worker.py",
}  # of fixed names, the command line, their own parent
STARTS_PROCESSES = {"tuning/worker.py", "tuning/compile.py"}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_source_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text("utf-8"))
    imported, called, keywords = set(), set(), set()
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | {
        item.asname or item.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for item in node.names
    }
    own |= {name.id for node in ast.walk(tree) if isinstance(node, ast.withitem) and isinstance(name := node.optional_vars, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {item.name.partition(".")[0] for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
            keywords |= {keyword.arg for keyword in node.keywords}
    assert not imported & UNPICKLES
    assert not (called - own) & EVALUATES
    assert not {call for call in called if call.endswith(("torch.load", "torch.jit.load", "os.system", "os.popen", ".loads"))} - {
        "json.loads"
    }
    assert "shell" not in keywords
    assert ("importlib.import_module" not in called) or _name(path) in IMPORTS_BY_NAME
    assert ("subprocess" not in imported) or _name(path) in STARTS_PROCESSES


def test_the_search_would_find_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for text in (
        "import pickle", "from pickle import loads", "eval('1')", "torch.load('x')", "import os\nos.system('x')", "import subprocess",
        "run('x', shell=True)", "import importlib\nimportlib.import_module('x')", "import marshal\nmarshal.loads(b'')",
    ):  # fmt: skip
        path = tmp_path / "bad.py"
        path.write_text(text)
        with pytest.raises(AssertionError):
            test_no_source_unpickles_or_evaluates(path)


# ---- hostile tuning files

CODE = "__import__('os').system('touch /tmp/fuzzytok-was-here')"
WATCHED = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect", "os.remove",
           "os.rename", "compile", "exec", "import", "marshal.loads", "ctypes.dlopen"}  # fmt: skip
_seen: list[str] | None = None


class Evil:
    def __reduce__(self) -> tuple:
        return eval, (CODE,)


def _watch(event: str, args: tuple) -> None:
    if _seen is not None and (event in WATCHED or (event == "open" and set(str(args[1])) & set("wax+"))):
        _seen.append(f"{event} {args!r:.100}")


@pytest.fixture(scope="module")
def watched():
    sys.addaudithook(_watch)  # for good: Python has no way back


def _good(places: Places) -> tuple[Path, dict]:
    path = places.put(places.own, 3)
    return path, json.loads(path.read_text())


def _hostile() -> dict[str, object]:
    """A function for each attack: of the good file's content, the bytes to write."""

    def in_header(name):
        return lambda content: json.dumps({**content, name: CODE}).encode()

    def in_entry(name, value=CODE):
        return lambda content: json.dumps({**content, "entries": [{**content["entries"][0], name: value}]}).encode()

    fields = [*PROBLEM._fields[1:], *CONFIG._fields, "time_us", "default_us", "shared", "tried"]
    attacks = {f"code as {name}": in_header(name) for name in ("schema", "op", "gpu", "versions", "kernel_hash", "space_hash", "entries")}
    del attacks["code as versions"]  # told to people, never used
    attacks |= {f"code as an entry's {name}": in_entry(name) for name in fields}
    numbers = {"a boolean": True, "10^400": 10**400, "-1": -1, "0": 0, "3": 3, "2^31": 2**31, "64.0": 64.0, "a list": [64]}
    attacks |= {f"BLOCK_T is {name}": in_entry("BLOCK_T", value) for name, value in numbers.items()}
    attacks |= {f"num_warps is {name}": in_entry("num_warps", value) for name, value in numbers.items()}
    attacks |= {
        "a pickle": lambda content: pickle.dumps(Evil()),
        "nested too deep": lambda content: b"[" * 200_000,
        "nested too deep inside": lambda content: b'{"schema": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a long number": lambda content: b'{"schema": ' + b"9" * 100_000 + b"}",
        "no text": lambda content: bytes(range(256)) * 10,
        "NaN": in_entry("BLOCK_T", float("nan")),
        "an unknown field": in_entry("__class__"),
        "null bytes": lambda content: json.dumps(content).encode() + b"\x00" * 1000,
        "a path of its own": in_entry("path", "../../etc/passwd"),
    }  # fmt: skip
    return attacks


@pytest.mark.parametrize("attack", _hostile().values(), ids=_hostile())
def test_hostile_tuning_file(attack, places, watched):
    """No exception, no process, no import, nothing written; the default serves."""
    global _seen
    path, content = _good(places)
    assert tuning.get_config(0, PROBLEM).num_stages == 3  # the same file, were it not hostile; all that is imported lazily is there now
    path.write_bytes(attack(content))
    tuning.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lookup.find(0, PROBLEM._replace(op="causal_conv1d_input_grad"))  # has no file: the warning machinery is warm, too
        _seen = []
        try:
            config = tuning.get_config(0, PROBLEM)
            happened = list(_seen)
        finally:
            _seen = None
    assert config == default_config(PROBLEM)
    assert happened == []
    assert store.read(path, GPU, OP)[0] == []


def test_the_watch_would_see_it(watched, tmp_path):
    global _seen
    _seen = []
    try:
        exec("1")
        (tmp_path / "written").write_text("x")
    finally:
        happened, _seen = _seen, None
    assert any(event.startswith("exec") for event in happened)
    assert any(event.startswith("open") for event in happened)


# ---- checkpoints


@pytest.mark.parametrize(
    "module", [CausalConv1d(4, 6, 3), ResidualCausalBlock(4, 3, norm="layer"), FuzzyTokenizer(dim=8)], ids=lambda m: type(m).__name__
)
def test_a_state_is_tensors_alone(module):
    state = module.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    for cls in {type(part) for part in module.modules() if type(part).__module__.startswith("fuzzytok_kernels")}:
        assert not {"__setstate__", "__reduce__", "__reduce_ex__", "set_extra_state"} & vars(cls).keys()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    module.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config, weights: config.update(dtype="load"),
        lambda config, weights: config.update(dtype=CODE),
        lambda config, weights: config.update(activation=CODE),
        lambda config, weights: config.update(kernel_size=CODE),
        lambda config, weights: config.update(__class__=CODE),
        lambda config, weights: config.update(model_type=CODE),
        lambda config, weights: weights.write_bytes(pickle.dumps(Evil())),
        lambda config, weights: torch.save({"embedding.weight": torch.zeros(3)}, weights),
        lambda config, weights: weights.write_bytes(b"\xff" * 8 + b"{}"),
    ],
    ids=["dtype is a function", "dtype", "activation", "kernel_size", "field", "model_type", "a pickle", "of torch.save", "long header"],
)
def test_hostile_model_folder(spoil, watched, tmp_path):
    """Refused by a ValueError, with no process, no import of what it names, nothing unpickled."""
    global _seen
    pytest.importorskip("safetensors")
    pytest.importorskip("huggingface_hub")
    FuzzyTokenizer(dim=8, dilations=(1,)).save_pretrained(tmp_path)
    FuzzyTokenizer.from_pretrained(tmp_path)  # what is imported lazily is there now
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    spoil(config, tmp_path / "model.safetensors")
    path.write_text(json.dumps(config))
    _seen = []
    try:
        with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
            FuzzyTokenizer.from_pretrained(tmp_path)
        happened = list(_seen)
    finally:
        _seen = None
    assert happened == []
