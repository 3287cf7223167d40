"""Several ranks against one device: DTensor's rules, the styles of parallelize_module, sequence parallel. The checks run on the ranks."""

import dtensor_checks
import pytest
import sequence_checks
import torch
from modes import not_interpreted
from ranks import GPUS, RANKS, Ranks

from bench import sequence_parallel
from fuzzytok_kernels.distributed import history_bytes, sharding
from fuzzytok_kernels.distributed.exchange import TimeShards
from fuzzytok_kernels.distributed.sequence import without_history

pytestmark = [
    pytest.mark.xdist_group("ranks"),  # `--dist loadgroup`: one process spawns them
    pytest.mark.skipif(RANKS < 2, reason=f"needs two GPUs; there is {GPUS}"),
    not_interpreted,
]
needs_four = pytest.mark.skipif(RANKS < 4, reason=f"needs four GPUs; there are {GPUS}")
each_size = pytest.mark.parametrize("size", [2, pytest.param(4, marks=needs_four)])
each_activation = pytest.mark.parametrize("activation", [None, "gelu", "glu"])


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.stop()


# ---- DTensor


def test_every_op_has_a_rule():
    """But for streaming, which writes its states in place: a state that DTensor moved first would be written nowhere."""
    names = {name.removeprefix("fuzzytok::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if "fuzzytok::" in name}
    without = {name for name in names if getattr(torch.ops.fuzzytok, name).default not in sharding._OPS}
    assert without == {"causal_conv1d_update", "residual_stack_update", "embedding_norm"}
    for op, rule in sharding._OPS.items():
        assert list(rule.arguments) == [argument.name for argument in op._schema.arguments]


@each_size
@each_activation
@pytest.mark.parametrize("way", dtensor_checks.WAYS)
def test_dtensor(way, activation, size, ranks):
    ranks.run(dtensor_checks.dtensor, size, way, activation, (4, 8, 10, 3))


@each_size
@pytest.mark.parametrize("way", dtensor_checks.WAYS)
def test_dtensor_that_leaves_ranks_unequal_or_without_rows(way, size, ranks):
    ranks.run(dtensor_checks.dtensor, size, way, None, (3, 6, 5, 3))


@needs_four
@pytest.mark.parametrize(("first", "second"), [("batch", "column"), ("batch", "row"), ("column", "row"), ("batch", "batch")])
def test_dtensor_on_two_dimensions(first, second, ranks):
    ranks.run(dtensor_checks.dtensor_on_two_dimensions, first, second)


@each_size
@pytest.mark.parametrize("way", ["batch", "replicated"])
def test_dtensor_bytes(way, size, ranks):
    ranks.run(dtensor_checks.dtensor_bytes, size, way)


@each_size
def test_column_activation_row(size, ranks):
    ranks.run(dtensor_checks.column_activation_row, size)


@each_size
def test_column_of_a_gate(size, ranks):
    ranks.run(dtensor_checks.column_gate, size)


def test_styles_refuse_other_modules(ranks):
    ranks.run(dtensor_checks.styles_refuse_other_modules, 2)


@needs_four
@pytest.mark.parametrize("kind", ["column", "gate"])
def test_parallel_tokenizer_under_fsdp(kind, ranks):
    ranks.run(dtensor_checks.parallel_tokenizer_under_fsdp, kind)


# ---- sequence parallel


@pytest.mark.parametrize("history", [0, 1, 3, 4, 9, 100])
@pytest.mark.parametrize("lengths", [(5,), (4, 4), (1,) * 9, (3, 1, 0, 0, 7, 2), (0, 0, 3, 0)], ids=str)
def test_who_sends_what(lengths, history):
    """Every rank gets the steps before its own, each from the rank that has it, and that rank sends it."""
    owners = [rank for rank, length in enumerate(lengths) for _ in range(length)]
    shards = [TimeShards(None, rank, lengths) for rank in range(len(lengths))]
    sent = {(rank, piece) for rank, each in enumerate(shards) for piece in each.sent(history)}
    received = {(piece.peer, piece._replace(peer=rank)) for rank, each in enumerate(shards) for piece in each.received(history)}
    assert sent == received
    for each in shards:
        steps = [(piece.peer, step) for piece in each.received(history) for step in range(piece.begin, piece.end)]
        assert steps == [(owners[step], step) for step in range(max(0, each.start - history), each.start)]
    assert history_bytes(lengths, history, 3) == 3 * sum(piece.end - piece.begin for _, piece in sent)


LENGTHS = [(20, 20), (1, 1), (2, 5), pytest.param((3, 3, 3, 3), marks=needs_four), pytest.param((9, 1, 4, 6), marks=needs_four)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@each_activation
def test_sequence_parallel(activation, lengths, ranks):
    """Histories of 0, 2 and 8 steps: of one neighbour, or of all ranks on the left."""
    ranks.run(sequence_checks.sequence_parallel, lengths, activation)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bytes_sent(lengths, ranks):
    ranks.run(sequence_checks.bytes_sent, lengths)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_gradient_of_what_drops_a_history(dim, order):
    """Zeros, and the gradient behind them, in memory as it lies itself."""
    shape = (2, 3, 5)
    y = torch.randn((2, 7, 5) if dim == 1 else (2, 3, 9), requires_grad=True)
    grad = torch.empty_permuted(shape, order).normal_()
    (got,) = torch.autograd.grad(without_history(y, 4, dim), y, grad)
    (want,) = torch.autograd.grad(y.narrow(dim, 4, shape[dim]), y, grad)
    assert torch.equal(got, want)
    assert got.stride() == torch.empty_permuted(y.shape, order).stride()


def test_stored_pre_activation(ranks):
    ranks.run(sequence_checks.stored_pre_activation, 2)


def test_sequence_parallel_autocast(ranks):
    ranks.run(sequence_checks.sequence_parallel_autocast, 2)


def test_lengths_are_refused(ranks):
    ranks.run(sequence_checks.lengths_are_refused, 2)


@each_size
def test_overlap(size, ranks):
    ranks.run(sequence_checks.overlap, size)


@pytest.mark.parametrize("fsdp", [False, True], ids=["", "fsdp"])
@pytest.mark.parametrize("where", ["input", "convolutions"])
@pytest.mark.parametrize("lengths", [(50, 50), (13, 13), pytest.param((11, 11, 11, 11), marks=needs_four)], ids=str)
def test_stack(lengths, where, fsdp, ranks):
    """The receptive field is 43: of one neighbour, or of all ranks on the left."""
    ranks.run(sequence_checks.stack, lengths, where, fsdp)


@each_size
def test_averaged_gradients(size, ranks):
    ranks.run(sequence_checks.averaged_gradients, size)


@each_size
def test_averaged_in_two_messages(size, ranks):
    ranks.run(sequence_checks.averaged_in_two_messages, size)


@each_size
def test_stack_of_blocks(size, ranks):
    ranks.run(sequence_checks.stack_of_blocks, size)


@needs_four
def test_channels_and_time(ranks):
    ranks.run(sequence_checks.channels_and_time, (30, 30))


@pytest.mark.parametrize("where", ["input", "convolutions"])
def test_compiled(where, ranks):
    ranks.run(sequence_checks.compiled, where)


def test_bench_runs(ranks):
    """bench.sequence_parallel, which checks every form's gradients before it times."""
    rows = ranks.run(sequence_checks.bench_runs)[0]
    forms = ["none", "one a stack", "one a convolution", "one a stack, DDP", "one a stack, FSDP2"]
    sizes = [size for size in (1, 2, 4) if size <= RANKS]
    wanted = [(size, steps, form) for steps in (64, 20) for size in sizes for form in (forms if size > 1 else ["none"])]
    assert [row[:3] for row in rows if row.how == "launched"] == wanted
    assert all(len(row.us) == RANKS and min(row.us) > 0 for row in rows)


def test_bytes_of_a_step():
    def sent(form: str) -> tuple[int, int]:
        return sequence_parallel.bytes_sent(form, 4, 20, 16, 2)

    parameters = 257 * 16 + 256 * 16 + 256 + 16 + 9 * (3 * 16 * 16 + 16)  # embedding and norm, head, blocks
    assert sent("none") == (0, 0)
    assert sent("one a stack") == sent("one a stack, DDP") == (20 + 40 + 42, 3 * 8 * parameters)
    assert sent("one a convolution") == (2 * 16 * 2 * 42 * 3, 3 * 8 * parameters)
    assert sent("one a stack, FSDP2") == (20 + 40 + 42, 3 * 8 * parameters)


# ---- packed sequences

PACKED = [  # steps of each rank, and where sequences end before the last
    ((20, 20), (3, 17, 17, 31)),
    ((20, 20), (20,)),
    ((2, 5), ()),
    pytest.param((9, 1, 4, 6), (8, 11, 12), marks=needs_four),
]


@pytest.mark.parametrize(("lengths", "ends"), PACKED, ids=str)
@each_activation
def test_packed_convolution(activation, lengths, ends, ranks):
    ranks.run(sequence_checks.packed_convolution, lengths, ends, activation)


@pytest.mark.parametrize("where", ["input", "convolutions"])
@pytest.mark.parametrize(("lengths", "ends"), [((60, 60), (5, 58, 58, 90)), pytest.param((12,) * 4, (7, 30), marks=needs_four)], ids=str)
def test_packed_tokenizer(lengths, ends, where, ranks):
    ranks.run(sequence_checks.packed_tokenizer, lengths, ends, where)


def test_boundaries_are_refused(ranks):
    ranks.run(sequence_checks.boundaries_are_refused, 2)


def test_boundaries_of_a_stack_are_refused(ranks):
    ranks.run(sequence_checks.boundaries_of_a_stack_are_refused, 2)


@pytest.mark.parametrize("kind", ["state", "packed"])
@pytest.mark.parametrize("way", ["batch", "column", "row", "replicated"])
def test_dtensor_sequences(way, kind, ranks):
    ranks.run(dtensor_checks.dtensor_sequences, 2, way, kind)
