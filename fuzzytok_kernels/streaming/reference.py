"""What the updating ops mean, in plain PyTorch: the oracle of the tests, and the implementation on CPU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzzytok_kernels import reference
from fuzzytok_kernels.layout import empty_output, in_layout_of


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    """x (B, C_in, L) behind conv_state (slots, C_in, H) -> y (B, C, L); conv_state then ends with x. H is (K-1)*dilation.

    With cache_seqlens (B,), the steps before this call, step s lies at `s % H`; without, oldest first. conv_state_indices (B,) are the
    rows' slots; a row whose slot there is not yields zeros.
    """
    (B, _, L), history = x.shape, conv_state.shape[2]
    slots = torch.arange(B, device=x.device) if conv_state_indices is None else conv_state_indices.long()
    live = (slots >= 0) & (slots < len(conv_state))  # (B,)
    entries = torch.arange(history, device=x.device).expand(B, history)  # where the states keep their steps, oldest first
    after = entries
    if cache_seqlens is not None and history:
        entries, after = ((cache_seqlens.long()[:, None] + entries + shift) % history for shift in (0, L))
    before = x.new_zeros(B, history, x.shape[1])
    before[live] = conv_state.mT[slots[live, None], entries[live]]
    known = torch.cat([before.mT, x], 2)  # (B, C_in, H + L)
    y = reference.ACTIVATIONS[activation](reference.causal_conv1d(known, weight, bias, dilation)[:, :, history:])
    y = y if residual is None else residual + y
    conv_state.mT[slots[live, None], after[live]] = known[live, :, L:].mT
    return in_layout_of(empty_output(x, y.shape[1]), y.masked_fill(~live[:, None, None], 0))


def residual_stack_update(
    x: Tensor,
    history: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    activation: str,
) -> Tensor:
    """x (B, C, L) through `x + activation(conv(x))` for each layer -> y (B, C, L); positions (slots,) then count L steps more.

    history (slots, sum of (K-1)*d, C) holds the layers' circular states one after the other, transposed; slots (B,) are the rows' slots.
    """
    index = torch.arange(len(x), device=x.device) if slots is None else slots.long()
    live = (index >= 0) & (index < len(positions))
    seen = torch.where(live, positions[torch.where(live, index, 0)], 0) if len(positions) else index
    lengths = [(weight.shape[2] - 1) * dilation for weight, dilation in zip(weights, dilations, strict=True)]
    y = x.clone(memory_format=torch.preserve_format) if not weights else x
    for state, weight, bias, dilation in zip(history.split(lengths, 1), weights, biases, dilations, strict=True):
        y = causal_conv1d_update(y, state.mT, weight, bias, y, seen, slots, dilation, activation)
    positions[index[live]] += x.shape[2]
    return in_layout_of(empty_output(x, x.shape[1]), y.masked_fill(~live[:, None, None], 0))


def embedding_norm(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """ids (B, L), embedding (num_ids, C), weight and bias (C,) -> (B, L, C): Eq. 1 of the paper, the embedding and its LayerNorm."""
    try:
        return F.layer_norm(F.embedding(ids.long(), embedding), weight.shape, weight, bias, eps)
    except IndexError as error:
        raise IndexError(f"ids reach from {ids.min()} to {ids.max()}; expected 0 to {len(embedding) - 1}") from error
