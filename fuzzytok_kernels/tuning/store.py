"""The tuning files: one JSON file for each GPU and op, one winner a line. What cannot be trusted is never used, and never raises."""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fuzzytok_kernels.tuning.gpu import Gpu, versions
from fuzzytok_kernels.tuning.hashes import in_space, kernel_hash, space_hash
from fuzzytok_kernels.tuning.problem import DTYPES, LAYOUTS, Problem, distance
from fuzzytok_kernels.tuning.space import OPS, Config

SCHEMA = 1

_PROBLEM_FIELDS = [name for name in Problem._fields if name != "op"]  # the file says the op once
_warned: set[Path] = set()


class Entry(NamedTuple):
    """One winner: a line of a file."""

    problem: Problem
    config: Config
    time_us: float | None = None  # None: chosen for a whole architecture, never measured
    default_us: float | None = None
    shared: int | None = None  # bytes of shared memory that its program takes; None: not known
    tried: int | None = None  # how many candidates it was chosen from


def path_of(directory: Path, gpu: Gpu, op: str) -> Path:
    """Where the winners of `op` on `gpu` lie below `directory`."""
    return directory / gpu.arch / gpu.slug / f"{op}.json"


def read(path: Path, gpu: Gpu, op: str) -> tuple[list[Entry], str | None]:
    """The entries that `gpu` can run, and why others, or all of them, are refused; never raises.

    A file for other kernels, another search space or another architecture is refused silently, a broken one with one warning.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        differences = _differences(content, gpu, op)
        if differences:
            return [], "\n".join(differences)
        return _usable(path, content, gpu, op)
    except FileNotFoundError:
        return [], "no such file"
    except (OSError, ValueError, RecursionError) as error:
        return [], _broken(path, str(error))


def header(path: Path) -> tuple[Gpu, dict[str, Any]]:
    """The GPU and the versions of the file at `path`, whatever its entries. Raises OSError or ValueError."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    had = content.get("versions")
    return _gpu(content), had if isinstance(had, dict) else {}


def merge(directory: Path, gpu: Gpu, op: str, entries: Iterable[Entry], measured: Mapping[str, Any]) -> Path:
    """Add `entries` to the file of `gpu` and `op` below `directory`, each in place of an older one of its problem; return its path.

    Safe against other processes that merge at the same time and against being killed. A file that holds anything that `read` refuses
    is kept beside the new one as `.bad`; that of another version of the package under a name of its own, and what is kept so of this
    version lives on: two that share a folder lose nothing of each other. `measured` says how the times were taken. Raises OSError if
    the folder cannot be written, and ValueError if an entry is one that `read` would refuse.
    """
    from filelock import FileLock

    entries = list(entries)
    for entry in entries:
        _parsed(json.loads(_line(entry)), op)
    path = path_of(directory, gpu, op)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{op}.lock")):
            kept, refusal = read(path, gpu, op)
            if refusal and path.exists():
                _keep_aside(path, op, refusal, whole=not kept)
            if not kept:
                kept, _ = read(_aside(path, _version(op)), gpu, op)
            merged = {entry.problem: entry for entry in [*kept, *entries]}
            _write(path, gpu, op, merged.values(), measured)
    except OSError as error:
        raise OSError(f"tuning results cannot be stored in {path.parent}: {error}; name a folder that can be written") from error
    return path


def nearest(entries: Iterable[Entry], problem: Problem) -> Entry | None:
    """The entry for `problem`, or the one of its kind that is nearest; None if there is none."""
    alike = [entry for entry in entries if entry.problem.kind == problem.kind]
    return min(
        alike, key=lambda entry: (distance(entry.problem, problem), entry.problem.dtype != problem.dtype, entry.problem), default=None
    )


# ---- what can be trusted


def _differences(content: dict, gpu: Gpu, op: str) -> list[str]:
    """How a file is not of this version, op and architecture."""
    if content.get("schema") != SCHEMA:
        return [f"schema is {content.get('schema')!r}, expected {SCHEMA}"]
    pairs = {
        "op": (content.get("op"), op),
        "arch": (_gpu(content).arch, gpu.arch),
        "kernel_hash": (content.get("kernel_hash"), kernel_hash(op)),
        "space_hash": (content.get("space_hash"), space_hash()),
    }
    return [f"{name} is {had!r}, expected {expected!r}" for name, (had, expected) in pairs.items() if had != expected]


def _gpu(content: dict) -> Gpu:
    """Raises ValueError unless the file says what it was measured on."""
    fields = content.get("gpu")
    if not isinstance(fields, dict) or [type(fields.get(name)) for name in Gpu._fields] != [str, str, int, int]:
        raise ValueError(f"gpu is {fields!r}, expected its {', '.join(Gpu._fields)}")
    gpu = Gpu(*(fields[name] for name in Gpu._fields))
    if not re.fullmatch(r"sm[0-9]+|gfx[0-9a-f]+", gpu.arch) or gpu.sm_count < 1 or gpu.shared_memory < 1:
        raise ValueError(f"gpu is {fields!r}, expected an arch as sm90 or gfx942, and positive numbers")
    return gpu


def _usable(path: Path, content: dict, gpu: Gpu, op: str) -> tuple[list[Entry], str | None]:
    if not isinstance(content.get("entries"), list):
        raise ValueError("entries is no list")
    usable, broken, too_large = [], [], []
    for number, fields in enumerate(content["entries"], 1):
        try:
            entry = _parsed(fields, op)
        except ValueError as error:
            broken.append(f"entry {number}: {error}")
            continue
        needed = _gpu(content).shared_memory if entry.shared is None else entry.shared
        if needed > gpu.shared_memory:
            too_large.append(f"entry {number}: shared memory is {needed:,} bytes, expected at most {gpu.shared_memory:,}")
        else:
            usable.append(entry)
    if broken:
        _broken(path, *broken)
    return usable, "\n".join(broken + too_large) or None


def _parsed(fields: Any, op: str) -> Entry:
    """An entry from its line. Raises ValueError with the field, what it is and what was expected."""
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r}, expected an object")
    names = {*_PROBLEM_FIELDS, *Config._fields, *Entry._fields[2:]}
    if fields.keys() != names:
        raise ValueError(f"fields missing or unknown: {', '.join(sorted(names ^ fields.keys()))}")
    problem = Problem(op, *(fields[name] for name in _PROBLEM_FIELDS))
    config = Config(*(fields[name] for name in Config._fields))
    _expect(fields, "dtype", "one of " + ", ".join(DTYPES), problem.dtype in DTYPES)
    _expect(fields, "layout", "one of " + ", ".join(LAYOUTS), problem.layout in LAYOUTS)
    _expect(fields, "aligned", "true or false", type(problem.aligned) is bool)
    _expect(fields, "epilogue", "one of " + ", ".join(OPS[op].epilogues), problem.epilogue in OPS[op].epilogues)
    for name in ("kernel_size", "c_in", "c_out", "steps"):
        _expect(fields, name, "a positive integer of 64 bits", type(fields[name]) is int and 0 < fields[name] < 2**63)
    if not in_space(config):
        raise ValueError(f"{config} is outside the search space")
    _expect(fields, "path", "pointer, for the problem is not aligned", config.path == "pointer" or problem.aligned)
    for name in ("time_us", "default_us"):
        time = fields[name]
        _expect(fields, name, "a positive number or null", time is None or (type(time) in (int, float) and 0 < time < math.inf))
    for name in ("shared", "tried"):
        _expect(fields, name, "a natural number or null", fields[name] is None or (type(fields[name]) is int and fields[name] >= 0))
    return Entry(problem, config, *(fields[name] for name in Entry._fields[2:]))


def _expect(fields: dict, name: str, expected: str, met: bool) -> None:
    if not met:
        raise ValueError(f"{name} is {fields[name]!r}, expected {expected}")


def _broken(path: Path, *why: str) -> str:
    if path not in _warned:
        _warned.add(path)
        more = f" (and {len(why) - 1} more)" if len(why) > 1 else ""
        warnings.warn(f"fuzzytok_kernels ignores what is broken in the tuning file {path}: {why[0]}{more}", stacklevel=2)
    return "\n".join(why)


# ---- writing


def _keep_aside(path: Path, op: str, refusal: str, whole: bool) -> None:
    """Keep a file that is about to be replaced; only a copy, if some of its entries live on and must outlast a kill."""
    version = _version_of(path)
    aside = path.with_name(f"{path.name}.bad") if version is None or version == _version(op) else _aside(path, version)
    (os.replace if whole else shutil.copyfile)(path, aside)
    warnings.warn(f"fuzzytok_kernels keeps the former {path} as {aside.name}: {refusal}", stacklevel=3)


def _aside(path: Path, version: str) -> Path:
    return path.with_name(f"{path.name}.{version}.bad")


def _version(op: str) -> str:
    """That of the files which this version of the package writes for `op`."""
    return f"{SCHEMA}-{kernel_hash(op)}-{space_hash()}"


def _version_of(path: Path) -> str | None:
    """That of a file; None if it is broken."""
    try:
        content = json.loads(path.read_text("utf-8"))
        version = "-".join(str(content[name]) for name in ("schema", "kernel_hash", "space_hash"))
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return version if re.fullmatch(r"[0-9]+-[0-9a-f]{16}-[0-9a-f]{16}", version) else None


def _write(path: Path, gpu: Gpu, op: str, entries: Iterable[Entry], measured: Mapping[str, Any]) -> None:
    """Replace the file in one step. Call it under the lock."""
    header = {
        "schema": SCHEMA,
        "op": op,
        "gpu": gpu._asdict(),
        "versions": versions(),
        "kernel_hash": kernel_hash(op),
        "space_hash": space_hash(),
        "measured": dict(measured),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in header.items()]
    text = "\n".join(["{", *lines, '  "entries": [', ",\n".join(f"    {_line(entry)}" for entry in sorted(entries)), "  ]", "}", ""])
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(entry: Entry) -> str:
    rest = {name: _rounded(value) for name, value in entry._asdict().items() if name not in ("problem", "config")}
    fields = {**entry.problem._asdict(), **entry.config._asdict(), **rest}
    return json.dumps({name: value for name, value in fields.items() if name != "op"})


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value  # what is beyond is noise
