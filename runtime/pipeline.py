"""``Pipeline``: a bundle, its engines, and the loop from noise to pictures. numpy only around the engines."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentedge.runtime import autoencoder, guidance, images, samplers, selection, sizes
from latentedge.runtime.bundle import Array, Bundle, Manifest
from latentedge.runtime.conditioning import (
    AESTHETIC_SCORE,
    NEGATIVE_AESTHETIC_SCORE,
    Conditioner,
    concat_input,
    repeated,
)
from latentedge.runtime.correction import corrected
from latentedge.runtime.denoiser import Branch, Combine, Denoiser
from latentedge.runtime.engines import BACKENDS, Engine, EngineOptions, open_engine
from latentedge.runtime.engines.settings import parse_backend
from latentedge.runtime.errors import UsageError
from latentedge.runtime.noise import Draws, NoiseStream, Recorded
from latentedge.runtime.request import Request
from latentedge.runtime.run import Run, picture_count
from latentedge.runtime.samplers import Plan, Step


@dataclass(frozen=True)
class Result:
    """What ``generate`` gives.

    ``array`` is float32 ``[N, H, W, 3]`` in 0..1, ``images`` the same as 8-bit PIL images, ``latents`` float32
    ``[N, C, h, w]`` in the model's own scale, ``timings`` seconds by stage, and by step under ``"steps"``.
    """

    images: list[Image.Image]
    array: Array
    latents: Array
    timings: dict[str, Any]
    seed: int | None = None


class Pipeline:
    """Draws pictures from a bundle. Engines are opened when they are first needed."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        precision: str,
        options: EngineOptions | None = None,
        engines: Mapping[str, Engine] | None = None,
    ) -> None:
        self.path = bundle.path
        self.backend = backend
        self.precision = precision
        self._bundle = bundle
        self.options = options or EngineOptions()
        self._engines: dict[str, Engine] = dict(engines or {})

    @classmethod
    def open(
        cls, path: str | Path, backend: str = "auto", precision: str = "auto", *, options: EngineOptions | None = None
    ) -> Pipeline:
        """Open the bundle at ``path``.

        ``backend`` and ``precision`` "auto" follow what was measured on this machine (``docs/bundle.md``); anything
        else is what runs, or an error. A backend's settings may follow its name, ``"tensorrt:cuda_graph=on,device=1"``,
        or be in ``options``. :class:`~latentedge.runtime.errors.BundleError` for a damaged bundle.
        """
        bundle = Bundle.open(path)
        backend, options = parse_backend(backend, options or EngineOptions())
        choice = selection.choose(bundle, backend, precision, measured_here=options.device is None)
        warning = selection.below_floor(bundle, choice)
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
        return cls(bundle, choice.backend, choice.precision, options)

    @property
    def bundle(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    def engine(self, component: str) -> Engine:
        """The loaded engine of a component; with ``low_memory`` the others are closed first."""
        if component not in self._engines:
            if self.options.low_memory:
                self.close()
            precision = selection.component_precision(self._bundle.component(component), self.precision, self.backend)
            if BACKENDS[self.backend].reads_graph:
                self._bundle.check_graphs(component, precision)
            self._engines[component] = open_engine(self._bundle, component, self.backend, precision, self.options)
        return self._engines[component]

    def digest(self) -> str:
        """SHA-256 of the bundle's manifest, which covers every file of it."""
        return self._bundle.digest()

    def preview(self, latents: Array) -> list[Image.Image]:
        """Small pictures of latents ``[N, C, h, w]``: by the bundle's linear map, or decoded where it has none."""
        rows = self.bundle.latent.preview
        if rows is None:
            array = self.decode(latents)
        else:
            table = np.asarray(rows, np.float32)
            array = np.einsum("nchw,cr->nhwr", latents, table[:-1]) + table[-1]
        return [Image.fromarray(item) for item in images.to_bytes(array, truncate=False)]

    def close(self) -> None:
        """Free every engine; they are opened again when needed."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: str | Sequence[str] | None = None, **options: Any) -> Result:
        """Draw pictures.

        Pictures are given as path, PIL image, uint8 or float 0..1 array ``[N, H, W, 3]`` (masks ``[N, H, W]``,
        1 = paint here). The arguments:

        - ``prompt``, ``negative_prompt``: text, or a list of it; ``batch_size``: pictures for each prompt.
        - ``class_label``, ``layout``, ``semantic_map``, ``embeddings``: what other models are steered by.
        - ``image``, ``mask``, ``strength``: a picture to start from, complete, enlarge or reconstruct.
        - ``height``, ``width``, ``steps``, ``sampler``, ``schedule`` (scheduler_config names), ``eta``, ``seed`` (a
          number, or one for each picture), ``rng`` ("torch", "cuda", "numpy").
        - ``guidance_scale``, ``guidance_rescale``, ``guidance_interval`` (lowest and highest sigma), ``guidance_every``
          (3: the unconditional branch is computed in every third evaluation, or in those listed, and its difference
          from the conditional one is kept between them),
          ``image_guidance_scale``.
        - ``callback``: called with each :class:`~latentedge.runtime.samplers.Step`; returning True stops.
        - ``tile``: side of the tiles, in latent pixels, that encoder and decoder work in, and the UNet of a
          super-resolution or semantic model; 0: none. Super-resolution of more than the bundle's largest size is tiled.
        - ``latents``, ``noise``, ``prompt_ids``, ``negative_prompt_ids``, ``encoder_hidden_states``,
          ``negative_encoder_hidden_states``, ``text_embeds``, ``negative_text_embeds``: exact replay.

        Raises :class:`~latentedge.runtime.errors.UsageError` for values that do not fit the bundle.
        """
        request = Request.of(prompt, options)
        run = self._prepare(request)
        if self.bundle.task == "reconstruction":
            return self._reconstruct(run)
        steps: list[float] = []
        latents, loop = self._begin(run)
        clock = time.perf_counter()
        for step in loop:
            steps.append(time.perf_counter() - clock)
            latents = step.latents
            if request.callback is not None and request.callback(step) is True:
                break
            clock = time.perf_counter()
        run.timings["steps"] = steps
        return self._finish(run, latents)

    def steps(self, prompt: str | Sequence[str] | None = None, **options: Any) -> Iterator[Step]:
        """The loop of :meth:`generate` as a generator: one ``Step`` for each evaluation of the model."""
        _, loop = self._begin(self._prepare(Request.of(prompt, options)))
        yield from loop

    def decode(self, latents: Array, tile: int | None = None) -> Array:
        """Pictures, float32 ``[N, H, W, 3]`` in 0..1, from latents ``[N, C, h, w]`` in the model's own scale."""
        pictures = autoencoder.decode(self.engine("vae_decoder"), self.bundle.latent, latents, tile)
        return np.clip(pictures, 0, 1)

    def encode(self, image: images.Picture, *, seed: int | None = None, tile: int | None = None) -> Array:
        """Latents, float32 ``[N, C, h, w]`` in the model's own scale; with ``seed`` a sample of the distribution."""
        draws = None if seed is None else NoiseStream("torch", seed)
        pictures = images.pictures_from(image)
        return autoencoder.encode(self.engine("vae_encoder"), self.bundle.latent, pictures, draws, tile=tile)

    def reconstruct(self, image: images.Picture, tile: int | None = None) -> Result:
        """A picture through encoder (the distribution's mode) and decoder."""
        return self._reconstruct(self._prepare(Request(image=image, tile=tile)))

    def _prepare(self, request: Request) -> Run:
        manifest = self.bundle
        request.check(manifest)
        defaults = manifest.defaults
        seed = request.seed if request.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
        pictures, mask = sizes.pictures_of(self._bundle, request)
        pictures, kept = sizes.completed(self._bundle, pictures)
        count = picture_count(request, pictures)
        schedule = dict(request.schedule if request.schedule is not None else manifest.schedule)
        schedule.setdefault("dialect", manifest.schedule.get("dialect", "diffusers"))
        scale = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        sampler = request.sampler or (None if (request.schedule or {}).get("_class_name") else defaults.sampler)
        # The bundle's eta goes with the bundle's sampler; PLMS takes none.
        own = samplers.same(
            sampler or schedule.get("_class_name"), defaults.sampler or manifest.schedule.get("_class_name")
        )
        image_scale = request.image_guidance_scale
        image_scale = defaults.image_guidance_scale if image_scale is None else image_scale
        # With a mask, or with a picture beside its latent, a model starts from noise unless it was made for inpainting.
        plain = mask is None and not manifest.conditioning.concat
        partly = pictures is not None and (plain or manifest.task == "inpainting")
        full = defaults.strength if partly else 1.0
        strength = full if request.strength is None else request.strength
        if manifest.conditioning.guidance_embedding is not None and 0 < strength < 1:
            schedule.setdefault("strength", strength)  # a distilled model's own schedule is cut instead of its steps
        draws = NoiseStream(request.rng, seed) if request.noise is None else Recorded(request.noise)
        rows = count
        if (
            pictures is not None
            and isinstance(draws, NoiseStream)
            and draws.shared
            and schedule["dialect"] != "compvis"
        ):
            rows = max(len(pictures), 1 if mask is None else len(mask))  # as the original, which encodes what is given
        return Run(
            request=request,
            count=count,
            steps=request.steps or defaults.steps,
            sampler=sampler,
            schedule=schedule,
            guidance_scale=float(scale),
            image_guidance_scale=float(image_scale),
            strength=float(strength),
            eta=(defaults.eta if own else 0.0) if request.eta is None else request.eta,
            draws=draws,
            pictures=None if pictures is None else repeated(pictures, rows, "image"),
            mask=None if mask is None else repeated(mask, rows, "mask"),
            tile=sizes.tile_of(self._bundle, request),
            kept=kept,
            timings={"seed": seed},
        )

    def _begin(self, run: Run) -> tuple[Array, Iterator[Step]]:
        """The latents that the loop starts from, and the loop."""
        clock = time.perf_counter()
        height, width = sizes.latent_size(self._bundle, run.request, run.pictures)
        conditioner = Conditioner(self._bundle, self.engine, run.request, run.count)
        pixels = self._pixels(height, width)
        given = run.request.time_ids
        conditional = conditioner.with_sizes(conditioner.conditional(), *pixels, given, AESTHETIC_SCORE)
        unconditional = None
        if self._is_guided(run):
            negative = run.request.negative_time_ids
            unconditional = conditioner.with_sizes(
                conditioner.unconditional(conditional),
                *pixels,
                given if negative is None else negative,
                NEGATIVE_AESTHETIC_SCORE,
            )
        run.timings["condition"] = time.perf_counter() - clock
        clock = time.perf_counter()
        plan = samplers.prepare(run.schedule, run.sampler, run.steps)
        latents, begin, known = self._start(run, plan, height, width)
        concat = self._concat(run, height, width)
        run.timings["encode"] = time.perf_counter() - clock
        denoiser = self._denoiser(run, conditioner, conditional, unconditional, concat)
        model: samplers.Model = denoiser
        first = begin if run.request.start is None else run.request.start.index + 1
        interval, every = run.request.guidance_interval, run.request.guidance_every
        if every != 1 and self.options.caching:
            # Deep blocks are kept for all branches at once.
            raise UsageError("guidance_every does not go with step caching.", hint="leave one of the two out")
        if unconditional is not None and (interval is not None or every != 1):
            model = denoiser.following(guidance.planned(plan, first, interval, every))
        elif self.bundle.task == "super-resolution" and run.schedule["dialect"] != "compvis":
            model = denoiser.scaling_concat(plan, first)
        model = corrected(model, self.bundle, self.precision)
        loop = samplers.follow(model, plan, latents, eta=run.eta, noise=run.draws, begin=begin, start=run.request.start)
        return latents, loop if known is None else self._keep_known(run, plan, loop, *known)

    def _pixels(self, height: int, width: int) -> tuple[int, int]:
        return height * self.bundle.latent.downscale, width * self.bundle.latent.downscale

    def _start(self, run: Run, plan: Plan, height: int, width: int) -> tuple[Array, int, tuple[Array, Array] | None]:
        """Starting latents, the index of the first step, and (picture's latents, noise) where a mask keeps a part."""
        manifest, request = self.bundle, run.request
        shape = (run.count, manifest.latent.channels, height, width)
        takes_picture = bool(manifest.conditioning.concat)
        from_picture = run.pictures is not None and (not takes_picture or run.strength < 1)
        if takes_picture and request.latents is not None:
            from_picture = False
        if not from_picture:
            noise = self._initial_noise(request, shape, run.draws)
            return np.asarray(noise * np.float32(plan.init_noise_sigma), np.float32), 0, None
        assert run.pictures is not None
        encoder = self.engine("vae_encoder")
        encoded = autoencoder.encode(encoder, manifest.latent, run.pictures, run.draws, tile=run.tile)
        encoded = repeated(encoded, run.count, "image")
        noise = self._initial_noise(request, shape, run.draws)
        begin = plan.begin(run.strength)
        known = (encoded, noise) if run.mask is not None and not takes_picture else None
        if known is not None and run.schedule["dialect"] != "compvis" and manifest.latent.encoding == "kl":
            # The original draws for the masked picture too, which only nine channels take.
            run.draws.normal((len(run.pictures), *shape[1:]))
        if known is not None and (run.strength == 1 or request.latents is not None):
            return np.asarray(noise * np.float32(plan.init_noise_sigma), np.float32), begin, known
        return plan.noised_start(encoded, noise, begin), begin, known

    @staticmethod
    def _initial_noise(request: Request, shape: tuple[int, ...], draws: Draws) -> Array:
        if request.latents is None:
            return draws.normal(shape)
        latents = np.asarray(request.latents, np.float32)
        if latents.shape != shape:
            raise UsageError(f"latents: expected {list(shape)}, found {list(latents.shape)}.")
        return latents

    def _concat(self, run: Run, height: int, width: int) -> Array | None:
        entries = self.bundle.conditioning.concat
        if not entries:
            return None
        parts = [
            concat_input(
                entry,
                self._bundle,
                self.engine,
                run.pictures,
                run.mask,
                run.request.semantic_map,
                (height, width),
                run.draws,
            )
            for entry in entries
        ]
        asked = next((part.shape[2:] for part in parts if part.shape[2:] != (height, width)), None)
        if asked is not None:
            raise UsageError(f"latents: this picture or map takes sides {list(asked)}, found {[height, width]}.")
        return np.concatenate([repeated(part, run.count, "image") for part in parts], axis=1)

    def _keeps_picture(self) -> bool:
        """Whether the picture outside of the mask is put back: CompVis's inpaint.py does, inpainting by text does not."""
        return self.bundle.task == "inpainting" and self.bundle.conditioning.cross_attention == "none"

    def _is_guided(self, run: Run) -> bool:
        """Whether an unconditional branch is evaluated: where the original does, and never at a scale of 1."""
        conditioning, scale = self.bundle.conditioning, run.guidance_scale
        if conditioning.guidance_embedding is not None or conditioning.cross_attention == "none":
            return False
        if conditioning.image_guidance:
            return scale > 1 and run.image_guidance_scale >= 1
        return scale != 1 if conditioning.guidance_below_one else scale > 1

    def _denoiser(
        self,
        run: Run,
        conditioner: Conditioner,
        conditional: dict[str, Array],
        unconditional: dict[str, Array] | None,
        concat: Array | None,
    ) -> Denoiser:
        conditioning = self.bundle.conditioning
        if conditioning.guidance_embedding is not None:
            embedding = guidance.guidance_embedding(run.guidance_scale - 1, conditioning.guidance_embedding)
            conditional = {**conditional, "timestep_cond": np.repeat(embedding, run.count, axis=0)}
        branches, index = [conditioner.branch(conditional, concat)], 0
        combine: Combine = guidance.only
        if unconditional is not None and conditioning.image_guidance and concat is not None:
            uncond = conditioner.branch(unconditional, concat)
            branches = [branches[0], uncond, Branch(uncond.inputs, np.zeros_like(concat))]
            combine = guidance.text_and_image(run.guidance_scale, run.image_guidance_scale)
        elif unconditional is not None:
            branches, index = [conditioner.branch(unconditional, concat), branches[0]], 1
            combine = guidance.classifier_free(run.guidance_scale, run.request.guidance_rescale)
        tile = sizes.unet_tile(self._bundle, run.tile, concat, cached=self.options.caching)
        separate = self.options.low_memory
        return Denoiser(self.engine("unet"), branches, combine, conditional=index, separate=separate, tile=tile)

    def _keep_known(self, run: Run, plan: Plan, loop: Any, encoded: Array, noise: Array) -> Iterator[Step]:
        """Put the noised picture back outside of the mask after every step (a model without a mask input)."""
        assert run.mask is not None
        paint = repeated(images.resize_nearest(run.mask, *encoded.shape[2:])[:, None], len(encoded), "mask")
        replaced: Array | None = None
        while True:
            try:
                step = loop.send(replaced)
            except StopIteration:
                return
            kept = plan.add_noise(encoded, noise, step.index + 1) if not step.last else encoded
            replaced = np.asarray(paint * step.latents + (1 - paint) * kept, np.float32)
            yield step.replace(latents=replaced)

    def _reconstruct(self, run: Run) -> Result:
        assert run.pictures is not None
        latents = autoencoder.encode(self.engine("vae_encoder"), self.bundle.latent, run.pictures, tile=run.tile)
        return self._finish(run, latents)

    def _finish(self, run: Run, latents: Array) -> Result:
        clock = time.perf_counter()
        array = self.decode(latents, run.tile)
        if run.kept is not None:
            array = np.ascontiguousarray(array[:, : run.kept[0], : run.kept[1]])
        compvis = self.bundle.schedule.get("dialect") == "compvis"
        if compvis and self._keeps_picture() and run.mask is not None and run.pictures is not None:
            paint = run.mask[..., None]
            # To -1..1 and back in float32, as inpaint.py has it: where 8 bits are truncated, the rounding shows.
            two, one = np.float32(2), np.float32(1)
            kept = (run.pictures * two - one + one) / two
            array = np.asarray((1 - paint) * kept + paint * array, np.float32)
        run.timings["decode"] = time.perf_counter() - clock
        seed = run.timings.pop("seed")
        bytes_ = images.to_bytes(array, truncate=compvis)
        return Result([Image.fromarray(item) for item in bytes_], array, latents, run.timings, seed)
