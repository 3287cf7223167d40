"""What is timed: shapes, sections, rivals, and what each row has to do at least."""

from collections.abc import Iterator
from typing import NamedTuple

OPS = ("forward", "input_grad", "weight_grad", "forward_backward")
CUDNN_FORMS = ("conv1d_pad", "conv1d_trim", "conv2d_pad", "conv2d_trim")
EXPENSIVE_FORMS = ("compiled", "conv2d_pad_searched", "conv2d_trim_searched")  # seconds to prepare, so only for some shapes
PYTORCH_FORMS = (*CUDNN_FORMS, "shifted", *EXPENSIVE_FORMS)
PAPER_FORMS = ("listing1", "naive")
ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


class Shape(NamedTuple):
    """One convolution."""

    B: int
    T: int
    c_in: int
    c_out: int
    K: int
    d: int

    @property
    def tokens(self) -> int:
        return self.B * self.T

    def __str__(self) -> str:
        channels = f"{self.c_in}" if self.c_in == self.c_out else f"{self.c_in}to{self.c_out}"
        return f"{self.B}x{self.T}x{channels}_K{self.K}_d{self.d}"

    @staticmethod
    def parse(name: str) -> "Shape":
        """The shape that `str` gave `name`."""
        sizes, K, d = name.split("_")
        B, T, channels = sizes.split("x")
        c_in, _, c_out = channels.partition("to")
        return Shape(int(B), int(T), int(c_in), int(c_out or c_in), int(K[1:]), int(d[1:]))


class Case(NamedTuple):
    """One row: `rival` computes `op` of `shape`."""

    section: str  # "main", or the question that the row answers
    op: str  # of OPS
    rival: str  # "ours", "gemm" (a bound), or one of the forms
    shape: Shape
    dtype: str = "bf16"
    layout: str = "last"  # of x and grad_y, for ours: where the channels are

    def __str__(self) -> str:
        return f"{self.section}-{self.op}-{self.rival}-{self.shape}"


PAPER_SHAPES = (
    Shape(1, 128, 256, 256, 3, 1),
    Shape(8, 256, 256, 256, 3, 2),
    Shape(16, 512, 256, 256, 3, 4),
    Shape(32, 1024, 256, 256, 3, 1),
)
GRID = (
    *PAPER_SHAPES,
    Shape(32, 2048, 256, 256, 3, 4),
    Shape(32, 2048, 512, 512, 3, 4),
    Shape(64, 4096, 128, 128, 3, 2),
    Shape(8, 8192, 1024, 1024, 3, 2),
    Shape(1, 65536, 256, 256, 3, 4),
    Shape(16, 2048, 512, 512, 7, 8),
    Shape(16, 1000, 320, 192, 5, 3),
    Shape(32, 2048, 64, 64, 3, 1),
)
SMALL = PAPER_SHAPES[:2]
LARGE = tuple(shape for shape in GRID if shape.tokens >= 1 << 16)
EXPENSIVE_SHAPES = (Shape(32, 2048, 256, 256, 3, 4), Shape(32, 2048, 512, 512, 3, 4), Shape(64, 4096, 128, 128, 3, 2))
FP32_SHAPES = (PAPER_SHAPES[1], Shape(32, 2048, 256, 256, 3, 4), Shape(32, 2048, 512, 512, 3, 4), Shape(16, 1000, 320, 192, 5, 3))
DILATIONS = tuple(1 << i for i in range(10))
LENGTHS = tuple(Shape(8, T, 256, 256, 3, 2) for T in (128, 512, 2048, 8192, 32768))
HOST_SHAPES = (PAPER_SHAPES[0], Shape(32, 2048, 256, 256, 3, 4))
CPU_SHAPES = (*SMALL, Shape(2, 500, 320, 192, 5, 3), Shape(2, 1024, 64, 64, 3, 1))


def cases(on_gpu: bool) -> list[Case]:
    """All rows, mostly those of one shape together: the full grid on a GPU, a small one on the CPU."""
    return list(_gpu_cases() if on_gpu else _cpu_cases())


def _cpu_cases() -> Iterator[Case]:
    for shape in CPU_SHAPES:
        for op in ("forward", "forward_backward"):
            for rival in ("ours", "conv1d_pad"):
                yield Case("main", op, rival, shape, dtype="fp32")
    yield from _host_cases(CPU_SHAPES[:1], dtype="fp32")


def _gpu_cases() -> Iterator[Case]:
    yield from _host_cases(HOST_SHAPES)
    for shape in GRID:
        for op in OPS:
            for rival in _rivals(op, shape):
                yield Case("main", op, rival, shape)
        yield Case("channels_first", "forward_backward", "ours", shape, layout="first")
        for op in ("forward", "forward_backward"):
            yield Case("fp16", op, "ours", shape, dtype="fp16")
    for shape in LENGTHS:
        for rival in ("ours", "conv1d_pad", "conv2d_trim"):
            yield Case("length", "forward_backward", rival, shape)
    for d in DILATIONS:
        for op in ("forward", "forward_backward"):
            yield Case("dilation", op, "ours", Shape(32, 2048, 256, 256, 3, d))
    for dtype in ("tf32", "fp32"):
        for shape in FP32_SHAPES:
            for op in ("forward", "forward_backward"):
                for rival in ("ours", "conv1d_pad"):
                    yield Case(dtype, op, rival, shape, dtype=dtype)
    for shape in EXPENSIVE_SHAPES:  # last: what a run that is cut short can best do without
        for op in ("forward", "forward_backward"):
            for rival in EXPENSIVE_FORMS:
                yield Case("main", op, rival, shape)


def _host_cases(shapes: tuple[Shape, ...], dtype: str = "bf16") -> Iterator[Case]:
    for shape in shapes:
        for op in ("forward", "forward_backward"):
            for rival in ("ours", "module", "conv1d_pad"):
                yield Case("host", op, rival, shape, dtype=dtype)


def companion(case: Case) -> Case | None:
    """The row of ours that a bar holds `case` against; timed in turns with it, since rows apart had clocks apart: 16 % by 300 rows."""
    if case.section == "fp16":
        return case._replace(section="main", dtype="bf16")
    if case.section == "dilation" and case.shape.d > DILATIONS[0]:
        return case._replace(shape=case.shape._replace(d=DILATIONS[0]))
    return None


def _rivals(op: str, shape: Shape) -> Iterator[str]:
    yield "ours"
    if op != "forward_backward":
        yield "gemm"
    if op in ("forward", "forward_backward"):
        yield from (*CUDNN_FORMS, "shifted")
    if op == "forward":
        yield "listing1"
        if shape in PAPER_SHAPES:
            yield "naive"


def flops(op: str, shape: Shape) -> int:
    """Floating-point operations of `op`; the products with the zeros before t = 0 count."""
    one = 2 * shape.tokens * shape.c_in * shape.c_out * shape.K
    return 3 * one if op == "forward_backward" else one


def least_bytes(op: str, shape: Shape, element_size: int) -> int:
    """The fewest bytes that `op` moves: each input read once and each output written once.

    Forward and backward are two passes over x and the weight, with whatever a model does between them; grad_y is read once for both
    gradients.
    """
    weight = shape.K * shape.c_in * shape.c_out
    x, y, bias = shape.tokens * shape.c_in, shape.tokens * shape.c_out, shape.c_out
    elements = {
        "forward": x + weight + bias + y,
        "input_grad": y + weight + x,
        "weight_grad": y + x + weight + bias,
        "forward_backward": (x + weight + bias + y) + (y + x + weight + x + weight + bias),
    }
    return elements[op] * element_size
