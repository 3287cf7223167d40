"""One training step: windows out of the stream, loss, gradients, AdamW; on a GPU all of it is one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.paper.config import Settings
from bench.paper.models import LanguageModel

_WARM_STEPS = 3  # before the capture, and undone
_BETAS = (0.9, 0.98)


class Step:
    """`step(starts, rate)` trains on the windows of (batch,) starts; `step.loss` is then the mean cross-entropy in nats, unsynchronised."""

    def __init__(self, model: LanguageModel, stream: Tensor, length: int, settings: Settings) -> None:
        self.model, self.stream, self.settings = model, stream, settings
        device = stream.device
        self.starts = torch.zeros(settings.batch, dtype=torch.long, device=device)
        self.rate, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.places = torch.arange(length + 1, device=device)
        self.forward: Callable[[Tensor], Tensor] = model.loss
        self.optimizer = adamw(model, self.rate, settings.weight_decay)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.not_captured: str | None = None  # why there is no graph

    def __call__(self, starts: Tensor, rate: Tensor) -> None:
        self.starts.copy_(starts)
        self.rate.copy_(rate)
        if self.graph:
            self.graph.replay()
        else:
            self._once()

    def _once(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        ids = self.stream[self.starts[:, None] + self.places].long()  # [B, T + 1]
        with autocast(self.stream.device):
            loss = self.forward(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def load(self, stored: dict) -> None:
        """The optimiser's state, before `capture`."""
        self.optimizer.load_state_dict(stored)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def capture(self) -> None:
        """From now on a step is one replay. A model that cannot be captured goes on as it was, and says why."""
        kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        states = {key: value.clone() for key, value in self._states()}
        self.rate.zero_()
        try:
            self.graph = self._captured()
        except RuntimeError as error:
            self.not_captured = str(error).strip().partition("\n")[0][:120]
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), kept, strict=True):
                parameter.copy_(value)
            for key, value in self._states():
                value.copy_(states[key]) if key in states else value.zero_()

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_STEPS):
                self._once()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._once()
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def _states(self) -> list[tuple[tuple[int, str], Tensor]]:
        """The optimiser's tensors, in place."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return [
            ((number, name), value)
            for number, parameter in enumerate(parameters)
            for name, value in self.optimizer.state.get(parameter, {}).items()
        ]


def adamw(model: nn.Module, rate: Tensor | float, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay for what has more than one axis."""
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=_BETAS, fused=True, capturable=parameters[0].is_cuda)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, nothing on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
