"""What both stages share: the configuration, the pace, resumable state, the moving average, and the loss curves."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from examples.emoji.captions import HERE
from latentedge.export.models.registry import build_network

CONFIG = HERE / "config.yaml"


def read_config(path: Path = CONFIG) -> dict[str, Any]:
    """The model's parameters of a CompVis YAML."""
    parameters: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
    return parameters


def build(stage: Mapping[str, Any]) -> Any:
    """A network from a ``*_config`` entry, with initial weights."""
    return build_network(stage["target"], stage["params"])


def start_with_references(network: nn.Module, level: float = 1.0) -> None:
    """Give every second channel of the convolutions before a norm a constant ``level`` to start with.

    Group normalisation has 32 groups whatever the width. With 64 channels a group is two channels, whose absolute
    level, the picture's colour, would be normalised away; a constant neighbour keeps it readable.
    """
    for name, module in network.named_modules():
        feeds_norm = isinstance(module, nn.Conv2d) and module.out_channels == 64 and not name.endswith("conv2")
        if feeds_norm and module.bias is not None and bool(module.weight.any()):
            with torch.no_grad():
                module.bias[1::2] += level


@dataclass
class Pace:
    """How far training is, 0 to 1: by wall-clock ``minutes`` (a shared machine's speed varies) or by ``steps``."""

    minutes: float | None = None
    steps: int | None = None
    spent: float = 0.0
    step: int = 0
    _last: float | None = None

    def advance(self) -> None:
        """Count one step and the seconds since the one before."""
        now = time.monotonic()
        if self._last is not None:
            self.spent += now - self._last
        self._last = now
        self.step += 1

    @property
    def progress(self) -> float:
        """Share of the training that is done, at most 1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        if self.minutes is None:
            raise ValueError("a pace needs minutes or steps")
        return min(1.0, self.spent / (60.0 * self.minutes))

    def learning_rate(self, peak: float, warm_up: int = 100, floor: float = 0.01) -> float:
        """Linear warm-up over ``warm_up`` steps, then half a cosine down to ``floor`` of the peak."""
        decayed = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * self.progress))
        return peak * min(1.0, (self.step + 1) / warm_up) * decayed


class MovingAverage:
    """An exponential moving average of weights, warmed up so that the first steps are forgotten soon."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the weights of ``module``."""
        self.count += 1
        decay = min(self.decay, (1.0 + self.count) / (10.0 + self.count))
        for name, value in module.state_dict().items():
            self.weights[name].lerp_(value, 1.0 - decay)

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes."""
        return {"count": self.count, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.count = state["count"]
        self.weights = dict(state["weights"])


@dataclass
class Session:
    """Everything that a resumed run needs to go on as if it had never stopped."""

    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    averages: dict[str, MovingAverage]
    pace: Pace
    random: np.random.Generator
    noise: torch.Generator
    curves: dict[str, list[float]] = field(default_factory=dict)

    def record(self, **values: float) -> None:
        """Append to the loss curves."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)

    def recent(self, name: str, count: int = 50) -> float:
        """Mean of a curve's last values."""
        return float(np.mean(self.curves[name][-count:]))

    def save(self, path: Path) -> None:
        """Write the state aside, then rename: a run that is killed while saving keeps the state before."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "averages": {name: average.state() for name, average in self.averages.items()},
            "pace": {"spent": self.pace.spent, "step": self.pace.step},
            "random": self.random.bit_generator.state,
            "noise": self.noise.get_state(),
            "curves": self.curves,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        torch.save(state, aside)
        os.replace(aside, path)

    def resume(self, path: Path) -> bool:
        """Continue from ``path`` if it exists."""
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for name, average in self.averages.items():
            average.restore(state["averages"][name])
        self.pace.spent, self.pace.step = state["pace"]["spent"], state["pace"]["step"]
        self.random.bit_generator.state = state["random"]
        self.noise.set_state(state["noise"])
        self.curves = state["curves"]
        return True


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The rate for all parameters, times a group's own ``scale`` where it has one."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def load_fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load the tensors whose name and shape fit; returns the names of the network's tensors that stay as they were."""
    own = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def to_network(pictures: np.ndarray) -> Tensor:
    """uint8 [batch, height, width, 3] to float32 [batch, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0


def to_pictures(tensor: Tensor) -> np.ndarray:
    """[batch, 3, height, width] in about [-1, 1] to uint8 [batch, height, width, 3]."""
    levels = (tensor.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return levels.round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def save_grid(rows: list[np.ndarray], path: Path) -> None:
    """Pictures as a PNG: each row is uint8 [columns, height, width, 3]."""
    from PIL import Image

    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def save_curves(curves: Mapping[str, list[float]], path: Path, smoothing: int = 50) -> None:
    """The curves, each a running mean over ``smoothing`` steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), dpi=100)
    for name, values in curves.items():
        window = min(smoothing, max(1, len(values)))
        axis.plot(np.convolve(values, np.ones(window) / window, mode="valid"), label=name)
    axis.set_xlabel("step")
    axis.set_yscale("log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
