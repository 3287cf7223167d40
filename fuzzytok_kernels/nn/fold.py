"""Whether the front of a tokenizer may run as look-ups: only if nobody could tell, but for rounding and time."""

from typing import Any

from torch import nn

from fuzzytok_kernels import private
from fuzzytok_kernels.nn.block import ResidualCausalBlock
from fuzzytok_kernels.nn.conv import CausalConv1d


def foldable(tokenizer: Any) -> bool:
    """Whether embedding, norm and first block are what `FuzzyTokenizer` made, as far as it matters.

    Parameters are read through the modules: a parametrized weight (`torch.nn.utils.parametrizations`) stays one, and parameters may be
    shared or replaced. What prevents it are hooks, a forward of its own in a subclass or an instance, a norm or a dropout in the block,
    and what an embedding does beyond its look-up.
    """
    if len(tokenizer.blocks) == 0:
        return False
    first: Any = tokenizer.blocks[0]
    embedding, norm = tokenizer.embedding, tokenizer.norm
    kinds = ((embedding, nn.Embedding), (norm, nn.LayerNorm), (first, ResidualCausalBlock))
    if not all(_runs_as(module, kind) for module, kind in kinds):
        return False
    if not (_runs_as(first.norm, nn.Identity) and _runs_as(first.conv, CausalConv1d)):
        return False
    alone = embedding.max_norm is None and embedding.padding_idx is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return alone and len(norm.normalized_shape) == 1 and not (first.dropout and first.training)


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of `kind` and nothing else."""
    if not isinstance(module, kind) or private.has_hooks(module):
        return False
    return type(module).forward is kind.forward and "forward" not in module.__dict__
