"""Runs independent pieces of calibration here, or on a Ray cluster; the results are the same in either case.

A piece is a pure function of its settings and its index: a sample of the trajectory, or a block's error alone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from latentedge.runtime.errors import EngineError, LatentEdgeError, MissingDependencyError

Settings = TypeVar("Settings")
Result = TypeVar("Result")

#: The address that starts a cluster of this machine's cores.
LOCAL = "local"
CONNECT_SECONDS = 10.0


class Mapper(Protocol):
    """Runs ``function(settings, index)`` for several indexes and gives (index, result) as they are done."""

    def __call__(
        self, function: Callable[[Settings, int], Result], settings: Settings, indexes: list[int]
    ) -> Iterator[tuple[int, Result]]:
        """``settings`` and results must be picklable; the order of the results is not that of the indexes."""


def one_by_one(
    function: Callable[[Settings, int], Result], settings: Settings, indexes: list[int]
) -> Iterator[tuple[int, Result]]:
    """Every piece in this process."""
    for index in indexes:
        yield index, function(settings, index)


def mapper_of(address: str | None) -> Mapper:
    """Here, or by the Ray cluster at ``address`` ("local" starts one on this machine)."""
    return one_by_one if address is None else on_ray(address)


def on_ray(address: str) -> Mapper:
    """The Ray cluster at ``address`` ("local" starts one here); every node reads the bundle at its path."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--ray needs the Python package ray, which is not installed.", hint="pip install 'latentedge[ray]'"
        ) from error

    def run(
        function: Callable[[Settings, int], Result], settings: Settings, indexes: list[int]
    ) -> Iterator[tuple[int, Result]]:
        if not indexes:
            return
        _connect(ray, address)
        try:
            remote: Any = ray.remote(function)
            running = {remote.remote(settings, index): index for index in indexes}
            while running:
                done, _ = ray.wait(list(running))
                for reference in done:
                    yield running.pop(reference), _result(ray, reference)
        finally:
            ray.shutdown()

    return run


def _connect(ray: Any, address: str) -> None:
    """Connect, or start a cluster of this machine's cores; :class:`EngineError` where nothing answers at the address."""
    try:
        if ":" in address:
            # Ray itself waits for many minutes.
            host, port = address.rpartition("//")[2].rsplit(":", 1)
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        dashboard = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **dashboard)
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"there is no Ray cluster at {address!r}: {error}",
            hint="start one with `ray start --head`, or pass --ray local",
        ) from error


def _result(ray: Any, reference: Any) -> Any:
    """A piece's result; an error of this project as it was raised on the node."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LatentEdgeError):
            raise error.cause from error
        raise
