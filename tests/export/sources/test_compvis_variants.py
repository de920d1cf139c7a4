"""Models that the original's classes build beside the published zoo, and files that hold a tensor once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

from latentedge.runtime.bundle import Layout  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError  # noqa: E402
from tests.export.sources import compvis_models  # noqa: E402
from tests.export.sources.test_compvis import Written, components  # noqa: E402


def test_classes_that_the_unet_embeds(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["class-in-unet"])
    model = written.load()
    assert (model.conditioning.classes, model.conditioning.null_class) == (11, 10)
    assert set(components(model)) == {"unet", "vae_encoder", "vae_decoder"}
    assert [spec.name for spec in components(model)["unet"].spec.inputs] == ["sample", "timestep", "class_labels"]
    written.model["params"]["conditioning_key"] = "crossattn"
    with pytest.raises(LatentEdgeError, match="has a label embedding, and conditioning_key is crossattn"):
        written.load()


@pytest.mark.parametrize("left_out", ["first_stage_model.", "cond_stage_model."])
def test_a_first_stage_that_is_stored_once(left_out: str, tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["inpainting"])
    written.state = {name: value for name, value in written.state.items() if not name.startswith(left_out)}
    encoder = components(written.load())["vae_encoder"].build()
    expected = written.networks["first_stage_config"].encoder.conv_in.weight
    assert torch.equal(encoder.encoder.conv_in.weight, expected)
    written.state["cond_stage_model.surprise"] = torch.ones(1)
    with pytest.raises(LatentEdgeError, match="surprise"):
        written.load()


def test_a_codebook_that_the_original_does_not_use(tmp_path: Path) -> None:
    model = copy.deepcopy(compvis_models.DIFFUSION["unconditional-vq"])
    model["params"]["first_stage_config"]["target"] = "ldm.models.autoencoder.VQModel"
    written = Written(tmp_path, model)
    read = written.load()
    assert any("decoded unquantised" in message for message in read.messages)
    first_stage = written.networks["first_stage_config"]
    latent = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        found = components(read)["vae_decoder"].build()(latent)
        assert torch.equal(found, first_stage.decoder(first_stage.post_quant_conv(latent)))
        assert not torch.allclose(found, first_stage.decode(first_stage.quantize.nearest(latent)[0]), atol=1e-2)


def test_layout_by_its_own_class(tmp_path: Path) -> None:
    model = copy.deepcopy(compvis_models.DIFFUSION["layout"])
    model["target"] = "ldm.models.diffusion.ddpm.Layout2ImgDiffusion"
    assert Written(tmp_path, model).load().conditioning.layout == Layout(92, 30, 8192, 8191, crop=True)
