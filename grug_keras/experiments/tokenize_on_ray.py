"""Tokenizes a corpus on the nodes of a Ray cluster."""

import contextlib
import os

from grug_keras.data import tokenize
from grug_keras.experiments.on_ray import RayExecutor

_RETRIES = 3


def tokenize_on_ray(address, workers, data, out, options):
    """Tokenizes a corpus on a Ray cluster, with the same bytes as one machine.

    A worker whose node dies is begun again elsewhere, and goes on from the blocks that are there.

    Args:
        address: str, see `RayExecutor`.
        workers: int or None, how many share the work; None is one a node.
        data: str, see `tokenize`.
        out: `pathlib.Path` of a folder on a file system that all nodes see.
        options: dict, further arguments of `tokenize`.

    Returns:
        dict, the content of `dataset.json`.

    Raises:
        ValueError: as `tokenize`, or if there is no cluster, or the nodes do not see `out`.
    """
    executor = RayExecutor(address, small=False)
    ray, alive = executor.ray, [node for node in executor.ray.nodes() if node["Alive"]]
    cpus = [node["Resources"]["CPU"] for node in alive if node["Resources"].get("CPU")]
    workers = workers or len(cpus) or 1
    spread = {"num_cpus": min(cpus, default=1), "scheduling_strategy": "SPREAD"}
    remote = ray.remote(**spread, max_retries=_RETRIES)(_work)
    given = (os.getcwd(), data, out.absolute(), options)
    tasks = [remote.remote(*given, (i, workers)) for i in range(1, workers + 1)]
    try:
        waiting = tasks
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            _check(ray, done)
    except BaseException:
        for task in tasks:
            ray.cancel(task, force=True)
        raise
    if not (out / "dataset.json").exists():
        raise ValueError(
            f"out={str(out)!r} must be on a file system that all nodes see; or copy what they have "
            f"in {out / 'parts'} together, and give the command with --shard 1/{workers}"
        )
    return tokenize(data, out=out, **options)


def _check(ray, done):
    """Raises ValueError, one line, if a task has failed."""
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from None
        raise ValueError(f"Ray: {str(error).strip().splitlines()[-1]}") from error


def _work(folder, data, out, options, shard):
    """Runs on a node; a relative `data` is relative to `folder`."""
    there = contextlib.chdir(folder) if os.path.isdir(folder) else contextlib.nullcontext()
    with there:
        tokenize(data, out=out, shard=shard, **options)
