# SPDX-License-Identifier: GPL-2.0-or-later
"""One small module for each parser that reads what a VM sent: ``seeds()`` gives inputs made by our own encoders, ``check(data)`` fails when
the parser does what it must not, ``WORDS`` (if there) are pieces of inputs that are worth putting in, ``COST`` (if there) how much longer one input takes than
another target's.
"""
