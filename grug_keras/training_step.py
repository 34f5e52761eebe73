"""The training step that `fit` compiles, before there is a model: shapes, no weights."""

import dataclasses
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """A function and what it takes, to be lowered and compiled ahead of time.

    Attributes:
        function: `jax.jit` of `(state, batch)`, as in `keras.Model.fit` on JAX.
        state, batch: trees of `jax.ShapeDtypeStruct` with their shardings.
        model: the model; its variables have shapes and no values.
    """

    function: Any
    state: Any
    batch: Any
    model: Any

    def lower(self):
        """`jax.stages.Lowered`, for the platform of the mesh's devices."""
        return self.function.lower(self.state, self.batch)


def training_step(build, batch_size, seq_len, packed=True):
    """Traces what `fit` would compile, on the mesh that `sharding.distribute` set.

    Args:
        build: function without arguments, returns a compiled `Grugformer`. It runs under
            `jax.eval_shape`, so that nothing is allocated.
        batch_size: int, B, over all devices.
        seq_len: int, S.
        packed: bool, whether the batches have segment ids.

    Returns:
        `TrainingStep`.

    Raises:
        ValueError: as of `sharding.Sharding`.
    """
    import jax

    distribution = keras.distribution.distribution()
    distribution.check_batch(batch_size)
    made = []

    def make():
        model = build()
        model.build()
        model.optimizer.build(model.trainable_variables)
        made.append(model)
        return ()

    jax.eval_shape(make)
    (model,) = made
    distribution.check_batch(batch_size, model.accumulate)

    def abstract(shape, dtype, layout):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)

    def like(variable):
        layout = distribution.get_variable_layout(variable)
        return abstract(variable.shape, variable.dtype, layout)

    def data(dtype):
        shape = (batch_size, seq_len)
        return abstract(shape, dtype, distribution.get_data_layout(shape))

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([like(variable) for variable in group] for group in groups)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # As `keras.src.backend.jax.trainer.JAXTrainer.make_train_function` compiles it.
    function = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    names = ("token_ids", "segment_ids") if packed else ("token_ids",)
    batch = ({name: data("int32") for name in names}, data("int32"), data("float32"))
    return TrainingStep(function, state, batch, model)
