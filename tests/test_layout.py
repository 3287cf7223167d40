"""The layout of every result: the rule, and the same strides from op and fake."""

import pytest
import torch
from oracle import LAYOUTS, OPS, WEIGHT_LAYOUTS, Problem, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

PROBLEMS = [
    Problem(B=2, c_in=16, c_out=24, T=9, K=3, d=2),
    Problem(B=1, c_in=16, c_out=24, T=1, K=3, d=2),
    Problem(B=3, c_in=1, c_out=1, T=5, K=2, d=1),
    Problem(B=1, c_in=1, c_out=8, T=5, K=1, d=1),
    Problem(B=0, c_in=16, c_out=24, T=9, K=3, d=2),
    Problem(B=2, c_in=16, c_out=24, T=0, K=3, d=2),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(problem, layout, device):
    """Channels-last if `x.stride(1) == 1 and x.stride(2) != 1`, else channels-first contiguous, whatever the layout of the weight."""
    for weight in [None, *WEIGHT_LAYOUTS] if layout == "channels-last" and problem == PROBLEMS[0] else [None]:
        inputs = make_inputs(problem, torch.float32, device, x=layout, grad_y=layout, weight=weight)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = inputs.map(mode.from_tensor)
        for op in OPS:
            results = _tuple(OPS[op](*inputs.args(op)))
            with mode:
                expected = _tuple(OPS[op](*fakes.args(op)))
            for result, fake in zip(results, expected, strict=True):
                assert (result.shape, result.stride(), result.dtype) == (fake.shape, fake.stride(), fake.dtype), (op, weight)
            if op != "causal_conv1d_weight_grad" and results[0].numel():
                source = inputs.args(op)[0]
                assert results[0].stride() == _rule(source, results[0].shape[1]), (op, weight)


def _rule(x: torch.Tensor, channels: int) -> tuple:
    T = x.shape[2]
    return (T * channels, 1, channels) if x.stride(1) == 1 and x.stride(2) != 1 else (channels * T, T, 1)


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
