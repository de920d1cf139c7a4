"""Running a graph on the host, with ONNX Runtime's CPU provider: what every export is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import cast

from latentedge.export.errors import ExportError
from latentedge.runtime.bundle import Array


class HostSession:
    """A graph loaded by ONNX Runtime on the CPU. Use as a context manager: the weights are freed at its end."""

    def __init__(self, graph: Path | bytes) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # One arena for each picture size would stay allocated; the exporter runs every size once.
        options.enable_cpu_mem_arena = False
        try:
            self._session = onnxruntime.InferenceSession(
                graph if isinstance(graph, bytes) else str(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            where = "the graph" if isinstance(graph, bytes) else graph.name
            raise ExportError(f"ONNX Runtime does not load {where}: {error}") from error
        self.output_names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name; :class:`ExportError` when the graph fails on these inputs."""
        try:
            arrays = self._session.run(None, dict(inputs))
        except Exception as error:
            shapes = {name: list(array.shape) for name, array in inputs.items()}
            raise ExportError(f"ONNX Runtime fails on inputs of shape {shapes}: {error}") from error
        return dict(zip(self.output_names, cast("list[Array]", arrays), strict=True))

    def __enter__(self) -> HostSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session
