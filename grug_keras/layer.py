"""The base class of the layers: configuration, projections, norms and initial values."""

from grug_keras.config import GrugConfig
import keras

# Standard deviation of a unit normal that is truncated at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


class GrugLayer(keras.layers.Layer):
    """A layer built from a `GrugConfig`, saved with it.

    Args:
        config: `GrugConfig`, or its fields as a dict.
        **kwargs: `name`, `dtype` and the other arguments of `keras.layers.Layer`.
    """

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = GrugConfig.of(config)

    def dense(self, units, name):
        """Returns a projection without bias: Muon, LoRA and quantization expect its 2-D kernel."""
        return keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=initializer(self.config),
            name=name,
            dtype=self.dtype_policy,
        )

    def rms_norm(self, name):
        """Returns an RMS normalisation of the last axis."""
        return keras.layers.RMSNormalization(
            epsilon=self.config.rms_norm_eps, name=name, dtype=self.dtype_policy
        )

    def get_config(self):
        return {**super().get_config(), "config": self.config.as_dict()}


def initializer(config):
    """Returns a new initializer whose samples have standard deviation `config.initializer_std`."""
    return keras.initializers.TruncatedNormal(stddev=config.initializer_std / _TRUNCATED_STD)
