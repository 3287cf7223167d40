"""The runs of a table: each trained to its end, and its evaluations, each stored as soon as it is there."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.model.attempts import free
from bench.paper.bundle import Bundle
from bench.paper.causality import causality
from bench.paper.config import ConfigurationError, ModelConfig, Run, Settings, model_names, resolve
from bench.paper.costs import compiled_ms, memory, speed
from bench.paper.evaluate import bits_per_byte, robustness
from bench.paper.models import LanguageModel
from bench.paper.radical import of_model
from bench.paper.train import OutOfTimeError, Training

EVALUATIONS = frozenset({"training", "test", "robustness", "causality", "radical"})
_COMPILE_SECONDS = 60.0
_BY_STEP_TIME = ("lstm", "transformer", "conv", "conv1d")


class Place(NamedTuple):
    """Where runs are kept, where they run, and until when."""

    folder: Path
    device: torch.device
    deadline: float


class Outcome:
    """What is known of one run: `result.json` in its folder, a figure a key. `asked` are the figures that it is whole with."""

    def __init__(self, run: Run, bundle: Bundle, place: Place, earlier: dict[str, Any], asked: frozenset[str] = EVALUATIONS) -> None:
        self.run, self.bundle, self.place, self.asked = run, bundle, place, asked
        self.folder = place.folder / f"{run.settings.name}-{run.settings.train_mib:g}mib" / run.name
        self._write_config()
        self.figures: dict[str, Any] = self._kept() or self._taken(earlier)

    @property
    def first(self) -> bool:
        """Whether its seed is the first of its corpus."""
        return self.run.seed == self.run.settings.seeds[self.run.corpus][0]

    @property
    def lock(self) -> Path:
        """Held by the process that works on the run."""
        return self.folder / ".lock"

    def read(self) -> None:
        """The figures that another process may have stored by now."""
        self.figures |= self._kept()

    def figure(self, name: str, make: Callable[[], Any], seconds: float = 0.0) -> Any:
        """The stored figure, or `make()`, stored.

        Raises:
            OutOfTimeError: it is not there, and the time is up, or would be before it is made in about so many seconds.
        """
        if name not in self.figures:
            if time.monotonic() + seconds >= self.place.deadline:
                raise OutOfTimeError(f"{self.run.name}: {name} is left to do")
            begin = time.monotonic()
            self.figures[name] = make()
            self._write()
            print(f"{self.run.name}: {name}, {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        return self.figures[name]

    @property
    def whole(self) -> bool:
        """Whether it is trained, and evaluated as its table asks."""
        return self.asked <= set(self.figures)

    def train(self) -> dict[str, Any]:
        """Its training, whole."""
        return self.figure("training", self._trained)

    def trained(self) -> LanguageModel:
        """With the weights of the end."""
        model = LanguageModel(self.run.size).to(self.place.device)
        model.load_state_dict(torch.load(self.folder / "weights.pt", map_location=self.place.device, weights_only=True))
        return model

    def evaluate(self) -> None:
        """Train, and all that Table 2 asks of a trained model."""
        self.train()
        vocabulary, window = self.run.model.vocabulary, self.run.scored_length
        evaluations: dict[str, Callable[[LanguageModel], Any]] = {
            "test": lambda model: bits_per_byte(model, self.bundle, vocabulary, "test", window),
            "robustness": lambda model: robustness(model, self.bundle, vocabulary, window),
            "causality": lambda model: causality(model, self.run.settings.checked),
            "radical": lambda model: of_model(model, self.bundle, vocabulary),
        }
        for name, evaluation in evaluations.items():
            self.figure(name, functools.partial(self._evaluated, evaluation))

    def untrained(self) -> dict[str, Any]:
        """The radical ratio of the model as its seed makes it."""
        return self.figure("untrained", self._untrained)

    def costs(self) -> None:
        """Memory and speed, on a GPU."""
        bytes_per_id = self.bundle.bytes_per_id(self.run.model.vocabulary)
        self.figure("memory", lambda: memory(self.run, bytes_per_id, self.place.device))
        self.figure("speed", lambda: speed(self.run, self.place.device))

    def compiled(self) -> None:
        """The speed of the step compiled by PyTorch, on a GPU."""
        self.figure("compiled_ms", lambda: compiled_ms(self.run, self.place.device), _COMPILE_SECONDS)

    def _evaluated(self, evaluation: Callable[[LanguageModel], Any]) -> Any:
        return evaluation(self.trained())

    def _untrained(self) -> dict[str, Any]:
        torch.manual_seed(self.run.seed)
        return of_model(LanguageModel(self.run.size).to(self.place.device), self.bundle, self.run.model.vocabulary)

    def _trained(self) -> dict[str, Any]:
        training = Training(self.run, self.bundle, self.folder, self.place.device)
        try:
            return training.go(self.place.deadline)
        finally:
            del training
            free()

    def stored(self) -> dict[str, Any]:
        """The run and its figures, as JSON holds them."""
        return {"run": self.run.stored(), "figures": self.figures}

    def _write_config(self) -> None:
        """Into the run's folder, which is made if it is not there."""
        path, config = self.folder / "config.json", json.dumps(self.run.stored(), indent=1) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != config:
            raise ConfigurationError(f"{self.folder} holds a run with another configuration: remove it to start anew")
        unfinished = self.folder / f"config.{os.getpid()}"  # no process reads what another has half written
        unfinished.write_text(config, encoding="utf-8")
        unfinished.replace(path)

    def _kept(self) -> dict[str, Any]:
        path = self.folder / "result.json"
        figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        lost = "training" in figures and not self.asked <= set(figures) and not (self.folder / "weights.pt").exists()
        return {name: figure for name, figure in figures.items() if not lost or name not in self.asked}

    def _taken(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """From an earlier table, if it is of the same run: its machine, and with it the folder, may be gone."""
        same = earlier.get("run") == json.loads(json.dumps(self.run.stored()))
        whole = not self.run.model.trained or self.asked <= set(earlier.get("figures", {}))  # what is missing would want its weights
        return dict(earlier["figures"]) if same and whole else {}

    def _write(self) -> None:
        unfinished = self.folder / "result.unfinished"
        unfinished.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "result.json")


def longest_first(some: Iterable[Outcome]) -> list[Outcome]:
    """So that processes that share them end together."""
    return sorted(some, key=lambda each: _BY_STEP_TIME.index(each.run.size.kind))


def outcomes(bundle: Bundle, settings: Settings, place: Place, rates: dict[str, float], earlier: dict[str, Any]) -> list[Outcome]:
    """All runs on a corpus, seed by seed, so that a table that is not finished has every model.

    `rates` are learning rates by label, for those that have a better one than their config's; `earlier` are stored runs by name.
    """
    models = [ModelConfig.load(name) for name in model_names()]
    models = [model._replace(rate=rates.get(model.label, model.rate)) for model in models]
    seeds = settings.seeds[bundle.facts["name"]]
    runs = [resolve(model, bundle, settings, seed) for seed in seeds for model in models if model.trained or seed == seeds[0]]
    return [Outcome(run, bundle, place, earlier.get(run.name, {})) for run in runs]
