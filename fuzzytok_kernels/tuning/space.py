"""The configs: what a kernel can be told, and what is chosen where nothing was measured."""

from typing import NamedTuple

from fuzzytok_kernels.tuning.problem import Problem


class Config(NamedTuple):
    """How one problem runs. The names in capitals are the kernels' own."""

    path: str  # "tma" (descriptors) or "pointer"
    BLOCK_T: int
    BLOCK_C_IN: int
    BLOCK_C_OUT: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # the persistent convolution's programs, or those that the splits of the weight gradient make up


def default_config(problem: Problem, path: str | None = None) -> Config:
    """A config that fits every supported GPU and is never far off. `path` overrides the choice of path."""
    if path is None:
        path = "tma" if problem.aligned and problem.steps >= 1 << 12 else "pointer"
    wide = 2 if problem.dtype in ("tf32", "fp32") else 1
    if path == "pointer":
        block_t = 128 if problem.steps >= 1 << 15 else 64 if problem.steps >= 1 << 11 else 32
        return Config(path, block_t, 32 // wide, 64, 4, 3, 4)
    block_out = min(128, _power_of_two(problem.c_out))
    if problem.op == "causal_conv1d_weight_grad":
        return Config(path, 64 // wide, min(128, _power_of_two(problem.c_in)), block_out, 4 if wide == 1 else 8, 3, 1)
    return Config(path, 128, min(64 // wide, _power_of_two(problem.c_in)), block_out, 4 if wide == 1 else 8, 3, 2 if wide == 1 else 1)


def _power_of_two(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())
