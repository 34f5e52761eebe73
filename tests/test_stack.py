"""Blocks in one loop compute what blocks written out compute."""

import dataclasses
import warnings

from grug_keras import MLP, Block, GrugConfig, Grugformer, stack
from grug_keras.training.model_config import size_config
import keras
import numpy as np
import pytest

CONFIG = GrugConfig(40, 16, 24, 4, 4, 2, max_seq_len=12, qk_norm=True, remat="full")
BACKEND = keras.config.backend()
POLICIES = ["full"] if BACKEND == "tensorflow" else ["full", "dots"]


class EverySecond(Block):
    """Another program in every second block, told by its name alone."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        return y + x if int(self.name[-1]) % 2 else y


class LastAlone(Block):
    """Another program in the last block alone."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        return y + x if self.name == "block_3" else y


class WithPenalty(Block):
    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(y)))
        return y


class WithRegularizer(Block):
    def build(self, input_shape):
        super().build(input_shape)
        penalty = keras.regularizers.L2(0.1)
        self.bias = self.add_weight(name="bias", shape=(16,), regularizer=penalty)

    def call(self, x, **arguments):
        return super().call(x, **arguments) + self.bias


class OwnConstant(Block):
    """Blocks that differ in an array alone, which an inner function captures."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        if BACKEND != "jax":
            return y
        import jax

        scales = np.full(16, 1.0 + int(self.name[-1]), "float32")
        return jax.jit(lambda y: y * scales)(y)


class OwnGradient(Block):
    """Blocks that differ in the backward pass alone."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        if BACKEND != "jax":
            return y
        import jax

        scale = float(self.name[-1])
        identity = jax.custom_vjp(lambda y: y)
        identity.defvjp(lambda y: (y, None), lambda _, g: (scale * g,))
        return identity(y)


class Precise(MLP):
    """A layer of another dtype policy than the model's."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **{**kwargs, "dtype": "float32"})

    def call(self, x):
        return keras.ops.cast(super().call(x), keras.config.dtype_policy().compute_dtype)


class PreciseBlock(Block):
    mlp_class = Precise

    def call(self, x, **arguments):
        return keras.ops.cast(super().call(x, **arguments), x.dtype)


def data(rng):
    tokens = rng.integers(0, 40, (4, 13)).astype("int32")
    segments = np.sort(rng.integers(0, 3, (4, 12)).astype("int32"))
    return {"token_ids": tokens[:, :-1], "segment_ids": segments}, tokens[:, 1:]


def train(block_class, remat, rng):
    keras.utils.set_random_seed(0)
    config = dataclasses.replace(CONFIG, remat=remat)
    model = Grugformer(config, block_class)
    model.compile(keras.optimizers.SGD(0.1))
    inputs, labels = data(rng)
    losses = model.fit(inputs, labels, epochs=3, verbose=0, shuffle=False).history["loss"]
    return losses, model.get_weights()


@pytest.fixture
def loops(monkeypatch):
    """The number of programs in the loop of each call since then, 0 for blocks written out."""
    found, search = [], stack._programs

    def spy(*arguments):
        programs = search(*arguments)
        found.append(len(programs or ()))
        return programs

    monkeypatch.setattr(stack, "_programs", spy)
    return found


def case(*values, slow=False, jax=False):
    """A case of the next test. What a trace compares is JAX's; each slow case has a fast like."""
    marks = [pytest.mark.slow] * slow + [pytest.mark.jax] * jax
    return pytest.param(*values, marks=marks, id=f"{values[0].__name__}-{values[1]}")


@pytest.mark.parametrize(
    ("block_class", "policy", "loop"),
    [
        case(Block, "float32", 1),
        case(Block, "mixed_bfloat16", 1, slow=True),
        case(EverySecond, "float32", 2, jax=True, slow=True),
        case(LastAlone, "float32", 0, jax=True, slow=True),
        case(WithPenalty, "float32", 1),
        case(WithRegularizer, "float32", 1, slow=True),
        case(OwnConstant, "float32", 0, jax=True, slow=True),
        case(OwnGradient, "float32", 0, jax=True),
        case(PreciseBlock, "mixed_bfloat16", 1, jax=True, slow=True),
        case(PreciseBlock, "float32", 1, jax=True, slow=True),
    ],
)
def test_a_loop_over_blocks_trains_as_blocks_written_out(block_class, policy, loop, loops, recwarn):
    keras.config.set_dtype_policy(policy)
    try:
        results = [
            train(block_class, remat, np.random.default_rng(0)) for remat in ("none", *POLICIES)
        ]
    finally:
        keras.config.set_dtype_policy("float32")
    (expected_losses, expected), *others = results
    assert loops == ([loop] * len(loops) if BACKEND == "jax" else [])
    assert loops or BACKEND != "jax"
    assert any("compiled by itself" in str(w.message) for w in recwarn) == (0 in loops)
    tolerance = 1e-4 if policy == "float32" else 1e-2  # XLA may fuse the two otherwise
    for losses, weights in others:
        np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
        for got, want in zip(weights, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=tolerance)


def count_products(model, remat):
    """The products of matrices in a training step, one body of a loop counted once."""
    inputs, labels = data(np.random.default_rng(0))
    if BACKEND == "torch":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Counting(TorchDispatchMode):
            products = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.products += "aten.mm" in str(function)
                return function(*args, **(kwargs or {}))

        with Counting() as counting:
            model.train_step((inputs, labels))
        return counting.products
    import jax

    state = (
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
        [v.value for v in model.optimizer.variables],
        [v.value for v in model.metrics_variables],
    )
    return str(jax.make_jaxpr(model.train_step)(state, (inputs, labels))).count("dot_general[")


@pytest.mark.skipif(BACKEND == "tensorflow", reason="has no such policy")
def test_dots_keeps_the_products_with_weights():
    """Of a block's seven, full multiplies those again that the backward pass needs: six."""
    counts = {}
    for remat in ("none", "dots", "full"):
        model = Grugformer(dataclasses.replace(CONFIG, remat=remat, num_layers=1))
        model.compile(keras.optimizers.SGD(0.1))
        model.build()
        model.optimizer.build(model.trainable_variables)
        counts[remat] = count_products(model, remat)
    assert counts["full"] - counts["dots"] == 6, counts
    if BACKEND == "torch":
        assert counts["dots"] == counts["none"]


@pytest.mark.jax
def test_dots_keeps_what_kernels_return():
    """Attention's output and statistics: its forward kernel runs once."""
    from grug_keras.ops.jax.function_loop import recomputed
    from grug_keras.ops.jax.splash_attention import splash_attention
    import jax

    def layer(x):
        return splash_attention(x, x, x, None, interpret=True)

    def kernels(remat):
        gradient = jax.grad(lambda x: recomputed(layer, remat)(x).sum())
        return str(jax.make_jaxpr(gradient)(np.ones((1, 128, 1, 64), "float32"))).count(
            "splash_mha_fwd"
        )

    assert 0 < kernels("dots") < kernels("full")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others have it")
def test_tensorflow_refuses_a_policy_that_it_does_not_have():
    with pytest.raises(ValueError, match="remat='dots' needs JAX or PyTorch, this is TensorFlow"):
        blocks_after(Block, "dots")
    with pytest.raises(ValueError, match="^remat='dots' needs JAX or PyTorch"):  # of a run
        size_config("smoke", 384, remat="dots")


def test_a_policy_is_named_and_has_an_older_name():
    saved = CONFIG.as_dict()
    assert GrugConfig.of({**saved, "remat": True}) == CONFIG
    assert GrugConfig.of({**saved, "remat": False}).remat == "none"
    for wrong in (1, None, "half", ["dots"]):
        with pytest.raises(ValueError, match=r"remat must be one of .*'none', 'dots', 'full'"):
            GrugConfig.of({**saved, "remat": wrong})


@pytest.mark.jax
def test_blocks_that_differ_in_an_array_are_told_apart_whatever_jax_makes_of_constants(loops):
    """JAX is on its way to keep arrays in the program, where its text does not show them."""
    import jax

    flag = "jax_use_simplified_jaxpr_constants"
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        train(OwnConstant, "full", np.random.default_rng(0))
    finally:
        jax.config.update(flag, before)
    assert loops
    assert not any(loops)


class SharedAverage(Block):
    """Blocks that share a state: the second sees what the first has left."""

    average = None

    def call(self, x, **arguments):
        y = super().call(x, **arguments) + self.average
        self.average.assign(0.5 * self.average + keras.ops.mean(y))
        return y


class OfModel(Grugformer):
    """The state is the model's own, not a block's."""

    def build(self, input_shape=None):
        average = self.add_weight(name="average", shape=(), initializer="ones", trainable=False)
        for block in self.blocks:
            object.__setattr__(block, "average", average)
        super().build(input_shape)


def test_a_state_of_the_model_that_all_blocks_change_is_followed():
    found = []
    for remat in ("none", *POLICIES):
        keras.utils.set_random_seed(0)
        model = OfModel(dataclasses.replace(CONFIG, remat=remat), SharedAverage)
        model.compile(keras.optimizers.SGD(0.1))
        inputs, labels = data(np.random.default_rng(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            logs = model.fit(inputs, labels, epochs=2, verbose=0, shuffle=False).history
        average = next(v for v in model.non_trainable_variables if "average" in v.path)
        found.append([*logs["loss"], *logs["gradient_norm"], float(average.numpy())])
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-4)


@pytest.mark.jax
def test_inference_in_eager_mode_traces_nothing(monkeypatch):
    """It did at every call, and compiled a loop each time."""
    model = Grugformer(CONFIG)
    model.build()
    inputs, _ = data(np.random.default_rng(0))
    monkeypatch.setattr(stack, "_programs", None)
    monkeypatch.setattr(stack, "_recompute", None)
    model.logits(inputs)


class InnerPenalty(MLP):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.sum(keras.ops.square(x), axis=(0, 1)))  # a vector
        return super().call(x)


class InnerPenaltyBlock(Block):
    mlp_class = InnerPenalty


def blocks_after(block_class, remat):
    """A model that has run once in training, and its result."""
    keras.utils.set_random_seed(0)
    model = Grugformer(dataclasses.replace(CONFIG, remat=remat), block_class)
    model.compile(keras.optimizers.SGD(0.1))
    inputs, labels = data(np.random.default_rng(0))
    return model, model.fit(inputs, labels, epochs=2, verbose=0, shuffle=False).history


def test_a_penalty_inside_of_a_block_counts_once():
    """Keras knows a loss by its address, which a second one may get when the first is gone."""
    kept = blocks_after(InnerPenaltyBlock, "none")[1]
    plain = blocks_after(Block, "none")[1]
    assert kept["gradient_norm"][0] != pytest.approx(plain["gradient_norm"][0], rel=1e-2)
    for remat in POLICIES:
        model, recomputed = blocks_after(InnerPenaltyBlock, remat)
        np.testing.assert_allclose(kept["gradient_norm"], recomputed["gradient_norm"], rtol=1e-4)
        assert not any(block.mlp._loss_ids for block in model.blocks)


class Unseeded(Block):
    def call(self, x, **arguments):
        return super().call(x, **arguments) + keras.random.normal(keras.ops.shape(x))


OUTSIDE = keras.random.SeedGenerator(3)


class Untracked(Block):
    def call(self, x, **arguments):
        return super().call(x, **arguments) + keras.random.normal(keras.ops.shape(x), seed=OUTSIDE)


@pytest.mark.parametrize("block_class", [Unseeded, Untracked])
def test_noise_that_recomputation_could_not_draw_again_is_refused(block_class):
    message = "block_0 changes a variable that is not the model's|only use seeded random ops"
    with pytest.raises(ValueError, match=message):
        blocks_after(block_class, POLICIES[-1])


class ReadsTheFirst(Block):
    """Every second block reads what the first one changes."""

    first = None  # the average of block_0

    def build(self, input_shape):
        super().build(input_shape)
        if self.name[-1] in "02":
            self.average = self.add_weight((), "zeros", trainable=False, name="average")
        if self.name == "block_0":
            ReadsTheFirst.first = self.average

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        if self.name[-1] in "02":
            self.average.assign(self.average + 1)
            return y
        return y + ReadsTheFirst.first


def test_a_block_sees_what_another_has_just_changed():
    histories = []
    for remat in ("none", *POLICIES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            histories.append(blocks_after(ReadsTheFirst, remat)[1])
    for name in ("loss", "gradient_norm"):
        for other in histories[1:]:
            np.testing.assert_allclose(histories[0][name], other[name], rtol=1e-4)


class Counting(Block):
    """Counts to more than bfloat16 can."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.calls = keras.metrics.Sum(name="calls")

    def build(self, input_shape):
        super().build(input_shape)
        self.count = self.add_weight((), "zeros", trainable=False, name="count")

    def call(self, x, **arguments):
        self.count.assign(self.count + 300.5)
        self.calls.update_state(300.5)
        return super().call(x, **arguments)


@pytest.mark.parametrize("remat", ["none", *POLICIES])
def test_state_and_metrics_are_exact_in_a_mixed_policy(remat):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, logs = blocks_after(Counting, remat)
    finally:
        keras.config.set_dtype_policy("float32")
    for i, block in enumerate(model.blocks):
        assert float(block.count.numpy()) == 601
        assert logs[f"block_{i}/calls"] == [300.5, 300.5]
