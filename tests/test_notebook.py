"""The notebook of docs/notebooks/ is clean, and runs from its first cell to its last."""

import ast
import os
import pathlib
import re

import nbformat
import pytest

pytestmark = pytest.mark.jax

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_run.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_a_notebook_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in code_of(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None)
        ast.parse(re.sub("^!.*", "", cell.source, flags=re.MULTILINE))
        assert max(map(len, cell.source.splitlines())) <= 100
    for target in re.findall(r"\]\((\.\./[^)#]*)", str(notebook)):
        assert (NOTEBOOK.parent / target).exists(), target


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    """All cells, in a kernel of its own, with few steps: that it works nothing else shows."""
    from nbclient import NotebookClient

    monkeypatch.setenv("GRUG_ROOT", str(ROOT))
    monkeypatch.setenv("GRUG_STEPS", "30")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("KERAS_BACKEND")
    before = sorted(os.listdir(ROOT))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in code_of(notebook)]
    assert "the machine has a CPU" in printed[1]
    assert re.search(r"validation: [\d.]+ bits per byte", printed[3])
    assert code_of(notebook)[4].outputs[0].data["image/png"]
    assert "def " in printed[5]
    assert re.search(r"accuracy: [\d.]+ - .*loss: [\d.]+", printed[6])
    assert "model.safetensors" in printed[7]
    name, difference = re.search(r"(\w+) differs by ([\d.e-]+)", printed[8]).groups()
    assert (name, float(difference) < 2e-5) == ("Qwen3ForCausalLM", True)
    assert sorted(os.listdir(ROOT)) == before, "nothing is left in the repository"
