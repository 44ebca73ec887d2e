# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job on the simulator: make demo. With --shell, a prompt inside the VM at the end: make demo-shell."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "sim"))

from qubes_sim.stand import Stand  # noqa: E402

#: A request under a token that nobody with the key made, as an attacker in the VM's queue would leave it.
_FORGERY = """\
cd ~/.qvm-remote/queue
id=$(date -u +%Y%m%d-%H%M%S)-$$-0badcafe
echo "v2 300 shell - $(printf 0%.0s $(seq 64))" > pending/$id.auth
echo 'touch /srv/owned' > pending/.$id && mv pending/.$id pending/$id
for _ in $(seq 100); do [ -e results/$id.exit ] && break; sleep 0.1; done
cat results/$id.err; exit "$(cat results/$id.exit)"
"""
_SHELL_HINT = """
You are in the VM 'work', the engine is running in dom0. Try:  qvm-remote hostname
                                                               qvm-remote --help
Leave with exit or Ctrl-D."""


def main(argv):
    """Run the demo.

    Returns:
        int, 0 when everything was as it should be.
    """
    # A closed terminal or a kill must not leave a simulator behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    folder = tempfile.mkdtemp(prefix="qvm-remote-demo-")
    stand = Stand(os.path.join(folder, "sim"), say=lambda text: print(f"* {text}", flush=True))
    try:
        stand.set_up()
        stand.wait_served("work", "dev")
        if argv == ["--shell"]:
            print(_SHELL_HINT, flush=True)
            return subprocess.run(stand.command("vm", "work", "--", "/bin/bash", "-i"), check=False).returncode
        return _show(stand)
    except (RuntimeError, subprocess.SubprocessError) as err:
        print(f"demo: error: {err}", file=sys.stderr)
        return 1
    finally:
        try:
            stand.stop_engine()
        finally:
            stand.down()
            shutil.rmtree(folder, ignore_errors=True)


def _show(stand):
    print("* from the VM 'work', as its user:", flush=True)
    wrong = 0
    for line, expected, has_to_say in (
        ("qvm-remote hostname", 0, "dom0"),
        ("qvm-remote qvm-ls", 0, "work"),
        ("echo 'uname -n; id -un' | qvm-remote", 0, "dom0"),
        ("tar -c -C /etc hostname | qvm-remote 'tar -x -O'", 0, "work"),
        ("qvm-remote 'echo on stderr >&2; exit 7'", 7, "on stderr"),
        ("qvm-remote ping", 0, "dom0 answered"),
    ):
        wrong += _check(stand, line, ["bash", "-c", line], expected, has_to_say)
    wrong += _check(stand, "(a command under a forged token)", ["bash", "-c", _FORGERY], 125, "token")
    if stand.dom0("test", "-e", "/srv/owned").returncode == 0:
        print("demo: error: the forgery ran", file=sys.stderr)
        wrong += 1
    return 1 if wrong else 0


def _check(stand, line, argv, expected, has_to_say):
    done = stand.vm("work", *argv)
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    print(f"\nuser@work$ {line}\n{output}[exit code {done.returncode}]", flush=True)
    if done.returncode == expected and has_to_say in output:
        return 0
    print(f"demo: error: expected exit code {expected} and {has_to_say!r}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
