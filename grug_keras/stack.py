"""Runs a model's blocks one after another.

The contract: numbers, state, losses and metrics are those of `for block in blocks: x = block(x)`.
Replace `run_blocks` by that loop and only compile time and memory change.

A block that is recomputed in the backward pass (`remat`), in whole or in part, must not act twice.
So it runs as a function of tensors that returns its output, its losses and its new state, which are
added and assigned once, outside; the recomputation starts from the same state, and draws the same
random numbers.

On JAX, blocks that are recomputed in whole run as one `scan` over their stacked weights and state
if they are one program, or a pattern of a few programs that repeats: XLA then compiles the pattern
instead of all. Whether they are is found by tracing the forward and backward pass of each block and
comparing the traces; if not, the blocks are written out, with a warning. Other blocks are always
written out: a scan would copy the activations that it keeps.
"""

import contextlib
import functools
import warnings

from grug_keras.distribution import gather, split_batch
import keras


def run_blocks(calls, x, remat="none", variables=()):
    """Applies blocks in turn.

    Args:
        calls: list of pairs of a built layer and a dict, the further arguments of its call.
        x: float tensor `(B, S, D)`, input of the first block.
        remat: str, what the backward pass computes again, as of `GrugConfig`.
        variables: list of `keras.Variable`, all of the model: a block may use more than its own.

    Returns:
        Float tensor `(B, S, D)`, output of the last block.

    Raises:
        ValueError: names a block that returns another shape than that of its input, or a `remat`
            that the backend does not have.
    """
    check_remat(remat)
    # In eager mode JAX differentiates nothing here, and would compile a loop at every call.
    if remat == "none" or (keras.config.backend() == "jax" and not _is_traced(x)):
        for block, arguments in calls:
            y = block(x, **arguments)
            check_shape(block.name, y, x)
            x = split_batch(y)
        return x
    blocks = [_PureBlock(*call, variables) for call in calls]
    if remat == "full" and keras.config.backend() == "jax" and len(blocks) > 1:
        values = [block.read(x) for block in blocks]
        if programs := _programs(blocks, values, x):
            return _loop(blocks, values, programs, x)
        warnings.warn(
            f"the {len(blocks)} blocks are not one program with other weights, nor a pattern that "
            "repeats: each is compiled by itself, not all as one loop. The numbers are the same, "
            "compiling takes longer.",
            stacklevel=2,
        )
    for block in blocks:
        x = split_batch(_recompute(block, x, remat))
    return x


def check_remat(remat):
    """Raises ValueError for a policy of `GrugConfig` that the backend does not have."""
    if remat == "dots" and keras.config.backend() == "tensorflow":
        raise ValueError("remat='dots' needs JAX or PyTorch, this is TensorFlow: use 'full'")


def _is_traced(x):
    import jax

    return isinstance(x, jax.core.Tracer)


def check_shape(name, y, x):
    """Raises ValueError if a hook changes the shape `(B, S, D)` of the residual stream."""
    shape = getattr(y, "shape", None)
    if shape is None or not _fits(tuple(shape), tuple(x.shape)):
        got = y if shape is None else tuple(shape)
        raise ValueError(f"{name} must return the shape of its input, {tuple(x.shape)}, got {got}")


def _fits(shape, expected):
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(a == b or None in (a, b) for a, b in pairs)


class _PureBlock:
    """A block's call as a function of tensors, without side effects.

    Args:
        block: built layer.
        arguments: dict, the further arguments of its call.
        others: list of `keras.Variable`, what it may use besides its own.

    Attributes:
        weights: list of `keras.Variable`, what the block trains.
        state: list of `keras.Variable`, what it may change: seeds, averages, metrics.
        others: list of `keras.Variable`, those that are not its own.
        updated: list of `keras.Variable`, what its last call changed.
        tensors: list, the float tensors among the arguments: TensorFlow's recomputation
            has gradients for what it is given, not for what it finds in a closure.
    """

    def __init__(self, block, arguments, others):
        self.block, self.arguments = block, arguments
        self.weights = list(block.trainable_variables)
        self.state = [v for v in block.variables if not v.trainable] + block.metrics_variables
        own = {id(v) for v in (*self.weights, *self.state)}
        self.others = [v for v in others if id(v) not in own]
        self.updated = []
        self.tensors = [leaf for leaf in keras.tree.flatten(arguments) if _is_float_tensor(leaf)]

    def read(self, x):
        """Returns the present values of its own variables and of the others, two lists.

        On TensorFlow and PyTorch the values of weights are None: there, the gradient goes to the
        variables themselves.
        """
        lists = ((*self.weights, *self.state), self.others)
        return _as_stored()(x, run=lambda x: [[_value(v) for v in some] for some in lists])

    def __call__(self, x, tensors, own, others):
        """Returns output, losses and the new values of what the call has updated.

        Args:
            x: float tensor `(B, S, D)`.
            tensors: list, in place of the attribute.
            own, others: lists, as of `read`.
        """
        variables = [*self.weights, *self.state, *self.others]
        pairs = zip(variables, [*own, *others], strict=True)
        given = [(variable, value) for variable, value in pairs if value is not None]

        def run(x):
            scope = keras.StatelessScope(given, collect_losses=True)
            before = [scope.get_current_value(v) for v in variables]
            with scope, _forgotten_losses(self.block):
                y = self.block(x, **self._arguments(tensors))
            check_shape(self.block.name, y, x)
            if set(scope.state_mapping) - {id(v) for v in variables}:
                raise ValueError(
                    f"{self.block.name} changes a variable that is not the model's, as unseeded "
                    "random numbers do: remat needs a keras.random.SeedGenerator, or whatever it "
                    "is, as an attribute of the layer"
                )
            after = [scope.get_current_value(v) for v in variables]
            changed = [i for i, value in enumerate(after) if value is not before[i]]
            self.updated = [variables[i] for i in changed]
            return y, list(scope.losses), [after[i] for i in changed]

        return _as_stored()(x, run=run)

    def function(self, others, on_mesh=False):
        """The block as a function of its input and its own values, for `ops.jax.function_loop`.

        Args:
            others: list, as of `read`.
            on_mesh: bool, whether it says where values lie on the mesh.
        """

        def run(x, own):
            if on_mesh:  # here, so that weights are gathered once for all that backward needs them
                weights = [gather(*pair) for pair in zip(own, self.weights, strict=False)]
                own = [*weights, *own[len(weights) :]]
            y, losses, state = self(x, self.tensors, own, others)
            return (split_batch(y) if on_mesh else y, losses), state

        return run

    def updated_places(self):
        """Where in its state the variables stand that the last call changed; None: not in it."""
        places = {id(variable): place for place, variable in enumerate(self.state)}
        return [places.get(id(variable)) for variable in self.updated]

    def _arguments(self, tensors):
        replaced = iter(tensors)
        return keras.tree.map_structure(
            lambda leaf: next(replaced) if _is_float_tensor(leaf) else leaf, self.arguments
        )

    def commit(self, losses, values):
        """Adds the losses and assigns the new state, as the call itself would have done."""
        for loss in losses:
            self.block.add_loss(loss)
        for variable, value in zip(self.updated, values, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def _forgotten_losses(block):
    """Lets layers forget the losses that they add meanwhile.

    Keras knows a loss by its address; once it is gone, another loss may have the same.
    """
    known = [(layer._loss_ids, set(layer._loss_ids)) for layer in block._flatten_layers()]
    try:
        yield
    finally:  # PyTorch ends a recomputation by an exception
        for ids, before in known:
            ids.intersection_update(before)


@functools.cache
def _as_stored():
    """A layer that runs `run(x)` on variables as they are stored.

    In the model's own call Keras casts all variables to the compute dtype, averages and metrics
    too. A layer without autocast is the public way out.
    """

    class AsStored(keras.layers.Layer):
        def call(self, x, run):
            return run(x)

    return AsStored(autocast=False)


def _value(variable):
    """The value of a variable, which a later assignment leaves as it is."""
    if keras.config.backend() == "jax":
        return variable.value
    # The tape of TensorFlow or PyTorch follows the variable itself.
    return None if variable.trainable else keras.ops.copy(variable.value)


def _is_float_tensor(leaf):
    return keras.ops.is_tensor(leaf) and "float" in keras.backend.standardize_dtype(leaf.dtype)


def _recompute(block, x, remat):
    """Runs one block, again in the backward pass."""
    stored = block.read(x)
    if keras.config.backend() == "jax":
        from grug_keras.ops.jax.function_loop import recomputed

        y, losses, values = recomputed(block, remat)(x, block.tensors, *stored)
    else:
        states = []  # not outputs: TensorFlow would ask for the gradient of a seed

        def run(x, *tensors):
            y, losses, values = block(x, tensors, *stored)
            states.append(values)
            return (y, *losses)

        y, *losses = _checkpoint(run, remat)(x, *block.tensors)
        values = states[0]
    block.commit(losses, values)
    return y


def _checkpoint(function, remat):
    """A function that TensorFlow or PyTorch runs again in the backward pass, or parts of it."""
    if remat == "full":
        return keras.remat(function)
    from torch.ops import aten
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    # Products of two matrices: one is a weight.
    kept = functools.partial(create_selective_checkpoint_contexts, [aten.mm.default])
    return functools.partial(checkpoint, function, use_reentrant=False, context_fn=kept)


def _programs(blocks, values, x):
    """The programs that the blocks repeat, to be run as a loop; None to write them out."""
    from grug_keras.ops.jax.function_loop import find_programs

    state = [id(variable) for block in blocks for variable in block.state]
    if len(set(state)) < len(state):  # the second of two blocks must see what the first changed
        return None
    functions = [block.function(others) for block, (_, others) in zip(blocks, values, strict=True)]
    programs = find_programs(functions, [own for own, _ in values], x)
    places = [block.updated_places() for block in blocks]
    repeats = programs and places == places[: len(programs)] * (len(blocks) // len(programs))
    changed = {id(variable) for block in blocks for variable in block.updated}
    for block, (_, others), program in zip(blocks, values, programs or (), strict=False):
        pairs = zip(block.others, others, strict=True)
        if {id(value) for v, value in pairs if id(v) in changed} & set(program.constants):
            return None  # it must see what another block has changed
    return programs if repeats and all(None not in some for some in places) else None


def _loop(blocks, values, programs, x):
    """Runs the blocks as one loop over the programs that they repeat."""
    from grug_keras.ops.jax.function_loop import loop

    period = len(programs)
    functions = [
        block.function(others, on_mesh=True)
        for block, (_, others) in zip(blocks[:period], values, strict=False)
    ]
    x, found = loop(functions, [own for own, _ in values], programs, x)
    for i, block in enumerate(blocks):
        losses, state = found[i % period]
        losses = [keras.ops.sum(loss) for loss in losses] if i < period else []  # of all layers
        block.commit(losses, [value[i // period] for value in state])
    return x
