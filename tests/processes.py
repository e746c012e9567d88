"""Python in a process of its own, for what happens at import."""

import os
import subprocess
import sys
import tempfile


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code`; not from the checkout, whose source folder would be imported instead of the installed package."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=120,
    )
