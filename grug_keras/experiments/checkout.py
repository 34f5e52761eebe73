"""The git checkout that holds the experiments."""

import contextlib
import io
import itertools
import pathlib
import shutil
import tarfile
import tempfile

from grug_keras.training.git import git, git_bytes, is_no_checkout
from grug_keras.training.source import source_of

ARCHIVE = "docs/archive.md"
_MOST_COMMITS = 100  # of those that touch the code: a search takes half a second each


class Checkout:
    """A git checkout of grug_keras.

    Args:
        root: path of its top folder.

    Attributes:
        root: `pathlib.Path`, absolute.
    """

    def __init__(self, root):
        self.root = pathlib.Path(root).resolve()

    @classmethod
    def find(cls, folder="."):
        """Finds the checkout that a folder belongs to.

        Args:
            folder: path.

        Returns:
            `Checkout`.

        Raises:
            ValueError: if the folder is in no git checkout, or in one without an archive, or if
                git refuses.
        """
        try:
            root = cls(folder).git("rev-parse", "--show-toplevel")
        except ValueError as error:
            if not is_no_checkout(error):
                raise
            raise ValueError(f"run this inside a checkout of grug_keras: {error}") from None
        if not (pathlib.Path(root) / ARCHIVE).is_file():
            raise ValueError(f"run this inside a checkout of grug_keras: {root} has no {ARCHIVE}")
        return cls(root)

    def git(self, *arguments):
        """Runs a git command and returns what it prints.

        Raises:
            ValueError: with the message of git, if the command fails.
        """
        return git(self.root, *arguments)

    def _git_succeeds(self, *arguments):
        try:
            self.git(*arguments)
        except ValueError:
            return False
        return True

    def short(self, commit):
        """Returns the first ten digits of the SHA of a commit."""
        return self.git("rev-parse", "--short=10", commit)

    def has_commit(self, sha):
        """Whether this clone has a commit."""
        return self._git_succeeds("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}")

    def is_ancestor(self, sha):
        """Whether a commit is HEAD or an ancestor of HEAD."""
        return self._git_succeeds("merge-base", "--is-ancestor", sha, "HEAD")

    def contains(self, sha, path):
        """Whether a path exists in a commit."""
        return self._git_succeeds("cat-file", "-e", f"{sha}:{path}")

    def is_new(self, path):
        """Whether no commit before HEAD has a path.

        If HEAD itself added the path, a file of that commit could not name the commit yet.
        """
        return not any(self.contains(parent, path) for parent in ("HEAD^1", "HEAD^2"))

    def introduced(self, path):
        """Returns the short SHA of the latest commit that added a path, or None."""
        sha = self.git("log", "-1", "--diff-filter=A", "--format=%H", "--", path)
        return self.short(sha) if sha else None

    def commit_of(self, source, path, hint=None):
        """Finds a commit of HEAD's history whose code is that of a run.

        By content: a run on a branch that was squashed belongs to the commit that it became.

        Args:
            source: dict, of `source_of`.
            path: str, the script.
            hint: str or None, a commit to try first.

        Returns:
            str, full SHA, or None.
        """
        tried = set()
        log = ["log", f"-{_MOST_COMMITS}", "--format=%H", "--", "grug_keras", "ops", path]
        candidates = [hint] if hint and self.has_commit(hint) and self.is_ancestor(hint) else []
        for commit in itertools.chain(candidates, ["HEAD"], self.git(*log).split()):
            named = [f"{commit}:{name}" for name in ("grug_keras", "ops", path)]
            if not all(self.contains(*name.split(":")) for name in named):
                continue
            key = self.git("rev-parse", *named)
            if key not in tried and self.source(commit, path) == source:
                return self.git("rev-parse", commit)
            tried.add(key)
        return None

    def source(self, commit, path):
        """Returns `source_of` a script and the package of a commit."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [p for p in ("grug_keras", "ops", path) if self.contains(commit, p)]
            tree = git_bytes(self.root, "archive", commit, "--", *paths)
            with tarfile.open(fileobj=io.BytesIO(tree)) as files:
                files.extractall(folder, filter="data")
            return source_of(pathlib.Path(folder, path), pathlib.Path(folder, "grug_keras"))

    def is_shallow(self):
        """Whether this is a shallow clone, which lacks a part of the history."""
        return self.git("rev-parse", "--is-shallow-repository") == "true"

    def changed(self, *ignored):
        """Returns the paths that differ from HEAD or are untracked.

        Args:
            *ignored: str, prefixes of paths to leave out.

        Returns:
            list of str, relative to the root.
        """
        status = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
        paths = [entry[3:] for entry in status.split("\0") if entry]  # after "XY "
        return [path for path in paths if not path.startswith(ignored)]

    @contextlib.contextmanager
    def worktree(self, commit):
        """Checks out a commit in a temporary folder for the duration of a `with` block.

        Args:
            commit: str.

        Yields:
            Pair of paths: the files of the commit, and a folder for `PYTHONPATH` that holds
            its package.
        """
        with tempfile.TemporaryDirectory() as folder:
            tree, package = pathlib.Path(folder) / "tree", pathlib.Path(folder) / "package"
            self.git("worktree", "add", "--detach", "--quiet", str(tree), commit)
            try:
                # As pyproject.toml installs it: `ops` stands beside the package and is part of it.
                shutil.copytree(tree / "grug_keras", package / "grug_keras")
                shutil.copytree(tree / "ops", package / "grug_keras" / "ops")
                yield tree, package
            finally:
                self.git("worktree", "remove", "--force", str(tree))
