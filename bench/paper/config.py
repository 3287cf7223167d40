"""What a run is: one file a model in `configs/`, the sizes common to all, and both resolved against a corpus."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.paper.bundle import Bundle
from bench.paper.matching import matched
from bench.paper.models import Size
from bench.paper.vocabulary import SIZES

CONFIGS = Path(__file__).parent / "configs"
REFERENCE = "fuzzytok-43"  # its FLOPs a byte are everyone's


class Settings(NamedTuple):
    """Common to all models; lengths in source bytes."""

    name: str
    width: int  # of the reference
    window: int  # of a training window; evaluation scores the second half of each
    batch: int  # windows a step
    train_mib: float
    warmup: float  # the share of the steps in which the rate rises
    final_rate: float  # as a share of the highest, where its cosine ends
    weight_decay: float
    clip: float  # of the gradient's norm
    curve_points: int
    validation_kib: int  # of the learning curve
    timed_steps: int
    seeds: dict[str, list[int]]  # by corpus
    checked: int  # positions of the checks of causality


class ModelConfig(NamedTuple):
    """One file."""

    name: str
    label: str
    kind: str
    vocabulary: str
    depth: int
    rate: float
    trained: bool = True  # else it has a speed and a memory only

    @staticmethod
    def load(name: str) -> "ModelConfig":
        """From `configs/NAME.json`."""
        return ModelConfig(name, **json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))


class ConfigurationError(ValueError):
    """What is stored is of a run with another configuration."""


class Run(NamedTuple):
    """One training run, in full."""

    model: ModelConfig
    size: Size
    corpus: str
    sha256: str  # of the corpus's training text
    seed: int
    settings: Settings
    length: int  # ids of a window

    @property
    def name(self) -> str:
        return f"{self.corpus}/{self.model.name}-s{self.seed}"

    @property
    def scored_length(self) -> int:
        """Ids of a window of the evaluation, whose first half is context: at least the receptive field, where there is one."""
        return max(self.length, 2 * (self.size.receptive_field or 0))

    def stored(self) -> dict[str, Any]:
        """As JSON holds it."""
        settings = {name: value for name, value in self.settings._asdict().items() if name != "seeds"}  # how many more there are
        return {**self._asdict(), "model": self.model._asdict(), "size": self.size._asdict(), "settings": settings}


def load_settings(name: str) -> Settings:
    """`full` or `smoke`, from `configs/sizes.json`."""
    sizes = json.loads((CONFIGS / "sizes.json").read_text(encoding="utf-8"))
    return Settings(name, **sizes[name])


def model_names() -> list[str]:
    """Of all models, in the order of the table."""
    return json.loads((CONFIGS / "sizes.json").read_text(encoding="utf-8"))["models"]


def resolve(model: ModelConfig, bundle: Bundle, settings: Settings, seed: int) -> Run:
    """The run of `model` on the corpus: as many bytes in a window, and as many FLOPs a byte, as the reference has."""
    reference = ModelConfig.load(REFERENCE)
    target = Size(reference.kind, SIZES[reference.vocabulary], reference.depth, settings.width).flops(settings.window)
    bytes_per_id = bundle.bytes_per_id(model.vocabulary)
    length = round(settings.window / bytes_per_id)
    size = matched(model.kind, len(bundle.vocabulary(model.vocabulary).pieces), model.depth, length, target * bytes_per_id)
    return Run(model, size, bundle.facts["name"], bundle.facts["sha256"]["train"], seed, settings, length)
