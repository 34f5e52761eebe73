"""Which mesh axis splits which axis of which variable.

The data axis splits the batch and, as FSDP (ZeRO-3, https://arxiv.org/abs/1910.02054), every
matrix and its optimizer slots; the model axis splits heads, the MLP and the vocabulary
(Megatron, https://arxiv.org/abs/1909.08053). Only JAX has `keras.distribution.ModelParallel`.
"""

import math
import re

import keras

AXES = ("data", "model")
COLUMNS, ROWS = ("data", "model"), ("model", "data")
HEAD_RULE = r".*/lm_head/kernel"
# {regular expression of a variable's whole path: the mesh axis that splits each of its axes}.
RULES = {
    r".*/token_embedding/embeddings": ROWS,  # (V, D)
    r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel": COLUMNS,
    r".*/(o_proj|down_proj)/kernel": ROWS,
    HEAD_RULE: COLUMNS,  # (D, V)
}
LARGEST_COPY = 2**14  # elements that every device may hold without a rule that says so


class Sharding(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` that raises where Keras would replicate silently.

    Args:
        mesh: `keras.distribution.DeviceMesh` with the axes `"data"` and `"model"`.
        rules: as of `distribute`.
    """

    def __init__(self, mesh, rules):
        if tuple(mesh.axis_names) != AXES:
            raise ValueError(f"mesh must have the axes {AXES}, got {tuple(mesh.axis_names)}")
        self.rules = dict(rules)
        self._factored_shapes = set()  # of the weights so far, each without one of its axes
        layouts = keras.distribution.LayoutMap(mesh)
        for rule, axes in self.rules.items():
            layouts[rule] = axes
        # A process makes only its own rows of a batch: there is nothing for Keras to shard.
        super().__init__(layout_map=layouts, batch_dim_name="data", auto_shard_dataset=False)

    def get_variable_layout(self, variable):
        """Returns the layout of a variable, after checking it.

        Raises:
            ValueError: names a large variable that no rule matches and that is no factored slot,
                a variable that two rules match, or one whose shape the mesh does not divide.
        """
        layout = getattr(variable, "_layout", None)  # an optimizer's slot lies as its weight
        matching = [rule for rule in self.rules if re.fullmatch(rule, variable.path)]
        if layout is None and self._is_factored(variable, matching):
            replicated = [None] * len(variable.shape)
            return keras.distribution.TensorLayout(replicated, self.device_mesh)
        if layout is None and not matching and math.prod(variable.shape) > LARGEST_COPY:
            raise ValueError(
                f"no sharding rule matches {variable.path} of shape {tuple(variable.shape)}: "
                "every device would hold all of it. Add a rule for it, e.g. rules="
                f'{{**distribution.RULES, r".*/{_tail(variable.path)}": {_example(variable)}}}'
            )
        if len(matching) > 1:
            raise ValueError(f"sharding rules {matching} all match {variable.path}")
        layout = super().get_variable_layout(variable)
        self._check_divides(variable, layout.axes)
        if variable.trainable:
            shape = tuple(variable.shape)
            self._factored_shapes |= {shape[:i] + shape[i + 1 :] for i in range(len(shape))}
        return layout

    def _is_factored(self, variable, matching):
        """Whether it is an optimizer's slot with one axis less than a weight, or one element.

        As Adafactor has them: small beside their weights, so that every device may hold all of
        them (https://arxiv.org/abs/1804.04235, section 3). Keras and optax end their paths as
        that of the weight, so that a rule for all axes of the weight may match them.
        """
        rank, shape = len(variable.shape), tuple(variable.shape)
        if variable.trainable or any(len(self.rules[rule]) == rank for rule in matching):
            return False
        return math.prod(shape) == 1 or shape in self._factored_shapes

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
        """Checks the rules and the heads of a whole model.

        Raises:
            ValueError: for a rule that matches none of its variables, and for heads that the
                model axis does not divide.
        """
        paths = [variable.path for variable in model.variables]
        for rule in self.rules:
            if rule == HEAD_RULE and model.config.tie_embeddings:
                continue  # the head is the embedding table
            if not any(re.fullmatch(rule, path) for path in paths):
                raise ValueError(
                    f"sharding rule {rule!r} matches no variable of {model.name}: "
                    "misspelt, or of a layer that this model does not have"
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


def _tail(path):
    """A rule for a variable and its counterparts in the other blocks."""
    return re.sub(r"block_\d+", r"block_\\d+", "/".join(path.split("/")[-2:]))


def _example(variable):
    return ("data", *[None] * (len(variable.shape) - 1))
