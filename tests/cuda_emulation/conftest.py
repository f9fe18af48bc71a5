"""The emulator switches stacks and reads symbols as Linux and g++ have them."""

from __future__ import annotations

import platform
import shutil

if platform.system() != "Linux" or shutil.which("g++") is None:
    collect_ignore_glob = ["*.py"]
