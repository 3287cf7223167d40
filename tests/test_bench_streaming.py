"""bench.streaming: its rivals are the same tokenizer, a wrong one is not timed, and the bars are judged."""

import pytest
import torch
from modes import ON_CUDA, interpreter_cannot
from test_streaming import small
from torch import Tensor

from bench import streaming as bench
from bench.measure import WrongResultError

pytestmark = pytest.mark.usefixtures("strict_dtype")  # TF32 off


@interpreter_cannot("fp64 is the oracle's")
@pytest.mark.parametrize("form", [bench.Ours, bench.Padded, bench.Ring])
def test_the_rivals_are_the_same_tokenizer(form, device):
    with torch.no_grad():
        assert bench.error(small(device, dilations=(1, 2, 4) * 3), form, 3, 50) < 1e-5


@interpreter_cannot("fp64 is the oracle's")
def test_a_wrong_rival_is_not_timed(device):
    class Forgetful(bench.Ours):
        def __call__(self, ids: Tensor) -> Tensor:
            self.state.reset()
            return super().__call__(ids)

    with torch.no_grad(), pytest.raises(WrongResultError):
        bench.error(small(device, dilations=(1, 2, 4) * 3), Forgetful, 2, 50)


def test_the_bars_are_judged(device):
    steps = {
        batch: {"ours": bench.Step(us, us), "one": bench.Step(100.0, 90.0), "one, compiled": bench.Step(50.0, 50.0)}
        for batch, us in ((1, 30.0), (8, 35.0), (64, 41.0))
    }
    tokenizer = small(device)
    rows = bench.bars(tokenizer, steps, 1.2)
    verdicts = [row.split(" | ")[-1].removesuffix(" |") for row in rows[2:]]
    assert verdicts == ["met", "met", "missed", "missed", "missed", "met"]
    assert "3.33x" in rows[3]
    assert bench.step_table(steps)[2] == "| ours | 30.0 | 30.0 | 35.0 | 35.0 | 41.0 | 41.0 |"


@pytest.mark.skipif(ON_CUDA, reason="without a GPU")
def test_without_a_gpu_the_bench_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is none"):
        bench.main([])
