"""python -m tests.killed PATH SCRIPT [flags]: run a script that kills itself (-9) the moment it has
written PATH, or, where PATH begins with "!", the moment before that file or folder gets its name.

Every write that counts ends in os.replace, so nothing need be watched from outside.
"""

import importlib
import os
import signal
import sys

from ease.run import command_line

_, path, script, *flags = sys.argv
replace = os.replace


def replace_and_die(source, target) -> None:
    here = str(target).endswith("/" + path.removeprefix("!"))
    if not (here and path.startswith("!")):
        replace(source, target)
    if here:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.replace, sys.argv = replace_and_die, [script, *flags]
    module = importlib.import_module(script.removesuffix(".py"))
    command_line(module.main, module.Config)
