"""Which optimizer gets which variable: by role, said aloud, and an error where nothing says."""

import re

from grug_keras import Block, GrugConfig, Grugformer, Muon
from grug_keras.optimizers.roles import optimizer_table, role_of
import keras
import pytest

CONFIG = GrugConfig(
    vocab_size=64, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
    max_seq_len=12, qk_norm=True,
)  # fmt: skip


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


def test_muon_takes_the_matrices_inside_the_blocks_alone():
    model = make(Muon(0.02, adam_lr_ratio=0.3))
    taken = {
        variable.path.split("/", 1)[1]
        for variable in model.trainable_variables
        if model.optimizer.rule_of(variable) == "Muon"
    }
    names = ("attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj",
             "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")  # fmt: skip
    assert taken == {f"block_{i}/{name}/kernel" for i in range(2) for name in names}
    roles = {role_of(variable) for variable in model.trainable_variables}
    assert roles == {"matrix", "embedding", "head", "vector"}


def test_the_table_adds_up():
    model = make(Muon(0.02, adam_lr_ratio=0.3))
    title, *rows = (line.split(maxsplit=3) for line in optimizer_table(model).splitlines())
    assert title == ["role", "variables", "parameters", "optimizer"]
    assert [row[0] for row in rows] == ["matrix", "embedding", "head", "vector"]
    assert [row[3] for row in rows] == ["Muon", *["AdamW, 0.3 of the rate"] * 3]
    assert sum(int(row[1]) for row in rows) == len(model.trainable_variables)
    assert sum(int(row[2].replace(",", "")) for row in rows) == model.count_params()
    assert "AdamW" in optimizer_table(make(keras.optimizers.AdamW()))


def test_a_variable_without_a_role_is_an_error_that_names_it(tmp_path):
    message = r"no role for grugformer.*/block_0/experts of shape \(3, 16, 16\): name one, e.g. "
    with pytest.raises(ValueError, match=message + r"roles={r'\.\*experts': 'other'}"):
        make(Muon(0.02), ExpertBlock)
    with pytest.raises(ValueError, match="must be one of matrix, .*, got 'big'"):
        make(Muon(0.02, roles={r".*experts": "big"}), ExpertBlock)
    model = make(Muon(0.02, roles={r".*experts": "other"}), ExpertBlock)
    assert "other" in optimizer_table(model)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer))
    assert again.roles == {r".*experts": "other"}


def test_the_table_shows_every_optimizer_of_a_role():
    text = optimizer_table(make(Muon(0.02, exclude_layers=["down_proj"])))
    assert re.search(r"^matrix +12 .* Muon$", text, re.M), text
    assert re.search(r"^matrix +2 .* AdamW, 1 of the rate$", text, re.M), text
