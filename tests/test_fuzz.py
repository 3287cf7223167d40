"""Random problems of every op (cases.py), and that the check finds what is wrong. `make fuzz` runs many more on a GPU."""

import math

import cases
import guards
import pytest
import torch
import verdicts
from hypothesis import HealthCheck, Phase, find, given, settings
from modes import INTERPRETED, KERNELS_RUN, ON_CUDA, needs_kernels
from places import GPU

from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.tuning import Config, Problem, space

EXAMPLES = 8 if ON_CUDA else 24 if INTERPRETED else 60  # on a GPU each is compiled, and `make fuzz` draws thousands
QUIET = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

CASE = cases.Case(
    op="causal_conv1d", dtype="fp16", layout="channels-last", others="channels-last", weight="contiguous", bias="contiguous",
    activation="none", residual="none", packed=False, state=False, K=3, config=1, c_in=16, channels=8, T=21, B=2, d=2, spoilt=None, seed=5,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word on NaN, in the interpreter
@pytest.mark.parametrize("op", cases.SUBJECTS)
def test_any_case(op, strict):
    @settings(max_examples=EXAMPLES, **QUIET)
    @given(case=cases.any_case(op))
    def check(case):
        verdicts.check(case)

    check()


def test_a_correct_kernel_passes():
    """Under TF32, where a state is rounded as x is: a rule without that failed a right kernel in 122 of 2,000 draws of such a case."""
    small = CASE._replace(op="causal_conv1d_update", dtype="tf32", activation="gelu_tanh", bias="none", state=True, channels=16, T=1, B=1)
    reference = verdicts._function(cases.SUBJECTS[small.op].reference, small.op)
    for seed in range(100):
        case = small._replace(seed=seed)
        args = cases.SUBJECTS[case.op].arguments(case, cases.Tensors(case))
        rounded = tuple(map(verdicts._nearest_tf32, args[:3])) + args[3:]  # x, the state and the weight
        y, state = (verdicts.call(reference, case.op, given) for given in (rounded, args))
        verdicts._check_values(case, args, (y[0], *state[1:]))


def test_every_op_has_a_subject():
    assert {*cases.SUBJECTS} == {*CHECKS}


@pytest.mark.parametrize("op", cases.SUBJECTS)
def test_what_the_sanitizers_and_the_repeats_run(op, device, strict, monkeypatch):
    """Whatever they are given, so that a GPU's time is not lost to it."""
    pytest.importorskip("triton")
    import repeats
    import sanitize

    monkeypatch.setattr(guards, "ZONE", guards.ZONE)
    some = [case for case in [*sanitize._cases(op, 4, 11), *repeats._cases()] if case.op == op]
    assert len(some) == 7
    for case in some[: 4 if KERNELS_RUN else 7]:
        case = case._replace(dtype="fp32")
        args = cases.SUBJECTS[op].arguments(case, cases.Tensors(case))
        first, second = (repeats._bits(verdicts.call(getattr(torch.ops.fuzzytok, op).default, op, args)) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_a_case_is_one_line_and_back():
    for spoilt in (None, math.inf):
        case = CASE._replace(spoilt=spoilt)
        assert "\n" not in str(case)
        assert cases.from_text(str(case)) == case


@pytest.mark.parametrize("op", space.OPS)
def test_every_config_fits(op):
    """A program of its widest dtype into what Hopper gives one; three stages of 128 steps in fp32 did not, 1 template of 150 on an H200."""
    problem = Problem(op, "fp32", "last", True, "none", 3, 64, 64, 4096)
    for config in cases.CONFIGS[1:]:
        assert space.shared_memory(problem, Config(**config)) <= GPU.shared_memory, config


@pytest.mark.parametrize("op", cases.SUBJECTS)
def test_sizes_keep_what_is_compiled(op):
    """Whatever the sizes of a template, each is in the group that it says."""
    template = {name: values[0] for name, values in cases.choices(op).items()}
    for group, among in (("one", {1}), ("odd", {1, 3, 5, 7, 9, 11, 13, 15}), ("twice odd", {2, 6, 10, 14}), ("8s", {8}), ("16s", {0})):
        case = find(cases.sizes({**template, "T": group}), lambda case: True, settings=settings(**QUIET, phases=[Phase.generate]))
        assert case.T % 16 in among


# ---- faults that are planted


def beyond(y, *args):
    y.as_strided((1,), (1,), y.storage_offset() + y.numel())[:] = 0


def before(y, *args):
    y.as_strided((1,), (1,), y.storage_offset() - 1)[:] = 0


def unwritten(y, *args):
    y[-1, -1, -1] = math.nan


def wrong_by_a_little(y, *args):
    y[0, 0, 0] += 0.02


def writes_x(y, x, *args):
    x[0, 0, 0] += 1


def sees_the_future(y, x, *args):
    y[:, :, :-1] += 0 * x.sum(1, keepdim=True)[:, :, 1:]


def sees_another_row(y, x, *args):
    y[1] += 0 * x[0].sum()


FAULTS = {
    beyond: "memory behind",
    before: "memory before",
    unwritten: "error nan",
    wrong_by_a_little: "norm of the error 0.0",
    writes_x: "x, or what lies around it, was written",
    sees_the_future: "reached more than it may",
    sees_another_row: "reached more than it may",
}


@needs_kernels
@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_the_check_finds(fault, message, strict, monkeypatch):
    from fuzzytok_kernels import launch

    right = launch.causal_conv1d

    def wrong(*args):
        y = right(*args)
        fault(y, *args)
        return y

    case = CASE._replace(spoilt=math.nan)
    verdicts.check(case)
    monkeypatch.setattr(launch, "causal_conv1d", wrong)
    monkeypatch.setattr(verdicts, "_check_the_op_itself", lambda *args: None)  # it calls what is not wrong
    with pytest.raises(AssertionError, match=message):
        verdicts.check(case)


@needs_kernels
@pytest.mark.parametrize("activation", ["none", "gelu", "glu"])
def test_the_check_finds_a_lost_step_of_the_look_ups_gradient(activation, strict, monkeypatch):
    from fuzzytok_kernels import byte_launch

    right = byte_launch.byte_causal_conv1d_grad

    def wrong(grad_y, *args):
        grad_y = grad_y.clone()
        grad_y[0, :, 7] = 0
        return right(grad_y, *args)

    case = CASE._replace(op="byte_causal_conv1d_grad", activation=activation)
    verdicts.check(case)
    monkeypatch.setattr(byte_launch, "byte_causal_conv1d_grad", wrong)
    monkeypatch.setattr(verdicts, "_check_the_op_itself", lambda *args: None)  # it calls what is not wrong
    with pytest.raises(AssertionError, match="norm of the error"):
        verdicts.check(case)


@needs_kernels
def test_the_check_calls_the_op_itself(strict, monkeypatch):
    """On a GPU, where it costs little: the bits must be those of the launcher, a NaN's too."""
    monkeypatch.setattr(verdicts, "ON_CUDA", True)
    verdicts.check(CASE._replace(spoilt=math.nan))
    with pytest.raises(AssertionError, match="the op itself gave other bits"):
        verdicts._check_the_op_itself("causal_conv1d", (torch.ones(1, 1, 2), torch.ones(1, 1, 1)), (torch.zeros(1, 1, 2),))


# ---- that an address outside of all tensors is found, see addresses.py


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's addresses are watched")
@pytest.mark.parametrize(("reach", "mask"), [(1, False), (-1, False), (1, True)])
def test_an_address_outside_is_told(reach, mask):
    from outside import copy_kernel
    from triton.runtime.errors import InterpreterError

    x, y = torch.arange(16.0), torch.empty(16)
    if mask:
        copy_kernel[(1,)](x, y, reach, 16 - reach, BLOCK=16)
        assert torch.equal(y[: 16 - reach], x[reach:])
    else:
        with pytest.raises(InterpreterError, match="1 of 16 elements lie in no tensor of the launch"):
            copy_kernel[(1,)](x, y, reach, 16, BLOCK=16)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's addresses are watched")
@pytest.mark.parametrize(("source", "target", "fits"), [(0, 4, True), (-4, 0, True), (0, -4, False)])
def test_a_store_from_a_negative_coordinate_is_told(source, target, fits):
    """Where a load is none, and no store that hangs over the end."""
    from outside import described_copy_kernel
    from triton.runtime.errors import InterpreterError
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.arange(16.0).reshape(1, 16), torch.zeros(1, 16)
    arguments = *(TensorDescriptor.from_tensor(tensor, [1, 16]) for tensor in (x, y)), source, target
    if fits:
        described_copy_kernel[(1,)](*arguments)
        assert torch.equal(y[:, 4:], x[:, :12])
    else:
        with pytest.raises(InterpreterError, match=r"from the negative coordinate of \[0, -4\] on"):
            described_copy_kernel[(1,)](*arguments)
