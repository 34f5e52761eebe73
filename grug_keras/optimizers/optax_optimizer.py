"""Any optax transformation as a Keras optimizer, on JAX."""

import keras


@keras.saving.register_keras_serializable(package="grug_keras")
class OptaxOptimizer(keras.optimizers.Optimizer):
    """Trains with an optax transformation, in `fit`, with checkpoints and on a mesh.

    The transformation sees parameters and gradients as a dict of the variables' paths without
    the model's name, such as `"block_0/attention/q_proj/kernel"`, so that masks can go by name.
    Each leaf of its state is a Keras variable, split over a mesh like the weight that it belongs
    to. Learning rate, schedule, clipping, weight decay, averaging and accumulation are set in the
    transformation; setting `learning_rate`, as callbacks do, raises. A weight's `constraint` is
    applied after each update, as by Keras.

    Args:
        transformation: `optax.GradientTransformation`, `optax.MultiSteps`, or the name of a
            function of `optax` or `optax.contrib`, such as `"adamw"`; only with a name can a
            saved model be loaded with its optimizer.
        arguments: dict or None, of the named function; may hold Keras schedules.
        name: str.

    Raises:
        ValueError: on another backend than JAX, or for what is no transformation.

    Example:

    >>> model.compile(OptaxOptimizer(optax.adamw(1e-3, weight_decay=0.1)))
    >>> model.compile(OptaxOptimizer("contrib.muon", {"learning_rate": Trapezoid(0.02, 1000)}))

    The library: https://optax.readthedocs.io.
    """

    def __init__(self, transformation, arguments=None, name="optax_optimizer"):
        if keras.config.backend() != "jax":
            raise ValueError(
                "OptaxOptimizer needs the JAX backend, this is "
                f"{keras.config.backend()}: choose a Keras optimizer"
            )
        known = transformation if isinstance(transformation, str) else None
        if known is not None:
            transformation = _named(known)(**(arguments or {}))
        elif arguments:
            raise ValueError(f"arguments={arguments!r} belong to a transformation given by name")
        if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
            raise ValueError(
                f"transformation must be an optax.GradientTransformation, got {transformation!r}"
            )
        # Keras requires a rate. Updates are applied as they come, times 1; and ReduceLROnPlateau
        # would leave a rate of 0 as it is, and say nothing.
        super().__init__(learning_rate=1.0, name=name)
        self._transformation, self._named = transformation, known
        self._arguments = arguments or {}

    @property
    def learning_rate(self):
        """1: the rate of the transformation is known to it alone."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        raise ValueError(
            f"learning_rate={value} cannot be set on OptaxOptimizer: its rate is set in the "
            "transformation, as in optax.adamw(schedule)"
        )

    def build(self, variables):
        """Creates one variable for each leaf of the transformation's state."""
        if self.built:
            return
        super().build(variables)
        import jax

        self._keys = _keys(variables)
        by_key = dict(zip(self._keys, variables, strict=True))
        state = self._transformation.init({key: v.value for key, v in by_key.items()})
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(state)
        self._state = [self._slot(path, leaf, by_key) for path, leaf in leaves]

    def _slot(self, path, leaf, by_key):
        import jax
        from jax import numpy as jnp

        name = jax.tree_util.keystr(path, simple=True, separator="_").replace("/", "_")
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"transformation keeps a random key in {name}: a Keras variable cannot hold it"
            )
        # A moment has the key of its weight in its path, and its shape.
        owner = next((by_key[p.key] for p in path if getattr(p, "key", None) in by_key), None)
        options = {"shape": leaf.shape, "dtype": str(leaf.dtype), "name": name}
        if owner is not None and owner.shape == leaf.shape:
            distribution = keras.distribution.distribution()
            if distribution is not None:
                options["layout"] = distribution.get_variable_layout(owner)
        return self.add_variable(initializer=lambda shape, dtype: leaf.astype(dtype), **options)

    def apply(self, grads, trainable_variables=None):
        """Updates the variables once; gradients that are None count as zeros."""
        import jax
        from jax import numpy as jnp
        import optax

        variables = trainable_variables
        if variables is None:
            variables = self._trainable_variables
        elif not self.built:
            self.build(variables)
        if _keys(variables) != self._keys:
            raise ValueError("trainable_variables must be those the optimizer was built with")
        parameters = {key: v.value for key, v in zip(self._keys, variables, strict=True)}
        gradients = {
            key: jnp.zeros_like(parameters[key]) if gradient is None else gradient
            for key, gradient in zip(self._keys, grads, strict=True)
        }
        state = jax.tree_util.tree_unflatten(self._structure, [v.value for v in self._state])
        updates, state = self._transformation.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        for slot, value in zip(self._state, jax.tree_util.tree_leaves(state), strict=True):
            slot.assign(value)
        for key, variable in zip(self._keys, variables, strict=True):
            variable.assign(parameters[key])
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        self.iterations.assign_add(1)
        return self.iterations

    def unbuilt(self):
        """Returns the same optimizer without state."""
        if self._named is not None:
            return OptaxOptimizer(self._named, self._arguments, name=self.name)
        return OptaxOptimizer(self._transformation, name=self.name)

    def get_config(self):
        # A mask or another function cannot be written to a file.
        values = self._arguments.values()
        saved = not any(callable(value) and not _is_schedule(value) for value in values)
        return {
            "name": self.name,
            "transformation": self._named if saved else None,
            "arguments": {
                name: keras.saving.serialize_keras_object(value)
                for name, value in self._arguments.items()
                if saved
            },
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if config["transformation"] is None:
            raise ValueError(
                "a saved OptaxOptimizer of a transformation given as an object, or with a function "
                "among its arguments, cannot be loaded: load the model with compile=False and "
                "compile it again, or name the transformation, as in "
                "OptaxOptimizer('adamw', {'learning_rate': 1e-3})"
            )
        arguments = {
            name: keras.saving.deserialize_keras_object(value, custom_objects)
            for name, value in config["arguments"].items()
        }
        return cls(config["transformation"], arguments, name=config["name"])


def _is_schedule(value):
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def _named(name):
    import optax
    import optax.contrib

    found = optax
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(
            f"transformation={name!r} is no function of optax, as 'adamw' or 'contrib.muon' are"
        )
    return found


def _keys(variables):
    """Paths without the model's name, which counts the models of a process."""
    keys = [variable.path.split("/", 1)[-1] for variable in variables]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"two variables are called {min(twice)}: name their layers apart")
    return keys
