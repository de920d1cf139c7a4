"""A backend's settings in its name: read in one place, an error where the backend does not have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentedge.runtime import pipeline as pipeline_module
from latentedge.runtime.engines import BACKENDS, EngineOptions
from latentedge.runtime.engines.settings import VALUES, listed_backends, parse_backend
from latentedge.runtime.errors import UsageError
from latentedge.runtime.generate_command import generate
from latentedge.runtime.pipeline import Pipeline


@pytest.mark.parametrize(
    ("text", "name", "changes"),
    [
        ("tensorrt", "tensorrt", {}),
        ("auto", "auto", {}),
        ("tensorrt:cuda_graph=on", "tensorrt", {"cuda_graph": True}),
        ("tensorrt:cuda_graph=off,device=1", "tensorrt", {"cuda_graph": False, "device": "gpu:1"}),
        ("tensorrt-rtx: device = cuda:2 ", "tensorrt-rtx", {"device": "cuda:2"}),
        ("onnxruntime:device=cuda,cuda_graph=on", "onnxruntime", {"device": "cuda", "cuda_graph": True}),
        ("onnxruntime:threads=3", "onnxruntime", {"threads": 3}),
        ("openvino:device=gpu", "openvino", {"device": "gpu"}),
    ],
)
def test_settings_become_options_and_leave_the_others(text: str, name: str, changes: dict[str, Any]) -> None:
    given = EngineOptions(low_memory=True, cache_interval=2, cuda_graph=True)
    found, options = parse_backend(text, given)
    assert found == name
    assert vars(options) == {**vars(given), **changes}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensorrt:speed=11", r"'tensorrt' has no setting 'speed=11'; it has: device=.*, cuda_graph=on or off"),
        ("tensorrt:cuda_graph", "has no setting 'cuda_graph'"),
        ("tensorrt:", "has no setting ''"),
        ("tensorrt:device=1,", "has no setting ''"),
        ("tensorrt:threads=2", "has no setting 'threads=2'"),
        ("openvino:cuda_graph=on", "'openvino' has no setting"),
        ("tensorrrt:device=1", "there is no backend 'tensorrrt'"),
        ("auto:device=1", "'auto' has no setting 'device=1'; it has none"),
        ("tensorrt:cuda_graph=yes", "the setting cuda_graph is on or off, found 'yes'"),
        ("tensorrt:device=-1", "the setting device is 1 or gpu:1 or cpu, found '-1'"),
        ("tensorrt:device=gpu:", "the setting device"),
        ("onnxruntime:threads=0", "the setting threads is 1 or more, found '0'"),
        ("onnxruntime:threads=two", "the setting threads"),
    ],
)
def test_what_a_backend_does_not_have_or_cannot_be_read_is_an_error(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_backend(text, EngineOptions())


def test_every_setting_of_a_backend_is_an_option_and_can_be_read() -> None:
    for backend in BACKENDS.values():
        assert set(backend.settings) <= set(VALUES) & set(vars(EngineOptions()))


def test_a_setting_belongs_to_the_backend_before_it() -> None:
    assert listed_backends("all") == ["all"]
    assert listed_backends("onnxruntime,tensorrt:device=1, cuda_graph=on , tensorrt:cuda_graph=off,openvino") == [
        "onnxruntime",
        "tensorrt:device=1, cuda_graph=on",
        "tensorrt:cuda_graph=off",
        "openvino",
    ]


def test_they_reach_the_pipelines_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    class Opened(Exception):  # noqa: N818 - ends the command
        """The bundle was opened."""

    def choose(bundle: object, backend: str, precision: str, *, measured_here: bool) -> None:
        asked.append((backend, measured_here))
        raise Opened

    monkeypatch.setattr(pipeline_module.Bundle, "open", classmethod(lambda cls, path: None))
    monkeypatch.setattr(pipeline_module.selection, "choose", choose)
    for backend in ("tensorrt:cuda_graph=on", "onnxruntime:device=cuda"):
        with pytest.raises(Opened):
            Pipeline.open(tmp_path, backend)
        arguments = [str(tmp_path), "prompt", "-o", "x.png", "--backend", backend]
        assert isinstance(CliRunner().invoke(generate, arguments).exception, Opened)
    # What was measured on the default device says nothing about another.
    assert asked == [("tensorrt", True)] * 2 + [("onnxruntime", False)] * 2
