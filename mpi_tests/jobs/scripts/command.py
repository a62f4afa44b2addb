"""command.py ABSENT,... COMMAND...: hvd-compress COMMAND, where these packages cannot be imported; - for none."""

import importlib.abc
import sys

from hvd_compress.commands import main

absent = sys.argv[1].split(",")


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
sys.exit(main(sys.argv[2:]))
