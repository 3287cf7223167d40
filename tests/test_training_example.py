"""`fuzzytok_kernels.examples.train` under torchrun: a rank is killed, and another number of ranks goes on at the last checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from modes import ON_CUDA, not_interpreted

from fuzzytok_kernels.examples import train

ROOT = Path(__file__).parents[1]
TIMEOUT = 60
GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(ON_CUDA and GPUS < 2, reason="needs two GPUs"),
    not_interpreted,
]


def torchrun(ranks: int, time_ranks: int, checkpoints: Path, steps: int) -> subprocess.Popen:
    sizes = {"batch": 4, "length": 64, "dim": 8, "every": 3, "steps": steps, "time-ranks": time_ranks, "timeout": TIMEOUT}
    options = [f"--{name}={value}" for name, value in (sizes | {"file": ROOT / "README.md", "checkpoints": checkpoints}).items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({} if ON_CUDA else {"CUDA_VISIBLE_DEVICES": ""})
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *("-m", "fuzzytok_kernels.examples.train", *options),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def losses(log: str) -> dict[int, float]:
    return {int(step): float(bits) for step, bits in re.findall(r"^step (\d+): ([\d.]+) bits per byte$", log, re.MULTILINE)}


def test_killed_and_resumed(tmp_path):
    """The killed run ends within the timeout and says what happened; its checkpoint serves other ranks, to the same losses."""
    run = torchrun(ranks=2, time_ranks=2, checkpoints=tmp_path, steps=10**6)
    log = ""
    while "\nstep 5: " not in log and (line := run.stdout.readline()):
        log += line
    victim = int(re.search(r"^rank 1 of 2: process (\d+)$", log, re.MULTILINE)[1])
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    rest, errors = run.communicate(timeout=2 * TIMEOUT)
    assert time.monotonic() - begin < TIMEOUT
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors and f"pid: {victim}" in errors
    killed = losses(log + rest)
    last = max(step for step in killed if step % 3 == 0 and (tmp_path / f"step-{step:08}" / ".metadata").exists())
    assert max(killed) - last <= 3

    (tmp_path / "step-99999999").mkdir()  # as a run leaves it that was killed while it wrote
    ranks = 4 if not ON_CUDA or GPUS >= 4 else 1
    resumed = torchrun(ranks=ranks, time_ranks=min(2, ranks), checkpoints=tmp_path, steps=max(killed) + 1)
    log, errors = resumed.communicate(timeout=2 * TIMEOUT)
    assert resumed.returncode == 0, errors
    assert f"resumed at step {last}\n" in log
    again = losses(log)
    assert list(again) == list(range(last + 1, max(killed) + 2))
    for step in again.keys() & killed.keys():
        assert again[step] == pytest.approx(killed[step], abs=0.05 if ON_CUDA else 2e-4)
    assert killed[max(killed)] < killed[1]


def test_without_torchrun(tmp_path):
    command = [sys.executable, "-m", "fuzzytok_kernels.examples.train", f"--file={ROOT / 'README.md'}", f"--checkpoints={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr.strip().splitlines()[-1][:23]) == (1, "run it under torchrun: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--time-ranks=0", "--time-ranks is 0; expected at least 1"),
        ("--every=0", "--every is 0; expected at least 1"),
        ("--length=10000000", r"--file=\S+README.md has \d+ bytes; expected more than the 10000000 of --length"),
    ],
)
def test_options_are_refused(option, message, monkeypatch, tmp_path):
    """Before the ranks meet, by each alike."""
    monkeypatch.setattr(sys, "argv", ["train", f"--file={ROOT / 'README.md'}", f"--checkpoints={tmp_path}", option])
    with pytest.raises(SystemExit, match=f"^{message}$"):
        train._options()
