# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the protocol package and the client importable, as Salt's loader and the launcher do."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "_utils"), os.path.join(ROOT, "client"), os.path.join(ROOT, "sim")]
