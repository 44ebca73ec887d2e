# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulator of Qubes OS for developing and testing qvm-remote. Never installed anywhere."""
