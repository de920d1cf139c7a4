"""Built engines on disk: ``engines/<key>/`` holds the plans and ``key.json``, which says what they were built from.

A plan is loaded only where all of that still holds; otherwise the message names what changed and the command that
builds it anew. ``latentedge build`` writes these folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentedge.runtime.bundle import Axis, Bundle, Component, Variant, contained_path
from latentedge.runtime.errors import BundleError, EngineError, UsageError
from latentedge.runtime.structured import structure

KEY_NAME = "key.json"
#: The order and meaning of the fields below; a plan of another version is built anew.
KEY_VERSION = 1


@dataclass(frozen=True)
class PlanFile:
    """One serialised engine of a chain, in the order in which they run."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class PlanKey:
    """Everything that a plan depends on."""

    backend: str
    library_version: str
    component: str
    precision: str
    #: SHA-256 of the variant's graph and of its weight files.
    weights: dict[str, str]
    axes: dict[str, Axis]
    compute_capabilities: tuple[str, ...]
    #: Operating system and processor: plans do not run on another.
    platform: str
    options: dict[str, Any] = field(default_factory=dict)
    version: int = KEY_VERSION

    def folder_name(self) -> str:
        """Sixteen hex digits that differ when any field differs."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def covers(self, axes: Mapping[str, int]) -> bool:
        """Whether a plan with this key runs with these axis lengths."""
        return all(name in axes and axis.min <= axes[name] <= axis.max for name, axis in self.axes.items())


@dataclass(frozen=True)
class Plan:
    """A built engine: its folder, its key, its files, and when it was built (seconds since 1970)."""

    folder: Path
    key: PlanKey
    files: tuple[PlanFile, ...]
    built: float

    def slack(self) -> int:
        """How many axis lengths the profiles allow for; a plan with less slack is tuned closer to its shapes."""
        return sum(axis.max - axis.min for axis in self.key.axes.values())


@dataclass(frozen=True)
class Target:
    """Where a plan has to run."""

    backend: str
    library_version: str
    compute_capability: str
    platform: str


def this_platform() -> str:
    """Operating system and processor, such as ``"Linux-aarch64"``."""
    return f"{platform.system()}-{platform.machine()}"


def variant_digests(variant: Variant) -> dict[str, str]:
    """SHA-256 by file name, of a variant's graph and weights."""
    return {variant.path: variant.sha256, **variant.external_data}


def engines_folder(bundle: Bundle, cache: Path | None) -> Path:
    """Where the built engines of a bundle lie."""
    return bundle.path / "engines" if cache is None else cache


def read_plans(folder: Path) -> list[Plan]:
    """Every built engine in ``folder``, but none that is being written; :class:`BundleError` names a damaged key file."""
    return [read_plan(path.parent) for path in sorted(folder.glob(f"[!.]*/{KEY_NAME}"))]


def read_plan(folder: Path) -> Plan:
    """The built engine in ``folder``."""
    path = folder / KEY_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = structure(tuple[PlanFile, ...], data["files"], "files")
        plan = Plan(folder, structure(PlanKey, data["key"], "key"), files, float(data["built"]))
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        raise BundleError(f"{path} is damaged: {error}.", hint=f"remove {folder} and build the engine again") from error
    for file in plan.files:
        contained_path(file.path)
    return plan


def usable_plans(
    bundle: Bundle, component: Component, precision: str, target: Target, cache: Path | None
) -> list[Plan]:
    """Plans of a component that run here, newest first; :class:`EngineError` says what keeps the others from it."""
    variant = bundle.variant(component.name, precision)[1]
    folder = engines_folder(bundle, cache)
    plans = [
        plan
        for plan in read_plans(folder)
        if (plan.key.backend, plan.key.component, plan.key.precision) == (target.backend, component.name, precision)
    ]
    faults = {plan.folder.name: differences(plan.key, variant_digests(variant), target) for plan in plans}
    usable = [plan for plan in plans if not faults[plan.folder.name]]
    if not usable:
        reasons = "".join(f"\n  {name}: {'; '.join(found)}" for name, found in faults.items())
        raise EngineError(
            f"{folder} holds no {target.backend} engine for {component.name} in {precision} that runs here"
            + (f":{reasons}" if reasons else "."),
            hint=rebuild_command(bundle, target.backend, precision),
        )
    return sorted(usable, key=lambda plan: -plan.built)


def differences(key: PlanKey, weights: Mapping[str, str], target: Target) -> list[str]:
    """What changed between a plan's build and here, in words; empty when it may be loaded."""
    found = []
    if key.version != KEY_VERSION:
        found.append(f"its key is of version {key.version}, expected {KEY_VERSION}")
    if key.weights != dict(weights):
        found.append("the component's graph or weights changed")
    if not _library_fits(key, target):
        found.append(f"built with {key.backend} {key.library_version}, here is {target.library_version}")
    if target.compute_capability not in key.compute_capabilities:
        built_for = ", ".join(key.compute_capabilities)
        found.append(f"built for compute capability {built_for}, this GPU has {target.compute_capability}")
    if key.platform != target.platform:
        found.append(f"built on {key.platform}, here is {target.platform}")
    return found


def _library_fits(key: PlanKey, target: Target) -> bool:
    if key.options.get("version_compatible"):
        return version_tuple(key.library_version) <= version_tuple(target.library_version)
    return key.library_version == target.library_version


def version_tuple(version: str) -> tuple[int, ...]:
    """``"10.13.3.9"`` as ``(10, 13, 3, 9)``; parts that are no numbers end it."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def choose_plan(plans: Sequence[Plan], axes: Mapping[str, int], command: str) -> Plan:
    """The plan tuned closest to ``axes``; :class:`UsageError` lists the ranges that are there when none covers them."""
    fitting = [plan for plan in plans if plan.key.covers(axes)]
    if not fitting:
        ranges = "; ".join(
            ", ".join(f"{name} {axis.min}..{axis.max}" for name, axis in plan.key.axes.items()) for plan in plans
        )
        component = plans[0].key.component
        asked = ", ".join(f"{name} {length}" for name, length in axes.items())
        raise UsageError(f"{component}: the engine is built for {ranges}; asked for: {asked}.", hint=command)
    return min(fitting, key=Plan.slack)


def rebuild_command(bundle: Bundle, backend: str, precision: str) -> str:
    """The command that builds what is missing; ``--batch`` and ``--size`` widen it."""
    return f"build it on this machine: latentedge build {bundle.path} --backend {backend} --precision {precision}"
