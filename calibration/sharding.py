"""Takes calibration samples in several processes, or on a Ray cluster; the statistics are the same in either case."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from latentedge.calibration.capture import CaptureSettings, Mapper, one_by_one, take_sample
from latentedge.runtime.errors import MissingDependencyError


def mapper_of(workers: int, address: str | None) -> Mapper:
    """How samples are taken: here, in ``workers`` processes, or by the Ray cluster at ``address``."""
    if address is not None:
        return on_ray(address)
    return one_by_one if workers == 1 else in_processes(workers)


def in_processes(workers: int) -> Mapper:
    """Samples in ``workers`` fresh processes: engine libraries do not survive a fork."""

    def run(settings: CaptureSettings, indexes: list[int]) -> Iterator[tuple[int, bytes]]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(indexes) or 1), mp_context=context) as pool:
            futures = {pool.submit(take_sample, settings, index): index for index in indexes}
            for future in as_completed(futures):
                yield futures[future], future.result()

    return run


def on_ray(address: str) -> Mapper:
    """Samples on the Ray cluster at ``address`` ("local" starts one here); every node reads the bundle at its path."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--ray needs the Python package ray, which is not installed.", hint="pip install 'latentedge[ray]'"
        ) from error

    def run(settings: CaptureSettings, indexes: list[int]) -> Iterator[tuple[int, bytes]]:
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False)
        try:
            remote = ray.remote(take_sample)
            running = {remote.remote(settings, index): index for index in indexes}
            while running:
                done, _ = ray.wait(list(running))
                for reference in done:
                    yield running.pop(reference), ray.get(reference)
        finally:
            ray.shutdown()

    return run
