"""The table that the look-ups read, [V + 1, K * C_out + C], and the gradients of what it is made of: small products over the ids.

Its columns are what each tap makes of an id, the bias in those of tap 0, and behind them the embedding itself. Its last row is that of no
id: it adds nothing, and its own step is NaN.
The forward reads it in the dtype of the embedding: K entries, each about p / sqrt(K), are together as far off as a p that PyTorch rounds
once, and PyTorch rounds the activation and the sum besides. The backward reads it in fp32: rounded, a pre-activation near 0 would change
its sign before ReLU, which PyTorch's never does, and an id's steps would all err the same way, so that their sum (of one channel, or one
id) was off by more than twice PyTorch's error. What that costs is not known apart: on an H100, forward and backward of bf16 take 152 us
(B=32 T=2048 C=256, 2026-11-28), and took 161 with rounded tables and sums by id other than today's.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.dot import dot
from fuzzytok_kernels.profile import fixed_name


@triton.jit(repr=fixed_name("byte_causal_conv1d_table"))
def table_kernel(
    embedding, weight, bias, table, n_ids, channels, c_out, stride_ev, stride_ec, stride_wo, stride_wi, stride_wk, stride_bias,
    K: tl.constexpr, PRECISION: tl.constexpr, BEHIND: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """embedding (V, C_in), weight (C_out, C_in, K), bias (C_out,) or None -> table, and zeros in the BEHIND elements that follow it.

    A program makes one block of one tap, or copies one of the embedding.
    """
    width = K * c_out + channels
    if tl.program_id(0) == 0:
        tl.store(table + (tl.cast(n_ids, tl.int64) + 1) * width + tl.arange(0, BEHIND), tl.zeros([BEHIND], table.dtype.element_ty))
    n_o = tl.cdiv(c_out, BLOCK_O)
    n_columns = K * n_o + tl.cdiv(channels, BLOCK_O)
    pid = tl.program_id(0)
    v = pid // n_columns * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    k, o = pid % n_columns // n_o, pid % n_columns % n_o * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    within = o < c_out
    if k < K:
        value = tl.zeros([BLOCK_V, BLOCK_O], tl.float32)
        for start in range(0, channels, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I).to(tl.int64)
            e = tl.load(  # [V, C_in]
                embedding + v[:, None] * stride_ev + i[None, :] * stride_ec, mask=(v < n_ids)[:, None] & (i < channels)[None, :], other=0.0
            )
            w = tl.load(  # [C_in, C_out]
                weight + k.to(tl.int64) * stride_wk + i[:, None] * stride_wi + o[None, :] * stride_wo,
                mask=(i < channels)[:, None] & within[None, :],
                other=0.0,
            )
            value = dot(e, w, value, PRECISION)
        if bias is not None:
            start = tl.load(bias + o * stride_bias, mask=o < tl.where(k == 0, c_out, 0), other=0.0).to(tl.float32)
            value += tl.where((v < n_ids)[:, None], start[None, :], 0.0)
    else:
        o += (k - K) * n_o * BLOCK_O  # C may be below or above a multiple of C_out's blocks
        within = o < channels
        value = tl.load(
            embedding + v[:, None] * stride_ev + o[None, :] * stride_ec, mask=(v < n_ids)[:, None] & within[None, :], other=float("nan")
        ).to(tl.float32)
    out = table + v[:, None] * width + tl.minimum(k, K) * c_out + o[None, :]
    tl.store(out, value.to(table.dtype.element_ty), mask=(v <= n_ids)[:, None] & within[None, :])


@triton.jit(repr=fixed_name("byte_causal_conv1d_table_grad"))
def table_grads_kernel(
    grad_table, embedding, weight, grad_embedding, grad_weight, grad_bias,
    of_ids, n_ids, channels, c_out, stride_ev, stride_ec, stride_wo, stride_wi, stride_wk,
    K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    TAP_BLOCK_V: tl.constexpr, TAP_BLOCK_O: tl.constexpr, TAP_BLOCK_I: tl.constexpr,
):  # fmt: skip
    """grad_table [V, K * C_out + C] -> grad_embedding contiguous [V, C_in] by the first `of_ids` programs; grad_weight contiguous
    [K, C_out, C_in] and grad_bias [C_out] by the others. In one launch, for either waits for memory more than it computes.
    """
    pid = tl.program_id(0)
    if pid < of_ids:
        _embedding_grad(
            grad_table, weight, grad_embedding, pid, n_ids, channels, c_out, stride_wo, stride_wi, stride_wk, K, PRECISION,
            BLOCK_V, BLOCK_O, BLOCK_I,
        )  # fmt: skip
    else:
        _tap_grad(
            grad_table, embedding, grad_weight, grad_bias, pid - of_ids, n_ids, channels, c_out, stride_ev, stride_ec, K, PRECISION,
            TAP_BLOCK_V, TAP_BLOCK_O, TAP_BLOCK_I,
        )  # fmt: skip


@triton.jit
def _embedding_grad(
    grad_table, weight, grad_embedding, pid, n_ids, channels, c_out, stride_wo, stride_wi, stride_wk,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    n_i = tl.cdiv(channels, BLOCK_I)
    v = pid // n_i * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    i = pid % n_i * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)
    row, mask = grad_table + v[:, None] * (K * c_out + channels), (v < n_ids)[:, None] & (i < channels)[None, :]
    n_o = tl.cdiv(c_out, BLOCK_O)
    value = tl.zeros([BLOCK_V, BLOCK_I], tl.float32)
    for step in range(K * n_o):
        k, o = step // n_o, step % n_o * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
        grad = tl.load(row + k * c_out + o[None, :], mask=(v < n_ids)[:, None] & (o < c_out)[None, :], other=0.0)  # [V, C_out]
        w = tl.load(  # [C_out, C_in]
            weight + k.to(tl.int64) * stride_wk + o[:, None] * stride_wo + i[None, :] * stride_wi,
            mask=(o < c_out)[:, None] & (i < channels)[None, :],
            other=0.0,
        )
        value = tl.dot(grad, w.to(tl.float32), value, input_precision=PRECISION)
    value += tl.load(row + K * c_out + i[None, :], mask=mask, other=0.0)
    tl.store(grad_embedding + v[:, None] * channels + i[None, :], value.to(grad_embedding.dtype.element_ty), mask=mask)


@triton.jit
def _tap_grad(
    grad_table, embedding, grad_weight, grad_bias, pid, n_ids, channels, c_out, stride_ev, stride_ec,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The bias reaches each step once, and so does tap 0: its gradient is the sum of tap 0's over the ids."""
    n_o, n_i = tl.cdiv(c_out, BLOCK_O), tl.cdiv(channels, BLOCK_I)
    block_i, k = pid % n_i, pid // n_i // n_o
    i = block_i * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)
    o = pid // n_i % n_o * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    value, total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32), tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, n_ids, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V).to(tl.int64)
        grad = tl.load(  # [C_out, V]
            grad_table + v[None, :] * (K * c_out + channels) + k * c_out + o[:, None],
            mask=(v < n_ids)[None, :] & (o < c_out)[:, None],
            other=0.0,
        )
        e = tl.load(  # [V, C_in]
            embedding + v[:, None] * stride_ev + i[None, :] * stride_ec, mask=(v < n_ids)[:, None] & (i < channels)[None, :], other=0.0
        )
        value = tl.dot(grad, e.to(tl.float32), value, input_precision=PRECISION)
        total += tl.sum(grad, axis=1)
    out = grad_weight + (k * c_out + o[:, None]) * channels + i[None, :]
    tl.store(out, value.to(grad_weight.dtype.element_ty), mask=(o < c_out)[:, None] & (i < channels)[None, :])
    tl.store(grad_bias + o, total.to(grad_bias.dtype.element_ty), mask=o < tl.where((k == 0) & (block_i == 0), c_out, 0))
