"""Training on many devices: the mesh, the rules that split variables over it, the processes."""

from grug_keras.distribution.constraints import gather, split_batch, split_layers
from grug_keras.distribution.mesh import describe_mesh, distribute, make_mesh, mesh_shape
from grug_keras.distribution.processes import (
    broadcast_text,
    exit_process,
    initialize,
    local_rows,
    on_this_host,
    process,
)
from grug_keras.distribution.sharding import AXES, RULES, Sharding

__all__ = [
    "AXES",
    "RULES",
    "Sharding",
    "broadcast_text",
    "describe_mesh",
    "distribute",
    "exit_process",
    "gather",
    "initialize",
    "local_rows",
    "make_mesh",
    "mesh_shape",
    "on_this_host",
    "process",
    "split_batch",
    "split_layers",
]
