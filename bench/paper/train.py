"""A training run: to its end, or to the deadline, from where it was."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.paper.bundle import Bundle
from bench.paper.config import ConfigurationError, Run
from bench.paper.evaluate import bits_per_byte
from bench.paper.models import LanguageModel
from bench.paper.step import Step
from bench.paper.windows import Plan, plan

_LOGS = 64  # readings of the loss in a run, and chances to stop
_CHECKPOINT_SECONDS = 60.0
_UNTIMED_STEPS = 10


class OutOfTimeError(Exception):
    """The deadline came; what was done is kept."""


class Training:
    """The state of a run on `device`, kept in `folder`: checkpoint.pt, metrics.jsonl, and in the end weights.pt."""

    def __init__(self, run: Run, bundle: Bundle, folder: Path, device: torch.device) -> None:
        self.run, self.bundle, self.folder = run, bundle, folder
        settings, vocabulary = run.settings, bundle.vocabulary(run.model.vocabulary)
        ids = bundle.ids(run.model.vocabulary, "train")
        self.plan: Plan = plan(ids, vocabulary.lengths, run.length, settings.batch, settings.train_mib * (1 << 20), run.seed)
        torch.manual_seed(run.seed)
        self.model = LanguageModel(run.size).to(device)
        stream = torch.from_numpy(ids.astype(np.int16)).to(device)
        self.step = Step(self.model, stream, run.length, settings)
        self.starts = torch.from_numpy(self.plan.starts).to(device)
        self.rates = rates(run, len(self.plan.starts)).to(device)
        self.done, self.seconds, self.timed = 0, 0.0, list[float]()
        folder.mkdir(parents=True, exist_ok=True)
        if not self._checkpoint.exists():
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        else:
            self._resume(torch.load(self._checkpoint, map_location=device, weights_only=True))
        if device.type == "cuda":
            self.step.capture()

    def go(self, deadline: float) -> dict[str, Any]:
        """Train until the plan is done, and return what is known of it.

        Raises:
            OutOfTimeError: `time.monotonic()` reached `deadline` first.
        """
        total, saved = len(self.plan.starts), time.monotonic()
        often = max(1, total // _LOGS)
        curve = set(np.linspace(0, total, self.run.settings.curve_points + 1).round().astype(int).tolist()[1:])
        with tqdm(total=total, initial=self.done, desc=self.run.name, unit="step", mininterval=1.0) as bar:
            while self.done < total:
                begin = time.perf_counter()
                steps = min(often - self.done % often, total - self.done, min(point for point in curve if point > self.done) - self.done)
                for _ in range(steps):
                    self._one()
                loss = float(self.step.loss)
                self.seconds += time.perf_counter() - begin
                bar.update(steps)
                bar.set_postfix_str(f"{self._bits(loss):.3f} bits/byte")
                self._log(loss, validate=self.done in curve)
                now = time.monotonic()
                if self.done < total and (now >= deadline or now > saved + _CHECKPOINT_SECONDS):
                    self._save()
                    saved = now
                    if now >= deadline:
                        raise OutOfTimeError(f"{self.run.name} stopped at step {self.done} of {total}")
        return self._finished()

    def _one(self) -> None:
        """A step; some of them are waited for and timed."""
        timed = self.done >= _UNTIMED_STEPS and len(self.timed) < self.run.settings.timed_steps
        if timed:
            _synchronize(self.starts)
            begin = time.perf_counter()
        self.step(self.starts[self.done], self.rates[self.done])
        if timed:
            _synchronize(self.starts)
            self.timed.append(time.perf_counter() - begin)
        self.done += 1

    def _bits(self, loss: float) -> float:
        """Of a byte, from the loss of an id in nats."""
        return loss / math.log(2) / self.bundle.bytes_per_id(self.run.model.vocabulary)

    def _log(self, loss: float, validate: bool) -> None:
        row: dict[str, Any] = {
            "step": self.done,
            "bytes": int(self.plan.source_bytes[: self.done].sum()),
            "bits_per_byte": self._bits(loss),
            "rate": float(self.rates[self.done - 1]),
            "seconds": self.seconds,
        }
        if validate:
            settings = self.run.settings
            row["validation"] = bits_per_byte(
                self.model, self.bundle, self.run.model.vocabulary, "validation", self.run.scored_length, settings.validation_kib << 10
            )
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _finished(self) -> dict[str, Any]:
        torch.save(self.model.state_dict(), self.folder / "weights.pt")
        self._checkpoint.unlink(missing_ok=True)
        write_tensorboard(self.metrics(), self.folder)
        per_step = self.plan.source_bytes.mean()
        return {
            "steps": self.done,
            "bytes": int(self.plan.source_bytes.sum()),
            "seconds": self.seconds,
            "bytes_per_s": float(per_step / np.median(self.timed)) if self.timed else None,
            "timed_steps": len(self.timed),
            "not_captured": self.step.not_captured,
            "curve": self.metrics(),
        }

    # ---- stopping and going on

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _save(self) -> None:
        unfinished = self._checkpoint.with_suffix(".unfinished")
        state = {
            "run": json.dumps(self.run.stored(), sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "timed": self.timed,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(state, unfinished)
        unfinished.replace(self._checkpoint)

    def _resume(self, state: dict[str, Any]) -> None:
        if state["run"] != json.dumps(self.run.stored(), sort_keys=True):
            raise ConfigurationError(f"{self._checkpoint} is of a run with another configuration: remove {self.folder} to start anew")
        self.model.load_state_dict(state["model"])
        self.step.load(state["optimizer"])
        self.done, self.seconds, self.timed = state["done"], state["seconds"], state["timed"]
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda_random"]])
        kept = [row for row in self.metrics() if row["step"] <= self.done]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def rates(run: Run, steps: int) -> Tensor:
    """(steps,) learning rates: a line up, and a cosine down to a share of the highest."""
    settings = run.settings
    warm = max(1, round(settings.warmup * steps))
    step = torch.arange(steps, dtype=torch.float64)
    fall = ((step - warm) / max(1, steps - warm)).clamp(0, 1)
    cosine = settings.final_rate + (1 - settings.final_rate) * (1 + torch.cos(math.pi * fall)) / 2
    return (run.model.rate * torch.minimum((step + 1) / warm, cosine)).float()


def write_tensorboard(metrics: list[dict[str, Any]], folder: Path) -> None:
    """The same rows for TensorBoard, if it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(folder) as writer:
        for row in metrics:
            for name in ("bits_per_byte", "validation", "rate"):
                if name in row:
                    writer.add_scalar(name, row[name], row["bytes"])


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
