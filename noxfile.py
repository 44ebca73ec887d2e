# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix: the tests under each Salt in the field. make test runs the newest whole, and "oldest".

    nox                                  every Salt, with the Python that nox runs on
    nox -s "tests(salt='3007')"          one of them
    nox -s tests -- tests/functional     a part of the tests
    nox -s oldest                        what depends on Salt most, under the oldest one
"""

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True
SALTS = ["3006", "3007", "3008"]
#: What depends on Salt most: its loader, its states, and its minion with the engine, from pillar to a VM's command.
_OF_SALT = ("tests/functional", "tests/e2e/test_in_templates.py::test_the_example_of_a_pillar_can_be_applied_as_it_is")


@nox.session
@nox.parametrize("salt", SALTS)
def tests(session, salt):
    """All tests, or those named, under one Salt."""
    _run(session, salt, *(session.posargs or ("tests",)))


@nox.session
def oldest(session):
    """The tests that depend on Salt most, under the oldest one."""
    _run(session, SALTS[0], *_OF_SALT)


def _run(session, salt, *words):
    # Salt 3006 does not name looseversion, which it imports.
    session.install("--quiet", f"salt=={salt}.*", "looseversion", "pytest>=7", "pytest-salt-factories>=1.0", "pytest-xdist", "hypothesis")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *words)
