"""The tables and the report of `bench.paper` on small sizes: what they count, say and write. No times are asserted."""

import json
import math
import shutil
import time

import pytest
import torch
from modes import DEVICE, ON_CUDA, needs_cuda, not_interpreted
from paper_inputs import small_bundle, small_run

from bench.grid import PAPER_SHAPES, Shape
from bench.paper import beside, claims, costs, noises, prepare, radical_table, resampling, runs, sweep, table1, table2, table2_text, traffic
from bench.paper.__main__ import main
from bench.paper.train import Training

pytestmark = not_interpreted


def test_traffic_counts_what_tiles_ask_for():
    shape = PAPER_SHAPES[3]
    asked = {name: traffic.requested(name, shape, {"BLOCK_T": 128, "BLOCK_C_OUT": 128}) for name in ("scalar", "naive", "listing1", "ours")}
    one_read = shape.tokens * 256 * 3 * 2  # all of x in bf16, once for each tap
    assert {name: each["x"] // one_read for name, each in asked.items()} == {"scalar": 256, "naive": 1, "listing1": 8, "ours": 2}
    assert asked["scalar"]["x"] / asked["listing1"]["x"] == 32  # the claim
    assert asked["listing1"]["weight"] == asked["naive"]["weight"] == shape.tokens // 32 * 256 * 256 * 3 * 2
    output = "==PROF== 3 passes\n"
    output += '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","lts__t_bytes.sum"\n'
    output += '"","","byte","byte","byte"\n"0","conv","1,024","2048","99"\n'
    assert traffic.parsed(output) == {"dram_read": 1024.0, "dram_write": 2048.0, "l2": 99.0}
    assert traffic.parsed('"ID"\n""\n') == {} and traffic.parsed("==ERROR== ERR_NVGPUCTRPERM") == {}


def made_up_table1() -> dict:
    rows = {}
    for place, shape in enumerate(PAPER_SHAPES, 1):
        forward = {
            name: {"us": place * time_us, "launched_us": 50.0, "configs": {}}
            for name, time_us in zip(table1.RIVALS, (90, 60, 20, 15, 10), strict=True)
        }
        rows[str(shape)] = {"forward": forward, "forward_backward": {name: forward[name] for name in ("conv1d_pad", "conv2d_trim", "ours")}}
    rows[str(PAPER_SHAPES[0])]["forward"]["naive"] = {"failed": "OutOfResources: no"}
    kernels = ("scalar", "naive", "listing1", "ours")
    counted = {
        name: {"requested": traffic.requested(name, PAPER_SHAPES[3], {}), "measured": {"failed": "ncu is not on the PATH"}}
        for name in kernels
    }
    return {"rows": rows, "traffic": {"shape": str(PAPER_SHAPES[3]), "rows": counted}}


def made_up_run(name: str, seed: int, test: float) -> dict:
    run = small_run(small_bundle(), name, seed, width=80)
    checks = {
        "bit_equal": True,
        "gradient": True,
        "reach": run.size.receptive_field or 192,
        "length": 192,
        "exact": run.size.receptive_field and True,
    }
    figures = {
        "training": {"bytes": 1 << 20, "bytes_per_s": 2e6, "curve": [{"bytes": 10, "validation": 3.0}, {"bytes": 20, "validation": test}]},
        "test": test,
        "robustness": {"none": test, **dict.fromkeys(noises.NOISES, test + 0.25)},
        "causality": checks,
        "memory": {"16x1024": 100 * test, "32x2048": 400 * test},
        "speed": {"step_ms": 2.0, "model_ms": 1.5, "compiled_ms": {"failed": "RuntimeError: no"}},
    }
    return {"run": json.loads(json.dumps(run.stored())), "figures": figures}


def made_up_table2() -> dict:
    runs = {
        f"{name}-{seed}": made_up_run(name, seed, test)
        for name, tests in {"fuzzytok-43": (2.0, 2.2), "bpe4096-conv": (1.5, 1.7), "bpe4096-transformer": (2.3, 2.5)}.items()
        for seed, test in enumerate(tests)
    }
    runs["unfinished"] = {
        "run": made_up_run("byte-lstm", 0, 1.0)["run"],
        "figures": {"training": {"bytes": 5, "bytes_per_s": 1.0, "curve": []}},
    }
    return {"smoke": {"facts": small_bundle().facts, "runs": runs}}


def test_table1_measures_and_says_so(monkeypatch):
    monkeypatch.setattr(table1, "PAPER_SHAPES", (Shape(1, 128, 16, 16, 3, 1),))
    monkeypatch.setattr(table1, "SMALL", table1.PAPER_SHAPES)
    monkeypatch.setattr(traffic, "measured", lambda rival, shape: {"failed": "not tried"})
    figures = json.loads(json.dumps(table1.measure()))
    rows = figures["rows"]["1x128x16_K3_d1"]
    assert set(rows["forward_backward"]) == {"conv1d_pad", "conv2d_trim", "ours"}
    assert all(row["us"] > 0 and row["launched_us"] > 0 for op in rows.values() for row in op.values())
    assert ("naive" in rows["forward"]) == ON_CUDA and "| 1 x 128 |" in table1.text(figures)


@needs_cuda
@pytest.mark.parametrize("name", ["fuzzytok-43", "fuzzytok-43-conv1d", "byte-lstm", "byte-transformer"])
def test_costs_are_measured_on_a_gpu(name):
    run = small_run(small_bundle(), name, width=80)
    figures = costs.memory(run, 1.0, DEVICE)
    assert 0 < figures["16x1024"] < figures["32x2048"]
    assert costs._step_ms(run, DEVICE) > 0 and costs._model_ms(run, DEVICE) > 0
    step, starts, rate = costs._random_step(run, 2, run.length, DEVICE)
    step.capture()
    before = [parameter.clone() for parameter in step.model.parameters()]
    step(starts, rate)
    assert step.not_captured is None and any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_table1_says_what_was_measured():
    text = table1.text(made_up_table1())
    assert "| 32 x 1024 | 91.02 M | 136.5 M |" in text and "1.50x | 4.46x | 43,969, 195,930 | 2.00x" in text
    assert "OutOfResources: no" in text and "Not measured: ncu is not on the PATH." in text and "8 times as much of x" in text


def test_table1_says_where_ours_loses():
    figures = made_up_table1()
    row = figures["rows"][str(PAPER_SHAPES[2])]["forward"]
    row["conv2d_trim"], row["conv1d_pad"] = row["conv2d_trim"] | {"us": 1.0}, row["conv1d_pad"] | {"launched_us": 49.0}
    text = table1.text(figures)
    assert "Faster than ours: in a graph, conv2d channels_last at 16 x 512; launched one by one, F.conv1d + F.pad at 16 x 512." in text
    assert "Faster than ours: in a graph, none; launched one by one, none." in text


def test_models_stand_in_the_order_of_the_configs_and_their_seeds():
    runs = {f"{name}-{seed}": made_up_run(name, seed, 1.0) for name, seed in (("byte-lstm", 0), ("fuzzytok-43", 1), ("fuzzytok-43", 0))}
    found = table2_text.models({"facts": small_bundle().facts, "runs": runs})
    assert [(name, [each["run"]["seed"] for each in model.runs]) for name, model in found.items()] == [
        ("fuzzytok-43", [0, 1]),
        ("byte-lstm", [0]),
    ]


def test_the_radical_ratio_of_several_seeds_is_their_mean_and_lies_in_its_interval():
    rows = [{name: [ratio, ratio - 0.1, ratio + 0.1] for name in radical_table.COLUMNS} for ratio in (1.0, 2.0)]
    assert set(radical_table._cells(rows)) == {"1.500 ± 0.707 [1.400, 1.600]"}
    assert set(radical_table._cells(rows[:1])) == {"1.000 [0.900, 1.100]"}
    assert set(radical_table._cells([{name: [None, None, None] for name in radical_table.COLUMNS}])) == {"-"}


def test_table2_says_where_fuzzytok_loses():
    text = table2_text.text(made_up_table2())
    assert "| FuzzyTok, RF 43 | 2.1000 ± 0.1414 | 1.4556 ± 0.0980 | 4.297 ± 0.421 |" in text
    assert "| bits, loss and perplexity per byte | 2.100 (FuzzyTok, RF 43) | 1.600 (conv, BPE 4096) |" in text
    assert "| conv, BPE 4096 | 160 | 31.2% more | 640 | 31.2% more |" in text and "240 | 12.5% less |" in text
    assert "43 of 43" in text and "25.0% of cuts" in text and "| +0.250 ± 0.000 |" in text
    assert "training MB/s" not in text.split("FuzzyTok loses")[1]
    assert "byte LSTM" not in text.split("Robustness")[1].split("Costs")[0] and "Not measured yet, or in part: byte LSTM." in text
    assert "Bar: FuzzyTok, RF 43 trains at >= 60%" in text and "Not measured yet: the step of any model compiled" in text


def test_table2_says_what_to_hold_against_its_figures():
    figures = made_up_table2()
    runs = figures["smoke"]["runs"]
    text = table2_text.text(figures)
    assert "One seed" not in text and "Over-fitted" not in text and "xz does" not in text
    del runs["bpe4096-conv-1"]
    for seed, bits in enumerate((3.5, 3.7)):
        runs[f"fuzzytok-43-{seed}"]["figures"]["training"]["curve"][-1]["validation"] = bits
    figures["smoke"]["facts"]["xz"] = 2.05
    text = table2_text.text(figures)
    assert "One seed of conv, BPE 4096: " in text
    assert "(FuzzyTok, RF 43 3.00, then 3.60)" in text
    assert "xz does better than 2 of the 3 models here: FuzzyTok, RF 43; Transformer, BPE 4096." in text


def test_an_earlier_table_keeps_what_was_run_alike():
    runs = {f"{name}-{seed}": made_up_run(name, seed, 1.0) for name in ("fuzzytok-43", "byte-lstm") for seed in (0, 1)}
    other = small_run(small_bundle(), width=80, weight_decay=0.0).stored()
    assert table2._alike(runs, runs["byte-lstm-1"]["run"], {}) == runs
    assert table2._alike(runs, json.loads(json.dumps(other)), {}) == {}
    faster = json.loads(json.dumps(runs["byte-lstm-0"]))
    faster["run"]["model"]["rate"] *= 2
    assert set(table2._alike(runs, runs["byte-lstm-1"]["run"], {"byte-lstm-0": faster})) == {"fuzzytok-43-0", "fuzzytok-43-1"}


def test_every_defect_has_something_beside_it():
    figures = {"table1": made_up_table1(), "table2": made_up_table2()}
    said = {key: beside.beside(key, figures) for _, key, _ in claims.DEFECTS}
    assert said["losses"].startswith("FuzzyTok, RF 43: 2.100 bits per byte of held-out text, 1.456 nats.")
    assert said["memory"].startswith("210 MiB and 840 MiB, 4.00 times as much") and said["memory"].endswith("-31.2%, 12.5%.")
    rival = table2_text.models(figures["table2"]["smoke"])["bpe4096-conv"]
    assert beside._against_385(rival, [80.0, 800.0]).endswith("385 tokens that its parameter counts imply: 50.0%, -25.0%.")
    assert said["table1"].startswith("-, 1.50x, 1.50x, 1.50x; our tuned kernels / its tiled one: 6.00x")
    assert said["cudnn"].startswith("F.conv1d + F.pad takes 2.00 times our time")
    assert said["radical"] == said["per_byte"] == said["fields"] == "not measured yet"
    assert all(beside.beside(key, {}) for _, key, _ in claims.DEFECTS)


def test_the_commands_from_corpus_to_report(tmp_path, monkeypatch, capsys):
    """On a made-up corpus: out of time, then to the end, then the other tables, then the report alone."""
    names = ["fuzzytok-29", "fuzzytok-43"]
    monkeypatch.setattr(runs, "model_names", lambda: names)
    monkeypatch.setattr(resampling, "_RESAMPLES", 10)
    small = small_run(small_bundle(), train_mib=0.002).settings
    monkeypatch.setattr("bench.paper.__main__.load_settings", lambda name: small)
    small_bundle().save(prepare.path_of(tmp_path, "smoke"))
    options = ["--smoke", "--work", str(tmp_path), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="has no tables"):
        main(["report", *options])
    begin = time.monotonic()
    main(["table2", *options, "--budget-seconds", "0"])
    assert "the same command goes on from there" in capsys.readouterr().err and time.monotonic() - begin < 60
    assert "Not finished" in (tmp_path / "results/report.md").read_text(encoding="utf-8")
    main(["table2", *options])
    stored = json.loads((tmp_path / "results/table2.json").read_text(encoding="utf-8"))
    figures = [run["figures"] for run in stored["figures"]["smoke"]["runs"].values()]
    assert (
        all({"training", "test", "robustness", "causality", "radical"} <= set(each) for each in figures[:2])
        and stored["facts"]["left"] is None
    )
    main(["radical", *options])
    main(["report", *options])
    text = (tmp_path / "results/report.md").read_text(encoding="utf-8")
    for wanted in (
        "FuzzyTok, RF 29, untrained",
        "character trigrams",
        "bag of bytes",
        "byte 5-gram",
        "Not measured yet: table1.",
        "0.4110",
    ):
        assert wanted in text


def one_small_model(monkeypatch, folder) -> list[str]:
    """The options of a command that is to have one model, on a made-up corpus."""
    monkeypatch.setattr(resampling, "_RESAMPLES", 10)
    for module in (runs, sweep):
        monkeypatch.setattr(module, "model_names", lambda: ["fuzzytok-29"])
    settings = small_run(small_bundle(), train_mib=0.002).settings._replace(seeds={"smoke": [0, 1]})
    monkeypatch.setattr("bench.paper.__main__.load_settings", lambda name: settings)
    small_bundle().save(prepare.path_of(folder, "smoke"))
    return ["--smoke", "--work", str(folder), "--results", str(folder / "results")]


def stored_in(folder, name: str) -> dict:
    return json.loads((folder / f"results/{name}.json").read_text(encoding="utf-8"))


def swept(rates: dict[float, float]) -> dict:
    """A sweep's figures of one model: bits per byte by rate."""
    run = small_run(small_bundle()).stored()
    return {
        str(rate): {"run": run | {"model": run["model"] | {"rate": rate}}, "figures": {"training": {"curve": [{"validation": bits}]}}}
        for rate, bits in rates.items()
    }


def test_table2_trains_at_the_rates_that_the_sweep_found(tmp_path, monkeypatch):
    options = one_small_model(monkeypatch, tmp_path)
    main(["sweep", *options])
    figures = stored_in(tmp_path, "sweep")["figures"]
    bits = {each["run"]["model"]["rate"]: each["figures"]["training"]["curve"][-1]["validation"] for each in figures.values()}
    assert set(bits) == {0.001, 0.002, 0.004}
    best = sweep.best(figures)["FuzzyTok, RF 29"]
    assert bits[best] == min(bits.values())
    main(["table2", *options])
    stored = stored_in(tmp_path, "table2")["figures"]["smoke"]["runs"]
    assert [run["run"]["model"]["rate"] for run in stored.values()] == [best, best]
    assert "| FuzzyTok, RF 29 | 0.001: " in (tmp_path / "results/report.md").read_text(encoding="utf-8")


def test_the_best_rate_is_one_of_three_that_did_not_diverge(monkeypatch):
    monkeypatch.setattr(sweep, "model_names", lambda: ["fuzzytok-29", "byte-lstm"])
    assert sweep.best(swept({0.001: 2.0, 0.002: 3.0})) == {}  # not fair to the others
    edge = swept({0.004: 3.0, 0.001: math.nan, 0.002: 2.0})
    assert sweep.best(edge) == {"FuzzyTok, RF 29": 0.002}
    text = sweep.text(edge)
    assert "| 0.001: nan, 0.002: **2.0000**, 0.004: 3.0000 |" in text and "At an edge" not in text
    assert "**Not equal yet:** byte LSTM were not tried" in text
    assert "At an edge of what was tried: FuzzyTok, RF 29 (0.004)." in sweep.text(swept({0.001: 3.0, 0.002: 2.0, 0.004: 1.0}))


def test_a_clean_clone_goes_on_from_the_tables_alone(tmp_path, monkeypatch):
    options = one_small_model(monkeypatch, tmp_path)
    for command in ("sweep", "table2"):
        main([command, *options])
    whole = {name: stored_in(tmp_path, name) for name in ("sweep", "table2")}
    gone = {"sweep": "smoke/fuzzytok-29-rate-x2-s0", "table2": "smoke/fuzzytok-29-s1"}
    for name, table in whole.items():
        runs_of = table["figures"] if name == "sweep" else table["figures"]["smoke"]["runs"]
        runs_left = {run: each for run, each in runs_of.items() if run != gone[name]}
        figures = runs_left if name == "sweep" else {"smoke": table["figures"]["smoke"] | {"runs": runs_left}}
        (tmp_path / f"results/{name}.json").write_text(json.dumps(table | {"figures": figures}), encoding="utf-8")
    shutil.rmtree(tmp_path / "runs")
    trained, train = [], Training.go
    monkeypatch.setattr(Training, "go", lambda self, deadline: trained.append(self.run.name) or train(self, deadline))
    for name, table in whole.items():
        main([name, *options])
        assert trained.pop() == gone[name] and not trained
        again = stored_in(tmp_path, name)
        assert set(again["facts"]["commits"]) == set(table["facts"]["commits"]) and again["facts"]["left"] is None
    assert sweep.best(stored_in(tmp_path, "sweep")["figures"]) == sweep.best(whole["sweep"]["figures"])
    assert set(stored_in(tmp_path, "table2")["figures"]["smoke"]["runs"]) == set(whole["table2"]["figures"]["smoke"]["runs"])
