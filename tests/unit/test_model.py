# SPDX-License-Identifier: GPL-2.0-or-later
"""The model of the protocol, with smaller budgets than `make model` gives it."""

import os
import shutil
import subprocess
import sys

import pytest

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_CHECK = [sys.executable, os.path.join(_ROOT, "model", "check.py"), "--bounded"]


@pytest.mark.skipif(not (shutil.which("spin") and shutil.which("gcc")), reason="spin is not installed; 'make model' installs it and checks all of it")
def test_the_models_promises_hold_and_each_mutation_breaks_the_one_that_it_should():
    done = subprocess.run(_CHECK, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_spin_it_says_what_to_do(tmp_path):
    done = subprocess.run(_CHECK, env={"PATH": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "spin and gcc not found; 'make model' installs" in done.stderr
