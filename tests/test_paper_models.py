"""The models of `bench.paper` in small: bits per byte, sizes, training that resumes, causality, the radical ratio."""

import json
import math

import numpy as np
import pytest
import torch
from modes import DEVICE, ON_CUDA, not_interpreted
from paper_inputs import MERGED, SIZES, encoded, small_bundle, small_run
from torch import nn

from bench.paper import config as configs
from bench.paper import radical, resampling, windows
from bench.paper.bundle import Bundle
from bench.paper.causality import causality, reached, unmoved
from bench.paper.config import ConfigurationError, ModelConfig, load_settings, model_names, resolve
from bench.paper.evaluate import bits_per_byte, total_bits
from bench.paper.matching import matched
from bench.paper.models import LanguageModel, Size, parameter_counts
from bench.paper.resampling import Pairs, Ranks
from bench.paper.runs import Outcome, Place
from bench.paper.step import autocast
from bench.paper.train import OutOfTimeError, Training, rates
from bench.paper.vocabulary import Vocabulary, byte_ids

pytestmark = not_interpreted


# ---- bits per byte


class Bigrams(nn.Module):
    """Knows P(id | the one before) by a table, and nothing else."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocabulary, vocabulary, device=DEVICE))

    def forward(self, ids):
        return self.embedding[ids.long()]


@pytest.mark.parametrize("window", [2, 6, 7, 500])
def test_bits_per_byte_over_a_bpe_is_the_hand_computed_one(window):
    documents = [b"the other", b"", b"bath \xc3\xa9 thth"]
    bundle = small_bundle()
    bundle.streams["bpe4096", "test"] = encoded(documents)
    model = Bigrams(len(MERGED.pieces))
    bits, before = 0.0, MERGED.end
    for token in encoded(documents).tolist():  # every token and all three end marks
        bits -= model.embedding[before].double().log_softmax(0)[token].item() / math.log(2)
        before = token
    expected = bits / sum(map(len, documents))
    assert bits_per_byte(model, bundle, "bpe4096", "test", window) == pytest.approx(expected, rel=1e-5 if not ON_CUDA else 1e-2)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 40])
def test_every_id_is_scored_once_with_half_a_window_before_it(length):
    window = 8
    scored = []

    class Watched(nn.Module):
        """Certain of every id, but not in the first half of a window."""

        def forward(self, ids):
            scored.append(ids)
            logits = torch.zeros(*ids.shape, 11, device=ids.device)
            following = (ids + 1) % 11  # the stream counts
            sure = torch.nn.functional.one_hot(following, 11) * 1e4
            logits[:, window // 2 :] = sure[:, window // 2 :]
            return logits

    stream = (torch.arange(1, 1 + length) % 11).to(DEVICE)
    bits = total_bits(Watched(), stream, end=0, window=window)  # type: ignore[arg-type]
    uncertain = min(length, window // 2)  # only the stream's own beginning has less before it
    assert bits == pytest.approx(uncertain * math.log2(11), rel=1e-6)


# ---- windows, sizes, training


def test_windows_cover_every_pass_once_and_count_their_bytes():
    ids = encoded([b"the other bath that the cat sat in"] * 30)
    found = windows.plan(ids, MERGED.lengths, length=10, batch=4, train_bytes=3000, seed=1)
    assert found.source_bytes.sum() >= 3000 > found.source_bytes[:-1].sum()
    by_hand = [sum(int(MERGED.lengths[ids[begin + 1 : begin + 11]].sum()) for begin in row) for row in found.starts]
    assert by_hand == found.source_bytes.tolist()
    one_pass = (len(ids) - 1) // 10 - 1
    first = np.sort(windows.shuffled(one_pass, 10, one_pass, seed=1))
    assert (np.diff(first) == 10).all() and first[-1] + 11 <= len(ids)
    assert np.array_equal(found.starts.ravel()[:one_pass], windows.shuffled(one_pass, 10, one_pass, seed=1)[: found.starts.size])
    assert not np.array_equal(found.starts, windows.plan(ids, MERGED.lengths, 10, 4, 3000, seed=2).starts[: len(found.starts)])
    with pytest.raises(ValueError, match="has no window of 600"):
        windows.plan(ids, MERGED.lengths, 600, 4, 3000, seed=0)


@pytest.mark.parametrize("kind", SIZES)
def test_flops_and_parameters_are_those_of_the_model(kind):
    size = SIZES[kind]
    model = LanguageModel(size)
    products = sum(2 * each.numel() for name, each in model.named_parameters() if each.dim() > 1 and "embedding" not in name)
    length = 33
    attention = size.depth * 2 * 2 * size.width * (length + 1) / 2 if kind == "transformer" else 0
    assert size.flops(length) == products + attention
    total, inner = parameter_counts(size)
    assert total == sum(each.numel() for each in model.parameters()) and inner == total - 257 * size.width


def test_the_compiler_leaves_the_lstm_in_one_piece():
    model, sizes = LanguageModel(Size("lstm", 300, 2, 64)), []

    def seen(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    ids = torch.randint(300, (2, 33))
    torch.compile(model.loss, dynamic=False, backend=seen)(ids).backward()
    assert sizes and max(sizes) < 32  # nodes of a graph, of 32 steps


@pytest.mark.parametrize("bytes_per_id", {"english": (1.69, 3.19), "multilingual": (1.48, 2.86)}.values())
def test_all_models_spend_the_same_flops_on_a_byte(bytes_per_id):
    settings, (small, large) = load_settings("full"), bytes_per_id
    facts = {"name": "any", "sha256": {"train": ""}, "bytes": {"train": 1e6}}
    facts["ids"] = {"bytes": 1e6, "bpe385": 1e6 / small, "bpe4096": 1e6 / large}
    pieces = {name: Vocabulary(name, (b"x",) * count) for name, count in (("bpe385", 385), ("bpe4096", 4096))}
    reference = None
    for name in model_names():
        run = resolve(ModelConfig.load(name), Bundle(facts, pieces, {}), settings, 0)
        per_id = {"bytes": 1, "bpe385": small, "bpe4096": large}[run.model.vocabulary]
        flops = run.size.flops(run.length) / per_id
        reference = reference or Size("conv", 257, 3, settings.width).flops(settings.window)
        assert flops == pytest.approx(reference, rel=0.03), name
        assert run.length * per_id == pytest.approx(settings.window, rel=0.01)
        assert run.scored_length // 2 >= (run.size.receptive_field or 0)
    assert ModelConfig.load("fuzzytok-43").kind == "conv" and configs.REFERENCE == "fuzzytok-43"
    with pytest.raises(ValueError, match="no lstm of 2 over 4096 ids has near 1,000 FLOPs an id"):
        matched("lstm", 4096, 2, 100, 1000)


def test_the_rate_rises_and_falls():
    run = small_run(small_bundle(), warmup=0.1, final_rate=0.05)
    found = rates(run, 200)
    assert found.argmax() in (19, 20) and found.max() == pytest.approx(run.model.rate) and found[0] == pytest.approx(run.model.rate / 20)
    assert found[-1] == pytest.approx(0.05 * run.model.rate, rel=0.01) and (found[21:].diff() < 0).all()


def test_a_run_that_is_stopped_goes_on_exactly(tmp_path):
    bundle = small_bundle()
    run = small_run(bundle)
    straight = Training(run, bundle, tmp_path / "straight", DEVICE)
    whole = straight.go(math.inf)
    stops = 0
    while True:
        torch.manual_seed(99 + stops)  # another process would have another state
        training = Training(run, bundle, tmp_path / "stopped", DEVICE)
        try:
            resumed = training.go(deadline=0)
            break
        except OutOfTimeError:
            stops += 1
    assert stops > 5
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(
            training.model.state_dict()[name], value, rtol=1e-3 if ON_CUDA else 0, atol=1e-4 if ON_CUDA else 0, msg=name
        )
    without_time = [[{key: row[key] for key in row if key != "seconds"} for row in found["curve"]] for found in (whole, resumed)]
    assert [row["step"] for row in without_time[0]] == [row["step"] for row in without_time[1]]
    if not ON_CUDA:
        assert without_time[0] == without_time[1]
    assert sum("validation" in row for row in whole["curve"]) == run.settings.curve_points
    assert whole["bytes"] >= run.settings.train_mib * (1 << 20) and whole["bytes_per_s"] > 0 and whole["not_captured"] is None
    assert whole["curve"][-1]["bits_per_byte"] < whole["curve"][0]["bits_per_byte"] - 1  # it learnt something
    assert (tmp_path / "stopped" / "weights.pt").exists() and not (tmp_path / "stopped" / "checkpoint.pt").exists()


def test_another_configuration_does_not_go_on(tmp_path):
    bundle = small_bundle()
    with pytest.raises(OutOfTimeError, match="stopped at step"):
        Training(small_run(bundle), bundle, tmp_path, DEVICE).go(deadline=0)
    with pytest.raises(ConfigurationError, match="another configuration"):
        Training(small_run(bundle, clip=2.0), bundle, tmp_path, DEVICE)
    place = Place(tmp_path, DEVICE, math.inf)
    first = Outcome(small_run(bundle), bundle, place, {})
    first.figure("test", lambda: 1.5)
    assert Outcome(small_run(bundle), bundle, place, {}).figure("test", lambda: 2.5) == 1.5
    more_seeds = small_run(bundle, seeds={"smoke": [0, 1, 2]})
    assert Outcome(more_seeds, bundle, place, {}).figures == {"test": 1.5}
    assert Outcome(small_run(bundle, train_mib=0.005), bundle, place, {}).figures == {}  # in a folder of its own
    with pytest.raises(ConfigurationError, match="another configuration"):
        Outcome(small_run(bundle, clip=2.0), bundle, place, {})
    elsewhere = Place(tmp_path / "elsewhere", DEVICE, math.inf)
    assert Outcome(small_run(bundle), bundle, elsewhere, json.loads(json.dumps(first.stored()))).figures == {}  # its weights are gone
    first.figures |= dict.fromkeys(("training", "robustness", "causality", "radical"), 0)
    assert Outcome(small_run(bundle), bundle, elsewhere, json.loads(json.dumps(first.stored()))).figures["test"] == 1.5
    assert Outcome(small_run(bundle, seed=1), bundle, elsewhere, json.loads(json.dumps(first.stored()))).figures == {}


# ---- causality


@pytest.mark.parametrize("kind", SIZES)
def test_models_are_causal_and_reach_their_receptive_field(kind):
    model = LanguageModel(SIZES[kind]).to(DEVICE)
    found = causality(model, checked=5)
    assert found["bit_equal"] and found["gradient"]
    if kind == "conv":
        assert found["reach"] == 29 and found["exact"]
    else:
        assert found["reach"] > 100 and found["exact"] is None


class Leaking(nn.Module):
    """A causal model, and a little of the next id."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LanguageModel(SIZES["conv"]).to(DEVICE)

    def forward(self, ids):
        following = torch.cat([ids[:, 1:], ids[:, -1:]], 1)
        return self.model(ids) + 1e-2 * self.model.embedding[following.long()].sum(-1, keepdim=True)


def test_a_planted_leak_is_found_by_both_checks():
    leaking = Leaking()
    assert not unmoved(leaking, 257, checked=3)
    assert reached(leaking, leaking.model.embedding, 257, checked=3)["later"] > 0


def test_a_wrong_receptive_field_is_found(monkeypatch):
    model = LanguageModel(SIZES["conv"]).to(DEVICE)
    model.size = model.size._replace(depth=3)  # says 43, has 29
    assert not causality(model, checked=3)["exact"]


# ---- the radical ratio


def test_auc_is_the_share_of_pairs_in_order():
    same, other = np.array([0.9, 0.5, 0.2]), np.array([0.5, 0.1])
    by_hand = sum((a > b) + (a == b) / 2 for a in same for b in other) / 6
    assert Ranks(same, other).auc(np.ones(3), np.ones(2)) == pytest.approx(by_hand)
    doubled = Ranks(np.append(same, 0.9), other).auc(np.ones(4), np.ones(2))
    assert Ranks(same, other).auc(np.array([2.0, 1, 1]), np.ones(2)) == pytest.approx(doubled)
    assert math.isnan(Ranks(same, other[:0]).auc(np.ones(3), np.ones(0)))


def test_figures_of_constructed_words():
    random = np.random.default_rng(0)
    groups = [[f"{chr(97 + family)}bc{word}" for word in range(3)] for family in range(20)]
    families, pairs = radical.paired(groups)
    assert len(pairs.same) == 60 and len(pairs.prefix) == 0 and (families[pairs.random[:, 0]] != families[pairs.random[:, 1]]).all()
    roots = np.repeat(np.eye(20), 3, axis=0)
    clear = resampling.figures(roots + 0.01 * random.random(roots.shape) + 0.1, families, pairs)
    assert clear["auc_random"] == [1, 1, 1] and clear["gap"][0] > 0.9 and clear["auc_prefix"] == [None, None, None]
    noise = resampling.figures(random.normal(size=(60, 50)), families, pairs)
    value, low, high = noise["auc_random"]
    assert low < 0.5 < high and low <= value <= high and high - low > 0.02
    shifted = resampling.figures(random.normal(size=(60, 50)) + 100, families, pairs)
    assert shifted["ratio"][0] == pytest.approx(1, abs=1e-3)  # one direction for all: the raw ratio says nothing
    two = resampling.figures(
        np.array([[1.0, 0], [1, 1], [0, 1], [-1, 1]]), np.array([0, 0, 1, 1]), Pairs(*map(np.array, ([[0, 1], [2, 3]], [[1, 2]], [[1, 2]])))
    )
    assert two["ratio"][0] == pytest.approx(1) and two["same"][0] == pytest.approx(2**-0.5)


def test_same_prefix_negatives_are_of_other_families():
    families, pairs = radical.paired([["cart", "carts"], ["carbon", "carbons"], ["dog", "dogs"]])
    assert len(pairs.prefix) == 4 and (families[pairs.prefix[:, 0]] != families[pairs.prefix[:, 1]]).all()
    assert radical.trigrams(" cat") == [" ca", "cat"] and radical.trigrams("ab") == ["ab"]


@pytest.mark.parametrize("vocabulary", ["bytes", "bpe4096"])
def test_words_are_embedded_alone_whatever_stands_beside_them(vocabulary):
    bundle = small_bundle()
    size = SIZES["conv"]._replace(vocabulary=len(bundle.vocabulary(vocabulary).pieces))
    model = LanguageModel(size).to(DEVICE)
    found = radical.embedded(model, bundle, vocabulary, "english")
    words = [f" {word}".encode() for group in bundle.facts["families"]["english"] for word in group]
    assert len(found) == len(words)
    for row, word in zip(found, words, strict=True):
        ids = byte_ids([word])[:-1] if vocabulary == "bytes" else encoded([word])[:-1]
        with autocast(DEVICE):
            alone = model.states(torch.from_numpy(ids.astype(np.int64))[None].to(DEVICE))[0].float().mean(0)
        rounding = 2e-2 if ON_CUDA else 1e-4  # of bf16, in which a GPU computes
        np.testing.assert_allclose(row, alone.detach().cpu().double().numpy(), rtol=1e-3, atol=rounding)
