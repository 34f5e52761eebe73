"""Where tensors lie on the mesh inside of a training step; without a mesh they stay as they are."""

import functools

from grug_keras.distribution.sharding import AXES, Sharding
import keras


def split_batch(x):
    """Splits a tensor's batch axis over the mesh's data axis, and no other axis.

    So the compiler gathers weights, not activations. Without a mesh, or if the data axis does not
    divide the batch, the tensor stays as it is.

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
    """Gathers the value of a variable from the data axis; its gradient is scattered again.

    Args:
        value: float tensor, in the dtype in which it should be sent.
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
    """Distributes whole layers of a stack of matrices over all devices of the mesh.

    Args:
        stack: tensor `(L, ...)`.

    Returns:
        Tensor `(L', ...)`, padded with zeros to a multiple of the devices; without a mesh as it
        is.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return stack
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = distribution.device_mesh.backend_mesh
    missing = -stack.shape[0] % mesh.size
    stack = keras.ops.pad(stack, [(0, missing)] + [(0, 0)] * (len(stack.shape) - 1))
    return keras.distribution.distribute_tensor(stack, NamedSharding(mesh, PartitionSpec(AXES)))
