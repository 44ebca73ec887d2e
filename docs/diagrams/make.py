#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the pictures of the documentation, beside itself: make diagrams."""

import os

import pictures

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    """Write every picture."""
    for name, draw in pictures.PICTURES.items():
        with open(os.path.join(HERE, f"{name}.svg"), "w", encoding="utf-8") as file:
            file.write(draw().svg())


if __name__ == "__main__":
    main()
