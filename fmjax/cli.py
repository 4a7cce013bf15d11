"""The console command: what can be done with finished runs, and with original archives.

    fmjax evaluate RUN          likelihood, sample quality and cost, with errors
    fmjax sample RUN --num 64   new samples, as a picture, files or arrays
    fmjax export RUN FILE       the parameters in one safetensors file
    fmjax prepare cifar10       a data set from its original archive, for TFDS

The working folder is where modules are looked for first, as `python -m` does, so that the module of
a user's own which made a run is found.
"""

import importlib
import os
import sys

COMMANDS = {
    "evaluate": "fmjax.evaluation.evaluate",
    "sample": "fmjax.evaluation.sample",
    "export": "fmjax.evaluation.export",
    "prepare": "fmjax.data.prepare",
}


def main() -> None:
    """Reads the first word, and leaves the rest to that command."""
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name == "--version":
        import fmjax

        print(fmjax.__version__)
        return
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: fmjax has the commands {known}; got {name}.", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fmjax":
            raise
        print(
            f"error: fmjax {name} needs {error.name}, which is not installed. "
            "pip install 'fmjax[train]' brings it.",
            file=sys.stderr,
        )
        sys.exit(2)
    if name == "prepare":
        sys.exit(module.main(args, prog="fmjax prepare"))
    from fmjax.harness import command

    command.run(module.main, module.Config, name=f"fmjax {name}", doc=module.__doc__, args=args)


if __name__ == "__main__":
    main()
