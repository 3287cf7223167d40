"""`bench.compiled` on small stacks: it checks before it times, and its bars say what the figures say. No times are asserted."""

import pytest
import torch
from modes import DEVICE, not_interpreted

from bench import compiled
from bench.grid import Shape
from bench.measure import Call, WrongResultError
from bench.model.blocks import ExactPlain
from bench.rivals import draw

pytestmark = not_interpreted
TINY = Shape(2, 37, 16, 16, 3, 4)


def test_host_costs(monkeypatch):
    monkeypatch.setattr(compiled, "CALLS", 2)
    costs = compiled.host_costs(depths=(1, 2))
    assert costs.keys() == set(compiled.OPS)
    assert all(row.keys() == {f"{kind}, {how}" for kind in ("ours", "native") for how in ("compiled", "eager")} for row in costs.values())


def test_a_wrong_stack_is_not_timed():
    stack = compiled._stack("ours", 1)
    with pytest.raises(WrongResultError):
        compiled._call(lambda x: 1.2 * stack(x), stack, "forward")


def test_native_makes_as_many_steps_as_it_gets():
    assert compiled._stack("native", 2)(torch.zeros(1, 64, 64, device=DEVICE, dtype=torch.bfloat16)).shape == (1, 64, 64)


@pytest.mark.parametrize("rival", [compiled.Training, compiled.Contiguous])
def test_the_weight_rivals_leave_gradients_laid_out_as_their_parameters(rival):
    data = draw(TINY, torch.float32, "last", DEVICE)
    calls = [Call(kind(TINY), "forward_backward", data) for kind in (rival, ExactPlain)]
    for call in calls:
        call()
    got, want = (call.results for call in calls)
    assert got["grad_weight"].is_contiguous() == (rival is compiled.Contiguous)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-2, atol=1e-2)


def test_bars_and_report():
    costs = {
        "forward": {"ours, compiled": 15.0, "native, compiled": 10.0},
        "forward_backward": {"ours, compiled": 31.0, "native, compiled": 20.0},
    }
    assert [bar.verdict for bar in compiled.bars(costs)] == ["met", "missed"]
    text = compiled.report(costs)
    assert "| forward | 15.0 | 10.0 |" in text
    assert "<= 1.5" in text


def test_it_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match="measured on a GPU"):
        compiled.main()
