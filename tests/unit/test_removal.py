# SPDX-License-Identifier: GPL-2.0-or-later
"""What is removed is ours, and what lies behind a mount is not."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

#: In a mount namespace of its own: what a killed engine and its commands may leave mounted, then the removal.
_PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pullrpc.config import Config
from pullrpc.removal import leftovers, remove
from pullrpc.errors import PullError
from dataclasses import replace
folder = sys.argv[2]
config = replace(Config(), key_dir=folder + "/keys", state_dir=folder + "/state", run_dir=folder + "/run")
class Defaults:
    key_dir, state_dir, run_dir = config.key_dir, config.state_dir, config.run_dir
import pullrpc.removal
pullrpc.removal.Config = Defaults
print(sorted(os.path.basename(path) for path in leftovers(config)))
try:
    print(remove(config))
except PullError as err:
    print("PullError", err)
    for line in open("/proc/self/mounts"):
        if line.split()[1].startswith(folder + "/run/jobs"):
            os.system(f"umount {line.split()[1]}")
    print(remove(config))
"""
_MOUNTS = """
mount -t tmpfs none "$3/run/jobs/0" && touch "$3/run/jobs/0/left" && mount --bind "$3/precious" "$3/run/jobs/0/"
[ "$4" = shallow ] || { mkdir -p "$3/run/jobs/1/deep"; mount --bind "$3/precious" "$3/run/jobs/1/deep"; }
exec "$0" -c "$1" "$2" "$3"
"""


@pytest.fixture
def place(tmp_path):
    """Folders as an engine leaves them, and one of somebody else's."""
    for name in ("keys", "state/spool/work", "run/jobs/0", "run/jobs/1", "precious/folder"):
        os.makedirs(tmp_path / name)
    for name in ("keys/work.key", "state/ledger.sqlite", "state/spool/work/out", "run/engine.lock", "precious/folder/file"):
        (tmp_path / name).write_text("x")
    return tmp_path


def _remove(place, depth):
    words = [sys.executable, _PROGRAM, os.path.join(ROOT, "_utils"), str(place), depth]
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNTS, *words], capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this kernel has no user namespaces for us")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_a_killed_engine_left_mounted_is_unmounted_and_nothing_behind_it_is_touched(place):
    assert _remove(place, "shallow") == ["['keys', 'run', 'state']", "[]"]
    assert sorted(os.listdir(place)) == ["precious"]
    assert (place / "precious/folder/file").read_text() == "x"


def test_what_a_command_mounted_deeper_is_left_and_said_and_found_by_the_next_try(place):
    found = _remove(place, "deep")
    assert found[0] == "['keys', 'run', 'state']"
    assert found[1].startswith(f"PullError {place}/run/jobs can't be removed: ")
    # And found once that is mended.
    assert found[2] == "[]"
    assert sorted(os.listdir(place)) == ["precious"]
    assert (place / "precious/folder/file").read_text() == "x"
