"""Widths that make every model spend the same arithmetic on a byte."""

from bench.paper.models import HEAD_DIM, Size

_STEP = 8  # bf16 rows of a multiple of 16 bytes
_WIDEST, _WIDEST_INNER = 2048, 16  # the latter in widths
_FITS, _TOO_FAR = 0.02, 0.10


def matched(kind: str, vocabulary: int, depth: int, length: int, target: float) -> Size:
    """The size whose forward pass comes nearest to `target` FLOPs for each id of a window of `length`.

    A Transformer's width is a number of heads, and its inner width makes up the rest: of all pairs that fit, the one closest to the usual
    four times the width.

    Raises:
        ValueError: the nearest is more than 10 % off, as where the target is less than the head alone takes.
    """
    if kind == "transformer":
        widths = [(width, inner) for width in range(HEAD_DIM, _WIDEST, HEAD_DIM) for inner in range(width, _WIDEST_INNER * width, _STEP)]
    else:
        widths = [(width, 0) for width in range(_STEP, _WIDEST, _STEP)]
    sizes = [Size(kind, vocabulary, depth, *pair) for pair in widths]
    errors = {size: abs(size.flops(length) / target - 1) for size in sizes}
    nearest = min(sizes, key=errors.__getitem__)
    if errors[nearest] > _TOO_FAR:
        raise ValueError(f"no {kind} of {depth} over {vocabulary} ids has near {target:,.0f} FLOPs an id: {nearest} is the nearest")
    fitting = [size for size in sizes if errors[size] <= _FITS] or [nearest]
    return min(fitting, key=lambda size: abs(size.inner / size.width - 4)) if kind == "transformer" else nearest
