"""Which optimizer gets which variable: by role, said aloud, and an error where nothing says."""

import re

from grug_keras import Block, GrugConfig, Grugformer
from grug_keras.optimizers import AdamW, Muon, optimizer_table, role_in, role_of
import keras
import pytest

CONFIG = GrugConfig(
    vocab_size=64,
    hidden_dim=16,
    intermediate_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=12,
    qk_norm=True,
)


class ExpertBlock(Block):
    """A block with a weight that no rule knows."""

    def build(self, input_shape):
        super().build(input_shape)
        self.experts = self.add_weight(name="experts", shape=(3, 16, 16))


def make(optimizer, block_class=Block):
    model = Grugformer(CONFIG, block_class=block_class)
    model.build()
    model.compile(optimizer)
    model.optimizer.build(model.trainable_variables)
    return model


def rows(model):
    title, *lines = optimizer_table(model).splitlines()
    assert title.split() == [
        "role",
        "variables",
        "parameters",
        "optimizer",
        "lr_ratio",
        "weight_decay",
        "betas",
    ]
    return [re.split(r" {2,}", re.sub(r"^(\S+) +", r"\1  ", line)) for line in lines]


def test_muon_takes_the_matrices_inside_the_blocks_alone():
    model = make(Muon(0.02, adam_lr_ratio=0.3))
    taken = {
        variable.path.split("/", 1)[1]
        for variable in model.trainable_variables
        if model.optimizer.rule_of(variable).algorithm == "muon"
    }
    names = (
        "attention/q_proj",
        "attention/k_proj",
        "attention/v_proj",
        "attention/o_proj",
        "mlp/gate_proj",
        "mlp/up_proj",
        "mlp/down_proj",
    )
    assert taken == {f"block_{i}/{name}/kernel" for i in range(2) for name in names}
    roles = {role_of(variable) for variable in model.trainable_variables}
    assert roles == {"matrix", "embedding", "head", "vector"}


def test_the_table_has_the_figures_of_each_role():
    optimizer = Muon(
        0.02,
        adam_lr_ratio=0.3,
        adam_beta_2=0.95,
        weight_decay=0.01,
        by_role={"matrix": {"momentum": 0.9}, "head": {"lr_ratio": 0.1, "weight_decay": 0}},
    )
    optimizer.exclude_from_weight_decay(var_names=["embeddings"])
    model = make(optimizer)
    table = rows(model)
    assert [row[0] for row in table] == ["matrix", "embedding", "head", "vector"]
    assert [row[3:] for row in table] == [
        ["Muon", "1", "0.01", "0.9"],
        ["AdamW", "0.3", "0", "0.9, 0.95"],
        ["AdamW", "0.1", "0", "0.9, 0.95"],
        ["AdamW", "0.3", "0", "0.9, 0.95"],
    ]
    assert sum(int(row[1]) for row in table) == len(model.trainable_variables)
    assert sum(int(row[2].replace(",", "")) for row in table) == model.count_params()


def test_the_table_shows_every_rule_of_a_role():
    table = rows(make(Muon(0.02, exclude_layers=["down_proj"])))
    assert [row[1:4:2] for row in table if row[0] == "matrix"] == [["2", "AdamW"], ["12", "Muon"]]


def test_the_table_shows_any_optimizer():
    table = rows(make(keras.optimizers.AdamW()))
    assert [row[3:] for row in table] == [["AdamW"]] * 4
    # As mixed_float16 makes it.
    roles, by_role = {r".*experts": "expert"}, {"expert": {"rule": "muon"}}
    inner = Muon(0.02, roles=roles, by_role=by_role)
    model = make(keras.optimizers.LossScaleOptimizer(inner), ExpertBlock)
    assert rows(model)[-1] == ["expert", "2", "1,536", "Muon", "1", "0.004", "0.95"]
    found = {role_in(model.optimizer, variable) for variable in model.trainable_variables}
    assert found == {"matrix", "embedding", "head", "vector", "expert"}


def test_a_variable_without_a_role_is_an_error_that_names_it():
    message = r"no role for grugformer.*/block_0/experts of shape \(3, 16, 16\): name one, e.g. "
    with pytest.raises(ValueError, match=message + r"roles={r'\.\*experts': 'other'}"):
        make(Muon(0.02), ExpertBlock)
    model = make(Muon(0.02, roles={r".*experts": "other"}), ExpertBlock)
    assert rows(model)[-1][:4] == ["other", "2", "1,536", "AdamW"]
    assert rows(make(AdamW(0.02), ExpertBlock))[-1][0] == "other"


def test_a_stack_named_a_matrix_is_one_to_muon():
    model = make(Muon(0.02, roles={r".*experts": "matrix"}), ExpertBlock)
    assert model.optimizer.rule_of(model.blocks[0].experts).algorithm == "muon"


def test_the_weight_of_any_embedding_layer_is_one():
    layer = keras.layers.Embedding(5, 3, name="value")
    layer.build()
    assert role_of(layer.embeddings) == "embedding"
