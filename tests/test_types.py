"""The types are right, in the library and as a user's own checker sees them (`use_of_types.py`)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_mypy_finds_nothing_in_the_library_and_what_is_wrong_in_a_users_script(tmp_path):
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0), done.stdout + done.stderr
