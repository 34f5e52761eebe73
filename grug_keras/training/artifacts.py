"""What a run leaves besides its results: the model as one file, a sample, a picture.

By now the results are recorded: nothing here can take them away.
"""

import contextlib
import logging

from grug_keras import distribution
from grug_keras.data.files import write_atomically
from grug_keras.training.checkpoint_stores import one_line
from grug_keras.training.document_scores import score_interval
from grug_keras.training.interrupts import sigterm_raises
from grug_keras.training.plots import plot_curve
from grug_keras.training.sampling import sample_validation

logger = logging.getLogger("grug_keras.training")


def write_artifacts(run, record, model):
    """Writes the model and draws the curve of a run; samples from one that is finished.

    A failure is a warning in the log. That of the model is in the record too: users rely on it.
    A signal ends what is left to do.

    Args:
        run: `Run`.
        record: `RunRecord`, which gets `sample` and `error`.
        model: trained.
    """
    with sigterm_raises():
        try:
            if record.status != "diverged":
                with distribution.on_this_host(model) as whole_model:
                    _save_model(run, record, whole_model)
                    if record.status == "finished":
                        data, seed = run.data, run.options.seed
                        with _optional("sample"):
                            record.sample = sample_validation(whole_model, data, seed)
                        with _optional("interval over documents"):
                            slices = run.validation_batches
                            interval = score_interval(whole_model, data, slices, seed)
                            record.bits_per_byte_interval = interval
            with _optional("picture"):
                _draw(run, record)
        except KeyboardInterrupt:
            logger.warning("stopped: what the run has left until now is complete, no more follows")


def _save_model(run, record, whole_model):
    """Writes `model.keras`; only the first process has the folder."""
    if distribution.process()[0]:
        return
    try:
        write_atomically(run.folder.model, whole_model.save)
    except (Exception, KeyboardInterrupt) as error:
        what = f"{run.folder.model.name} is not written: {one_line(error)}"
        logger.warning("%s", what)
        if record.status == "finished":
            record.error = what
        if isinstance(error, KeyboardInterrupt):
            raise


def _draw(run, record):
    sources = record.evaluations[-1].get("sources", {}) if record.loss is not None else {}
    plot_curve(
        run.folder.curve,
        run.folder.picture,
        title=f"{run.script.stem}, {run.options.size}, on {run.data.name}",
        validation=record.loss,
        by_source={name: scores["loss"] for name, scores in sources.items()},
    )


@contextlib.contextmanager
def _optional(what):
    try:
        yield
    except Exception as error:
        logger.warning("no %s: %s; the results are recorded", what, one_line(error))
