"""A script imported as a module, without running its command line."""

import importlib.util
import sys

_PREFIX = "_grug_speedrun_"  # else a script called types.py would replace Python's `types`


def import_script(path):
    """Imports a speedrun script.

    Args:
        path: `pathlib.Path`.

    Returns:
        The module.

    Raises:
        ValueError: if it cannot be imported.
    """
    spec = importlib.util.spec_from_file_location(_PREFIX + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of a class there
    try:
        spec.loader.exec_module(module)
    except SystemExit:
        raise ValueError(
            f'{path} runs when it is imported: call main under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be imported: {what}; run it to see where") from error
    return module
