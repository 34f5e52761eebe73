"""The recipes of docs/cloud.md call what the packages have, with options that the scripts have.

No package of a cloud is installed for it. What they accept was read from the source of
keras-kinetic 0.0.4 (`run` in kinetic/core/core.py), google-cloud-storage 3.17 and skypilot 0.14.1
(`get_task_schema`, `get_resources_schema` and `get_storage_schema` in sky/utils/schemas.py).
"""

import ast
import builtins
import pathlib
import re
import shlex

from grug_cli import main as grug
from grug_keras.best_guess import RECIPES
from grug_keras.training.options import read_arguments
import pytest
import yaml

pytestmark = pytest.mark.jax

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "cloud.md").read_text()
STARTER = "speedruns/grugformer_starter.py"
KINETIC_RUN = {
    "accelerator", "container_image", "base_image_repo", "zone", "project", "capture_env_vars",
    "cluster", "backend", "namespace", "volumes", "spot", "output_dir", "debug",
}  # fmt: skip
STORAGE = {"Client", "bucket", "blob", "upload_from_filename"}
TASK = {
    "name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs", "secrets",
}  # fmt: skip
RESOURCES = {
    "infra", "cloud", "region", "zone", "accelerators", "accelerator_args", "cpus", "memory",
    "instance_type", "use_spot", "disk_size", "disk_tier", "image_id", "ports", "job_recovery",
}  # fmt: skip
MOUNT = {
    "name": None,
    "source": None,
    "store": {"s3", "gcs", "azure", "r2", "ibm", "oci"},
    "mode": {"MOUNT", "COPY", "MOUNT_CACHED"},
}


def block(language):
    """The one block of a language in the document."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return text


def of_kind(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def test_kinetic_has_what_its_recipe_calls():
    text = block("python")
    assert len([line for line in text.splitlines() if line.strip()]) <= 16
    tree = ast.parse(text)
    compile(tree, "recipe", "exec")
    (function,) = of_kind(tree, ast.FunctionDef)
    (decorator,) = function.decorator_list
    assert ast.unparse(decorator.func) == "kinetic.run"
    assert {keyword.arg for keyword in decorator.keywords} <= KINETIC_RUN
    assert {node.attr for node in of_kind(function, ast.Attribute)} >= STORAGE
    # The function runs elsewhere: what it uses is imported in it.
    names = of_kind(function, ast.Name)
    known = {alias.name for node in of_kind(function, ast.Import) for alias in node.names}
    known |= {alias.name for node in of_kind(function, ast.ImportFrom) for alias in node.names}
    known |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    used = {name.id for name in names} - known - set(dir(builtins))
    assert used == {"kinetic", "options"}
    (call,) = [node for node in of_kind(tree, ast.Call) if ast.unparse(node.func) == "train"]
    recipe, options = read_arguments([ast.literal_eval(word) for word in call.args], RECIPES)
    assert (options.size, recipe.steps) == ("130m", 1000)
    assert STARTER in text


def test_skypilot_has_the_fields_of_its_recipe():
    text = block("yaml")
    assert len(text.splitlines()) <= 16
    task = yaml.safe_load(text)
    assert set(task) <= TASK
    assert set(task["resources"]) <= RESOURCES
    ((place, mount),) = task["file_mounts"].items()
    for field, value in mount.items():
        assert MOUNT[field] is None or value in MOUNT[field]
    python, script, *arguments = shlex.split(task["run"])
    assert (script, (ROOT / script).exists()) == (STARTER, True)
    assert python.replace("python", "pip") in task["setup"], "what the setup has made"
    _, options = read_arguments(arguments, RECIPES)
    assert (options.out, options.resume) == (place, ""), "the next machine goes on with the run"


def test_the_commands_of_ray_exist():
    for name in ("compare", "tokenize"):
        assert f"`grug {name}" in TEXT
        command = grug.get_command(None, name)
        assert "--on" in [flag for parameter in command.params for flag in parameter.opts]
