"""What all tests share: they, and the programs that they start, keep the bytecode of imports.

Containers often forbid it; then each program compiles thousands of modules at every start, which
is two thirds of a daemon's start and more than half of an engine's.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTHONDONTWRITEBYTECODE"] = ""
sys.dont_write_bytecode = False
