# SPDX-License-Identifier: GPL-2.0-or-later
"""The window on dom0's screen: whom it is shown to, with what in it, and that only its button for yes says yes. And notifications.

loginctl, systemd-run and systemctl are stand-ins that do what those do as far as it matters here; there is no screen.
"""

import os
import signal
import subprocess
import time

import pytest
from pullrpc.helper import SCREEN, Helper

_SESSIONS = {
    "c1": {"Active": "no", "Remote": "no", "Type": "x11", "Name": "other", "Class": "user"},
    "c2": {"Active": "yes", "Remote": "no", "Type": "x11", "Name": "lightdm", "Class": "greeter"},
    "3": {"Active": "yes", "Remote": "no", "Type": "tty", "Name": "root", "Class": "user"},
    "4": {"Active": "yes", "Remote": "yes", "Type": "x11", "Name": "far", "Class": "user"},
    "5": {"Active": "yes", "Remote": "no", "Type": "x11", "Name": "me", "Class": "user"},
}


#: Runs the program behind its options. As the real one: whoever is ended by one of these signals has ended well.
_SYSTEMD_RUN = """printf "%s\\n" "$@" > {folder}/argv
while [ "${{1#--}}" != "$1" ]; do shift; done
exec 3<&0
"$@" <&3 &
echo $! > {folder}/main.pid
wait $!
code=$?
case $code in 129|130|141|143) exit 0;; esac
exit $code"""


class _Screen:
    def __init__(self, folder):
        self.folder = folder
        self.log_in(_SESSIONS)
        self._program("loginctl", f'case "$2" in list-sessions) cat {folder}/sessions;; *) for last; do :; done; cat "{folder}/session.$last";; esac')
        self._program("systemd-run", _SYSTEMD_RUN.format(folder=folder))
        for name in ("zenity", "notify-send"):
            self._program(name, f"cat > {folder}/text; exec {folder}/window")
        self._program("systemctl", f'echo "$@" > {folder}/stopped; kill $(cat {folder}/window.pid)')
        self.window("exit 1")

    def _program(self, name, body):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(f"#!/bin/sh\n{body}\n")
        os.chmod(path, 0o700)

    def window(self, body):
        """Say how the window ends."""
        self._program("window", body)

    def log_in(self, sessions):
        """Say who is logged in."""
        with open(os.path.join(self.folder, "sessions"), "w", encoding="ascii") as file:
            file.write("".join(f"{name} 1000 {one['Name']} seat0\n" for name, one in sessions.items()))
        for name, one in sessions.items():
            with open(os.path.join(self.folder, f"session.{name}"), "w", encoding="ascii") as file:
                file.write("".join(f"{key}={value}\n" for key, value in one.items()))

    def start(self, module="ask_on_screen"):
        """Start a helper as the engine does."""
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "QVM_REMOTE_VM": "work", "QVM_REMOTE_ID": "id", "QVM_REMOTE_ASK_TIMEOUT": "30"}
        argv = Helper(SCREEN, module, {}).argv
        return subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def ask(self):
        """Ask once.

        Returns:
            (int, bytes): exit code and stdout.
        """
        process = self.start()
        out, _ = process.communicate(b"the question\n", 60)
        return process.returncode, out

    def tell(self, text):
        """Show a notification.

        Returns:
            (int, bytes): exit code and stderr.
        """
        process = self.start("tell_on_screen")
        _, said = process.communicate(text, 60)
        return process.returncode, said

    def read(self, name):
        """What a stand-in has noted."""
        with open(os.path.join(self.folder, name), encoding="ascii") as file:
            return file.read()


@pytest.fixture
def screen(tmp_path):
    return _Screen(str(tmp_path))


def test_the_window_is_shown_to_the_one_who_sits_there_with_the_text_unread_by_any_markup(screen):
    screen.window("exit 0")
    assert screen.ask() == (0, b"yes\n")
    argv = screen.read("argv").splitlines()
    assert argv[:2] == ["--user", "--machine=me@.host"]
    assert "--text-info" in argv and "--checkbox=I have read all of it" in argv
    assert screen.read("text") == "the question\n"
    assert not any("question" in word for word in argv)


@pytest.mark.parametrize(("code", "answer"), [(1, 1), (5, 1), (2, 2), (127, 2), (255, 2)])
def test_however_else_it_ends_it_is_no_yes(screen, code, answer):
    screen.window(f"exit {code}")
    assert screen.ask() == (answer, b"")


@pytest.mark.parametrize("who", ["window", "main"])
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE])
def test_a_window_that_somebody_ends_is_no_yes(screen, who, signum):
    # A task manager, the end of the session or of dom0: its own exit code is none of a person's.
    pid = f"{screen.folder}/{who}.pid"
    # The other one may not have noted its number yet.
    screen.window(f"echo $$ > {screen.folder}/window.pid; until [ -s {pid} ]; do sleep 0.01; done; kill -{signum.value} $(cat {pid}); exec sleep 1")
    assert screen.ask() == (2, b"")


def test_with_nobody_at_the_screen_nobody_is_asked(screen):
    screen.log_in({name: one for name, one in _SESSIONS.items() if name != "5"})
    assert screen.ask() == (2, b"")
    assert not os.path.exists(os.path.join(screen.folder, "argv"))


def test_a_question_that_is_taken_back_takes_its_window_with_it(screen):
    screen.window(f"echo $$ > {screen.folder}/window.pid; exec sleep 60")
    process = screen.start()
    process.stdin.write(b"the question\n")
    process.stdin.close()
    deadline = time.monotonic() + 60
    while not os.path.exists(os.path.join(screen.folder, "window.pid")) or not screen.read("window.pid"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # As the engine does, but the window: that is in a unit of the user's, out of reach.
    os.kill(process.pid, signal.SIGTERM)
    assert (process.wait(60), process.stdout.read()) == (1, b"")
    assert screen.read("stopped") == "--user --machine=me@.host stop qvm-remote-ask-id\n"


def test_a_notification_is_shown_to_the_one_who_sits_there_without_markup(screen):
    screen.window("exit 0")
    assert screen.tell(b"-a title\n<b>why</b> & more\n") == (0, b"")
    argv = screen.read("argv").splitlines()
    assert argv[:2] == ["--user", "--machine=me@.host"]
    assert argv[-3:] == ["--", "-a title", "&lt;b&gt;why&lt;/b&gt; &amp; more"]
    assert screen.read("text") == ""


def test_a_notification_that_nobody_sees_is_no_success(screen):
    screen.window("exit 3")
    assert screen.tell(b"title\ntext\n") == (3, b"")
    screen.log_in({name: one for name, one in _SESSIONS.items() if name != "5"})
    assert screen.tell(b"title\ntext\n") == (1, b"nobody is logged in at dom0's screen\n")
