"""The checkout that holds the experiments, asked through git."""

import contextlib
import pathlib
import shutil
import subprocess
import tempfile

ARCHIVE = "docs/archive.md"


class Repository:
    """A checkout of grug_keras.

    Args:
        root: path of its top folder.
    """

    def __init__(self, root):
        self.root = pathlib.Path(root).resolve()

    @classmethod
    def find(cls, folder="."):
        """The checkout around a folder.

        Raises:
            ValueError: if there is none, or it has no archive.
        """
        try:
            root = cls(folder).git("rev-parse", "--show-toplevel")
        except ValueError as error:
            raise ValueError(f"run this inside a checkout of grug_keras: {error}") from None
        if not (pathlib.Path(root) / ARCHIVE).is_file():
            raise ValueError(f"run this inside a checkout of grug_keras: {root} has no {ARCHIVE}")
        return cls(root)

    def git(self, *arguments):
        """What git prints.

        Raises:
            ValueError: with git's own words.
        """
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
        except FileNotFoundError:
            raise ValueError("git is not installed") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [str(error)]
            raise ValueError(f"git {arguments[0]}: {lines[-1]}") from None
        return done.stdout.strip()

    def _says(self, *arguments):
        try:
            self.git(*arguments)
        except ValueError:
            return False
        return True

    def head(self):
        """The full SHA of HEAD."""
        return self.git("rev-parse", "HEAD")

    def short(self, commit):
        """Ten digits of a commit's SHA."""
        return self.git("rev-parse", "--short=10", commit)

    def has_commit(self, sha):
        """Whether a commit is in this clone."""
        return self._says("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}")

    def is_ancestor(self, sha):
        """Whether HEAD goes back to a commit."""
        return self._says("merge-base", "--is-ancestor", sha, "HEAD")

    def contains(self, sha, path):
        """Whether a commit has a path."""
        return self._says("cat-file", "-e", f"{sha}:{path}")

    def is_new(self, path):
        """Whether no commit before HEAD has a path: its first commit cannot know its own name."""
        return not any(self.contains(parent, path) for parent in ("HEAD^1", "HEAD^2"))

    def introduced(self, path):
        """The commit that added a path last, or None if none has."""
        found = self.git("log", "-1", "--diff-filter=A", "--format=%H", "--", path)
        return self.short(found) if found else None

    def is_shallow(self):
        """Whether the clone leaves history out."""
        return self.git("rev-parse", "--is-shallow-repository") == "true"

    def changed(self, *but):
        """Paths that differ from HEAD or are not in it, those under `but` left out."""
        lines = self.git("status", "--porcelain", "--untracked-files=all").splitlines()
        paths = [line.lstrip().split(maxsplit=1)[1].split(" -> ")[-1] for line in lines]
        return [path for path in paths if not path.startswith(but)]

    @contextlib.contextmanager
    def worktree(self, commit):
        """A folder with the files of a commit, and one to put on `PYTHONPATH` for its package."""
        with tempfile.TemporaryDirectory() as folder:
            tree, package = pathlib.Path(folder) / "tree", pathlib.Path(folder) / "package"
            self.git("worktree", "add", "--detach", "--quiet", str(tree), commit)
            try:
                # As pyproject.toml installs it: `ops` stands beside the package, and is part of it.
                shutil.copytree(tree / "grug_keras", package / "grug_keras")
                shutil.copytree(tree / "ops", package / "grug_keras" / "ops")
                yield tree, package
            finally:
                self.git("worktree", "remove", "--force", str(tree))
