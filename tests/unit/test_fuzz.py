# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzing harness: each target for a moment, and that the harness finds what it is there for."""

import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RUN = [sys.executable, os.path.join(ROOT, "fuzz", "run.py")]
#: A reader of lines like "PUT 3abc" that believes one size too many.
_PLANTED = '''
"""A planted defect."""
WORDS = (b"Q", b"U", b"B", b"E")
def seeds():
    yield b"PUT 3abc"
def check(data):
    word, size, payload = data[:4], data[4:5], data[5:]
    if word != b"PUT " or not size.isdigit():
        return
    {condition}
        assert len(payload) == int(size), "a size was believed"
'''
_NEAR = _PLANTED.format(condition="if True:")
#: The same behind four branches in a row, which nobody gets through by chance: only who sees that one was taken.
_DEEP = _PLANTED.format(condition="".join(f"if payload[{at}:{at + 1}] != b'{byte}':\n        return\n    " for at, byte in enumerate("QUBE")) + "if True:")
_ATHERIS = importlib.util.find_spec("atheris")
_has_atheris = pytest.mark.skipif(_ATHERIS is None, reason="atheris is not installed; 'make fuzz' installs it where there is one")


def _run(*words, **options):
    return subprocess.run([*RUN, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=ROOT, **options)


def test_no_target_finds_a_defect(tmp_path):
    # Without atheris an input takes ten times as long.
    done = _run("--runs", "2000" if _ATHERIS else "200", "--seed", "1", "--keep", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {module.name for module in pkgutil.iter_modules([os.path.join(ROOT, "fuzz", "targets")])}
    assert {line.split()[0] for line in done.stdout.splitlines() if line.endswith("no defect")} == names
    assert len(names) >= 10


@pytest.mark.parametrize("engine, source", [pytest.param("atheris", _DEEP, marks=_has_atheris), ("hypothesis", _NEAR)])
def test_a_planted_defect_is_found_and_can_be_seen_again(tmp_path, engine, source):
    planted = tmp_path / "planted.py"
    planted.write_text(source)
    done = _run("--runs", "50000" if engine == "atheris" else "2000", "--seed", "1", "--engine", engine, "--keep", str(tmp_path), str(planted))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DEFECT: AssertionError: a size was believed" in done.stdout
    # What it says to do shows the same.
    shown = done.stdout.splitlines()[-1].strip()
    again = subprocess.run(shown, shell=True, capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 1
    assert "AssertionError: a size was believed" in again.stderr
    seed = tmp_path / "seed"
    seed.write_bytes(b"PUT 3abc")
    assert _run(str(planted), "--input", str(seed)).returncode == 0


def test_a_parser_that_ends_the_process_hides_nothing(tmp_path):
    ending = tmp_path / "ending.py"
    ending.write_text("import os\ndef seeds():\n    yield b'a'\ndef check(data):\n    os._exit(0)\n")
    done = _run("--runs", "100", "--engine", "hypothesis", "--keep", str(tmp_path), str(ending))
    assert (done.returncode, "DEFECT" in done.stdout) == (1, True)


def test_without_atheris_it_says_so_in_one_line_and_goes_on(tmp_path):
    hidden = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfound = importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *more: None if name == 'atheris' else found(name, *more)\n"
    )
    done = _run("--runs", "50", "--keep", str(tmp_path), "ids", env=hidden)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "atheris is not installed: hypothesis goes on without it, and finds less"
    assert second.split()[:2] == ["ids", "hypothesis"]
    done = _run("--engine", "atheris", "ids", env=hidden)
    assert (done.returncode, "tools/bootstrap.py --fuzz" in done.stderr) == (2, True)
