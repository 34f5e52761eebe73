"""Functions that call a model, compiled once for each shape of their arguments."""

import keras


def compiled(model, key, make):
    """Returns a compiled function of a model, the same for the same key.

    Weights are read at each call. A model that is quantized or gets LoRA has other variables,
    and so another function.

    Args:
        model: built `Grugformer`.
        key: hashable, what the function depends on besides the model and its arguments.
        make: function without arguments that returns the function of tensors to compile. It may
            not change variables.

    Returns:
        Function of the same arguments.
    """
    if keras.config.backend() == "jax":
        model.jax_state_sync()  # while `fit` runs, the weights are not in the model
    variables = list(model.variables)
    # Past Keras, which would track the variables once more; with the model it is forgotten.
    functions = vars(model).setdefault("_compiled_functions", {})
    known, function = functions.get(key, (None, None))
    if known is None or [id(v) for v in known] != [id(v) for v in variables]:
        function = _compile(make(), variables)
        functions[key] = variables, function
    return function


def _compile(function, variables):
    if keras.config.backend() == "jax":
        import jax

        @jax.jit
        def stateless(values, *arguments):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*arguments)

        return lambda *arguments: stateless([v.value for v in variables], *arguments)
    if keras.config.backend() == "tensorflow":
        return _by_shape(function)
    import torch

    return torch.no_grad()(function)


def _by_shape(function):
    """One `tf.function` for each shape: of a single one TensorFlow warns that it traces it anew."""
    import tensorflow as tf

    functions = {}

    def run(*arguments):
        shapes = tuple(tuple(x.shape) for x in tf.nest.flatten(arguments))
        if shapes not in functions:
            functions[shapes] = tf.function(function, jit_compile=True)
        return functions[shapes](*arguments)

    return run
