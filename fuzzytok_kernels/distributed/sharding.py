"""How DTensor may shard the ops: over the batch, the output channels (column) or the input channels (row); never over time.

The rules follow from the subscripts of each op, as in an einsum. Sharded over a letter, a tensor that has it is split there; a result
that is a sum over it is partial on each rank, and what is added to such a result (bias, residual) enters as a partial one too, so that
it counts once; all else is replicated. Below autograd, so that the gradient ops are sharded by the same table.
"""

from typing import Any, NamedTuple

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fuzzytok_kernels import ops
from fuzzytok_kernels.reference import GATES


class _Op(NamedTuple):
    """Letters: b batch, c input channels, o output channels, and t, k, h, n, v (the rows of a table of ids), which are never split."""

    arguments: dict[str, str]  # by name, in the order of the schema; "" is no tensor
    results: tuple[tuple[str, str], ...]  # each with the letters that its factors have
    addends: tuple[str, ...] = ()
    letters: str = "boc"  # over which it may be sharded


_BYTES = {"ids": "bt", "embedding": "vc", "weight": "ock", "bias": "o", "dilation": "", "activation": "", "cu_seqlens": "n"}
_SEQUENCES = {"initial_state": "bch", "cu_seqlens": "n"}
_OPS = {
    ops.causal_conv1d: _Op({"x": "bct", "weight": "ock", "bias": "o", "dilation": ""}, (("bot", "boc"),), ("bias",)),
    ops.causal_conv1d_fused: _Op(
        {"x": "bct", "weight": "ock", "bias": "o", "residual": "bot", **_SEQUENCES, "dilation": "", "activation": ""},
        (("bot", "boc"),),
        ("bias", "residual"),
    ),
    ops.causal_conv1d_activation_grad: _Op(
        {"grad_y": "bot", "x": "bct", "weight": "ock", "bias": "o", **_SEQUENCES, "dilation": "", "activation": ""},
        (("bot", "boc"),),
        letters="bo",
    ),
    ops.causal_conv1d_input_grad: _Op(
        {"grad_y": "bot", "weight": "ock", "dilation": "", "residual": "bct", "cu_seqlens": "n"}, (("bct", "boc"),), ("residual",)
    ),
    ops.causal_conv1d_weight_grad: _Op(
        {"grad_y": "bot", "x": "bct", "kernel_size": "", "dilation": "", "cu_seqlens": "n"}, (("ock", "boc"), ("o", "bo"))
    ),
    # Over the batch alone: a channel of the embedding is summed over and added to the result, and the table is small.
    ops.byte_causal_conv1d: _Op(_BYTES, (("bct", "b"),), letters="b"),
    ops.byte_causal_conv1d_grad: _Op({"grad_y": "bct", **_BYTES}, (("vc", "b"), ("ock", "b"), ("o", "b")), letters="b"),
}  # fmt: skip


def _shardings(op: _Op, *args: Any) -> list[tuple[list[Placement | None], list[Placement | None]]]:
    """Per way to shard over one dimension of a mesh: the placements of the results, and of the arguments (None for what is no tensor)."""
    given = dict(zip(op.arguments, args, strict=False))
    tensors = {name: value for name, value in given.items() if op.arguments[name] and value is not None}
    ways: list[tuple[list[Placement | None], list[Placement | None]]] = []
    for letter in ("", *(letter for letter in op.letters if _splits(op, given, tensors, letter))):
        results: list[Placement | None] = [_placement(subscripts, letter, summed=letter in factors) for subscripts, factors in op.results]
        partial = Partial() in results
        arguments = [
            _placement(op.arguments[name], letter, summed=partial and name in op.addends) if name in tensors else None for name in given
        ]
        ways.append((results, arguments))
    return ways


def _placement(subscripts: str, letter: str, summed: bool) -> Placement:
    if letter and letter in subscripts:
        return Shard(subscripts.index(letter))
    return Partial() if letter and summed else Replicate()


def _splits(op: _Op, given: dict[str, Any], tensors: dict[str, Any], letter: str) -> bool:
    activation = given.get("activation", "none")
    if letter == "c" and activation != "none":
        return False  # no activation of a sum is the sum of activations: the arguments are gathered
    if letter == "b" and "cu_seqlens" in tensors:
        return False  # the batch is one, and its sequences lie in time
    if letter == "o" and activation in GATES:
        return False  # a value and its gate lie half the channels apart
    sizes = [spec.shape[op.arguments[name].index(letter)] for name, spec in tensors.items() if letter in op.arguments[name]]
    meshes = next(iter(tensors.values())).mesh.shape
    # A rank may be left without rows of the batch, but not without channels, of which the ops want one.
    return letter == "b" or all((ranks - 1) * -(-size // ranks) < size for ranks in meshes for size in sizes)


def _register() -> None:
    for overload, op in _OPS.items():
        register_sharding(overload)(lambda *args, op=op: _shardings(op, *args))


_register()
