"""Training on many devices: the mesh, and which axis of which variable it splits.

The data axis splits the batch and, as FSDP (ZeRO-3, https://arxiv.org/abs/1910.02054), every
matrix and its optimizer slots; the model axis splits heads, the MLP and the vocabulary
(Megatron, https://arxiv.org/abs/1909.08053). Only JAX has `keras.distribution.ModelParallel`.
"""

import contextlib
import functools
import math
import os
import pathlib
import re
import sys
import traceback

import keras
import numpy as np

AXES = ("data", "model")
COLUMNS, ROWS = ("data", "model"), ("model", "data")
# {regular expression of a variable's whole path: the mesh axis that splits each of its axes}.
RULES = {
    r".*/token_embedding/embeddings": ROWS,  # (V, D)
    r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel": COLUMNS,
    r".*/(o_proj|down_proj)/kernel": ROWS,
    r".*/lm_head/kernel": COLUMNS,  # (D, V)
}
LARGEST_COPY = 2**14  # elements that every device may hold without a rule that says so


def distribute(mesh, rules=None):
    """Has every model built from now on lie on a mesh of devices.

    Call it before the model and the optimizer are made. It sets Keras's distribution;
    `keras.distribution.set_distribution(None)` undoes it.

    Args:
        mesh: str, `"data=4,model=2"`; an axis left out is 1, and one may be `auto`: all the
            devices that the other leaves. Or a `keras.distribution.DeviceMesh` with these axes.
        rules: dict of regular expression -> tuple of `"data"`, `"model"` or None, as `RULES`,
            the default. An experiment with a large variable of its own adds a rule:
            `{**RULES, r".*/router/kernel": ("data", None)}`.

    Returns:
        `Sharding`.

    Raises:
        ValueError: for a mesh that the devices do not fill, naming it.
        RuntimeError: on a backend other than JAX.

    Example:

    >>> sharding.distribute("data=auto")
    >>> model = Grugformer(GrugConfig.preset("130m"))
    """
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        mesh = make_mesh(mesh)
    distribution = Sharding(mesh, RULES if rules is None else rules)
    keras.distribution.set_distribution(distribution)
    return distribution


class Sharding(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` that refuses what Keras lets pass in silence.

    Args:
        mesh: `keras.distribution.DeviceMesh` with the axes `"data"` and `"model"`.
        rules: as of `distribute`.
    """

    def __init__(self, mesh, rules):
        if tuple(mesh.axis_names) != AXES:
            raise ValueError(f"mesh must have the axes {AXES}, got {tuple(mesh.axis_names)}")
        self.rules = dict(rules)
        # A process makes only its own rows of a batch: there is nothing for Keras to shard.
        super().__init__(
            layout_map=layout_map(mesh, rules), batch_dim_name="data", auto_shard_dataset=False
        )

    def get_variable_layout(self, variable):
        """The layout of a variable, checked.

        Raises:
            ValueError: names the variable that no rule places though it is large, that two
                rules place, or whose shape the mesh does not divide.
        """
        layout = getattr(variable, "_layout", None)  # an optimizer's slot lies as its weight
        matching = [rule for rule in self.rules if re.fullmatch(rule, variable.path)]
        if layout is None and not matching and math.prod(variable.shape) > LARGEST_COPY:
            raise ValueError(
                f"no sharding rule matches {variable.path} of shape {tuple(variable.shape)}: "
                "every device would hold all of it. Add a rule for it, e.g. rules="
                f'{{**sharding.RULES, r".*/{_tail(variable.path)}": {_example(variable)}}}'
            )
        if len(matching) > 1:
            raise ValueError(f"sharding rules {matching} all match {variable.path}")
        layout = super().get_variable_layout(variable)
        self._check_divides(variable, layout.axes)
        return layout

    def _check_divides(self, variable, axes):
        if len(axes) != len(variable.shape):
            raise ValueError(
                f"the sharding rule of {variable.path} places {len(axes)} axes, {axes}, "
                f"its shape is {tuple(variable.shape)}"
            )
        sizes = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
        for size, axis in zip(variable.shape, axes, strict=True):
            if axis and size % sizes[axis]:
                raise ValueError(
                    f"mesh axis {axis}={sizes[axis]} does not divide {size}, of "
                    f"{variable.path} of shape {tuple(variable.shape)}"
                )

    def check_model(self, model):
        """Checks what only a whole model can tell.

        Raises:
            ValueError: for a rule that matches none of its variables, and for heads that the
                model axis does not divide.
        """
        paths = [variable.path for variable in model.variables]
        for rule in self.rules:
            if not any(re.fullmatch(rule, path) for path in paths):
                raise ValueError(
                    f"sharding rule {rule!r} matches no variable of {model.name}: "
                    "misspelt, or of a layer that this model has not"
                )
        split = self.device_mesh.shape[self.device_mesh.axis_names.index("model")]
        if model.config.num_heads % split:
            raise ValueError(
                f"mesh axis model={split} does not divide num_heads={model.config.num_heads}"
            )

    def check_batch(self, batch_size, accumulate=1):
        """Checks that the data axis divides a batch, and each of the parts that it is taken in.

        Raises:
            ValueError: names both.
        """
        replicas = self.num_model_replicas
        if batch_size % replicas:
            raise ValueError(f"batch={batch_size} is not a multiple of mesh axis data={replicas}")
        if batch_size // accumulate % replicas:
            raise ValueError(
                f"accumulate={accumulate} takes batch={batch_size} in parts of "
                f"{batch_size // accumulate}, no multiple of mesh axis data={replicas}"
            )


def layout_map(mesh, rules=None):
    """`keras.distribution.LayoutMap` of the rules, for a distribution of one's own.

    Args:
        mesh: `keras.distribution.DeviceMesh` with the axes `"data"` and `"model"`.
        rules: as of `distribute`.
    """
    found = keras.distribution.LayoutMap(mesh)
    for rule, axes in (RULES if rules is None else rules).items():
        found[rule] = axes
    return found


def make_mesh(mesh, devices=None):
    """Devices in a mesh with the axes `"data"` and `"model"`, neighbours in it near in the slice.

    Args:
        mesh: str, as of `distribute`.
        devices: list of `jax.Device`; defaults to all of all processes.

    Returns:
        `keras.distribution.DeviceMesh`.

    Raises:
        ValueError: for a mesh that cannot be read, or that the devices do not fill.
        RuntimeError: on a backend other than JAX.
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            f"mesh={mesh!r} needs the JAX backend (KERAS_BACKEND=jax), this is "
            f"{keras.config.backend()}: its Keras has no ModelParallel"
        )
    import jax
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(mesh, len(devices))
    # Model parallelism talks most, so that it gets the fastest links: the last axis.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return keras.distribution.DeviceMesh(shape, AXES, devices=grid)


def mesh_shape(mesh, num_devices):
    """Reads a mesh.

    Args:
        mesh: str, as of `distribute`.
        num_devices: int, how many there are to fill.

    Returns:
        Tuple of int, the sizes of the axes `"data"` and `"model"`.

    Raises:
        ValueError: names the mesh.
    """
    sizes = dict.fromkeys(AXES, "1")
    for part in mesh.replace(" ", "").split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not (size == "auto" or (size.isdigit() and int(size) > 0)):
            raise ValueError(
                f"mesh={mesh!r} must name its axes as data=4,model=2, or data=auto, got {part!r}"
            )
        sizes[axis] = size
    if list(sizes.values()).count("auto") > 1:
        raise ValueError(f"mesh={mesh!r} may leave one axis to auto, not both")
    known = math.prod(int(size) for size in sizes.values() if size != "auto")
    rest, over = divmod(num_devices, known)
    if over or (rest != 1 and "auto" not in sizes.values()):
        raise ValueError(f"mesh={mesh!r} does not fill the devices: there are {num_devices}")
    return tuple(rest if size == "auto" else int(size) for size in sizes.values())


def split_batch(x):
    """Keeps the examples of a tensor split over the data axis, and all else of it whole.

    So that the compiler gathers weights, not activations. Without a mesh, or for a batch that
    it does not divide, the tensor as it is.

    Args:
        x: tensor `(B, ...)`.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding) or x.shape[0] is None:
        return x
    if x.shape[0] % distribution.num_model_replicas:
        return x
    return keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape))


def gather(value, variable):
    """The value of a variable, gathered once from the data axis; its gradient, scattered again.

    Args:
        value: tensor, in any float dtype: that in which it is sent.
        variable: `keras.Variable`, whose layout says how the value is split.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return value
    split = distribution.get_variable_layout(variable)
    axes = [None if axis == "data" else axis for axis in split.axes]
    whole = keras.distribution.TensorLayout(axes, split.device_mesh)
    return _gather()(value, whole.backend_layout, split.backend_layout)


@functools.cache
def _gather():
    import jax

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
    def gather(value, whole, split):
        return jax.lax.with_sharding_constraint(value, whole)

    def backward(whole, split, _, gradient):
        return (jax.lax.with_sharding_constraint(gradient, split),)

    gather.defvjp(lambda value, whole, split: (gather(value, whole, split), None), backward)
    return gather


def split_layers(stack):
    """Gives every device some whole layers of a stack of matrices, without a mesh all.

    Args:
        stack: tensor `(L, ...)`.

    Returns:
        Tensor `(L', ...)`: L' is L, or with zeros up to what the devices divide.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return stack
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = distribution.device_mesh.backend_mesh
    missing = -stack.shape[0] % mesh.size
    stack = keras.ops.pad(stack, [(0, missing)] + [(0, 0)] * (len(stack.shape) - 1))
    return keras.distribution.distribute_tensor(stack, NamedSharding(mesh, PartitionSpec(AXES)))


def initialize():
    """Joins the other processes of a run of several hosts; call it before anything else.

    On a TPU slice the hosts find one another; elsewhere, say where they are in the environment
    variables of `keras.distribution.initialize`: `KERAS_DISTRIBUTION_JOB_ADDRESSES`,
    `KERAS_DISTRIBUTION_NUM_PROCESSES` and `KERAS_DISTRIBUTION_PROCESS_ID`. Without either,
    nothing happens: the run has one process.

    Raises:
        RuntimeError: if the processes do not find one another.
    """
    described = "KERAS_DISTRIBUTION_JOB_ADDRESSES" in os.environ
    if keras.config.backend() != "jax" or not (described or _on_tpu()):
        return
    try:
        keras.distribution.initialize()
    except (ValueError, RuntimeError) as error:
        if not described and "coordinator_address" in str(error):
            return  # chips, but no slice around them that JAX knows: one process
        raise RuntimeError(f"the processes of this run did not meet: {error}") from error


def leave(error):
    """Ends this process of several at once, after an error, and says which one it is.

    An orderly exit would wait for the other processes, and they may be gone or in the middle
    of a step that this one has left. They notice by themselves: at once, or where the network
    does not tell, by JAX's heartbeats within two minutes. In a run of one it does nothing.

    Args:
        error: the exception.
    """
    number, count = process()
    if count == 1:
        return
    import jax

    if hasattr(error, "format_message"):  # click's, for bad input
        what = error.format_message()
    elif isinstance(error, jax.errors.JaxRuntimeError) and "EXHAUSTED" not in str(error):
        what = f"another process has stopped or cannot be reached; its own log says why: {error}"
    else:
        what = "".join(traceback.format_exception(error))
    print(f"process {number} of {count} stops: {what}", file=sys.stderr, flush=True)
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def process():
    """This process's number, from 0, and how many there are in the run."""
    if keras.config.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def agree(text):
    """The first process's text, on all of them: up to 1000 bytes."""
    if process()[1] == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode().ljust(1000, b"\0"), dtype=np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().rstrip(b"\0").decode()


def rows(batch_size, accumulate=1):
    """Which rows of a batch the devices of this process hold: those that it must make.

    Args:
        batch_size: int, B, over all processes.
        accumulate: int, parts that the batch is taken in; the mesh splits each of them.

    Returns:
        int array, ascending.

    Raises:
        ValueError: if the data axis does not divide the batch, or a part of it.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return np.arange(batch_size)
    distribution.check_batch(batch_size, accumulate)
    return _rows_of(process()[0], distribution.device_mesh.backend_mesh.devices, batch_size)


def _rows_of(number, devices, batch_size):
    """`rows` of a process, by its number and the `(data, model)` array of all devices."""
    size = batch_size // len(devices)
    parts = [np.arange(part * size, (part + 1) * size) for part in range(len(devices))]
    mine = [any(d.process_index == number for d in row) for row in devices]
    return np.concatenate(parts)[np.repeat(mine, size)]


def describe():
    """The mesh as a record holds it: `{"data": 4, "model": 2, "processes": 1}`, or None."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return None
    return {
        **dict(zip(AXES, distribution.device_mesh.shape, strict=True)),
        "processes": process()[1],
    }


@contextlib.contextmanager
def on_this_host(model):
    """The model with all its weights where this process alone can use them, to save or to sample.

    All processes of a run must enter it. In a run of one it is the model itself; in a run of
    several a copy, and there is no mesh until the end.

    Args:
        model: a compiled, built model.
    """
    if process()[1] == 1:
        yield model
        return
    import jax

    distribution = keras.distribution.distribution()
    mesh = distribution.device_mesh.backend_mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    gather = jax.jit(lambda value: value, out_shardings=everywhere)
    groups = (model.weights, model.optimizer.variables)
    weights, slots = ([np.asarray(gather(v.value)) for v in group] for group in groups)
    keras.distribution.set_distribution(None)
    try:
        # The class itself: an experiment need not have registered its own.
        config = {**model.get_config(), "block_class": model.block_class}
        copy = type(model).from_config(config)
        copy.build()
        optimizer = model.optimizer
        if hasattr(optimizer, "unbuilt"):  # its transformation need not have a config
            optimizer = optimizer.unbuilt()
        else:
            optimizer = type(optimizer).from_config(optimizer.get_config())
        copy.compile(optimizer, accumulate=model.accumulate)
        copy.optimizer.build(copy.trainable_variables)
        copy.set_weights(weights)
        copy.optimizer.set_weights(slots)
        yield copy
    finally:
        keras.distribution.set_distribution(distribution)


def _on_tpu():
    """Whether this host has TPU chips, without touching them."""
    devices = pathlib.Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def _tail(path):
    """A rule for a variable and for its likes in the other blocks."""
    return re.sub(r"block_\d+", r"block_\\d+", "/".join(path.split("/")[-2:]))


def _example(variable):
    return ("data", *[None] * (len(variable.shape) - 1))
