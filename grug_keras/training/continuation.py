"""What a run goes on from: nothing, what it has left before, or a checkpoint of another run."""

import json

from grug_keras import distribution
from grug_keras.training.branch import (
    branch_recipe,
    copy_curve,
    find_origin,
    is_origin,
    restore_origin,
)
from grug_keras.training.folder import RunFolder, check_out, new_run_folder
from grug_keras.training.resume import find_run, tell_of_new_run, tokenizer_of_run
from grug_keras.training.same_run import check_same_run, first_difference
from grug_keras.training.segments import earlier_segments, segment_of

# Of a record, what makes the numbers of a run and may differ between its processes.
_MADE_BY = ("source", "versions", "device", "flags", "mesh")


class Continuation:
    """What a run goes on from. The first process finds it, and holds the folder.

    Args:
        experiment: str, name of the script.
        recipe: `Recipe` of the command line.
        options: `RunOptions`.

    Attributes:
        folder: `RunFolder`, or None before a new run has one.
        began: dict or None, the record that the run has left.
        origin: dict or None, of `find_origin`: where it branches from another run.
        recipe: `Recipe`; a branch has the warm-up of the other run.

    Raises:
        ValueError: if there is no such run, or it cannot be gone on with.
    """

    def __init__(self, experiment, recipe, options):
        self.experiment, self.options = experiment, options
        self.folder = self.began = self.origin = None
        is_first = distribution.process()[0] == 0
        if is_first:
            check_out(options.out)
            self.folder = find_run(experiment, recipe, options)
        try:
            if self.folder is not None:
                self.began = self.folder.record()
                self.origin = self._origin_of_record()
            elif is_first and options.branch is not None:
                self.origin = find_origin(options)
            begins = not (self.folder and self.folder.saved_steps())
            found = distribution.broadcast_text(json.dumps([self.origin, begins]))
            self.origin, begins = json.loads(found)
            self._begins_branch = begins and self.origin is not None
            self.recipe = branch_recipe(recipe, self.origin) if self.origin else recipe
        except BaseException:
            self.unlock()
            raise

    def _origin_of_record(self):
        origin, asked = self.began.get("branched_from"), self.options.branch_of()
        if asked is not None and not is_origin(origin, *asked):
            raise ValueError(
                f"branch={self.options.branch!r}: {self.folder} is no branch of that run"
            )
        return origin

    @property
    def gets_longer(self):
        """Whether the run has had another number of steps before."""
        return self.began is not None and self.began["recipe"]["steps"] != self.recipe.steps

    def load(self, load):
        """Loads the data; a run that was found and had other data is left for a new run.

        Args:
            load: function of the tokenizer's name, or of the path of one that the run has trained.

        Returns:
            What `load` returns.
        """
        if self.began is None:
            return load(self.options.tokenizer)
        data = load(tokenizer_of_run(self.folder, self.began, self.options.tokenizer))
        was = (self.began.get("data") or {}).get("sha256")
        if self.options.resume == "" and self.origin is None and was != data.sha256:
            self._leave(("data.sha256", was, data.sha256))
            return load(self.options.tokenizer)
        return data

    def check_same(self, record):
        """Refuses to go on with another run than was asked for; one that was found is left.

        Args:
            record: dict, of the run to be.

        Raises:
            ValueError: names what differs.
        """
        if self.began is None:
            return
        if self.options.resume == "" and self.origin is None:
            difference = first_difference(self.began, record)
            if difference is not None:
                self._leave(difference)
            return
        free = ("steps", *(("warmup",) if self.origin else ())) if self.options.extend else ()
        check_same_run(self.began, record, self.folder, schedule=free)
        if self.options.extend and not self.folder.saved_steps():
            raise ValueError(f"extend: {self.folder} has no checkpoint to go on from")

    def _leave(self, difference):
        tell_of_new_run(self.options.out, [(self.folder, difference)])
        self.unlock()
        self.folder = self.began = None

    def restore_origin(self, model, record):
        """Returns step and notes of the other run's checkpoint if a branch begins, else None."""
        return restore_origin(model, record, self.origin) if self._begins_branch else None

    def open_folder(self):
        """Locks the run's folder; returns the first process's, which all processes see.

        Late, so that a run that is refused before it has a record leaves no folder.
        """
        if self.folder is None:
            name = f"{self.experiment}-{self.options.size}-seed{self.options.seed}"
            self.folder = RunFolder(new_run_folder(self.options.out, name))
            self.folder.lock()
        if self._begins_branch and distribution.process()[0] == 0:
            copy_curve(self.origin, self.folder.curve)
        return RunFolder(distribution.broadcast_text(str(self.folder.path.resolve())))

    def unlock(self):
        """Lets other processes into the folder."""
        if self.folder is not None:
            self.folder.unlock()

    def take_over(self, record, step, notes):
        """Takes over what the checkpoint and the record of a continued run say.

        Args:
            record: `RunRecord` of now.
            step: int, of the checkpoint.
            notes: dict, of the checkpoint.
        """
        self._here, self._earlier = (step, record.started), []
        record.update(branched_from=self.origin, **notes.get("record", {}))
        record.update(steps=step)
        if step < self.recipe.steps:  # with another end, that is no loss of the end
            record.update(loss=None, bits_per_byte=None)
        if self.began is not None:
            record.started = self.began["started"]
            record.resumed = [*self.began.get("resumed", []), step]
            self._earlier = earlier_segments(self.began, step)
        if not self._is_one_run(record, step):
            record.identity = ""
        self.end_segment(record)

    def _is_one_run(self, record, step):
        """Whether one code, device and schedule has made the run from its first step on."""
        if self.origin is not None or self.gets_longer:
            return False
        if self.began is None or not step:
            return True
        now = record.as_dict()
        same = all(self.began.get(name) == now[name] for name in _MADE_BY)
        return same and bool(self.began.get("identity"))

    def end_segment(self, record, seconds=None):
        """Brings the segments of a record up to date.

        Args:
            record: `RunRecord`.
            seconds: float or None, training time of this process.
        """
        here = segment_of(record.as_dict(), *self._here, seconds)
        record.segments = [*self._earlier, here]
