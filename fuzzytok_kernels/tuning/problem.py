"""What a config is chosen for."""

import math
from typing import NamedTuple

from fuzzytok_kernels.reference import ACTIVATIONS, GATES

DTYPES = ("bf16", "fp16", "tf32", "fp32")  # "fp32" where PyTorch's switches ask for strict fp32, else "tf32"
LAYOUTS = ("last", "first")
EPILOGUES = ("none", "residual", *(name for name in ACTIVATIONS if name != "none"))  # a fused op's are tuned with a residual


class Problem(NamedTuple):
    """One problem of one op; dilation is no field, for it costs nothing."""

    op: str  # the name under torch.ops.fuzzytok
    dtype: str  # of DTYPES
    layout: str  # of LAYOUTS: how the op's first argument lies in memory
    aligned: bool  # whether descriptors can read it: the hardware has them and rows are multiples of 16 bytes
    epilogue: str  # of EPILOGUES
    kernel_size: int
    c_in: int
    c_out: int  # of the weight: for a gate twice the channels of the result
    steps: int  # B*T, rounded to a power of two, so that a training run with changing T stays with few configs

    @property
    def kind(self) -> dict[str, str]:
        """What must match for what is known of one problem to tell of another, by field; dtype up to its size."""
        return {"op": self.op, "dtype": "16 bits" if self.dtype in ("bf16", "fp16") else self.dtype}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The fields that match by distance. K is among them: a config chosen for another K is far better than the default."""
        return self[5:]


def describable(
    c_in: int, c_out: int, kernel_size: int, epilogue: str, element_size: int, T: int, dilation: int, packed: bool = False
) -> bool:
    """Whether descriptors can read such tensors, where the hardware has them: rows are multiples of 16 bytes, coordinates have 32 bits.

    Packed, one of these is taken: steps are counted up to 2**30, see `kernels/sequences.py`, in fp32 those of two planes in a row.
    """
    row, most = 16 // element_size, 2**31 // element_size if packed else 2**31
    return (
        c_in % row == 0
        and c_out % (2 * row if epilogue in GATES else row) == 0
        and (kernel_size + 2) * min(dilation, T) + T < most  # a group of taps may reach two beyond the last
    )


def distance(a: Problem, b: Problem) -> float:
    """How many doublings lie between the sizes of two problems of a kind; each other field that differs counts as half of one.

    Not the dtype: bf16 and fp16 run the same instructions at the same rate (a config chosen anew for fp16 lost up to 16 % on an H100).
    """
    others = sum(x != y for x, y in zip(a[2:5], b[2:5], strict=True))
    return math.hypot(*(math.log2(x / y) for x, y in zip(a.sizes, b.sizes, strict=True)), 0.5 * others)


def rounded_steps(steps: int) -> int:
    """The power of two nearest to `steps` >= 1 by ratio.

    Not the next one: 65,578 steps, a shard of 65,536 behind its history, had the config that the model expects of 131,072, where that of
    65,536 was measured. On an H100 that rank's kernels took 2,871 us a training step, those of the one without a history 2,564.
    """
    return 1 << (steps * steps).bit_length() // 2
