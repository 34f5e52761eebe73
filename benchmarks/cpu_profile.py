"""Where the time of a training step goes on a CPU: cores in use, page faults, kernels by time.

    python benchmarks/cpu_profile.py [--backend jax] [--size 7m] [--peer grug] [--steps 8]

Trains a row of `fit.py` (ours by default): once as it comes, once with `keep_memory()`, each in a
process of its own, and then once more under the profiler of the backend. A kernel's time is the
sum over the threads that run it. The profiler slows small kernels down: read shares, not times.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import click

KERNELS = 12
# Events that hold others or wait for them.
WAITS = r"Execut|Await|Block|^Start|^end|Process|Run|_step|while|call"


@click.command()
@click.option("--backend", type=click.Choice(["jax", "tensorflow", "torch"]), default="jax")
@click.option("--size", default="7m")
@click.option("--peer", default="grug")
@click.option("--steps", default=8)
@click.option("--worker", type=click.Choice(["plain", "kept", "profiled"]))
def main(worker, **options):
    if worker:
        print(json.dumps(work(worker, **options)), flush=True)
        return
    print(" ".join(str(value) for value in options.values()))
    for kind in ("plain", "kept", "profiled"):
        found = call(kind, **options)
        if kind != "profiled":
            print(f"{kind:<6} {found['ms']:7.1f} ms a step, {found['cores']:.2f} cores, "
                  f"{found['faults']:,.0f} page faults a step")  # fmt: skip
            continue
        total = sum(found.values())
        for name, ms in list(found.items())[:KERNELS]:
            print(f"{ms:9.1f} ms  {ms / total:4.0%}  {name}")


def call(kind, backend, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, __file__, "--worker", kind, "--backend", backend, *words],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def work(kind, backend, size, peer, steps):
    """Trains in this process; returns the figures of a step, or milliseconds by kernel."""
    import resource

    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import fit
    import numpy as np
    import peers

    if kind != "plain":
        import grug_keras

        grug_keras.keep_memory()
    xla = backend == "tensorflow" and peer == "grug" and fit.SHAPES[size][1] <= 256
    options = {"jit_compile": True} if xla else {}
    train, _ = getattr(peers, peer)(*fit.SHAPES[size], fit.RATE, fit.DECAY, **options)
    rng = np.random.default_rng(0)
    for _ in range(2):  # compile; fill caches
        train(*fit.random_batches(size, rng, 2))
    batches = fit.random_batches(size, rng, steps)
    if kind == "profiled":
        kernels = {"jax": of_jax, "tensorflow": of_tensorflow, "torch": of_torch}[backend]
        found = kernels(lambda: train(*batches))
        found = {name: ms / steps for name, ms in found.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    train(*batches)
    took, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = (after.ru_minflt - before.ru_minflt) / steps
    return {"ms": 1e3 * took / steps, "cores": busy / took, "faults": faults}


def of_jax(run):
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return in_trace(folder)


def of_tensorflow(run):
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            run()
        return in_trace(folder)


def in_trace(folder):
    """Milliseconds by kernel in the trace of XLA or TensorFlow, without what only waits."""
    import jax

    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    found = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            if not line.name.startswith(("tf_XLA", "tf_", "tf-")):
                continue
            for event in line.events:
                name = re.sub(r"[.\d]+$", "", event.name.rpartition(":")[2] or event.name)
                if not re.search(WAITS, name):
                    found[name] += event.duration_ns / 1e6
    return found


def of_torch(run):
    import torch

    with torch.profiler.profile() as profiler:
        run()
    return {e.key: e.self_cpu_time_total / 1e3 for e in profiler.key_averages()}


if __name__ == "__main__":
    main()
