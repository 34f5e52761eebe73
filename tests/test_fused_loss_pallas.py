"""The Pallas kernels of the fused loss: interpreted, checked for races, compiled for TPUs."""

import functools
import importlib
import json
import pathlib
import subprocess
import sys

from grug_keras import ops
from grug_keras.ops.chunk_loss import Columns, LossOptions
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("Pallas is JAX's alone", allow_module_level=True)

from grug_keras.ops.jax import cross_entropy_kernels as kernels
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

HERE = pathlib.Path(__file__).parent
T, D, V = 200, 64, 300  # two chunks of 128 rows, three tiles of 128 columns, both ragged


def arrays(peak=1.0):
    """bfloat16 hidden rows and head, labels at the edges of tiles, and weights, two of them 0."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(peak * rng.normal(size=(T, D)) / 8, jnp.bfloat16)
    lm_head = jnp.asarray(rng.normal(size=(D, V)), jnp.bfloat16)
    labels = rng.integers(0, V, T).astype("int32")
    if peak > 1:
        best = np.argmax(hidden.astype("float32") @ lm_head.astype("float32"), axis=1)
        labels = np.where(rng.random(T) < 0.75, best, labels).astype("int32")
    labels[:6] = 0, 127, 128, 255, 256, V - 1
    weights = rng.uniform(0.5, 2, T).astype("float32")
    weights[7:9] = 0
    return hidden, lm_head, labels, weights


def float64(*tensors):
    return [np.asarray(t.astype("float32"), "float64") for t in tensors]


def assert_gradients(got, want):
    for found, expected in zip(got, want, strict=True):
        assert oracle.relative_error(np.asarray(found.astype("float32")), expected) < 3e-3


@pytest.fixture
def narrow_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST_TILE", 128)
    monkeypatch.setattr(kernels, "NARROWEST_TILE", 128)


@functools.cache
def program(**options):
    """A function of `(hidden, lm_head, labels, weights)`: `((sum, statistics), gradients)`."""
    options = {"implementation": "pallas", "reduction": "sum", "chunk_size": 100, **options}

    def loss(hidden, lm_head, labels, weights):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, weights=weights, return_statistics=True, **options
        )

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("peak", [1.0, 6.0])
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1}], ids=str)
def test_interpreted_kernels_equal_float64(peak, options, narrow_tiles):
    hidden, lm_head, labels, weights = arrays(peak)
    (value, statistics), gradients = program(**options)(hidden, lm_head, labels, weights)
    names = {"z_loss": "z", "label_smoothing": "smoothing"}
    wide = float64(hidden, lm_head)
    losses, *want = oracle.cross_entropy(
        *wide, labels, weights, **{names[name]: value for name, value in options.items()}
    )
    assert float(value) == pytest.approx(losses.sum(), rel=1e-6)
    assert_gradients(gradients, want)
    assert np.all(np.asarray(gradients[0][7:9]) == 0)
    counted = weights > 0
    logits = np.where(counted[:, None], wide[0] @ wide[1], 0)
    assert np.array_equal(np.where(counted, logits.argmax(1), 0), statistics.argmax)
    logsumexp = np.where(counted, np.log(np.exp(logits).sum(1)), 0)
    assert oracle.relative_error(statistics.logsumexp, logsumexp) < 1e-6
    assert oracle.relative_error(statistics.losses * weights, losses) < 2e-6


def test_a_cotangent_for_every_token(narrow_tiles):
    hidden, lm_head, labels, weights = arrays()
    upstream = np.random.default_rng(1).normal(size=T).astype("float32")

    def loss(hidden, lm_head):
        losses = ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, weights=weights, implementation="pallas", reduction="none"
        )
        return (losses * upstream).sum()

    _, *want = oracle.cross_entropy(*float64(hidden, lm_head), labels, weights * upstream)
    assert_gradients(jax.jit(jax.grad(loss, (0, 1)))(hidden, lm_head), want)


def test_large_logits_and_columns_that_are_padding(narrow_tiles):
    """Near -20 a padding column of logit 0 would be all of the softmax; +-1e4 is far apart."""
    hidden, lm_head, labels, weights = arrays()
    for scale, shift in ((1.0, -20.0), (1e3, 0.0)):
        rows = jnp.concatenate([scale * hidden, jnp.ones((T, 1), "bfloat16")], axis=1)
        head = jnp.concatenate([lm_head, jnp.full((1, V), shift, "bfloat16")])
        (value, _), gradients = program()(rows, head, labels, weights)
        losses, *want = oracle.cross_entropy(*float64(rows, head), labels, weights)
        assert float(value) == pytest.approx(losses.sum(), rel=1e-6)
        # Not of the feature that shifts all logits: it has a gradient of 0, but for rounding.
        (d_rows, d_head), (want_rows, want_head) = gradients, want
        assert_gradients((d_rows[:, :D], d_head[:D]), (want_rows[:, :D], want_head[:D]))


def races_found():
    """Returns whether the interpreter has seen a race, from a private place, which moves."""
    place = "jax._src.pallas.mosaic.interpret"
    try:
        return importlib.import_module(f"{place}.interpret_pallas_call").races.races_found
    except ModuleNotFoundError:  # JAX 0.7
        return importlib.import_module(place).races.races_found


cores = "num_cores_or_threads"
if not hasattr(pltpu.InterpretParams, cores):  # JAX 0.7
    cores = "num_cores_per_device"
LOOK_FOR_RACES = pltpu.InterpretParams(detect_races=True, **{cores: 2})


@pytest.mark.slow
def test_no_race_in_two_chunks_that_add_to_one_gradient():
    hidden, lm_head, labels, weights = arrays()
    head = jnp.pad(lm_head, ((0, 0), (0, 84)))
    d_head, d_rows = jnp.zeros(head.shape), []
    call = {"lm_head": head, "num_columns": V, "columns": Columns(V), "options": LossOptions()}
    for start in (0, 16):
        chunk = tuple(a[start : start + 16] for a in (hidden, jnp.asarray(labels), weights))
        d_head, (_, part) = kernels.chunk_gradients(
            d_head, chunk, tile=128, interpret=LOOK_FOR_RACES, **call
        )
        assert not races_found()
        d_rows.append(part)
    wide = float64(hidden[:32], lm_head)
    _, *want = oracle.cross_entropy(*wide, labels[:32], weights[:32])
    assert_gradients((jnp.concatenate(d_rows), d_head[:, :V]), want)


@pytest.mark.slow
def test_a_race_would_be_found():
    """Two cores that add to one block, which the steps of the kernels must not do."""

    def kernel(x, total):
        total[...] += x[...]

    pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=LOOK_FOR_RACES,
    )(jnp.ones((32, 128)))
    assert races_found()


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        ("float32", {}, "takes bfloat16 hidden, got float32"),
        ("bfloat16", {"logit_soft_cap": 30.0}, "has no logit_soft_cap.*30.0"),
        ("bfloat16", {"chunk_size": 10**6}, "cannot hold chunks of 1000064 tokens"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(dtype, options, message):
    def loss(hidden, lm_head, labels):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, implementation="pallas", **options
        )

    shapes = ((10**6, 64), dtype), ((64, 300), dtype), ((10**6,), "int32")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.grad(loss, (0, 1)), *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


@pytest.mark.parametrize("precision", ["default", "tensorfloat32", "highest"])
def test_kernels_lower_for_tpu_under_any_precision(precision):
    hidden, lm_head, labels, _ = arrays()

    def loss(hidden, lm_head):
        return ops.fused_linear_cross_entropy(hidden, lm_head, labels, implementation="pallas")

    with jax.default_matmul_precision(precision):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(hidden, lm_head)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_second_derivatives_are_refused():
    hidden, lm_head, labels, _ = arrays()

    def loss(lm_head):
        return ops.fused_linear_cross_entropy(hidden, lm_head, labels, implementation="pallas")

    with pytest.raises(NotImplementedError, match="differentiated once"):
        jax.grad(lambda head: jax.grad(loss)(head).sum())(lm_head)


def test_block_sizes_fit_and_are_whole_lanes():
    for hidden_dim in (64, 512, 768, 1024, 2048, 4096, 8192):
        for num_tokens in (1, 300, 32768):
            for num_columns in (50, 50_257, 128_256):
                size, tile = kernels.block_sizes(num_tokens, hidden_dim, num_columns)
                assert size % 128 == tile % 128 == 0
                assert size < num_tokens + 128
                assert 128 <= tile < num_columns + 128
    assert kernels.block_sizes(32768, 1024, 128_256) == (2048, 512)
    assert kernels.block_sizes(32768, 1024, 128_256, chunk_size=1000) == (1024, 1024)
    assert kernels.block_sizes(32768, 12_000, 128_256) == (128, 128)
    with pytest.raises(ValueError, match="hidden dim 65536.*use implementation='chunked'"):
        kernels.block_sizes(32768, 65536, 128_256)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, HERE / "tpu_kernels.py"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v6e", "tpu7x"])
def test_kernels_beat_what_xla_makes(compiled, kind):
    """By the compiler's own count of cycles: that is why they are kept."""
    ours, theirs = (compiled[f"cross entropy, {name}, {kind}"] for name in ("pallas", "chunked"))
    assert ours["total"] < 0.7 * theirs["total"]
    assert ours["temporary"] < theirs["temporary"]


@pytest.mark.slow
def test_cycles_keep_their_budget(compiled):
    budgets = json.loads((HERE / "tpu_kernels.json").read_text())
    if compiled["libtpu"] != budgets["libtpu"]:
        pytest.skip(f"budgets are of libtpu {budgets['libtpu']}: tests/tpu_kernels.py --write")
    for name, budget in budgets.items():
        if name != "libtpu":
            assert compiled[name]["kernels"] == pytest.approx(budget["kernels"], rel=0.05), name
            assert compiled[name]["total"] == pytest.approx(budget["total"], rel=0.05), name
