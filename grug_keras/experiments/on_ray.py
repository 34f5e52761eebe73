"""Trains runs on the workers of a Ray cluster, one core each."""

import contextlib
import io
import pathlib
import tarfile
import tempfile

from grug_keras.data.files import write_atomically
from grug_keras.experiments.child import Children, ended_run, log_file, train
from grug_keras.experiments.executors import LocalExecutor
from grug_keras.experiments.snapshot import Snapshot

_RETRIES = 3


class RayExecutor:
    """Trains on a Ray cluster; a run whose worker dies is continued on another.

    The snapshot travels with the runs: workers have the package installed, and what runs is the
    code of the snapshot.
    Where the pool is on a file system that all nodes share, a run goes on from its checkpoint.

    Args:
        address: str, `"ray"` for the cluster that this machine belongs to (or one of this machine
            alone), else `"ray://host:port"`.
        small: bool, whether one core is enough for a run.

    Attributes:
        cores: int, of each run; 0 is the whole node.

    Raises:
        ValueError: if Ray is not installed, or if there is no cluster.
    """

    def __init__(self, address, small):
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError("--on ray needs Ray: pip install 'grug-keras[ray]'") from None
        if address != "ray" and not address.startswith("ray://"):
            raise ValueError(f"on must be ray or ray://HOST:PORT, got {address!r}")
        self.ray, self.cores = ray, 1 if small else 0
        if not ray.is_initialized():
            options = {"log_to_driver": False, "logging_level": "error"}
            try:
                ray.init(address="auto" if address == "ray" else address, **options)
            except ConnectionError:
                if address != "ray":
                    raise ValueError(f"on={address}: no Ray cluster answers there") from None
                ray.init(**options)  # none was started: a cluster of this machine

    def device(self, backend):
        """Returns what `provenance.device` says in a run of a backend, on some node."""
        with self._one_line_errors():
            return self.ray.get(self._remote(_device).remote(self.cores, backend))

    def run(self, snapshot, specs, pool):
        """Trains runs; as `LocalExecutor.run`."""
        remote, packed = self._remote(_train), self.ray.put(_pack(snapshot.folder))
        tasks = {
            remote.remote(packed, spec, str(pool / spec.folder), self.cores): spec for spec in specs
        }
        try:
            waiting = list(tasks)
            while waiting:
                (done,), waiting = self.ray.wait(waiting, num_returns=1)
                with self._one_line_errors():
                    trained, files = self.ray.get(done)
                _write(pool / tasks[done].folder, files)
                yield tasks[done], trained
        except BaseException:
            for task in tasks:
                self.ray.cancel(task, force=True)
            raise

    def _remote(self, function):
        if self.cores:
            return self.ray.remote(num_cpus=self.cores, max_retries=_RETRIES)(function)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        whole = {
            "num_cpus": min(node.get("CPU", 1) for node in nodes),
            "num_gpus": min(node.get("GPU", 0) for node in nodes),
        }
        return self.ray.remote(**whole, max_retries=_RETRIES)(function)

    @contextlib.contextmanager
    def _one_line_errors(self):
        try:
            yield
        except self.ray.exceptions.RayError as error:
            raise ValueError(f"Ray: {str(error).strip().splitlines()[-1]}") from error


def _device(cores, backend):
    executor = LocalExecutor(small=True)
    executor.cores = cores
    return executor.device(backend)


def _train(packed, spec, out, cores):
    """Runs on a worker; returns whether it trained, and the files of the run."""
    out = _folder(out)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            files.extractall(folder, filter="data")
        trained = train(Snapshot(folder), spec, out, cores, Children())
    found = ended_run(out)
    paths = [] if found is None else [found / "results.json", found / "curve.csv"]
    if log_file(out).is_file():
        paths.append(log_file(out))
    return trained, {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def _folder(out):
    """Returns the folder of a run, or one of this node where the driver's cannot be made."""
    out = pathlib.Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return out
    except OSError:
        return pathlib.Path(tempfile.gettempdir(), "grug-keras-pool", *out.parts[-2:])


def _pack(folder):
    """Returns the files of a folder as a tar file, bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as files:
        files.add(folder, arcname=".")
    return packed.getvalue()


def _write(out, files):
    """Writes the files of a run, the record last; it may be where the worker has put them."""
    for name, content in sorted(files.items(), key=lambda item: item[0].endswith("results.json")):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
