"""Which sequence of a packed batch a tile is of, and what bounds it there.

`cu_seqlens` (N + 1,) is int32, never decreasing, from 0 to T: sequence n is the steps from its number n up to its number n + 1, maybe none.
Whatever else it holds, no address outside it, the batch or the initial state is formed of it.

Blocks of BLOCK_T steps are counted from each sequence's own beginning. A program that has one alone searches for it among slots: sequence n
has those from `cu_seqlens[n] // BLOCK_T + n` on, enough wherever it begins, of which one at most is empty; T // BLOCK_T + N in all. One
that goes through many counts all blocks first and finds each from the last one: of sequences of 512 steps every fifth slot is empty, and
the weight-grad took 60 us with slots, 52 with blocks (C=256, 65,536 steps, H200). (Blocks that pass over an end, and mask what they read,
are fewer, but cost more: forward 64 us on an H100, where sequences of 512 steps took 52.)

For pointers the batch is a row for each sequence: of `length` steps, `start` times the stride of a step away. A descriptor cannot know the
lengths: its rows are all SIDE steps long and begin with any step, [bound, step, C] of the strides [s, s, 1], so that the hardware bounds
the steps on that side; or, for the input-grad, which looks on, they end with any: [side, bound, step, C] of the strides [-s, s, s, 1],
with side = SIDE. The stride -s is 2**34 - s, which SIDE = 2**30 makes the same in 64 bits.

What is wrong with the values is asserted by a kernel of its own, behind a forward's and beside its last tiles (PDL). In the convolution's
kernel an assertion is a call, and in a kernel that has one ptxas waits for each product of the tensor cores before the next: 56 us
where 49 are taken without.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fuzzytok_kernels.profile import fixed_name, moved_metadata


@triton.jit
def row_length():
    """The steps of a row that a descriptor reads: SIDE, as above. A function, since kernels read no global constants: see their tests."""
    return 1 << 30


@triton.jit
def sequence_of(slot, cu_seqlens, n_sequences, T, BLOCK_T: tl.constexpr):
    """The sequence that `slot` belongs to."""
    low, high = tl.full([], 0, tl.int32), n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        begun = _boundary(middle, cu_seqlens, n_sequences, T) // BLOCK_T + middle <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def place(slot, n, cu_seqlens, n_sequences, T, BLOCK_T: tl.constexpr):
    """Where sequence n begins, how many steps it has, and before how many of them `slot` begins: all of them if it is empty."""
    start, length = _sequence(n, cu_seqlens, n_sequences, T)
    before = tl.maximum(slot - (start // BLOCK_T + n), 0).to(tl.int64) * BLOCK_T
    return start, length, tl.minimum(before, length).to(tl.int32)


@triton.jit
def count_blocks(cu_seqlens, n_sequences, T, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr = 256):
    """How many blocks a row of T steps has, or all packed sequences (at most what T allows), and of these each of the first CHUNK [CHUNK].

    `find_block` begins with the latter: to read them anew took a forward 0.4 us of 56 with GELU, 1 of 48 without (H200). In 32 bits: for
    64 Triton 3.9 spilled up to 816 bytes in the convolution.
    """
    if cu_seqlens is None:
        return tl.cdiv(T, BLOCK_T), 0  # Triton 3.6 returns no None
    else:
        blocks = _blocks(tl.arange(0, CHUNK), cu_seqlens, n_sequences, T, BLOCK_T)
        counts, first = blocks, tl.full([], CHUNK, tl.int32)
        while (first < n_sequences) & (_boundary(first, cu_seqlens, n_sequences, T) < T):  # behind the last step there may be thousands
            counts += _blocks(first + tl.arange(0, CHUNK), cu_seqlens, n_sequences, T, BLOCK_T)
            first += CHUNK
        return tl.maximum(tl.minimum(tl.sum(counts), T // BLOCK_T + n_sequences), 0), blocks


@triton.jit
def find_block(block, blocks, cu_seqlens, n_sequences, T, BLOCK_T: tl.constexpr):
    """The sequence that `block` is of, where it begins, how many steps it has, and before how many of them the block begins.

    `blocks` [CHUNK] are those of the first sequences. Behind the last block: the last sequence's number, no steps, and t = 0.
    """
    CHUNK: tl.constexpr = blocks.shape[0]
    before, first = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    together = tl.sum(blocks)
    while (before + together <= block) & (n_sequences - first > CHUNK):
        before += together
        first += CHUNK
        blocks = _blocks(first + tl.arange(0, CHUNK), cu_seqlens, n_sequences, T, BLOCK_T)
        together = tl.sum(blocks)
    passed = before + tl.cumsum(blocks) <= block  # sequences without steps with those before them
    n = first + tl.sum(passed.to(tl.int32))
    start, length = _sequence(n, cu_seqlens, n_sequences, T)
    before += tl.sum(tl.where(passed, blocks, 0))
    # Wrong boundaries may count past 2**31: whatever `block - before` is then, t stays within the sequence.
    t = tl.minimum(tl.maximum(block - before, 0), length // BLOCK_T) * BLOCK_T
    return tl.minimum(n, n_sequences - 1), start, length, t


@triton.jit
def following(n, start, length, t, cu_seqlens, n_sequences, T, BLOCK_T: tl.constexpr):
    """As `find_block` of the next one; behind the last block with t = 0."""
    ends = length - t <= BLOCK_T
    t = tl.where(ends, 0, t + BLOCK_T)  # not in the branch: the weight-grad's loop would load nothing ahead, 117 us for 51
    if ends:
        end = start + length
        low = n + 1
        high = tl.where(_boundary(n + 2, cu_seqlens, n_sequences, T) > end, n + 2, n_sequences)
        while high - low > 1:  # some without steps come between
            middle = (low + high) // 2
            begun = _boundary(middle, cu_seqlens, n_sequences, T) <= end
            low = tl.where(begun, middle, low)
            high = tl.where(begun, high, middle)
        start, length = _sequence(low, cu_seqlens, n_sequences, T)
        n = tl.minimum(low, n_sequences - 1)
    return n, start, length, t


@triton.jit
def share(count, part, parts):
    """Where one of `parts` equal parts of `count` begins."""
    return (tl.cast(count, tl.int64) * part // parts).to(tl.int32)


@triton.jit
def moved(t, length, shift, BLOCK_T: tl.constexpr):
    """The first step of a tile: t, or so far before it that the tile ends with its sequence.

    So each tile of a sequence that is long enough is whole, and some steps are computed twice, to the same bits. That of a shorter one
    begins with it if it looks on (shift is negative), and before it if it looks back: what it reads on its other side is not bounded, and
    has to be there.
    """
    t = tl.minimum(t, length - BLOCK_T)
    return tl.where(shift < 0, tl.maximum(t, 0), t)


@triton.jit
def bounded(x, start, length, t):
    """The bound and the step for step t of a sequence, in the rows that x describes."""
    if len(x.block_shape) == 3:
        return start, t
    else:
        return start + length, row_length() - length + t


@triton.jit
def load(x, b, t, c):
    """From a descriptor of a batch [B, T, C], or of packed sequences: with a bound and a step for b and t."""
    if len(x.block_shape) == 3:
        return x.load([b, t, c])
    else:
        return x.load([row_length(), b, t, c])


@triton.jit(do_not_specialize=["n_sequences", "T"], repr=fixed_name("assert_sequences"), launch_metadata=moved_metadata)
def assert_sequences_kernel(cu_seqlens, n_sequences, T, PDL: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK boundaries a program, without a synchronisation: PyTorch reports the assertion at its next one.

    It ends after the launch in front of it, as the next launch expects.
    """
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = index < n_sequences
    start, end = tl.load(cu_seqlens + index, mask=inside, other=0), tl.load(cu_seqlens + index + 1, mask=inside, other=0)
    tl.device_assert(start <= end, "cu_seqlens must never decrease")
    tl.device_assert(tl.load(cu_seqlens) == 0, "cu_seqlens must begin with 0")
    tl.device_assert(tl.load(cu_seqlens + n_sequences) == T, "cu_seqlens must end with the steps of x")
    if PDL:
        gdc_wait()


@triton.jit
def _blocks(n, cu_seqlens, n_sequences, T, BLOCK_T: tl.constexpr):
    """Of the sequences n [CHUNK]."""
    _, length = _sequence(n, cu_seqlens, n_sequences, T)
    return length // BLOCK_T + (length % BLOCK_T > 0).to(tl.int32)  # not cdiv, which could pass 2**31


@triton.jit
def _sequence(n, cu_seqlens, n_sequences, T):
    """Where sequence n begins, and how many steps it has; none behind the last."""
    start = _boundary(n, cu_seqlens, n_sequences, T)
    return start, tl.maximum(_boundary(n + 1, cu_seqlens, n_sequences, T) - start, 0)


@triton.jit
def _boundary(n, cu_seqlens, n_sequences, T):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + tl.minimum(n, n_sequences)), 0), T)
