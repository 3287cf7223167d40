"""What `torch.utils.flop_counter` counts of the ops: as much as of F.conv1d."""

import pytest
import torch
from modes import not_interpreted
from oracle import Problem, conv1d, make_inputs, with_gradients
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fuzzytok_kernels import FuzzyTokenizer, causal_conv1d

PROBLEM = Problem(B=2, c_in=16, c_out=24, T=37, K=3, d=4)
PRODUCTS = 2 * 2 * 37 * 16 * 24 * 3

pytestmark = not_interpreted


def counted(function) -> dict[str, int]:
    """What `function()` counts, by op."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def test_as_much_as_conv1d(device):
    inputs = make_inputs(PROBLEM, torch.float32, device)

    def ours(x, weight, bias, dilation):
        return causal_conv1d(x, weight, bias, dilation=dilation)

    got, want = (counted(lambda f=f: with_gradients(f, inputs)) for f in (ours, conv1d))
    assert got == {f"fuzzytok.causal_conv1d{op}": PRODUCTS for op in ("", "_input_grad", "_weight_grad")}
    assert sum(got.values()) == sum(want.values())


@pytest.mark.parametrize("activation", ["gelu", "glu"])
def test_what_is_computed_anew_counts_again(activation, device):
    inputs = make_inputs(PROBLEM, torch.float32, device)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    got = counted(lambda: causal_conv1d(x, weight, dilation=4, activation=activation).sum().backward())
    assert got == {f"fuzzytok.causal_conv1d_{op}": PRODUCTS for op in ("fused", "activation_grad", "input_grad", "weight_grad")}


def test_a_model_on_the_meta_device():
    """Nothing is computed: what a step of a large model would take can be asked before there is a GPU."""
    with torch.device("meta"):
        tokenizer, ids = FuzzyTokenizer(dim=512), torch.zeros(4, 1000, dtype=torch.long)
    weights = 512 * 512 * 3
    want = {"fuzzytok.byte_causal_conv1d": 2 * 256 * weights, "fuzzytok.causal_conv1d_fused": 8 * 2 * 4 * 1000 * weights}
    assert counted(lambda: tokenizer(ids)) == want


def test_a_stream_counts_as_the_whole_does(device):
    tokenizer, ids = FuzzyTokenizer(dim=8, dilations=(1, 2), fold=False).to(device), torch.randint(256, (2, 5), device=device)
    state = tokenizer.init_state(2)
    assert sum(counted(lambda: tokenizer.step(ids, state)).values()) == sum(counted(lambda: tokenizer(ids)).values()) > 0


def test_every_op_has_a_formula():
    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fuzzytok::")}
    assert {name for name in names if getattr(torch.ops.fuzzytok, name) not in flop_registry} == set()
