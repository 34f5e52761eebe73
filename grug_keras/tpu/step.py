"""The training step that `fit` compiles, made of shapes alone: no weight is allocated."""

from typing import Any, NamedTuple

import keras


class TrainingStep(NamedTuple):
    """A training step and the shapes of its arguments, to lower and compile ahead of time.

    Attributes:
        function: `jax.jit` of a function of `(state, batch)`, as `keras.Model.fit` makes on JAX.
        state, batch: trees of `jax.ShapeDtypeStruct` with their shardings.
        model: `Grugformer`; its variables have shapes and no values.
    """

    function: Any
    state: Any
    batch: Any
    model: Any

    def lower(self):
        """Returns the `jax.stages.Lowered` for the platform of the mesh's devices."""
        return self.function.lower(self.state, self.batch)


def training_step(build, batch_size, seq_len, packed=True):
    """Makes the step that `fit` would compile, on the mesh that `distribution.distribute` set.

    Args:
        build: function without arguments, returns a compiled `Grugformer`. It runs under
            `jax.eval_shape`, so that nothing is allocated.
        batch_size: int, B, over all devices.
        seq_len: int, S.
        packed: bool, whether the batches have segment ids.

    Returns:
        `TrainingStep`.

    Raises:
        ValueError: if the mesh cannot split the batch or the model; see `distribution.Sharding`.
    """
    import jax

    distribution = keras.distribution.distribution()
    distribution.check_batch(batch_size)
    model = _build_without_values(build)
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


def _build_without_values(build):
    """Builds a model and its optimizer; their variables have shapes and no values."""
    import jax

    made = []

    def make():
        model = build()
        model.build()
        model.optimizer.build(model.trainable_variables)
        made.append(model)
        return ()

    jax.eval_shape(make)
    return made[0]
