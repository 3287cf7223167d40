"""What a config is chosen for."""

from typing import NamedTuple

DTYPES = ("bf16", "fp16", "tf32", "fp32")  # "fp32" where PyTorch's switches ask for strict fp32, else "tf32"
LAYOUTS = ("last", "first")


class Problem(NamedTuple):
    """One problem of one op. The first four fields match exactly, the others by distance; dilation is no field, for it costs nothing."""

    op: str  # the name under torch.ops.fuzzytok
    dtype: str  # of DTYPES
    layout: str  # of LAYOUTS: how the op's first argument lies in memory
    aligned: bool  # whether descriptors can read it: the hardware has them and rows are multiples of 16 bytes
    kernel_size: int
    c_in: int
    c_out: int
    steps: int  # B*T, rounded up to a power of two, so that a training run with changing T stays with one config

    @property
    def kind(self) -> tuple:
        """The fields that match exactly."""
        return self[:4]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The fields that match by distance. K is among them: a config chosen for another K is far better than the default."""
        return self[4:]


def rounded_steps(steps: int) -> int:
    """`steps` >= 1 rounded up to a power of two."""
    return 1 << (steps - 1).bit_length()
