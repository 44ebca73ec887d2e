# SPDX-License-Identifier: GPL-2.0-or-later
"""A process of dom0's that works with keys leaves no core dump, whatever the limits and the kernel's settings are."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_CRASH = """
import os, resource, sys
sys.path.insert(0, sys.argv[1])
{}
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if sys.argv[2] == "forks":
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        sys.exit(100 + os.WCOREDUMP(status))
os.abort()
"""


def _dumps(folder, preparation, how="itself"):
    """Whether a crash leaves a core dump."""
    words = [sys.executable, "-c", _CRASH.format(preparation), os.path.join(ROOT, "_utils"), how]
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(folder), *words], {"PATH": os.environ["PATH"]})
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) == 101 if os.WIFEXITED(status) else os.WCOREDUMP(status)


@pytest.mark.parametrize("how", ["itself", "forks"])
def test_a_process_that_has_opened_the_keyring_dumps_no_core(tmp_path, how):
    if subprocess.run(["sh", "-c", "ulimit -Hc"], capture_output=True, check=True).stdout != b"unlimited\n" or not _dumps(tmp_path, ""):
        pytest.skip("nothing leaves a core dump on this machine")
    assert _dumps(tmp_path, "", how)
    assert not _dumps(tmp_path, "from pullrpc.keyring import Keyring; Keyring('/nowhere')", how)
