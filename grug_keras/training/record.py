"""The record of a run, `results.json`: what ran, on what, from which commit, and what came out."""

import dataclasses
import datetime
import hashlib
import json
import logging
import shlex
import sys

from grug_keras import distribution
from grug_keras.data.files import write_json
from grug_keras.tpu.flops import MFU_CONVENTION, flops_per_token
from grug_keras.training.identity import run_identity
from grug_keras.training.initial_weights import describe_initial
from grug_keras.training.provenance import device, flags, git_state, versions
from grug_keras.training.same_run import plain_json
from grug_keras.training.source import source_of
import keras

logger = logging.getLogger("grug_keras.training")


@dataclasses.dataclass(kw_only=True)
class RunRecord:
    """What is known of a run; a figure that is not known yet is None.

    Attributes:
        schema: int, version of this format.
        id: str, name of the run folder.
        experiment: str, name of the script.
        status: str. `"running"`, then `"finished"`, `"interrupted"`, `"diverged"` or `"failed"`.
        command: str, the command line.
        started, finished: str, ISO 8601 times in UTC.
        resumed: list of int, the steps that the run was continued from.
        segments: list of dict, what each process has trained, see `segments.segment_of`.
        branched_from: dict or None, of `branch.find_origin`.
        identity: str, of what made the numbers, see `identity.run_identity`.
        source: dict of hashes of the code, see `source.source_of`.
        commit: str or None, of the checkout that holds the script.
        dirty: bool or None, whether the code differs from the commit.
        size: str, preset of the model.
        config: dict, of the `GrugConfig`.
        block_class: str.
        recipe: dict, of the `Recipe`.
        options: dict, of `RunOptions.asked`.
        save_every, evaluate_every, keep: int or None, of the `RunOptions`.
        optimizer: str, name of the class.
        optimizer_config: dict, serialized by Keras.
        dtype: str, dtype policy.
        seed: int.
        packing: str.
        init: dict of `name` and `sha256`, the weights that it began from; None: drawn.
        data: dict, see `TokenData.describe`.
        tokenizer: dict of `name` and `sha256`.
        backend: str.
        device: dict, see `provenance.device`.
        mesh: dict or None, see `distribution.describe_mesh`.
        versions: dict of library -> version.
        flags: dict of variables of the environment that change how numbers are computed.
        parameters, parameters_non_embedding: int.
        flops_per_token: int, by `mfu_convention`.
        steps, tokens: int, trained so far.
        seconds: float, training time without the first step of each process.
        compile_seconds, evaluation_seconds, checkpoint_seconds, total_seconds: float.
        import_seconds, build_seconds, first_step_seconds: float, since the process began: until
            the command runs, until model and optimizer are built, until the first step is done.
        programs: list of dict, see `startup.CompiledPrograms.table`; empty but for JAX.
        ms_per_step, tokens_per_second, mfu: float, of this process.
        peak_memory_bytes: int.
        train_loss: float, nats per token, of the last step.
        curve: list of `[step, train loss]`, thinned, see `plots.thin_curve`.
        evaluations: list of dicts of `step`, `loss` and `bits_per_byte`.
        loss, bits_per_byte: float, on the validation slice after the last step.
        bits_per_byte_interval: list of two floats or None, see `document_scores.score_interval`.
        epochs: list of float, how often each source was read.
        sample: dict of `prompt` and `text`; None if it failed.
        evaluation: dict or None, what `grug eval` has measured since: `suite`, see
            `evaluation.suite.run_suite`, and `tasks`, see `evaluation.tasks.run_tasks`.
        bad_step: int or None, index of the first step whose loss is not finite.
        error: str or None, of a run that failed, or that could not write its model.
    """

    schema: int = 7
    id: str
    experiment: str
    status: str = "running"
    command: str
    started: str
    resumed: list = dataclasses.field(default_factory=list)
    segments: list = dataclasses.field(default_factory=list)
    branched_from: dict | None = None
    finished: str | None = None
    identity: str
    source: dict
    commit: str | None
    dirty: bool | None
    size: str
    config: dict
    block_class: str
    recipe: dict
    options: dict
    save_every: int | None
    evaluate_every: int | None
    keep: int
    optimizer: str
    optimizer_config: dict
    dtype: str
    seed: int
    packing: str
    init: dict | None = None
    data: dict
    tokenizer: dict
    backend: str
    device: dict
    mesh: dict | None
    versions: dict
    flags: dict
    parameters: int
    parameters_non_embedding: int
    flops_per_token: int
    mfu_convention: str = MFU_CONVENTION
    steps: int = 0
    tokens: int = 0
    seconds: float | None = None
    compile_seconds: float | None = None
    import_seconds: float | None = None
    build_seconds: float | None = None
    first_step_seconds: float | None = None
    programs: list = dataclasses.field(default_factory=list)
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    total_seconds: float | None = None
    ms_per_step: float | None = None
    tokens_per_second: int | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    train_loss: float | None = None
    curve: list = dataclasses.field(default_factory=list)
    evaluations: list = dataclasses.field(default_factory=list)
    loss: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_interval: list | None = None
    epochs: list = dataclasses.field(default_factory=list)
    sample: dict | None = None
    evaluation: dict | None = None
    bad_step: int | None = None
    error: str | None = None

    def update(self, **values):
        """Sets fields by name."""
        for name, value in values.items():
            if name not in self.__dataclass_fields__:
                raise AttributeError(f"a record has no field {name!r}")
            setattr(self, name, value)

    def as_dict(self):
        """The record as JSON gives it back."""
        return plain_json(dataclasses.asdict(self))

    def save(self, path):
        """Writes the sealed record as JSON, whole or not at all."""
        write_json(path, seal(dataclasses.asdict(self)))

    def save_if_there_is_room(self, path):
        """Likewise; a disk that is full is named in the log and nothing is raised."""
        try:
            self.save(path)
        except OSError as error:
            logger.warning("results.json is not written: %s", error)


def new_record(run, model):
    """Everything that is known before training.

    Args:
        run: `Run`.
        model: built and compiled.

    Returns:
        `RunRecord`.
    """
    commit, dirty = git_state(run.script)
    origin = {
        "source": source_of(run.script),
        "versions": versions(),
        "flags": flags(),
        "backend": keras.config.backend(),
        "device": device(),
    }
    data = run.data.describe()
    identity = run_identity(
        recipe=run.recipe,
        options=run.options,
        config=run.config,
        data=data,
        tokenizer=run.data.tokenizer,
        **origin,
    )
    parameters = model.count_params()
    embeddings = sum(layer.count_params() for layer in (model.token_embedding, model.lm_head))
    return RunRecord(
        id="",  # it has no folder yet
        experiment=run.script.stem,
        command=shlex.join(["python", *sys.argv]),
        started=utc_now(),
        identity=identity,
        commit=commit,
        dirty=dirty,
        size=run.options.size,
        config=model.config.as_dict(),
        block_class=model.block_class.__name__,
        recipe=dataclasses.asdict(run.recipe),
        options=plain_json(run.options.asked()),
        save_every=run.options.save_every,
        evaluate_every=run.options.evaluate_every,
        keep=run.options.keep,
        optimizer=type(model.optimizer).__name__,
        optimizer_config=plain_json(keras.saving.serialize_keras_object(model.optimizer)),
        dtype=model.dtype_policy.name,
        seed=run.options.seed,
        packing=run.options.packing,
        init=describe_initial(run.options.init),
        data=data,
        tokenizer={"name": run.data.tokenizer.name, "sha256": run.data.tokenizer.sha256},
        mesh=distribution.describe_mesh(),
        **origin,
        parameters=parameters,
        parameters_non_embedding=parameters - embeddings,
        flops_per_token=flops_per_token(model, run.config.max_seq_len),
    )


def seal(record):
    """Returns the record with a checksum of its content, `sha256`, as the last entry.

    It shows that a number was changed by hand or a file was merged badly; it is no protection
    against forgery.
    """
    record = {name: value for name, value in record.items() if name != "sha256"}
    return {**record, "sha256": _checksum(record)}


def is_sealed(record):
    """Whether the content of a record still has the checksum that it was sealed with."""
    return record.get("sha256") == _checksum({k: v for k, v in record.items() if k != "sha256"})


def _checksum(record):
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A path may hold half a character.
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def utc_now():
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
