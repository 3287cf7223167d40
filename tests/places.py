"""Folders of tuning files for a GPU that is not there; the fixture `places` of conftest.py puts them in place of the real ones."""

import warnings
from pathlib import Path

from fuzzytok_kernels import tuning
from fuzzytok_kernels.tuning import Config, Problem, get_config
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.store import Entry, merge

GPU = Gpu("Fake GPU 9000", "sm90", 132, 232448)
SIBLING = Gpu("Fake GPU 9000 Ti", "sm90", 144, 232448)
GENERIC = Gpu("generic", "sm90", 1, 232448)
OP = "causal_conv1d"
PROBLEM = Problem(OP, "bf16", "last", True, "none", 3, 256, 256, 65536)
CONFIG = Config("tma", 128, 64, 128, 4, 3, 2)


class Places:
    """The folders of the look-up, empty, for a GPU that is not there."""

    def __init__(self, root: Path) -> None:
        self.own, self.cache, self.shipped = root / "own", root / "xdg" / "fuzzytok_kernels" / "tuning", root / "shipped"

    def put(self, folder: Path, stages: int, gpu: Gpu = GPU, problem: Problem = PROBLEM, **fields) -> Path:
        """Store a config that is told by its `num_stages`."""
        return merge(folder, gpu, problem.op, [Entry(problem, CONFIG._replace(num_stages=stages), shared=98304)._replace(**fields)], {})


def stages(problem: Problem = PROBLEM, device: int = 0) -> int:
    """The `num_stages` that `problem` gets in a process that has not looked before; silent."""
    tuning.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return get_config(device, problem).num_stages
