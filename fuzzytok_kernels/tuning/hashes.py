"""What makes a stored config one of this version: the kernels that it is for, and what its fields may say."""

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuzzytok_kernels.tuning.problem import Problem
from fuzzytok_kernels.tuning.space import OPS, Config

# What a stored config may say. A change here, or in the fields of Config or Problem, makes every stored winner a miss.
_BLOCKS = (16, 32, 64, 128, 256)
_RANGES: dict[str, Any] = {
    "path": ("tma", "pointer"),
    "BLOCK_T": _BLOCKS,
    "BLOCK_C_IN": _BLOCKS,
    "BLOCK_C_OUT": _BLOCKS,
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 9),
    "programs_per_sm": range(1, 33),
    "TAPS": (1, 2, 3),
}


def in_space(config: Config) -> bool:
    """True if every field of `config` is one that the kernels can be told."""
    try:
        check_fields(config._asdict())
    except ValueError:
        return False
    return True


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that a config does not have, or a value that the kernels cannot be told."""
    for name, value in fields.items():
        if name not in _RANGES:
            raise ValueError(f"{name} is no field of a config; expected one of {', '.join(_RANGES)}")
        if type(value) not in (int, str) or value not in _RANGES[name]:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, _RANGES[name]))}")


@functools.cache
def kernel_hash(op: str) -> str:
    """A hash of the kernels of `op` and what they call, blind to comments, docstrings, formatting and Python's version."""
    folder = Path(__file__).parents[1] / "kernels"
    return _hash("\n".join(_normalised(ast.parse((folder / name).read_text("utf-8"))) for name in OPS[op].kernels))


@functools.cache
def space_hash() -> str:
    """A hash of what an entry's fields are and may say."""
    return _hash(repr((Problem._fields, Config._fields, [(name, tuple(values)) for name, values in _RANGES.items()])))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _normalised(node: Any) -> str:
    """The syntax tree as text. Not ast.dump or ast.unparse, whose results differ from one Python to the next."""
    if isinstance(node, list):
        return f"[{','.join(map(_normalised, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
        fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
    return f"{type(node).__name__}({','.join(f'{name}={_normalised(value)}' for name, value in fields)})"
