# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions of the simulator's qubesadmin."""


class QubesException(Exception):
    """Base of all of them."""


class QubesVMNotRunningError(QubesException):
    """The qube does not run, and was not to be started."""


class QubesDaemonCommunicationError(QubesException):
    """qubesd can't be reached, or said something that can't be understood."""
