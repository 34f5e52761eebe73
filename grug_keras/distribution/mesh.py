"""The mesh of devices: reading it from a string, and having Keras build models on it."""

from collections import Counter
import math

from grug_keras.distribution.processes import process
from grug_keras.distribution.sharding import AXES, RULES, Sharding
import keras


def distribute(mesh, rules=None):
    """Places every model that is built from now on on a mesh of devices.

    Call it before the model and the optimizer are made. It sets Keras's distribution;
    `keras.distribution.set_distribution(None)` undoes it.

    Args:
        mesh: str, `"data=4,model=2"`. An axis left out has size 1; one may be `auto`: all
            devices that the other axis leaves. Or a `keras.distribution.DeviceMesh` with these
            axes.
        rules: dict of regular expression -> tuple of `"data"`, `"model"` or None, as `RULES`,
            the default. An experiment with a large variable of its own adds a rule:
            `{**RULES, r".*/router/kernel": ("data", None)}`.

    Returns:
        `Sharding`.

    Raises:
        ValueError: for a mesh that the devices do not fill, naming it.
        RuntimeError: on a backend other than JAX.

    Example:

    >>> distribution.distribute("data=auto")
    >>> model = Grugformer(GrugConfig.preset("130m"))
    """
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        mesh = make_mesh(mesh)
    distribution = Sharding(mesh, RULES if rules is None else rules)
    keras.distribution.set_distribution(distribution)
    return distribution


def make_mesh(mesh, devices=None):
    """Arranges devices in a mesh with the axes `"data"` and `"model"`.

    Neighbours in the mesh are near each other in a TPU slice. Of several slices, each has whole
    rows of the mesh: the axis `"model"` stays within a slice, and `"data"` spans them.

    Args:
        mesh: str, as of `distribute`.
        devices: list of `jax.Device`; defaults to all of all processes.

    Returns:
        `keras.distribution.DeviceMesh`.

    Raises:
        ValueError: for a mesh that cannot be read, that the devices do not fill, or whose rows are
            not within one slice.
        RuntimeError: on a backend other than JAX.
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            f"mesh={mesh!r} needs the JAX backend (KERAS_BACKEND=jax), this is "
            f"{keras.config.backend()}: its Keras has no ModelParallel"
        )
    import jax

    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(mesh, len(devices))
    return keras.distribution.DeviceMesh(shape, AXES, devices=_arrange(mesh, shape, devices))


def _arrange(mesh, shape, devices):
    """Returns the devices as an array of a shape: near ones beside each other."""
    from jax.experimental import mesh_utils

    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    # Model parallelism talks most, so that it gets the fastest links: the last axis.
    if len(slices) == 1 or devices[0].platform != "tpu":  # on GPUs a "slice" is a machine
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    (data, model), smallest = shape, min(slices.values())
    if smallest != max(slices.values()):
        raise ValueError(f"mesh={mesh!r}: the slices have {sorted(slices.values())} devices")
    if model > smallest:
        raise ValueError(
            f"mesh={mesh!r}: axis model={model} does not fit in a slice of {smallest} devices"
        )
    if data % len(slices):
        raise ValueError(
            f"mesh={mesh!r}: axis data={data} is not a multiple of the {len(slices)} slices"
        )
    inside = (data // len(slices), model)
    return mesh_utils.create_hybrid_device_mesh(
        inside, (len(slices), 1), devices, allow_split_physical_axes=True
    )


def mesh_shape(mesh, num_devices):
    """Parses a mesh.

    Args:
        mesh: str, as of `distribute`.
        num_devices: int, number of devices that the mesh must fill.

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


def describe_mesh():
    """Returns the mesh as `{"data": 4, "model": 2, "processes": 1}`, or None without one."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return None
    return {
        **dict(zip(AXES, distribution.device_mesh.shape, strict=True)),
        "processes": process()[1],
    }
