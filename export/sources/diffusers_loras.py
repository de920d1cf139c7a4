"""LoRA files of diffusers, peft and kohya's trainer, merged into a component before it is exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentedge.export.sources.diffusers_loading import (
    READING_ERRORS,
    Part,
    first_sentence,
    library,
    library_class,
    load,
    quiet,
)
from latentedge.runtime.errors import LatentEdgeError


@dataclass(frozen=True)
class Lora:
    """A LoRA file, the scale to merge it with, and how diffusers' pipelines read such a file."""

    path: Path
    scale: float
    pipeline: str
    unet_config: Mapping[str, Any]

    def tensors(self) -> tuple[dict[str, Any], dict[str, float] | None, Any]:
        """Tensors by diffusers' names, alphas, and metadata; :class:`LatentEdgeError` when the file is no LoRA."""
        if not self.path.is_file():
            raise LatentEdgeError(f"there is no LoRA file {self.path}.", hint="`--lora FILE:WEIGHT` takes a local file")
        pipeline = library_class(self.pipeline)
        try:
            with quiet():
                state, alphas, metadata = pipeline.lora_state_dict(
                    str(self.path), unet_config=_Fields(self.unet_config), return_lora_metadata=True
                )
        except READING_ERRORS as error:
            raise LatentEdgeError(f"{self.path} is no LoRA that diffusers reads: {first_sentence(error)}.") from error
        return state, alphas, metadata


class _Fields(dict[str, Any]):
    """A configuration whose fields are attributes, as diffusers' readers expect it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def lora_targets(lora: Lora, components: Sequence[str]) -> tuple[str, ...]:
    """Which of ``components`` a LoRA changes; :class:`LatentEdgeError` when it changes none."""
    state, _, _ = lora.tensors()
    targets = tuple(name for name in components if any(key.startswith(f"{name}.") for key in state))
    if not targets:
        raise LatentEdgeError(
            f"{lora.path} changes none of {', '.join(components)}; its keys start with {next(iter(state), 'nothing')}.",
            hint="a LoRA belongs to one family of models: Stable Diffusion 1, 2 or XL",
        )
    return targets


def mixed_alphas(lora: Lora) -> str | None:
    """A message where layers have alphas that diffusers does not apply.

    It gives the commonest alpha of a UNet to all of its attention layers, that of a text encoder to all of its layers.
    """
    _, alphas, _ = lora.tensors()
    parts: dict[str, dict[str, float]] = {}
    for key, alpha in (alphas or {}).items():
        parts.setdefault(key.partition(".")[0], {})[key] = float(alpha)
    others = 0
    for part, found in parts.items():
        ((commonest, _),) = Counter(found.values()).most_common(1)
        others += sum(
            alpha != commonest
            for key, alpha in found.items()
            if part.startswith("text_encoder") or ".processor." in key
        )
    if not others:
        return None
    return (
        f"{lora.path.name}: {others} layers have another alpha than most; as in diffusers, they are merged with the "
        "commonest one"
    )


def merge(model: Any, name: str, loras: Iterable[Lora]) -> None:
    """Merge every LoRA that has keys for the component ``name`` into its weights, for good."""
    for number, lora in enumerate(loras):
        state, alphas, metadata = lora.tensors()
        if not any(key.startswith(f"{name}.") for key in state):
            continue
        library("peft")
        pipeline = library_class(lora.pipeline)
        adapter = f"lora{number}"
        options = {"network_alphas": alphas, "adapter_name": adapter, "metadata": metadata}
        try:
            with quiet():
                if name == "unet":
                    pipeline.load_lora_into_unet(state, unet=model, **options)
                else:
                    _load_into_text_encoder(model, name, state, **options)
        except READING_ERRORS as error:
            raise LatentEdgeError(
                f"{lora.path} does not fit the {name} of this model: {first_sentence(error)}.",
                hint="a LoRA belongs to one family of models: Stable Diffusion 1, 2 or XL",
            ) from error
        _merge_layers(model, lora, adapter)


def _load_into_text_encoder(
    model: Any,
    name: str,
    state: Mapping[str, Any],
    *,
    network_alphas: Mapping[str, float] | None,
    adapter_name: str,
    metadata: Mapping[str, Any] | None,
) -> None:
    """As diffusers' ``load_lora_into_text_encoder``, through peft itself.

    diffusers goes through transformers, whose newest versions ask for a peft that is not there yet.
    """
    peft, utils = library("peft"), library("diffusers.utils")

    def own(entries: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        found = {key.removeprefix(f"{name}."): value for key, value in entries.items() if key.startswith(f"{name}.")}
        # transformers 5 has no text_model inside; files of the time before name it.
        flat = not hasattr(model, "text_model")
        return {key.removeprefix("text_model.") if flat else key: value for key, value in found.items()}

    tensors = utils.convert_state_dict_to_peft(utils.convert_state_dict_to_diffusers(own(state)))
    modules = {module for module, _ in model.named_modules()}
    ranks = {
        key: tensor.shape[1]
        for key, tensor in tensors.items()
        if key.endswith(".lora_B.weight") and key.removesuffix(".lora_B.weight") in modules
    }
    if not ranks:
        raise ValueError(f"none of its layers is in the {name}")
    settings = library("diffusers.utils.peft_utils")
    config = settings._create_lora_config(tensors, own(network_alphas), own(metadata), ranks, is_unet=False)
    peft.inject_adapter_in_model(config, model, adapter_name=adapter_name)
    peft.set_peft_model_state_dict(model, tensors, adapter_name)


def _merge_layers(model: Any, lora: Lora, adapter: str) -> None:
    tuner = library("peft.tuners.tuners_utils").BaseTunerLayer
    layers = [module for module in model.modules() if isinstance(module, tuner)]
    if not layers:
        raise LatentEdgeError(f"{lora.path} changed no layer of the model: its layers' names or sizes do not fit.")
    for layer in layers:
        layer.scale_layer(lora.scale)
        layer.merge(safe_merge=True, adapter_names=[adapter])
    library("diffusers.utils.peft_utils").recurse_remove_peft_layers(model)
    # What the two libraries remember of an adapter would name layers that are gone.
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(attribute, None)


def builder(part: Part, wrap: Callable[[Any], Any], loras: Sequence[Lora] = ()) -> Callable[[], Any]:
    """A function that loads the component, merges LoRA files and wraps it, when it is called."""

    def build() -> Any:
        model = load(part)
        merge(model, part.name, loras)
        return wrap(model).eval()

    return build
