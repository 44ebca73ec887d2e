# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured: a module for each scenario, with a function run(place) that gives rows."""
