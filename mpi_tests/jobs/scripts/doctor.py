"""hvd-compress doctor, where the packages that the arguments name cannot be imported."""

import importlib.abc
import sys

from hvd_compress.commands import main


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
sys.exit(main(["doctor", "--json"]))
