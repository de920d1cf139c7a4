"""`latentedge generate`: files that say how they were drawn, replays, seeds, sheets, Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from latentedge.runtime.cli import run
from latentedge.runtime.errors import UsageError
from latentedge.runtime.generate_command import (
    SECTIONS,
    caching_from,
    generate,
    guidance_from,
    preview_from,
    seeds_from,
    size_from,
)
from latentedge.runtime.picture_files import request_of
from latentedge.runtime.pipeline import Pipeline
from tests.runtime import bundles


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command on a null pipeline that needs no prompt, in an empty folder."""
    opened: list[tuple[Any, ...]] = []

    def open_null(path: Path, backend: str, precision: str, *, options: Any) -> Pipeline:
        opened.append((backend, precision))
        manifest = bundles.text_manifest(task="unconditional")
        pipeline = bundles.pipeline(manifest, unet=bundles.unet)
        pipeline.options = options
        monkeypatch.setattr(pipeline, "digest", lambda: "d" * 64)
        original = pipeline.generate
        ids = {"prompt_ids": np.array([[1, 2, 3, 4, 5]]), "negative_prompt_ids": np.array([[5, 4, 3, 2, 1]])}
        monkeypatch.setattr(pipeline, "generate", lambda prompt=None, **rest: original(None, **ids, **rest))
        return pipeline

    monkeypatch.setattr(Pipeline, "open", open_null)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(["generate", "x.bundle", *arguments], debug=True)


def test_a_picture_is_drawn_again_identically(command: Any) -> None:
    assert command("-o", "a.png", "--seed", "7", "--steps", "3", "--sampler", "euler_a") == 0
    assert request_of(Path("a.png"))["sampler"] == "euler_a"
    assert command("--from", "a.png", "-o", "b.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert command("--from", "a.png", "-o", "c.png", "--steps", "4") == 0
    assert np.asarray(Image.open("a.png")).tolist() != np.asarray(Image.open("c.png")).tolist()
    assert command("--from", "a.png", "--seed", "8", "-o", "d.png") == 2


def test_one_picture_for_each_seed(command: Any) -> None:
    assert command("-o", "p.png", "--seed", "3-5", "--sheet", "sheet.png") == 0
    assert sorted(path.name for path in Path().glob("p-*.png")) == ["p-1.png", "p-2.png", "p-3.png"]
    assert [request_of(path)["seed"] for path in sorted(Path().glob("p-*.png"))] == [3, 4, 5]
    assert Image.open("sheet.png").width > 3 * 160


def test_previews_and_ctrl_c(command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def interrupted_unet(inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return FUNCTIONS_UNET(inputs)

    monkeypatch.setattr(bundles, "unet", interrupted_unet)
    code = command("-o", "a.png", "--seed", "1", "--preview", "preview.png:2")
    assert code == 130
    assert "The last preview is preview.png" in capsys.readouterr().err
    assert Image.open("preview.png").size == (32, 32)
    assert not Path("a.png").exists()


FUNCTIONS_UNET = bundles.unet


def test_seeds_and_sizes() -> None:
    assert seeds_from("7") == [7]
    assert seeds_from("1,2, 5-7") == [1, 2, 5, 6, 7]
    assert size_from("768x512") == (512, 768)
    assert size_from("256") == (256, 256)
    for wrong in ("a", "", "1-", "5-3"):
        with pytest.raises(UsageError, match="--seed"):
            seeds_from(wrong)


def test_guidance_may_name_its_settings() -> None:
    assert guidance_from("7.5") == {"guidance_scale": 7.5}
    assert guidance_from("7.5:rescale=0.7, interval=0.3-5") == {
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
        "guidance_interval": [0.3, 5.0],
    }
    assert guidance_from("7.5:every=3") == {"guidance_scale": 7.5, "guidance_every": 3}
    assert guidance_from("7.5:every=0+4+9") == {"guidance_scale": 7.5, "guidance_every": [0, 4, 9]}
    for wrong in ("strong", "7:", "7:rescale", "7:interval=3", "7:scale=2", "7:every=", "7:every=2.5", "7:every=0,2"):
        with pytest.raises(UsageError, match="--guidance-scale takes"):
            guidance_from(wrong)


@pytest.mark.parametrize("option", ["-o", "--sheet", "--preview"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_drawn(
    option: str, command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "unet", lambda inputs: pytest.fail("drawn"))
    for file, message in (("a.jpg", "written as PNG, found a.jpg"), ("absent/a.png", "there is no folder absent")):
        assert command("-o", "fine.png", option, file) == 2
        assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_a_preview_may_name_its_steps() -> None:
    assert preview_from("grow.png") == (Path("grow.png"), 5)
    assert preview_from("a:b/grow.png:12") == (Path("a:b/grow.png"), 12)
    for wrong in ("grow.png:0", "grow.png:", "grow.png:two"):
        with pytest.raises(UsageError, match="--preview takes FILE"):
            preview_from(wrong)


def test_every_option_stands_under_one_heading_of_at_most_ten() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    options = {parameter.name for parameter in generate.params if isinstance(parameter, click.Option)}
    assert sorted(listed) == sorted(options)
    assert max(map(len, SECTIONS.values())) <= 10


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {"cache_interval": 1}),
        ("1", {"cache_interval": 1}),
        ("3", {"cache_interval": 3}),
        (3, {"cache_interval": 3}),
        ("0,2,5", {"cache_full": (0, 2, 5)}),
    ],
)
def test_step_caching_is_an_interval_or_a_list(text: Any, options: dict[str, Any]) -> None:
    assert caching_from(text) == options


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "2,5", "0,5,2", "0,2,2", "0,"])
def test_step_caching_that_cannot_be_read_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--cache-interval takes 3, or steps from 0 on"):
        caching_from(text)
