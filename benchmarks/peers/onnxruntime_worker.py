"""ONNX Runtime as it comes: the bundle's fp32 denoiser in a default session, numpy in, numpy out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import serve, timed


class OnnxRuntimeWorker:
    """Runs the denoiser only: ONNX Runtime has no pipeline of its own."""

    def load(self, bundle: str, threads: int, side: int, **_: Any) -> dict[str, Any]:
        """Open the session and run it once."""
        start = time.perf_counter()
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(Path(bundle) / "unet" / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        shapes = {entry.name: entry.shape for entry in self._session.get_inputs()}
        width = shapes["encoder_hidden_states"][2]
        generator = np.random.default_rng(0)
        self._inputs = {
            "sample": generator.standard_normal((2, shapes["sample"][1], side, side)).astype(np.float32),
            "timestep": np.full(2, 500, np.float32),
            "encoder_hidden_states": generator.standard_normal((2, 77, width)).astype(np.float32),
        }
        self._session.run(None, self._inputs)
        return {"first_picture_seconds": time.perf_counter() - start}

    def step(self, runs: int) -> dict[str, Any]:
        """Seconds of guided denoiser steps: two samples at once."""
        return dict(timed(lambda: self._session.run(None, self._inputs), runs))


if __name__ == "__main__":
    serve(OnnxRuntimeWorker())
