#!/usr/bin/env python3
"""Have a Chromium for the dashboard's tests, from the system's packages where that is allowed.

Never fails: where there is none and none can be installed, it says so, and those tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")  # as the tests look for it
TIMEOUT_S: Final = 600
_APT: Final = (
    ("apt-get", "update", "-qq"),
    ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"),
)


def main() -> None:
    if any(map(shutil.which, NAMES)):
        return
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        print("browser: no Chromium here; install one to have the dashboard tested in it")
        return
    print("browser: installing Chromium")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in _APT:
        try:
            subprocess.run(command, env=environ, check=True, timeout=TIMEOUT_S, capture_output=True)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"browser: no Chromium is to be had: {error}")
            return


if __name__ == "__main__":
    main()
