"""Which config packed sequences get in place of a batch's."""

import random

import pytest
from places import GPU

from fuzzytok_kernels import tuning
from fuzzytok_kernels.tuning import Config, Problem, get_config, lookup, space
from fuzzytok_kernels.tuning.space import PACKED

ONE, TWO = Config("tma", 128, 64, 128, 4, 4, 1), Config("tma", 128, 64, 128, 4, 3, 2)  # programs a multiprocessor; PACKED has three
INPUT_GRAD = Problem("causal_conv1d_input_grad", "bf16", "last", True, "residual", 3, 256, 256, 65_536)


@pytest.mark.parametrize(
    ("fields", "n_sequences", "T", "config", "expected"),
    [
        ({}, 128, 65_536, TWO, PACKED),  # five rounds of two, three of three
        ({}, 16, 65_536, TWO, TWO),  # four rounds of two, three of three
        ({}, 1, 1, TWO, TWO),
        ({"c_in": 128, "c_out": 128}, 8192, 16_384, ONE, ONE),  # most are padding
        ({}, 384, 98_304, TWO, TWO),  # 0.91 of the time
        ({"op": "causal_conv1d_fused", "epilogue": "gelu", "dtype": "fp16"}, 128, 65_536, TWO, PACKED),
        ({"op": "causal_conv1d", "epilogue": "none"}, 128, 65_536, TWO, PACKED),
        ({"op": "causal_conv1d_activation_grad", "epilogue": "gelu"}, 128, 65_536, TWO, TWO),
        ({"op": "causal_conv1d_fused", "epilogue": "glu"}, 128, 65_536, TWO, TWO),
        ({"dtype": "tf32"}, 128, 65_536, TWO, TWO),
        ({"op": "causal_conv1d", "epilogue": "none", "layout": "first"}, 128, 65_536, TWO, TWO),
        ({"c_out": 16}, 128, 65_536, TWO, TWO),
        ({}, 128, 65_536, TWO._replace(path="pointer"), TWO._replace(path="pointer")),
    ],
    ids=str,
)
def test_three_programs_where_the_last_round_of_two_is_nearly_empty(fields, n_sequences, T, config, expected):
    problem = INPUT_GRAD._replace(**fields)
    assert space.packed_config(problem, config, n_sequences, T, GPU) == expected
    assert space.packed_config(problem, config, n_sequences, T, GPU._replace(arch="sm100")) == config


def test_blocks_of_random_lengths():
    """Within 2 % of what 200 draws have on average."""
    draw = random.Random(0)
    for n, T, block_t in ((1, 1, 128), (16, 65_536, 128), (128, 65_536, 128), (512, 65_536, 64)):
        counts = []
        for _ in range(200):
            ends = sorted(draw.randint(0, T) for _ in range(n - 1))
            counts.append(sum(-(-(end - begin) // block_t) for begin, end in zip([0, *ends], [*ends, T], strict=True)))
        assert space._expected_blocks(n, T, block_t) == pytest.approx(sum(counts) / 200, rel=0.02)


def test_packed_sequences_are_told_to_the_choice(places, monkeypatch):
    tuning.forget()
    monkeypatch.setattr(lookup, "find", lambda device, problem: TWO)
    assert get_config(0, INPUT_GRAD, (128, 65_536)) == PACKED
    assert get_config(0, INPUT_GRAD, (16, 65_536)) == get_config(0, INPUT_GRAD) == TWO
    with tuning.force(TWO):
        assert get_config(0, INPUT_GRAD, (128, 65_536)) == TWO
