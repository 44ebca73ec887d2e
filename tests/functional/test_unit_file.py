# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's unit, in the eyes of the real systemd."""

import os
import subprocess

from conftest import ROOT

_UNIT = os.path.join(ROOT, "qvm-remote-formula", "qvm-remote", "files", "qvm-remote.service")
#: Exposure as systemd-analyze counts it, times ten; the README names 2.9 (systemd 252), and versions differ a little.
_EXPOSURE_MAX = 35


def _analyze(*words):
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


def test_the_unit_is_one_that_systemd_understands(tmp_path):
    with open(_UNIT, encoding="utf-8") as file:
        text = file.read()
    # Salt's programs are elsewhere here; systemd looks whether they are there.
    text = text.replace("/usr/bin/salt-call", "/usr/bin/true").replace("/usr/bin/salt-minion", "/usr/bin/true")
    path = tmp_path / "qvm-remote.service"
    path.write_text(text)
    done = _analyze("verify", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    path.write_text(text.replace("Restart=on-failure", "Restart=on-falure"))
    assert "on-falure" in _analyze("verify", str(path)).stderr


def test_the_unit_is_hardened_as_the_readme_says():
    within = _analyze("security", "--offline=true", f"--threshold={_EXPOSURE_MAX}", _UNIT)
    assert within.returncode == 0, within.stdout
    # A threshold that is out of reach shows that there is a check.
    assert _analyze("security", "--offline=true", "--threshold=5", _UNIT).returncode != 0


def test_what_vchan_needs_of_xen_is_open_to_the_service():
    with open(_UNIT, encoding="utf-8") as file:
        lines = file.read().splitlines()
    allowed = {line.partition("=")[2] for line in lines if line.startswith("DeviceAllow=")}
    # Xen's libraries open these (tools/libs: call, evtchn, gnttab, vchan, store); without one of them no qube is reached.
    assert allowed == {f"/dev/xen/{name} rw" for name in ("evtchn", "hypercall", "gntdev", "gntalloc", "privcmd", "xenbus", "xenbus_backend")}
