"""The configs: what a kernel can be told, which are worth trying, and what is chosen where nothing was measured."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.problem import EPILOGUES, Problem


class Config(NamedTuple):
    """How one problem runs. The names in capitals are the kernels' own."""

    path: str  # "tma" (descriptors) or "pointer"
    BLOCK_T: int
    BLOCK_C_IN: int
    BLOCK_C_OUT: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # the persistent convolution's programs, or those that the splits of the weight gradient make up
    TAPS: int = 1  # of the weight gradient: how many taps a program sums


# Hand-picked from sweeps on an H100; every problem tries those of its op that suit its channels and steps.
_CONV = tuple(
    Config(*fields)
    for fields in (
        ("tma", 128, 64, 128, 4, 3, 2), ("tma", 128, 64, 128, 4, 4, 1), ("tma", 128, 64, 128, 8, 3, 2), ("tma", 128, 64, 256, 8, 3, 1),
        ("tma", 128, 64, 256, 8, 4, 1), ("tma", 256, 64, 128, 8, 3, 1), ("tma", 256, 64, 128, 8, 4, 1), ("tma", 128, 128, 128, 8, 2, 1),
        ("tma", 128, 32, 128, 4, 4, 2), ("tma", 128, 64, 64, 4, 3, 4), ("tma", 128, 64, 64, 4, 4, 3), ("tma", 256, 64, 64, 8, 3, 2),
        ("tma", 64, 64, 128, 4, 3, 3), ("tma", 64, 64, 256, 4, 3, 2), ("tma", 64, 64, 64, 4, 4, 4), ("tma", 64, 128, 64, 4, 4, 2),
        ("tma", 64, 128, 32, 4, 4, 2), ("tma", 128, 64, 32, 4, 4, 4), ("tma", 128, 32, 64, 4, 4, 4), ("tma", 128, 32, 32, 4, 4, 4),
        ("tma", 128, 32, 128, 8, 4, 2), ("tma", 128, 32, 128, 8, 3, 2), ("tma", 128, 32, 256, 8, 3, 1), ("tma", 64, 32, 64, 4, 4, 4),
        ("pointer", 16, 64, 32, 4, 4, 1), ("pointer", 16, 128, 32, 4, 3, 1), ("pointer", 16, 64, 64, 4, 4, 1),
        ("pointer", 32, 64, 32, 4, 4, 1), ("pointer", 32, 64, 64, 4, 4, 1), ("pointer", 64, 64, 64, 4, 4, 1),
        ("pointer", 64, 32, 64, 4, 4, 1), ("pointer", 64, 64, 128, 4, 3, 1), ("pointer", 128, 32, 64, 4, 3, 1),
        ("pointer", 128, 64, 128, 8, 3, 1), ("pointer", 128, 32, 128, 8, 3, 1), ("pointer", 32, 128, 32, 4, 3, 1),
        ("pointer", 128, 32, 32, 4, 4, 1), ("pointer", 64, 32, 32, 4, 4, 1), ("pointer", 128, 16, 64, 4, 4, 1),
        ("pointer", 128, 16, 16, 4, 4, 1), ("pointer", 64, 16, 16, 4, 4, 1), ("pointer", 128, 64, 16, 4, 4, 1),
    )
)  # fmt: skip
_WEIGHT_GRAD = tuple(
    Config(*fields)
    for fields in (
        ("tma", 64, 128, 128, 4, 4, 1), ("tma", 64, 128, 128, 4, 3, 2), ("tma", 64, 256, 128, 8, 3, 1), ("tma", 64, 256, 128, 8, 4, 1),
        ("tma", 64, 256, 128, 8, 4, 2), ("tma", 64, 256, 128, 8, 4, 4), ("tma", 64, 128, 256, 8, 3, 1), ("tma", 64, 128, 256, 8, 4, 1),
        ("tma", 64, 128, 256, 8, 4, 4), ("tma", 64, 128, 128, 4, 4, 2), ("tma", 64, 128, 128, 4, 4, 4), ("tma", 128, 128, 128, 8, 3, 1),
        ("tma", 128, 128, 128, 8, 2, 1), ("tma", 64, 128, 64, 4, 4, 2), ("tma", 64, 64, 128, 4, 4, 2), ("tma", 64, 64, 64, 4, 4, 2),
        ("tma", 128, 64, 64, 4, 3, 2), ("tma", 128, 64, 64, 4, 3, 1), ("tma", 64, 64, 64, 4, 4, 4), ("tma", 32, 128, 128, 8, 3, 1),
        ("tma", 32, 64, 128, 4, 3, 2), ("tma", 32, 128, 64, 4, 3, 2), ("tma", 32, 64, 64, 4, 4, 2), ("tma", 64, 128, 128, 8, 2, 1),
        ("tma", 32, 64, 64, 4, 3, 2, 3), ("tma", 32, 64, 128, 8, 3, 1, 3), ("tma", 32, 64, 128, 8, 3, 2), ("tma", 64, 64, 64, 4, 3, 2),
        ("tma", 64, 128, 128, 8, 3, 1, 3), ("tma", 64, 128, 128, 8, 3, 2, 3),
        ("tma", 64, 64, 64, 4, 4, 2, 3),
        ("tma", 64, 64, 64, 4, 4, 1, 3), ("tma", 128, 64, 128, 8, 3, 1, 3), ("tma", 64, 128, 128, 8, 4, 1, 2),
        ("tma", 64, 128, 128, 8, 3, 1, 2), ("tma", 64, 128, 64, 4, 4, 2, 2), ("tma", 64, 64, 64, 4, 4, 2, 2),
        ("tma", 64, 32, 64, 4, 4, 1), ("tma", 128, 32, 64, 4, 3, 1), ("tma", 64, 64, 64, 4, 4, 1),
        ("pointer", 32, 32, 32, 4, 4, 2), ("pointer", 32, 32, 64, 4, 4, 2), ("pointer", 32, 64, 64, 4, 4, 2),
        ("pointer", 64, 32, 64, 4, 4, 1, 1), ("pointer", 64, 64, 64, 4, 3, 1, 3), ("pointer", 64, 32, 32, 4, 3, 1, 3),
        ("pointer", 64, 64, 64, 4, 3, 2), ("pointer", 64, 32, 32, 4, 4, 4), ("pointer", 64, 64, 64, 4, 3, 4),
        ("pointer", 64, 64, 128, 4, 3, 2), ("pointer", 32, 128, 128, 8, 3, 1), ("pointer", 64, 128, 128, 8, 3, 1),
        ("pointer", 128, 32, 32, 4, 3, 2), ("pointer", 128, 16, 16, 4, 3, 4), ("pointer", 64, 16, 16, 4, 4, 2),
        ("pointer", 64, 16, 64, 4, 4, 2), ("pointer", 64, 64, 16, 4, 4, 2),
    )
)  # fmt: skip


PACKED = Config("tma", 128, 32, 128, 4, 3, 3)  # see packed_config


class Op(NamedTuple):
    """What the tuner knows of an op; a new one joins by a line in OPS."""

    kernels: tuple[str, ...]  # the files under kernels/ that it launches from: a change in them makes its stored winners a miss
    configs: tuple[Config, ...]
    epilogues: tuple[str, ...] = ("none",)


_CONV_KERNELS = ("conv.py", "activation.py", "dot.py", "sequences.py", "transpose.py")
OPS = {
    "causal_conv1d": Op(_CONV_KERNELS, _CONV),
    "causal_conv1d_fused": Op(_CONV_KERNELS, _CONV, EPILOGUES[1:]),
    "causal_conv1d_activation_grad": Op(_CONV_KERNELS, _CONV, EPILOGUES[2:]),
    "causal_conv1d_input_grad": Op(_CONV_KERNELS, _CONV, EPILOGUES[:2]),
    "causal_conv1d_weight_grad": Op(("weight_grad.py", "dot.py", "sequences.py", "transpose.py"), _WEIGHT_GRAD),
}


def default_config(problem: Problem, path: str | None = None) -> Config:
    """A config that fits every supported GPU: safe, not fast. `path` overrides the choice of path."""
    if path is None:
        path = "tma" if problem.aligned and problem.steps >= 1 << 12 else "pointer"
    wide = _element_size(problem) // 2
    if problem.op == "causal_conv1d_weight_grad":
        # Three TF32 products with 128 rows would take 800 of the 512 columns of Blackwell's tensor memory, under Triton 3.6.
        block_in, block_out = _block(problem.c_in, 64 if problem.dtype == "fp32" else 128), _block(problem.c_out, 128)
        if path == "tma":
            return Config(path, 128 // _size_read(problem, path), block_in, block_out, 8, 2, 1)
        return Config(path, 32, min(block_in, 64), min(block_out, 64), 4, 2, 2)
    summed, produced = channels(problem)
    if path == "tma":
        block_out = _block(produced, 64 if problem.dtype == "fp32" else 128)  # three TF32 products take three times the registers
        # See `suits`; and the derivative, with 4 warps, spilled 208 bytes on sm120 under Triton 3.6.
        derivative = problem.op == "causal_conv1d_activation_grad"
        warps = 8 if wide == 2 or derivative or (problem.layout == "first" and problem.epilogue != "none") else 4
        return Config(path, 128, _block(summed, 64 // wide), block_out, warps, 2, 2 // wide)
    block_t = 128 if problem.steps >= 1 << 15 else 64 if problem.steps >= 1 << 11 else 32
    return Config(path, block_t // wide, 32 // wide, _block(produced, 64), 4 * wide, 2, 1)


def packed_config(problem: Problem, config: Config, n_sequences: int, T: int, gpu: Gpu) -> Config:
    """`config`, or PACKED where the model expects less than 0.9 of its time for sequences of random lengths, T steps in all.

    They have more blocks than a batch, and their last round may be nearly empty: 65,536 steps in 128 unequal sequences are five rounds of
    tiles for two programs a multiprocessor, three for three. That took the input-grad 59 us in place of 66, the forward with GELU 63 for
    67, without 53 for 56; 16,384 steps in 32 sequences, whose config has one program, 20 for 29, 22 for 29 and 19 for 26 (C=256, H200).
    Equal lengths of a whole number of blocks, and padded boundaries, have fewer blocks than that and mostly lose by it: 57 us for 55, 62
    for 58, 52 for 47, and of 16,384 steps 19 for 18, 21 for 18 and 19 for 16. Where there are fewer than 64 steps a sequence most are taken
    for padding, and `config` stays. Where the model expected 0.91 to 0.95 of the time, 7 of 20 cases lost, up to 13 %. Gates take 1.07
    times as long, and the gradient of an activation, which spills 328 bytes under Triton 3.6, 1.09 times. Measured on Hopper alone.
    """
    suited = gpu.arch == "sm90" and config.path == "tma" and problem.layout == "last" and _element_size(problem) == 2
    suited = suited and problem.op != "causal_conv1d_activation_grad" and problem.epilogue not in GATES and suits(PACKED, problem)
    if not suited or 64 * n_sequences > T:
        return config

    def time(config: Config) -> float:
        steps = config.BLOCK_T * _expected_blocks(n_sequences, T, config.BLOCK_T)
        return predicted(problem._replace(steps=steps), config, gpu.sm_count)

    return PACKED if time(PACKED) < 0.9 * time(config) else config


def _expected_blocks(n_sequences: int, T: int, block_t: int) -> int:
    """Those of sequences of random lengths on average: a length is exponential then, and has 1 / (1 - exp(-block_t / mean)) blocks."""
    return round(-n_sequences / math.expm1(-block_t * n_sequences / T))


def candidates(problem: Problem, most: int, gpu: Gpu) -> list[Config]:
    """At most `most` configs worth timing for `problem`, the likeliest by `predicted` first; the default is not among them."""
    others = fitting(problem, OPS[problem.op].configs, gpu) - {default_config(problem)}
    return sorted(others, key=lambda config: (predicted(problem, config, gpu.sm_count), config))[:most]


def fitting(problem: Problem, configs: Iterable[Config], gpu: Gpu) -> set[Config]:
    """Those of `configs` that suit `problem` and its programs the shared memory of `gpu`."""
    return {config for config in configs if suits(config, problem) and shared_memory(problem, config) <= gpu.shared_memory}


def shared_memory(problem: Problem, config: Config) -> int:
    """The bytes of shared memory that a program takes at most: its pipeline, and half a tile on its way out."""
    columns = config.TAPS * config.BLOCK_C_IN
    if problem.op == "causal_conv1d_weight_grad":
        stage, out = config.BLOCK_T * (columns + config.BLOCK_C_OUT), config.BLOCK_C_OUT * 16
    else:
        stage, out = (config.BLOCK_T + config.BLOCK_C_OUT) * columns, config.BLOCK_T * config.BLOCK_C_OUT // 2
    return _size_read(problem, config.path) * (config.num_stages * stage + out) + 2048


def predicted(problem: Problem, config: Config, multiprocessors: int) -> float:
    """Nanoseconds that `config` may take: waves of programs, each the longest of its products, its loads from L2 and their latency.

    To rank configs and to compare problems, no more: fitted to 2,000 times of random problems on an H100, where the config that it
    puts first loses 5 % (geometric mean) against the best of all, and the best of its first four 2 %.
    """
    size, tma = _size_read(problem, config.path), config.path == "tma"
    if problem.op == "causal_conv1d_weight_grad":
        groups = math.ceil(problem.kernel_size / config.TAPS)
        tiles = groups * math.ceil(problem.c_in / config.BLOCK_C_IN) * math.ceil(problem.c_out / config.BLOCK_C_OUT)
        steps = math.ceil(problem.steps / config.BLOCK_T)
        splits = max(1, min(steps, config.programs_per_sm * multiprocessors // tiles))
        programs, inner = tiles * splits, math.ceil(steps / splits)
        rows, columns, depth = config.BLOCK_C_OUT, config.TAPS * config.BLOCK_C_IN, config.BLOCK_T
        persistent = False
        tail = 0.0 if splits == 1 else 3e3 + programs * rows * columns * 8 / 2e3  # the reduction: a launch, and the partial sums twice
        if tma and problem.dtype == "tf32":  # two launches, that read 4 bytes and write 4
            inner *= 3
            tail += 6e3 + problem.steps * (problem.c_in + problem.c_out) * 8 / 2.5e3
    else:
        summed, produced = channels(problem)
        programs = math.ceil(problem.steps / config.BLOCK_T) * math.ceil(produced / config.BLOCK_C_OUT)
        inner = problem.kernel_size * math.ceil(summed / config.BLOCK_C_IN)
        rows, columns, depth = config.BLOCK_T, config.BLOCK_C_OUT, config.BLOCK_C_IN
        persistent, tail = tma, 0.0
    fitting = 227_000 // ((rows + columns) * depth * size * config.num_stages) or 1
    resident = config.programs_per_sm if persistent else min(fitting, 40 // config.num_warps)
    resident = min(resident, math.ceil(programs / multiprocessors))
    waves = math.ceil(programs / (multiprocessors * resident))
    products = 2 * rows * columns * depth / (6e3 if size == 2 else 2e3) * (1 if rows >= 64 else 2)  # at some 800 TFLOP/s a GPU
    loads = (rows + columns) * depth * size / (64 if tma else 36)  # at some 8 TB/s a GPU
    latency = (1700 if tma else 1400) / config.num_stages
    return waves * (inner * max(resident * products, resident * loads, latency) + resident * rows * columns * 0.11 + 1400) + tail + 1800


def channels(problem: Problem) -> tuple[int, int]:
    """The channels that a convolution sums over and those that it produces; the input-grad has them the other way round."""
    if problem.op == "causal_conv1d_input_grad":
        return problem.c_out, problem.c_in
    return problem.c_in, problem.c_out


def suits(config: Config, problem: Problem) -> bool:
    """Whether `config` can run `problem` and is neither too wide for it nor out of registers."""
    if config.path == "tma" and not problem.aligned:
        return False
    if problem.kernel_size < config.TAPS:
        return False
    weight_grad = problem.op == "causal_conv1d_weight_grad"
    tile = config.BLOCK_C_OUT * (config.TAPS * config.BLOCK_C_IN if weight_grad else config.BLOCK_T)
    through_registers = _size_read(problem, config.path) == 4 if weight_grad else problem.layout == "first" and problem.epilogue != "none"
    if through_registers and tile > 96 * 32 * config.num_warps:
        return False  # 128 sums a thread, beside operands in 32 bits or what the epilogue reads through pointers, spill up to 1,048 bytes
    summed, produced = channels(problem)
    return _block(summed, 256) >= config.BLOCK_C_IN and _block(produced, 256) >= config.BLOCK_C_OUT


def _block(count: int, most: int) -> int:
    return min(most, max(16, 1 << (count - 1).bit_length()))


def _size_read(problem: Problem, path: str) -> int:
    """The bytes of an element as the products read it: through descriptors the weight-grad reads TF32 as planes in bf16."""
    planes = problem.op == "causal_conv1d_weight_grad" and problem.dtype == "tf32" and path == "tma"
    return 2 if planes else _element_size(problem)


def _element_size(problem: Problem) -> int:
    return 4 if problem.dtype in ("tf32", "fp32") else 2
