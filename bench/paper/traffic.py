"""Bytes that a forward kernel moves: counted from its tiles, and read from the GPU's counters by ncu where that is allowed.

`python3 -m bench.paper.traffic RIVAL SHAPE` launches the kernel three times; `measured` runs that under ncu and reads the third.
"""

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.grid import ELEMENT_SIZES, Case, Shape
from bench.measure import Data
from bench.rivals import RIVALS

METRICS = {"dram_read": "dram__bytes_read.sum", "dram_write": "dram__bytes_write.sum", "l2": "lts__t_bytes.sum"}
_LISTING_TILE = 32  # in all three axes; the untiled kernel has it along time only
_SECONDS = 90


def requested(rival: str, shape: Shape, config: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that the programs ask for in all, of x and of the weight, in bf16: every tap of every tile counts, caches do not.

    `config` is that of ours. "scalar" is one product a load: what a kernel without tiles would ask for.
    """
    tiles = {
        "scalar": (1, 1),
        "naive": (_LISTING_TILE, shape.c_out),
        "listing1": (_LISTING_TILE, _LISTING_TILE),
        "ours": (config.get("BLOCK_T", 0), config.get("BLOCK_C_OUT", 0)),
    }
    block_t, block_out = tiles[rival]
    if not block_t:
        return {}
    of_x = shape.B * -(-shape.T // block_t) * -(-shape.c_out // block_out) * block_t * shape.c_in * shape.K
    of_weight = shape.B * -(-shape.T // block_t) * -(-shape.c_out // block_out) * block_out * shape.c_in * shape.K
    return {"x": of_x * ELEMENT_SIZES["bf16"], "weight": of_weight * ELEMENT_SIZES["bf16"]}


def measured(rival: str, shape: Shape) -> dict[str, Any]:
    """Bytes by METRICS, or why they could not be read."""
    if shutil.which("ncu") is None:
        return {"failed": "ncu is not on the PATH"}
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--metrics", ",".join(METRICS.values())]
    command += ["--kernel-name", "regex:conv", "--launch-skip", "2", "--launch-count", "1"]
    command += [sys.executable, "-m", "bench.paper.traffic", rival, str(shape)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"ncu took more than {_SECONDS} s"}
    return parsed(done.stdout) or {"failed": _reason(done.stdout + done.stderr)}


def parsed(output: str) -> dict[str, float]:
    """The metrics from ncu's raw page; empty if they are not in it."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(rows) < 2 or any(metric not in rows[0] for metric in METRICS.values()):
        return {}
    return {name: float(rows[-1][metric].replace(",", "")) for name, metric in METRICS.items()}  # the first row holds the units


def _reason(output: str) -> str:
    errors = [line for line in output.splitlines() if "==ERROR==" in line or "Error" in line]
    return (errors or output.strip().splitlines() or ["ncu printed nothing"])[0].removeprefix("==ERROR==").strip()[:160]


def main(arguments: Sequence[str]) -> None:
    """Launch a rival's forward kernel three times."""
    import torch

    rival, name = arguments
    shape = Shape.parse(name)
    data = Data(Case("main", "forward", rival, shape), 1)
    each = RIVALS[rival](shape)
    inputs = each.adapt(data.copies[0], "forward")
    with torch.no_grad():
        for _ in range(3):
            each.forward(inputs)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
