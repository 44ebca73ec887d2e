# SPDX-License-Identifier: GPL-2.0-or-later
"""Draws boxes, arrows and words as SVG that can be read on a light and on a dark page. The same calls give the same bytes."""

import dataclasses
from xml.sax.saxutils import escape

#: Width of a character, in parts of its size: that of a wide font (DejaVu Sans), so that words fit in any.
_ADVANCE = 0.64
_LINE = 18
_STYLE = """\
.page { fill: #ffffff } .zone { fill: #f3f5f8; stroke: #8a94a3; stroke-dasharray: 5 4 } .box { fill: #ffffff; stroke: #3a4657 }
.dom0 { fill: #e3edff; stroke: #2f5fb3 } .good { fill: #e2f5e6; stroke: #2c7a3f } .bad { fill: #fde8e6; stroke: #b3372b }
.line { fill: none; stroke: #3a4657; stroke-width: 1.5 } .life { stroke: #8a94a3; stroke-dasharray: 3 4 } .head { fill: #3a4657 }
text { font-family: sans-serif; fill: #1c232d } .name { font-weight: bold } .note { fill: #55606e }
@media (prefers-color-scheme: dark) {
.page { fill: #15191f } .zone { fill: #1d232b; stroke: #76818f } .box { fill: #232b35; stroke: #a9b4c2 }
.dom0 { fill: #1c2f52; stroke: #7aa5ee } .good { fill: #173a21; stroke: #6cc384 } .bad { fill: #4a201c; stroke: #ee8c80 }
.line { stroke: #a9b4c2 } .life { stroke: #76818f } .head { fill: #a9b4c2 }
text { fill: #e6ebf1 } .note { fill: #a9b4c2 }
}"""


@dataclasses.dataclass(frozen=True)
class Words:
    """A line of words, and the room that it takes.

    Attributes:
        text: str.
        left, top, right, bottom: float, of the room.
    """

    text: str
    left: float
    top: float
    right: float
    bottom: float


class Picture:
    """A picture.

    Args:
        title, description: str, for who can't see it.
        width, height: int, of the page.
    """

    def __init__(self, title, description, width, height):
        self.width, self.height = width, height
        #: Where words stand: a test looks whether they are in each other's way.
        self.words = []
        self._title, self._description = title, description
        self._parts = []

    def zone(self, x, y, width, height, name):
        """A place that has things in it, with its name at the upper left."""
        self._rectangle(x, y, width, height, "zone", 8)
        self.text(x + 12, y + 21, name, "name", "start")

    def box(self, x, y, width, height, *lines, kind="box"):
        """A thing; the first line is its name."""
        self._rectangle(x, y, width, height, kind, 5)
        top = y + height / 2 - _LINE * (len(lines) - 1) / 2 + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + number * _LINE, line, "name" if number == 0 else "note")

    def arrow(self, *points, ends=1):
        """A line through points (x, y), with a head at its end, or (``ends=2``) at both."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        start = ' marker-start="url(#head)"' if ends == 2 else ""
        self._parts.append(f'<polyline class="line" points="{path}" marker-end="url(#head)"{start}/>')

    def line(self, x, y, to_x, to_y):
        """A thin line."""
        self._parts.append(f'<line class="life" x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}"/>')

    def text(self, x, y, line, kind="note", anchor="middle", size=13):
        """A line of words.

        Args:
            x, y: float, where it begins, has its middle, or ends; its baseline.
            line: str.
            kind: str: ``name`` or ``note``.
            anchor: str: ``start``, ``middle`` or ``end``.
            size: int, of its characters.
        """
        room = len(line) * size * _ADVANCE
        left = x - {"start": 0, "middle": room / 2, "end": room}[anchor]
        self.words.append(Words(line, left, y - size, left + room, y + size * 0.25))
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(line)}</text>')

    def svg(self):
        """The picture as text."""
        head = '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self._title)}</title>",
                f"<desc>{escape(self._description)}</desc>",
                f"<style>\n{_STYLE}\n</style>",
                f'<defs>{head}<path class="head" d="M0,0 L10,5 L0,10 z"/></marker></defs>',
                f'<rect class="page" width="{self.width}" height="{self.height}"/>',
                *self._parts,
                "</svg>\n",
            ]
        )

    def _rectangle(self, x, y, width, height, kind, radius):
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>')
