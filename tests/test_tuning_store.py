"""The tuning files: what is written is read again, and nothing that is broken, foreign or interrupted ever raises or costs an entry."""

import ast
import itertools
import json
import os
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

import fuzzytok_kernels
from fuzzytok_kernels.tuning import Config, Problem, hashes, store
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.space import OPS
from fuzzytok_kernels.tuning.store import Entry, merge, nearest, read

GPU = Gpu("Fake GPU 9000 (80GB)", "sm90", 132, 232448)
OP = "causal_conv1d"
PROBLEM = Problem(OP, "bf16", "last", True, "none", 3, 256, 256, 65536)
CONFIG = Config("tma", 128, 64, 128, 4, 3, 2)
MEASURED = {"inputs": "fresh random, cold L2"}


def entry(c: int = 256, **fields) -> Entry:
    return Entry(PROBLEM._replace(c_in=c, c_out=c), CONFIG, 41.7, 45.0, 98304, 14)._replace(**fields)


def stored(folder: Path, *entries: Entry) -> Path:
    return merge(folder, GPU, OP, entries or (entry(64), entry(256)), MEASURED)


def edited(path: Path, edit) -> Path:
    """The file at `path`, with `edit` applied to its content."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def read_silently(path: Path, gpu: Gpu = GPU) -> tuple[list[Entry], str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(path, gpu, OP)


def read_with_one_warning(path: Path) -> tuple[list[Entry], str]:
    """Read twice; the second time is silent."""
    with pytest.warns(UserWarning, match=re.escape(str(path))) as caught:
        entries, refusal = read(path, GPU, OP)
    assert len(caught) == 1
    assert read_silently(path) == (entries, refusal)
    assert refusal
    return entries, refusal


# ---- what is written


def test_round_trip(tmp_path):
    path = stored(tmp_path, entry(256), entry(64), entry(128, time_us=None, default_us=None, shared=None, tried=None))
    assert path == tmp_path / "sm90" / "fake_gpu_9000_80gb" / "causal_conv1d.json"
    entries, refusal = read_silently(path)
    assert refusal is None
    assert entries == [entry(64), entry(128, time_us=None, default_us=None, shared=None, tried=None), entry(256)]
    content = json.loads(path.read_text())
    assert content["gpu"] == GPU._asdict()
    assert content["measured"] == MEASURED
    assert content["versions"]["torch"] == torch.__version__
    assert [line.count('"steps"') for line in path.read_text().splitlines() if "steps" in line] == [1, 1, 1]


def test_newer_replaces_and_others_stay(tmp_path):
    stored(tmp_path, entry(64), entry(256))
    path = stored(tmp_path, entry(256, time_us=40.0), entry(512))
    assert read_silently(path)[0] == [entry(64), entry(256, time_us=40.0), entry(512)]


def test_times_keep_what_can_be_measured(tmp_path):
    assert read_silently(stored(tmp_path, entry(time_us=41.73912)))[0][0].time_us == 41.74


@pytest.mark.parametrize(
    "wrong",
    [{"time_us": float("nan")}, {"time_us": -1.0}, {"config": CONFIG._replace(BLOCK_T=48)}, {"problem": PROBLEM._replace(aligned=False)}],
    ids=str,
)
def test_merge_writes_nothing_that_would_be_refused(wrong, tmp_path):
    path = stored(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"expected|outside"):
        stored(tmp_path, entry(512), entry(**wrong))
    assert path.read_bytes() == before


def test_nearest():
    def at(c_in, c_out, steps, **exact):
        return entry(problem=PROBLEM._replace(c_in=c_in, c_out=c_out, steps=steps, **exact))

    entries = [
        at(64, 64, 4096),
        at(256, 256, 4096),
        at(256, 256, 65536),
        at(64, 64, 65536, dtype="fp16"),
        at(256, 256, 65536, kernel_size=5),
    ]
    assert nearest(entries, PROBLEM) == entries[2]
    assert nearest(entries, PROBLEM._replace(c_in=256, c_out=248)) == entries[2]
    assert nearest(entries, PROBLEM._replace(kernel_size=6)) == entries[4]
    assert nearest(entries, PROBLEM._replace(c_in=100, c_out=80, steps=1)) == entries[0]
    assert nearest(entries, PROBLEM._replace(layout="first")) == entries[2]
    assert nearest(entries, PROBLEM._replace(dtype="fp16")) == entries[2]
    for other in ({"dtype": "tf32"}, {"op": "causal_conv1d_input_grad"}):
        assert nearest(entries, PROBLEM._replace(**other)) is None
    assert nearest([], PROBLEM) is None
    tied = [at(128, 256, 65536), at(256, 128, 65536), at(512, 256, 65536), at(256, 256, 131072)]
    for order in itertools.permutations(tied):
        assert nearest(order, PROBLEM) == tied[0]


# ---- hashes


def test_every_op_declares_the_files_of_its_kernels():
    ops = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fuzzytok::")}
    fixed = {"byte_causal_conv1d", "byte_causal_conv1d_grad", "causal_conv1d_update", "residual_stack_update", "embedding_norm"}
    assert ops == set(OPS) | fixed  # whose launchers say why one config serves them all
    folder = Path(fuzzytok_kernels.__file__).parent / "kernels"
    for names in (op.kernels for op in OPS.values()):
        for name in names:
            imported = re.findall(r"^from fuzzytok_kernels\.kernels\.(\w+) import", (folder / name).read_text(), re.MULTILINE)
            assert {f"{module}.py" for module in imported} <= set(names)


def test_kernel_hash_sees_code_alone():
    def normalised(source):
        return hashes._normalised(ast.parse(source))

    code = '"""What."""\ndef f(a, b: int = 1):\n    """Adds."""\n    return a + b  # the sum\n'
    assert normalised(code) == normalised("def f(\n    a,\n    b: int = 1,\n):\n\n    return (a + b)\n")
    assert normalised(code) != normalised(code.replace("a + b", "a - b"))
    # One text in every Python: a file measured with one must be a hit in all others.
    assert normalised("x[:, None] = f(y, k=1)") == (
        "Module(body=[Assign(targets=[Subscript(value=Name(id='x',ctx=Load()),slice=Tuple(elts=[Slice(),Constant()],ctx=Load()),ctx=Store())],"
        "value=Call(func=Name(id='f',ctx=Load()),args=[Name(id='y',ctx=Load())],keywords=[keyword(arg='k',value=Constant(value=1))]))])"
    )


# ---- files that are not to be used, silently


@pytest.mark.parametrize("field", ["schema", "op", "kernel_hash", "space_hash"])
def test_foreign_file_is_a_silent_miss(field, tmp_path):
    path = edited(stored(tmp_path), lambda content: content.update({field: "foreign"}))
    entries, refusal = read_silently(path)
    assert not entries
    assert re.fullmatch(rf"{field} is 'foreign', expected .*", refusal)


def test_other_architecture_is_a_silent_miss(tmp_path):
    assert read_silently(stored(tmp_path), GPU._replace(arch="sm80")) == ([], "arch is 'sm90', expected 'sm80'")


def test_no_file_is_a_silent_miss(tmp_path):
    assert read_silently(tmp_path / "none.json") == ([], "no such file")


def test_config_that_does_not_fit_is_a_silent_miss(tmp_path):
    path = stored(tmp_path, entry(64, shared=1 << 17), entry(128, shared=None), entry(256))
    entries, refusal = read_silently(path, GPU._replace(shared_memory=101376))
    assert entries == [entry(256)]
    assert refusal.splitlines() == [
        "entry 1: shared memory is 131,072 bytes, expected at most 101,376",
        "entry 2: shared memory is 232,448 bytes, expected at most 101,376",  # not known: what the GPU that ran it has
    ]


@pytest.mark.parametrize("versions", [{}, {"torch": "2.11.0", "triton": "3.6.0", "CUDA": "12.8", "driver": "535.1"}], ids=["none", "older"])
def test_other_versions_are_a_hit(versions, tmp_path):
    """They change how fast a config is, not what it means; a miss would take every shipped file away from every other Triton."""
    path = edited(stored(tmp_path), lambda content: content.update(versions=versions))
    assert read_silently(path) == ([entry(64), entry(256)], None)


@pytest.mark.parametrize("mtime", [0, 4e9], ids=["1970", "2096"])
def test_clocks_do_not_matter(mtime, tmp_path):
    """The later merge wins, whatever the clock says."""
    os.utime(stored(tmp_path, entry(64), entry(256)), (mtime, mtime))
    path = merge(tmp_path, GPU, OP, [entry(256, time_us=50.0)], {"date": "1970-01-01"})
    assert read_silently(path)[0] == [entry(64), entry(256, time_us=50.0)]


# ---- broken files and entries, with one warning


def test_truncated_at_any_byte(tmp_path):
    text = stored(tmp_path).read_text()
    for length in range(0, len(text.rstrip()), 7):
        path = tmp_path / f"{length}.json"
        path.write_text(text[:length])
        entries, _ = read_with_one_warning(path)
        assert not entries


CONTENTS = {
    "list": b"[]",
    "number": b"NaN",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "long number": b'{"schema": ' + b"9" * 10_000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_broken_file(content, tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    assert not read_with_one_warning(path)[0]


WRONG_HEADERS: list[dict] = [
    *({"gpu": gpu} for gpu in (None, {"arch": "sm90"})),
    *(
        {"gpu": GPU._replace(**fields)._asdict()}
        for fields in ({"arch": "smXY"}, {"arch": "../sm90"}, {"sm_count": 0}, {"shared_memory": -1})
    ),
    *({"entries": entries} for entries in (None, {})),
]


@pytest.mark.parametrize("change", WRONG_HEADERS, ids=str)
def test_broken_header(change, tmp_path):
    assert not read_with_one_warning(edited(stored(tmp_path), lambda content: content.update(change)))[0]


WRONG = [
    *({"time_us": value} for value in (float("nan"), -1.0, 0, float("inf"), "41.7", True)),
    *({"default_us": value} for value in (float("nan"), -45.0)),
    *({"BLOCK_T": value} for value in (48, 512, 0, -128, 128.0, "128", True, [128])),
    *({"path": value} for value in ("magic", None, ["tma"])),
    *({"num_warps": value} for value in (3, 64, None)),
    *({"num_stages": value} for value in (0, 9, float("nan"))),
    {"programs_per_sm": 0},
    {"aligned": False},  # the entry's path is "tma"
    {"aligned": 1},
    {"kernel_size": 0},
    {"c_in": -64},
    {"steps": 2.0},
    {"dtype": "int8"},
    {"dtype": {}},
    {"layout": "middle"},
    {"shared": -1},
    {"tried": "all"},
    {"unknown": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_broken_entry_costs_no_other(wrong, tmp_path):
    path = edited(stored(tmp_path), lambda content: content["entries"][0].update(wrong))
    entries, refusal = read_with_one_warning(path)
    assert entries == [entry(256)]
    assert refusal.startswith("entry 1: ")


@pytest.mark.parametrize("line", [None, [], "x", {}], ids=str)
def test_entry_of_another_kind(line, tmp_path):
    path = edited(stored(tmp_path), lambda content: content["entries"].insert(0, line))
    assert read_with_one_warning(path)[0] == [entry(64), entry(256)]


# ---- merging into what is broken or foreign


def test_merge_keeps_a_foreign_file_aside(tmp_path):
    path = edited(stored(tmp_path), lambda content: content.update(schema=99))
    foreign = path.read_bytes()
    with pytest.warns(UserWarning, match=r"causal_conv1d.json\.99-\w+-\w+\.bad: schema is 99, expected 1") as caught:
        stored(tmp_path, entry(512))
    assert len(caught) == 1
    assert read_silently(path)[0] == [entry(512)]
    (aside,) = path.parent.glob("*.bad")
    assert aside.read_bytes() == foreign


@pytest.mark.filterwarnings("ignore:fuzzytok_kernels keeps the former")
def test_two_versions_that_share_a_folder_lose_nothing(tmp_path, monkeypatch):
    for turn, c_in in enumerate((64, 128, 192, 256, 320, 384)):
        with monkeypatch.context() as patch:
            if turn % 2:
                patch.setattr(store, "kernel_hash", lambda op: "0123456789abcdef")
            path = stored(tmp_path, entry(c_in))
            assert [had.problem.c_in for had in read_silently(path)[0]] == [64 + 64 * n for n in range(turn % 2, turn + 1, 2)]


@pytest.mark.parametrize("version", ["../../../../evil", "", None, [], "0" * 17])
def test_a_foreign_file_does_not_choose_its_name(version, tmp_path):
    path = edited(stored(tmp_path), lambda content: content.update(kernel_hash=version))
    with pytest.warns(UserWarning, match=r"causal_conv1d\.json\.bad"):
        stored(tmp_path, entry(512))
    assert path.with_name("causal_conv1d.json.bad").exists()


def test_merge_keeps_the_good_entries_of_a_broken_file(tmp_path):
    path = edited(stored(tmp_path), lambda content: content["entries"][0].update(time_us=-1))
    broken = path.read_bytes()
    with pytest.warns(UserWarning, match="causal_conv1d.json"):
        stored(tmp_path, entry(512))
    assert read_silently(path)[0] == [entry(256), entry(512)]
    assert path.with_name("causal_conv1d.json.bad").read_bytes() == broken


# ---- folders


def test_folder_in_the_file_s_place(tmp_path):
    path = store.path_of(tmp_path, GPU, OP)
    path.mkdir(parents=True)
    read_with_one_warning(path)
    with pytest.warns(UserWarning, match="bad"):
        stored(tmp_path)
    assert read_silently(path)[0] == [entry(64), entry(256)]


def test_file_in_the_folder_s_place(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    read_with_one_warning(store.path_of(folder, GPU, OP))
    with pytest.raises(OSError, match=r"tuning results cannot be stored in .*file.*; name a folder that can be written"):
        stored(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_unreadable_and_read_only_folders(tmp_path):
    path = stored(tmp_path)
    try:
        path.parent.chmod(0o500)
        assert read_silently(path)[0] == [entry(64), entry(256)]
        with pytest.raises(OSError, match="cannot be stored"):
            stored(tmp_path, entry(512))
        path.parent.chmod(0)
        assert not read_with_one_warning(path)[0]
    finally:
        path.parent.chmod(0o700)
    assert read_silently(path)[0] == [entry(64), entry(256)]


# ---- several processes


def fork(work, *args) -> int:
    """Run `work(*args)` in a child process; its id."""
    child = os.fork()
    if child == 0:
        try:
            work(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def merge_one_by_one(folder: Path, channels: range, finished: int | None = None) -> None:
    for c in channels:
        stored(folder, entry(c))
        if finished is not None:
            os.write(finished, f"{c} ".encode())


def test_processes_that_merge_at_once_lose_nothing(tmp_path):
    children = [fork(merge_one_by_one, tmp_path, range(first, 101, 4)) for first in (1, 2, 3, 4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    entries, refusal = read_silently(store.path_of(tmp_path, GPU, OP))
    assert refusal is None
    assert [entry.problem.c_in for entry in entries] == list(range(1, 101))


def test_killed_in_the_middle(tmp_path):
    """Whatever is reported finished is in the file, the file is readable, and the next process goes on."""
    path = store.path_of(tmp_path, GPU, OP)
    for attempt in range(12):
        reader, writer = os.pipe()
        child = fork(merge_one_by_one, tmp_path, range(1, 10_000), writer)
        os.close(writer)
        first = os.read(reader, 100)
        time.sleep(attempt * 0.004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as rest:
            finished = [int(c) for c in (first + rest.read()).split()]
        entries, refusal = read_silently(path)
        assert refusal is None
        assert set(finished) <= {entry.problem.c_in for entry in entries}
    stored(tmp_path, entry(20_000))
    assert {1, 20_000} <= {entry.problem.c_in for entry in read_silently(path)[0]}
