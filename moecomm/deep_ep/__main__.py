"""Run a script with `moecomm.deep_ep` in the place of `deep_ep`: python -m moecomm.deep_ep script.py [arguments]."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from moecomm.deep_ep.installation import install, pass_on

_USAGE = "usage: python -m moecomm.deep_ep [-m module | script.py] [arguments]"


def main() -> None:
    """Run what the command line names, as `python` would."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if arguments else 2)
    install()
    pass_on()
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise SystemExit(_USAGE)
        sys.argv = arguments[1:]
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
