"""Packed sequences where a tile could see too much: NaN in the neighbours, guard zones around tight memory, blocks of 16 steps."""

import guards
import pytest
import torch
from modes import INTERPRETED, KERNELS_RUN, needs_kernels
from test_packed import HISTORY, Case, D, K, boundaries, ops

from fuzzytok_kernels import causal_conv1d, reference

BLOCK = 16
# The last sequence ends with the memory: shorter than the history or a block, a block, a step more; alone, or behind others.
ENDS = [[n] for n in (1, BLOCK - 1, BLOCK)] + [[21, n] for n in (1, HISTORY - 1, BLOCK - 1, BLOCK, BLOCK + 1)]
HOSTILE = [*ENDS, [3, 0, 2, 0, 0], [*12 * [0], 3, *30 * [0], 9], [1] * 19, [16, 32, 16]]
each_hostile = pytest.mark.parametrize("lengths", HOSTILE, ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}, {lengths[-1]} last")


@pytest.fixture(autouse=KERNELS_RUN)
def small_blocks(path):
    """Many tiles in little time."""
    from fuzzytok_kernels import tuning

    with tuning.force(path=path, BLOCK_T=BLOCK, BLOCK_C_IN=16, BLOCK_C_OUT=32, num_warps=4, num_stages=2, programs_per_sm=1):
        yield


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word on NaN, in the interpreter
@pytest.mark.parametrize(("value", "stated"), [(float("nan"), True), (float("inf"), False), (1e4, True)])
def test_no_sequence_sees_another(value, stated, strict_dtype, device, path):
    """Whatever stands in one: in the other ones all outputs, final states and gradients keep their bits."""
    lengths = [5, 3, 0, 60, 1, 2, 40]
    case = Case(lengths, strict_dtype, stated=stated)
    before = case.run(causal_conv1d)
    bounds = case.cu_seqlens.tolist()
    for n in (1, 3):
        spoilt = {name: case.leaves[name].clone() for name in ("x", "residual", "initial_state") if name in case.leaves}
        grads = [grad_value.clone() for grad_value in case.grads]
        for part in (spoilt["x"], spoilt["residual"], grads[0]):
            part[:, :, bounds[n] : bounds[n + 1]] = value
        for part in (spoilt.get("initial_state"), grads[1]):
            if part is not None:
                part[n] = value
        spoilt_case = Case(lengths, strict_dtype, stated=stated)
        spoilt_case.leaves, spoilt_case.grads = case.leaves | spoilt, tuple(grads)
        after = spoilt_case.run(causal_conv1d)
        for name in {"y", "state", "grad_x", "grad_residual", "grad_initial_state"} & set(before):
            pairs = zip(*(list(r[name]) if "state" in name else case.of_sequence(r[name]) for r in (after, before)), strict=True)
            for m, (got, want) in enumerate(pairs):
                assert m == n or torch.equal(got, want), f"{name} of sequence {m} by what stands in {n}"


@needs_kernels  # the reference multiplies NaN by the zeros between sequences
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@each_hostile
def test_no_sequence_sees_another_in_the_weights(lengths, strict_dtype, device, path):
    """The last step of a sequence, and all of one that is no longer than the dilation, meet no gradient in the taps behind the first."""
    case = Case([*lengths, 2, *lengths], strict_dtype, stated=False)
    x, grad_y = case.leaves["x"], case.grads[0]
    want = ops.causal_conv1d_weight_grad(grad_y, x, K, D, case.cu_seqlens)
    x = x.clone()
    for sequence in x.split(case.lengths, 2):
        sequence[:, :, -1:] = float("nan")
        if sequence.shape[2] <= D:
            sequence[:] = float("nan")
    got = ops.causal_conv1d_weight_grad(grad_y, x, K, D, case.cu_seqlens)
    assert torch.equal(got[0][:, :, 1:], want[0][:, :, 1:])
    assert torch.equal(got[1], want[1])


def placed(inputs: guards.Inputs, name: str, channels: int, T: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, channels, T), channels-last, in rows of `width` channels: tight between guard zones, or a slice of a larger buffer."""
    values = torch.randn(1, channels, T, device=device).to(dtype)
    return inputs.place(name, values, (1, channels, T), (T * width, 1, width), width - channels)


def call(function, x, grad_y, weight, state, cu_seqlens) -> tuple:
    """All four ops of one block; `function` has them by name: the launchers, or the reference."""
    return (
        function.causal_conv1d_fused(x, weight, None, grad_y, state, cu_seqlens, D, "gelu"),
        function.causal_conv1d_activation_grad(grad_y, x, weight, None, state, cu_seqlens, D, "gelu"),
        function.causal_conv1d_input_grad(grad_y, weight, D, x, cu_seqlens),
        *function.causal_conv1d_weight_grad(grad_y, x, K, D, cu_seqlens),
    )


@needs_kernels
@pytest.mark.parametrize(("width", "stated"), [(16, False), (48, True)], ids=["tight", "slice, with a state"])
@each_hostile
def test_nothing_beyond_the_tensors(lengths, width, stated, strict_dtype, device, path):
    """All values are right, and the guard zones keep their bytes; what is read there is NaN, and so would the values be."""
    from fuzzytok_kernels import launch

    T, inputs = sum(lengths), guards.Inputs()
    x, grad_y = (placed(inputs, name, 16, T, width, strict_dtype, device) for name in ("x", "grad_y"))
    weight = (torch.randn(16, 16, K, device=device) / 7).to(strict_dtype)
    state = torch.randn(len(lengths), 16, HISTORY, device=device).to(strict_dtype) if stated else None
    cu_seqlens = boundaries(lengths)
    with guards.Allocations() as allocations:
        got = call(launch, x, grad_y, weight, state, cu_seqlens)
    want = call(reference, *(None if value is None else value.double() for value in (x, grad_y, weight, state)), cu_seqlens)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    inputs.check()
    allocations.check()


@pytest.mark.skipif(not INTERPRETED, reason="interpreter: an assertion on a GPU ends the process, and the reference has none")
@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize(
    "values",
    [
        [-9, 70],
        [0, 70],
        [0, 2**31 - 1, -(2**31)],
        [50, 20, 40],
        [40, 40, 40],
        [0],
        [7],
        [0, -5, 99, 3, 40],
        [0, 30, 10, 20, 40],
        [0, 40] * 9,
    ],
    ids=str,
)
def test_bad_values_form_no_address_outside(values, multiprocessors, device, path, monkeypatch):
    """Where nothing has checked them: whatever cu_seqlens holds, nothing but the results is written."""
    from fuzzytok_kernels import launch, support, tuning

    monkeypatch.setattr(support, "cpu_facts", support.cpu_facts._replace(multiprocessors=multiprocessors))
    tuning.forget()  # plans for another number of them
    inputs = guards.Inputs()
    x, grad_y = (placed(inputs, name, 16, 40, 16, torch.float32, device) for name in ("x", "grad_y"))
    weight, state = torch.randn(16, 16, K), torch.randn(len(values) - 1, 16, HISTORY)
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    for function, args in (
        ("causal_conv1d_fused", (x, weight, None, grad_y, state, cu_seqlens, D, "gelu")),
        ("causal_conv1d_fused", (x, weight, None, grad_y, None, cu_seqlens, D, "gelu")),
        ("causal_conv1d_activation_grad", (grad_y, x, weight, None, state, cu_seqlens, D, "gelu")),
        ("causal_conv1d_input_grad", (grad_y, weight, D, x, cu_seqlens)),
        ("causal_conv1d_weight_grad", (grad_y, x, K, D, cu_seqlens)),
    ):
        with guards.Allocations() as allocations:
            getattr(launch, function)(*args)
        inputs.check()
        allocations.check()
