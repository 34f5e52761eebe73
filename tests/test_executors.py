"""Runs in processes of their own: on cores of their own, stopped together, and on a Ray cluster."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

from grug_keras.experiments.child import RunSpec, ended_run
from grug_keras.experiments.executors import LocalExecutor
from grug_keras.experiments.pool import RunPool
from grug_keras.experiments.side import Side
from grug_keras.experiments.snapshot import Snapshot, snapshot
import keras
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STARTER = "speedruns/grugformer_starter.py"
pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="it starts processes, whatever they compute with"
)
# A run that does nothing but say where it was; it takes a while, and notes its attempts.
SCRIPT = """
import json, os, pathlib, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
with open(out / "attempts", "a") as file:
    print(os.getpid(), file=file)
if given["--kills"] == "parent" and len((out / "attempts").read_text().split()) == 1:
    os.kill(os.getppid(), 9)
begin = time.time()
time.sleep(float(given["--seconds"]))
(out / "run").mkdir(exist_ok=True)
(out / "run" / "curve.csv").write_text("step\\n1\\n")
record = {"status": "finished", "cores": sorted(os.sched_getaffinity(0)),
          "ran": [begin, time.time()], "identity": given["--identity"]}
(out / "run" / "results.json").write_text(json.dumps(record))
"""


@pytest.fixture
def code(tmp_path):
    """A snapshot with a script that pretends, and no package: that of these tests is imported."""
    folder = tmp_path / "snapshot"
    (folder / "speedruns").mkdir(parents=True)
    (folder / "package").mkdir()
    (folder / "snapshot.json").write_text('{"commit": null, "dirty": null}')
    (folder / "speedruns" / "it.py").write_text(SCRIPT)
    return Snapshot(folder)


def spec(identity, seconds=0.3, kills="nobody"):
    arguments = ("--seconds", str(seconds), "--kills", kills, "--identity", identity)
    return RunSpec("speedruns/it.py", arguments, 0, identity)


def record(pool, one):
    return json.loads((ended_run(pool / one.folder) / "results.json").read_text())


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="it needs two cores, and a system that lets a process choose",
)
def test_small_runs_go_at_once_each_on_a_core_of_its_own(code, tmp_path):
    specs = [spec(name) for name in "abcd"]
    executor = LocalExecutor(small=True, jobs=2)
    assert sorted(s.identity for s, here in executor.run(code, specs, tmp_path)) == list("abcd")
    found = [record(tmp_path, one) for one in specs]
    for i, one in enumerate(found):
        assert len(one["cores"]) == 1
        for other in found[i + 1 :]:
            overlap = min(one["ran"][1], other["ran"][1]) > max(one["ran"][0], other["ran"][0])
            assert not (overlap and one["cores"] == other["cores"])


def test_two_comparisons_train_a_run_of_both_once(code, tmp_path):
    import threading

    done, specs = [], [spec("a"), spec("b")]

    def work():
        done.extend(LocalExecutor(small=True, jobs=1).run(code, specs, tmp_path))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(here for _, here in done) == [False, False, True, True]
    for one in specs:
        assert len((tmp_path / one.folder / "attempts").read_text().split()) == 1


def start(code, pool, seconds):
    program = f"""
        from grug_keras.experiments.child import RunSpec
        from grug_keras.experiments.executors import LocalExecutor, stop_on_sigterm
        from grug_keras.experiments.snapshot import Snapshot
        import pathlib
        arguments = ("--seconds", "{seconds}", "--kills", "nobody", "--identity", "a")
        specs = [RunSpec("speedruns/it.py", arguments, 0, "a")]
        with stop_on_sigterm():
            list(LocalExecutor(True, 1).run(Snapshot({str(code.folder)!r}), specs,
                                            pathlib.Path({str(pool)!r})))
    """
    # In the background of a shell, as with `nohup ... &`, where SIGINT is ignored.
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    attempts = pool / "it" / "a" / "attempts"
    deadline = time.monotonic() + 60
    while not (attempts.is_file() and attempts.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, int(attempts.read_text().split()[-1])


def is_alive(pid):
    status = pathlib.Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG and /proc are Linux's")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_what_stops_a_comparison_stops_its_runs(code, tmp_path, number, status):
    process, child = start(code, tmp_path, 300)
    process.send_signal(number)
    assert process.wait(30) == status
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    assert ended_run(tmp_path / "it" / "a") is None
    again, _ = start(code, tmp_path, 0.1)
    assert again.wait(60) == 0, "and nothing is left behind that keeps it from going on"
    assert ended_run(tmp_path / "it" / "a")


def test_more_jobs_than_cores_are_refused():
    with pytest.raises(ValueError, match="jobs=1000: this machine trains"):
        LocalExecutor(small=True, jobs=1000)
    with pytest.raises(ValueError, match="jobs=2: this machine trains 1 of these runs at once"):
        LocalExecutor(small=False, jobs=2)
    one, all_of_them = LocalExecutor(small=True, jobs=1), LocalExecutor(small=True)
    assert one.cores == all_of_them.cores, "so that the numbers do not depend on how many go"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, of a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        import ray

        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
def test_a_cluster_repeats_a_run_whose_worker_was_killed(cluster, code, tmp_path):
    from grug_keras.experiments.on_ray import RayExecutor

    executor = RayExecutor("ray", small=True)
    specs = [spec("a"), spec("b", kills="parent"), spec("c"), spec("d")]
    assert len(executor.ray.nodes()) == 2
    assert sorted(s.identity for s, _ in executor.run(code, specs, tmp_path)) == list("abcd")
    assert [record(tmp_path, one)["identity"] for one in specs] == list("abcd")
    assert len((tmp_path / specs[1].folder / "attempts").read_text().split()) == 2


@pytest.mark.slow
def test_runs_of_a_cluster_equal_those_of_this_machine_to_the_bit(cluster, tmp_path):
    from grug_keras.experiments.on_ray import RayExecutor

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(2000)))
    options = ["--data", str(text), "--steps", "5", "--batch", "4", "--seq-len", "32"]
    side, found = Side(ROOT, STARTER, options), {}
    with snapshot(ROOT, [STARTER]) as code:
        for name, executor in [
            ("here", LocalExecutor(small=True)),
            ("there", RayExecutor("ray", small=True)),
        ]:
            device = executor.device("jax")
            assert device["cpu_cores"] == 1
            pool = RunPool(tmp_path / name, code, executor)
            records = pool.run([side.spec(seed, code, device) for seed in (0, 1)])
            found[name] = [[r["identity"], r["bits_per_byte"], r["curve"]] for r in records]
    assert found["here"] == found["there"]
    assert found["here"][0][1] != found["here"][1][1]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_refused():
    pytest.importorskip("ray")
    from grug_keras.experiments.on_ray import RayExecutor

    with pytest.raises(ValueError, match="on must be ray or ray://HOST:PORT, got 'slurm'"):
        RayExecutor("slurm", small=True)
