"""Meshes: training on 8 virtual devices equals training on one; what cannot be split is named."""

import json
import pathlib
import re
import subprocess
import sys
import types

from grug_keras import GrugConfig, Grugformer, OptaxOptimizer, distribution
from grug_keras.data import TokenBatches
from grug_keras.distribution.processes import rows_of_process
import keras
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, HERE / "mesh_training.py"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.jax
@pytest.mark.parametrize(
    ("run", "bound"),
    [
        ("DP, float32", 1e-5),
        ("FSDP, float32", 1e-5),
        ("TP, float32", 1e-5),
        ("FSDP x TP, float32", 1e-5),
        ("FSDP x TP, all kept", 1e-5),
        ("FSDP x TP, mixed", 5e-3),
        ("FSDP x TP, optax in parts", 1e-5),
        ("FSDP x TP, tied", 1e-5),
    ],
)
def test_a_mesh_trains_as_one_device(report, run, bound):
    """20 steps with packed documents, sinks, blockwise attention, the fused loss and Muon.

    bfloat16 sums in another order on another number of devices.
    """
    found = report["runs"][run]
    assert len(found["losses"]) == 20
    assert found["losses"][-1] < 0.8 * found["losses"][0], "it learnt nothing"
    assert found["difference"] < bound


@pytest.mark.slow
@pytest.mark.jax
def test_every_large_variable_and_its_slots_are_split(report):
    runs = report["runs"]
    assert runs["FSDP, float32"]["largest share"] == 1 / 8
    assert runs["FSDP x TP, float32"]["largest share"] == 1 / 8
    assert runs["TP, float32"]["largest share"] == 1 / 8
    assert runs["FSDP x TP, optax in parts"]["largest share"] == 1 / 8
    assert runs["DP, float32"]["largest share"] == 1


@pytest.mark.slow
@pytest.mark.jax
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("too many", "mesh='data=16' does not fill the devices: there are 8"),
        ("too few", "mesh='data=2,model=2' does not fill the devices: there are 8"),
        ("no fit", "mesh='data=auto,model=3' does not fill the devices: there are 8"),
        ("shape", "mesh axis data=8 does not divide 36, of grugformer"),
        ("heads", "mesh axis model=8 does not divide num_heads=4"),
        ("unknown variable", "no sharding rule matches grugformer"),
        ("no such variable", "sharding rule '.*/gate/kernel' matches no variable of grugformer"),
        ("two rules", "sharding rules ["),
        ("rank", "the sharding rule of grugformer"),
        ("batch", "batch=6 is not a multiple of mesh axis data=8"),
        ("parts", "accumulate=4 takes batch=8 in parts of 2, no multiple of mesh axis data=8"),
    ],
)
def test_what_cannot_be_split_is_named(report, case, message):
    assert report["errors"][case].startswith(message)


@pytest.mark.slow
@pytest.mark.jax
def test_an_experiment_adds_a_rule(report):
    assert report["errors"]["with a rule"] is None
    remedy = report["errors"]["unknown variable"]
    assert "shape (128, 256)" in remedy
    assert r".*/block_\d+/extra" in remedy


@pytest.fixture(scope="module")
def optimizers():
    script = [sys.executable, HERE / "mesh_optimizers.py"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.jax
@pytest.mark.parametrize("name", ["Keras's Adafactor", "optax's Adafactor", "Muon with stacks"])
def test_slots_of_any_shape_train_as_on_one_device(optimizers, name):
    """Four steps: large factored slots of the embedding, the head and stacks of matrices."""
    found = optimizers[name]
    assert found["losses"][-1] < 0.98 * found["losses"][0], "it learnt nothing"
    assert found["difference"] < 1e-5
    assert found["weights"] < 1e-5


@pytest.mark.jax
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: keras.optimizers.Adafactor(1e-3),
        lambda: OptaxOptimizer("adafactor", {"learning_rate": 1e-3, "min_dim_size_to_factor": 8}),
    ],
    ids=["Keras", "optax"],
)
def test_factored_slots_need_no_rule(make_optimizer):
    """Also where a rule for all axes of a weight matches the slots, by the end of their paths."""
    vocab_size = 2 * distribution.sharding.LARGEST_COPY
    rules = {**distribution.RULES, r".*scale": (None,)}
    distribution.distribute("data=1", rules)
    try:
        model = Grugformer(GrugConfig(vocab_size, 16, 24, 1, 4, 2, max_seq_len=8))
        model.build()
        optimizer = make_optimizer()
        optimizer.build(model.trainable_variables)
        state = keras.ops.zeros(vocab_size + 1)
        with pytest.raises(ValueError, match="no sharding rule matches free of shape"):
            keras.Variable(state, trainable=False, name="free")
    finally:
        keras.distribution.set_distribution(None)
    assert vocab_size in {max(v.shape, default=0) for v in optimizer.variables if len(v.shape) == 1}


@pytest.mark.jax
@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        ("data=4,model=2", 8, (4, 2)),
        ("model=2, data=4", 8, (4, 2)),
        ("data=auto", 8, (8, 1)),
        ("model=4,data=auto", 8, (2, 4)),
        ("model=auto", 8, (1, 8)),
        ("data=1", 1, (1, 1)),
    ],
)
def test_meshes_are_read(mesh, devices, shape):
    assert distribution.mesh_shape(mesh, devices) == shape


@pytest.mark.jax
@pytest.mark.parametrize(
    "mesh", ["", "8", "data", "data=", "data=0", "data=-1", "rows=2", "data=x"]
)
def test_a_mesh_that_cannot_be_read_is_named(mesh):
    with pytest.raises(ValueError, match=f"mesh='{mesh}' must name its axes as data=4,model=2"):
        distribution.mesh_shape(mesh, 8)


@pytest.mark.jax
def test_one_axis_at_most_is_left_open():
    with pytest.raises(ValueError, match="mesh='data=auto,model=auto' may leave one axis to auto"):
        distribution.mesh_shape("data=auto,model=auto", 8)


def tpus(*slices):
    """Devices as those of v5e slices of some numbers of chips, in no order."""
    fields = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0}
    return [
        types.SimpleNamespace(
            **fields, slice_index=number, process_index=number, coords=(i % 2, i // 2, 0), id=i
        )
        for i in reversed(range(max(slices)))
        for number, chips in enumerate(slices)
        if i < chips
    ]


@pytest.mark.jax
@pytest.mark.parametrize("mesh", ["data=auto", "data=4,model=2", "model=4,data=auto"])
def test_the_model_axis_stays_within_a_slice(mesh):
    devices = distribution.make_mesh(mesh, tpus(4, 4)).devices
    rows = [{device.slice_index for device in row} for row in devices]
    first = len(rows) // 2
    assert rows == [{0}] * first + [{1}] * first
    assert len({id(device) for device in devices.flat}) == 8


@pytest.mark.jax
@pytest.mark.parametrize(
    ("mesh", "slices", "message"),
    [
        ("model=auto", (4, 4), "axis model=8 does not fit in a slice of 4 devices"),
        ("data=3,model=4", (6, 6), "axis data=3 is not a multiple of the 2 slices"),
        ("data=auto", (4, 2), "the slices have [2, 4] devices"),
    ],
)
def test_a_mesh_that_slices_cannot_hold_is_named(mesh, slices, message):
    with pytest.raises(ValueError, match=re.escape(f"mesh='{mesh}': {message}")):
        distribution.make_mesh(mesh, tpus(*slices))


@pytest.mark.skipif(keras.config.backend() == "jax", reason="JAX can")
def test_another_backend_says_that_it_cannot():
    with pytest.raises(RuntimeError, match="mesh='data=auto' needs the JAX backend"):
        distribution.distribute("data=auto")


@pytest.mark.jax
def test_processes_make_their_rows_of_the_same_batches():
    tokens = np.arange(1000) % 50
    options = {"bos_id": 0, "seq_len": 8, "batch_size": 6, "steps": 3, "seed": 1}
    whole = TokenBatches(tokens, **options)
    parts = [TokenBatches(tokens, **options, rows=rows) for rows in ([0, 1, 4], [2, 3, 5])]
    for step in range(3):
        for part in parts:
            inputs, labels, weights = part[step]
            expected_inputs, expected_labels, expected_weights = whole[step]
            np.testing.assert_array_equal(labels, expected_labels[part.rows])
            np.testing.assert_array_equal(weights, expected_weights[part.rows])
            for name, value in inputs.items():
                np.testing.assert_array_equal(value, expected_inputs[name][part.rows])


@pytest.mark.jax
@pytest.mark.parametrize(
    ("processes", "rows"),  # of each device on the mesh; of a batch of 8, by process
    [
        ([[0], [0], [1], [1]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[0], [1], [1], [0]], [[0, 1, 6, 7], [2, 3, 4, 5]]),  # a slice is not numbered in order
        ([[0, 0], [1, 1]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[0, 1], [2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]),
    ],
)
def test_a_process_makes_the_rows_of_its_devices(processes, rows):
    devices = np.array([[types.SimpleNamespace(process_index=n) for n in row] for row in processes])
    for number, expected in enumerate(rows):
        assert list(rows_of_process(number, devices, 8)) == expected


def test_without_a_mesh_nothing_is_split(rng):
    assert distribution.describe_mesh() is None
    assert list(distribution.local_rows(3)) == [0, 1, 2]
    x = keras.ops.ones((2, 3, 4))
    assert distribution.split_batch(x) is x
    assert distribution.split_layers(x) is x


@pytest.mark.jax
def test_the_record_of_parameters_and_flops():
    """By hand: 2 blocks of 4 x 16 x 16 and 3 x 16 x 24, a head of 16 x 32; S = 8."""
    from grug_keras.tpu.flops import flops_per_token

    model = Grugformer(GrugConfig(32, 16, 24, 2, 4, 4, max_seq_len=8))
    model.build()
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 24) + 16 * 32
    assert flops_per_token(model, 8) == 6 * weights + 6 * 2 * 4 * 4 * 8
    # In a window of 2, the first of 8 positions sees one and the others two, roughly.
    model = Grugformer(GrugConfig(32, 16, 24, 2, 4, 4, max_seq_len=8, sliding_window=2))
    model.build()
    assert flops_per_token(model, 8) == 6 * weights + 12 * 2 * 4 * 4 * 1.75
