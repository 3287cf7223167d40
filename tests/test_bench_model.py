"""`bench.model` on small sizes: its models and blocks agree, its bars and report say what the figures say. No times are asserted."""

import copy
import json

import pytest
import torch
from modes import DEVICE, HALF, ON_CUDA, needs_cuda, not_interpreted

from bench.grid import Shape
from bench.measure import CALLS, Call, WrongResultError
from bench.model import __main__ as command
from bench.model import bars, blocks, forms, report, sections, sizes, steps, turns
from bench.model.__main__ import chosen, main
from bench.model.forms import FORMS, Form
from bench.model.steps import Batch
from bench.rivals import Conv1dPad, Conv2dPad, Conv2dTrim, draw
from fuzzytok_kernels import ResidualCausalBlock, reference

TINY = Shape(2, 37, 16, 16, 3, 4)
FORM_NAMES = [name for name, form in FORMS.items() if form.options is None]


@pytest.fixture
def ours():
    return forms.Model(16, 4).to(DEVICE)


@pytest.fixture
def batch():
    return Batch.draw(2, 40)


def figures_of(measured: dict) -> dict:
    return {"date": "2000-01-01", "gpu": "Pretended GPU", "versions": {"torch": "0", "CUDA": None}, "seconds": {}, "sections": measured}


def good() -> dict:
    """Sections with which every bar is met."""
    block = {"plain, 256 output channels": {"us": 40.0, "ratio": 1.0}}
    block |= {name: {"us": 40.0 * limit, "ratio": limit} for name, limit in bars.FORWARD_LIMITS.items()}
    rows = {name: {"error": 1e-3, "eager_ms": 15.0, "graph_ms": 10.0, "peak_mib": 700.0} for name in FORMS}
    rows["ours"] |= {"eager_ms": 3.0, "graph_ms": 2.0, "peak_mib": 430.0}
    return {
        "block": block,
        "backward": {"ours": {"us": 100.0, "ratio": 1.0}, "one": {"us": 230.0, "ratio": 2.3}, "other": {"failed": "Error: no"}},
        "model": {f"{B}x{T}": copy.deepcopy(rows) for B, T in sizes.BATCHES},
        "depth": {
            "best": "the best",
            "peaks": {str(depth): {name: {"mib": 99.0 * depth} for name in ("ours", "best")} for depth in sizes.DEPTHS},
        },
        "saved": {"ours": 1, "F.conv1d + F.pad": 2},
        "rule": {"768": {"recomputed": {"us": 1.0, "ratio": 1.0}, "stored": {"us": 1.1, "ratio": 1.1}}},
    }


def verdicts(measured: dict) -> dict[str, str]:
    return {bar.what: bar.verdict for bar in bars.judge(measured)}


# ---- the rivals


@not_interpreted
@pytest.mark.parametrize("name", FORM_NAMES)
def test_models_agree(name, ours, batch):
    wanted, found = (steps.first_results(FORMS[form], ours, batch) for form in ("ours", name))
    assert len(wanted) == 1 + 3 + 2 * 4 + 2
    assert steps.error_of(found, wanted) < steps.GRADIENT_BOUND


@not_interpreted
@pytest.mark.parametrize("name", FORM_NAMES)
def test_models_agree_in_fp32(name, ours, batch, strict):
    losses = []
    for form in (FORMS["ours"], FORMS[name]._replace(stream=None)):
        losses.append(form.build(ours)(*batch))
        losses[-1].backward()
    torch.testing.assert_close(*losses)


@not_interpreted
def test_a_wrong_model_is_refused(ours, batch):
    class Unflipped(forms.Conv1dResidual):
        def __init__(self, conv, stream):
            super().__init__(conv, stream)
            self.conv.weight = torch.nn.Parameter(conv.weight.detach().clone())

    wanted = steps.first_results(FORMS["ours"], ours, batch)
    with pytest.raises(WrongResultError, match="weight"):
        steps.measured(Form("wrong", Unflipped), ours, batch, wanted)


@not_interpreted
@pytest.mark.parametrize("block", [None, forms.Conv1dResidual, forms.Conv2dResidual])
def test_models_compile_in_one_graph(block, ours, batch):
    compiled, plain = (steps.first_results(Form("", block, options), ours, batch) for options in ({"backend": "aot_eager"}, None))
    steps.error_of(compiled, plain)


@pytest.mark.parametrize(
    "make",
    [
        blocks.OurBlock,
        blocks.Recomputed,
        blocks.Stored,
        *(
            pytest.param(lambda shape, conv=conv: blocks.CompiledBlock(conv(shape), backend="aot_eager"), id=conv.__name__)
            for conv in (Conv1dPad, Conv2dTrim, Conv2dPad)
        ),
    ],
)
def test_blocks_are_right(make):
    data = [draw(TINY, HALF, "last", DEVICE) for _ in range(2)]
    for op in ("forward", "forward_backward"):
        calls = turns.prepared(make(TINY), blocks.Exact(TINY), op, data)
        assert len(calls) >= CALLS


@pytest.mark.parametrize("activation", [*bars.FORWARD_LIMITS, *reference.GATES])
def test_forwards_are_right(activation):
    shape = TINY._replace(c_out=32) if activation in reference.GATES else TINY
    data = [draw(shape, HALF, "last", DEVICE)]
    turns.prepared(blocks.OurBlock(shape, activation), blocks.Exact(shape, activation), "forward", data)


def test_a_wrong_block_is_refused():
    data = [draw(TINY, HALF, "last", DEVICE)]
    with pytest.raises(WrongResultError, match="'y'"):
        turns.prepared(blocks.OurBlock(TINY, "relu"), blocks.Exact(TINY), "forward", data)


@not_interpreted
def test_blocks_are_timed_in_turns(monkeypatch):
    monkeypatch.setattr(turns, "ROUNDS", 2)

    class Broken(blocks.OurBlock):
        def convolve(self, x, weight, bias):
            raise RuntimeError("no kernel")

    exact = blocks.Exact(TINY)
    rivals = {"first": (blocks.OurBlock(TINY), exact), "second": (blocks.Stored(TINY), exact), "broken": (Broken(TINY), exact)}
    figures = turns.timed(TINY, "forward_backward", rivals)
    assert figures["first"]["ratio"] == 1
    assert figures["second"]["ratio"] == figures["second"]["us"] / figures["first"]["us"] > 0
    assert figures["broken"] == {"failed": "RuntimeError: no kernel"}


def test_kernels_are_those_of_the_sections():
    assert list(sections.kernels(["saved"])) == []
    assert {type(rival) for rival, _ in sections.kernels(["rule"])} == {blocks.Recomputed, blocks.Stored}
    for rival, op in sections.kernels(sections.MEASURES):
        call = Call(
            type(rival)(TINY, *([rival.activation] if isinstance(rival, blocks.OurBlock) else [])), op, draw(TINY, HALF, "last", DEVICE)
        )
        assert call.op


def test_a_block_saves_its_input_alone():
    block = ResidualCausalBlock(16, 3, 4).to(DEVICE)
    x = torch.randn(4, 200, 16, device=DEVICE).mT.requires_grad_()
    assert sections.saved_tensors(block, x) == 1
    assert sections.saved_tensors(forms.Conv1dResidual(block.conv), x) >= 2
    assert sections.saved_tensors(torch.nn.Identity(), x.detach()) == 0


# ---- bars and report


def test_bars_are_met():
    assert set(verdicts(good()).values()) == {"met", ""}
    assert verdicts({}) == {}


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (("block", "gelu", "ratio"), 1.46, "block forward / plain op, gelu"),
        (("backward", "one", "ratio"), 2.1, "block forward + backward, times faster than the best compiled"),
        (
            ("model", "32x2048", "conv2d_searched", "graph_ms"),
            3.5,
            "model step, times faster than the best compiled, CUDA graph against CUDA graph",
        ),
        (
            ("model", "32x2048", "conv1d_compiled", "eager_ms"),
            5.3,
            "model step, times faster than the best compiled, launched against launched",
        ),
        (
            ("model", "32x2048", "conv1d_bf16", "graph_ms"),
            9.9,
            "model step, times faster than eager F.conv1d, CUDA graph against CUDA graph",
        ),
        (("model", "32x2048", "conv2d", "peak_mib"), 600.0, "model step, peak memory / the best PyTorch form's"),
        (("saved", "ours"), 2, "tensors of the input's size that a block saves"),
    ],
)
def test_a_bar_is_missed(path, value, what):
    measured = good()
    *outer, last = path
    at = measured
    for key in outer:
        at = at[key]
    at[last] = value
    assert [name for name, verdict in verdicts(measured).items() if verdict == "missed"] == [what]


def test_a_failed_rival_is_no_met_bar():
    measured = good()
    measured["block"]["gelu"] = measured["backward"]["one"] = {"failed": "Error: no"}
    measured["model"]["32x2048"] |= {name: {"failed": "Error: no"} for name in forms.COMPILED}
    incomplete = [name for name, verdict in verdicts(measured).items() if verdict == "incomplete"]
    assert len(incomplete) == 4
    assert "Error: no" in report.render(figures_of(measured))


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    measured = good()
    del measured["model"]["16x1024"]["conv1d"]["graph_ms"]
    measured["model"]["16x1024"]["conv1d"]["graph_failed"] = "RuntimeError: capture"
    measured["rule"] = {"failed": "RuntimeError: all of it"}
    text = report.write(figures_of(measured), tmp_path)
    assert (tmp_path / "model.md").read_text() == text
    assert json.loads((tmp_path / "model.json").read_text())["sections"] == measured
    assert (tmp_path / "model_memory.png").stat().st_size > 10_000
    assert "the paper claims 38.1%" in text
    assert "| RuntimeError: capture |" in text
    assert "rule: RuntimeError: all of it" in text
    for line in text.splitlines():  # every table is whole
        assert not line.startswith("|") or line.endswith("|")
    tables = [table.splitlines() for table in text.split("\n\n") if table.startswith("|")]
    assert len(tables) == 7
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_what_is_measured_is_written_as_it_comes(tmp_path, monkeypatch):
    def model():
        rows = {name: copy.deepcopy(row) for name, row in good()["model"]["32x2048"].items() if name in ("ours", "conv1d")}
        yield {"32x2048": rows}
        assert json.loads((tmp_path / "model.json").read_text())["sections"]["model"] == {"32x2048": rows}
        raise RuntimeError("out of time")

    monkeypatch.setattr(command, "MEASURES", {"model": model})
    monkeypatch.setattr(command, "compile_kernels", lambda sections: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
    assert "| F.conv1d + F.pad |" in command.measure(["model"], tmp_path)


@pytest.mark.skipif(ON_CUDA, reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="a GPU, and there is none"):
        main([])


def test_sections_are_chosen(capsys):
    assert chosen("rule,block") == ["block", "rule"]
    with pytest.raises(SystemExit):
        main(["--only", "blocks"])
    assert "blocks: expected some of block," in capsys.readouterr().err


@needs_cuda
def test_a_step_is_measured(ours, batch):
    figures = steps.measured(FORMS["ours"], ours, batch, steps.first_results(FORMS["ours"], ours, batch))
    assert figures["eager_ms"] > 0
    assert figures["graph_ms"] > 0
    assert figures["peak_mib"] > 0
