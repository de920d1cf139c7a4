"""A process that runs one bundle with one backend and precision, told what to do over stdin, one JSON line at a time.

Every measured setting has a process of its own, so that load time, first picture and peak memory are its own, and the
caller can let several take turns. Standard output carries one JSON answer for each line; see :class:`Worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array, Component, Manifest
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.errors import LatentEdgeError
from latentedge.runtime.pipeline import Pipeline

PROMPT = "a photograph of a red apple on a wooden table"


class Worker:
    """Answers ``load``, ``picture``, ``save_picture``, ``sigmas``, ``component``, ``memory`` and ``close``.

    Settings come with ``load``.
    """

    def __init__(self) -> None:
        self._pipe: Pipeline | None = None
        self._request: dict[str, Any] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message: a dict of plain JSON data."""
        name = message.pop("do")
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "picture": self.picture,
            "component": self.component,
            "memory": self.memory,
            "save_picture": self.save_picture,
            "sigmas": self.sigmas,
        }
        return actions[name](**message)

    def load(
        self,
        bundle: str,
        backend: str,
        precision: str,
        request: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        only: dict[str, dict[str, int]] | None = None,
    ) -> dict[str, Any]:
        """Open the bundle and draw the first picture, which opens every engine.

        With ``only``, axis lengths by component, these components are opened and no picture is drawn.
        """
        start = time.perf_counter()
        self._pipe = Pipeline.open(bundle, backend, precision, options=EngineOptions(**(options or {})))
        self._request = {**default_request(self._pipe.bundle), **(request or {})}
        opened = time.perf_counter() - start
        pipe = self._pipe
        for name, axes in (only or {}).items():
            pipe.engine(name).bind(**axes)
        if only is None:
            self._draw(pipe)
        return {
            "backend": pipe.backend,
            "precision": pipe.precision,
            "open_seconds": opened,
            "first_picture_seconds": time.perf_counter() - start,
            "components": {
                name: {"axes": engine.axes, "precision": engine.precision} for name, engine in pipe._engines.items()
            },
        }

    def picture(self) -> dict[str, Any]:
        """Draw a picture; seconds in all, by stage, by step, and inside of engines."""
        pipe = self._loaded()
        with engine_clock() as clock:
            start, cpu = time.perf_counter(), time.process_time()
            result = self._draw(pipe)
            seconds = time.perf_counter() - start
        stages = {name: value for name, value in result.timings.items() if isinstance(value, float)}
        return {
            "seconds": seconds,
            "processor_seconds": time.process_time() - cpu,
            "engine_seconds": clock["seconds"],
            "stages": stages,
            "steps": list(result.timings["steps"]),
        }

    def save_picture(self, path: str, seed: int | None = None) -> dict[str, Any]:
        """Draw a picture, with another seed where one is given, and save its array, float32 [N, H, W, 3], to ``path``."""
        np.save(path, self._draw(self._loaded(), seed).array)
        return {"path": path}

    def sigmas(self) -> dict[str, Any]:
        """The sigma of each evaluation of a picture, in order; none where the bundle does not sample."""
        pipe = self._loaded()
        if not pipe.bundle.schedule:
            return {"sigmas": []}
        request = dict(self._request)
        prompt = request.pop("prompt", None)
        return {"sigmas": [float(step.sigma) for step in pipe.steps(prompt, **_arrays(request))]}

    def component(self, name: str, runs: int) -> dict[str, Any]:
        """Seconds of ``runs`` runs of one component on the shapes of the last picture, inputs written anew each time."""
        engine = self._loaded().engine(name)
        generator = np.random.default_rng(0)
        inputs = {
            spec.name: example(engine.component, spec.name, engine.axes, generator) for spec in engine.component.inputs
        }
        engine.writer = None
        engine.run(inputs)
        each_step = {"sample", "timestep"} if "timestep" in inputs else set(inputs)
        seconds, processor_seconds = [], []
        for index in range(runs):
            start, processor = time.perf_counter(), time.process_time()
            for written in each_step:
                array = inputs[written] - np.float32(index) if written == "timestep" else inputs[written]
                engine.write(written, array)
            engine.run()
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - processor)
        return {"seconds": seconds, "processor_seconds": processor_seconds}

    def memory(self) -> dict[str, Any]:
        """Resident memory of this process now and at its peak, in bytes; anonymous is what no file backs."""
        return process_memory()

    def close(self) -> None:
        """Free the engines."""
        if self._pipe is not None:
            self._pipe.close()

    def _draw(self, pipe: Pipeline, seed: int | None = None) -> Any:
        request = {**self._request, **({} if seed is None else {"seed": seed})}
        prompt = request.pop("prompt", None)
        return pipe.generate(prompt, **_arrays(request))

    def _loaded(self) -> Pipeline:
        if self._pipe is None:
            raise LatentEdgeError("the worker was asked to measure before it was told to load.")
        return self._pipe


def default_request(manifest: Manifest) -> dict[str, Any]:
    """Arguments of ``generate`` that fit any bundle: its own defaults, and random conditioning where it needs some."""
    request: dict[str, Any] = {"seed": 0}
    conditioning = manifest.conditioning
    if conditioning.cross_attention == "text" and all(encoder.tokenizer for encoder in conditioning.encoders):
        request["prompt"] = PROMPT
    elif conditioning.cross_attention == "class":
        request["class_label"] = 0
    elif conditioning.cross_attention != "none":
        spec = manifest.components["unet"].input("encoder_hidden_states")
        shape = (1, *(side if isinstance(side, int) else 77 for side in spec.shape[1:]))
        request["encoder_hidden_states"] = request["negative_encoder_hidden_states"] = {"random": shape}
    side = (manifest.defaults.height, manifest.defaults.width)
    sources = {entry.source for entry in conditioning.concat}
    if sources & {"masked_image_latent", "image_latent", "mask"} or manifest.task == "reconstruction":
        request["image"] = {"random": (1, *side, 3)}
    if "mask" in sources or "masked_image_latent" in sources:
        request["mask"] = {"half": (1, *side)}
    if "low_resolution_image" in sources:
        factor = conditioning.upscale or 4
        request["image"] = {"random": (1, side[0] // factor, side[1] // factor, 3)}
    if "segmentation" in sources:
        request["semantic_map"] = {"zeros": (1, *side)}
    return request


def _arrays(request: dict[str, Any]) -> dict[str, Any]:
    """The request with its arrays drawn, the same ones every time."""
    return {name: _array(value) if isinstance(value, dict) else value for name, value in request.items()}


def _array(recipe: dict[str, Any]) -> Array:
    (kind, shape), *_ = recipe.items()
    if kind == "random":
        return np.random.default_rng(0).uniform(0, 1, tuple(shape)).astype(np.float32)
    if kind == "zeros":
        return np.zeros(tuple(shape), np.int64)
    array = np.zeros(tuple(shape), np.float32)
    array[:, : shape[1] // 2] = 1
    return array


def example(component: Component, name: str, axes: dict[str, int], generator: np.random.Generator) -> Array:
    """An input to time a component with: N(0, 1), a timestep in the middle, ids 0."""
    spec = component.input(name)
    shape, dtype = spec.resolve(axes), np.dtype(spec.dtype)
    if name == "timestep":
        return np.full(shape, 500, dtype)
    return generator.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)


@contextlib.contextmanager
def engine_clock() -> Iterator[dict[str, float]]:
    """Seconds spent in ``Engine.run`` while the context is open; an engine made of engines counts once."""
    clock, depth, plain = {"seconds": 0.0}, [0], Engine.run

    def timed(engine: Engine, inputs: Any = None) -> Any:
        if depth[0]:
            return plain(engine, inputs)
        depth[0] += 1
        start = time.perf_counter()
        try:
            return plain(engine, inputs)
        finally:
            clock["seconds"] += time.perf_counter() - start
            depth[0] -= 1

    Engine.run = timed  # type: ignore[method-assign, assignment]
    try:
        yield clock
    finally:
        Engine.run = plain  # type: ignore[method-assign]


def process_memory() -> dict[str, int]:
    """``VmRSS``, ``VmHWM`` (peak) and ``RssAnon`` of this process in bytes, from /proc; empty where there is none."""
    status = Path("/proc/self/status")
    names = {"VmRSS": "rss", "VmHWM": "peak_rss", "RssAnon": "anonymous"}
    if not status.is_file():
        return {}
    lines = (line.split() for line in status.read_text().splitlines())
    return {names[key]: int(words[1]) * 1024 for words in lines if (key := words[0].rstrip(":")) in names}


def main() -> None:
    """Answer every line of stdin on what stdout was; anything that libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except LatentEdgeError as error:
            answer = {"error": error.message}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.close()


if __name__ == "__main__":
    main()
