# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames (pullrpc.frames): however a stream is cut into reads, the same frames come out of it, each uses up exactly its own bytes,
and no more is held than one frame.
"""

import json
import os

from pullrpc.errors import FrameError, SessionBroken
from pullrpc.frames import HEADER_MAX, FrameReader, encode_frame

#: What is read at once beyond a frame (pullrpc.frames).
_READ_SIZE = 1 << 16
_PREFIX = 8
WORDS = (b"\0\0\0\x02\0\0\0\0{}", b"\0\0\0\x07\0\0\0\x01", b'{"n":1}', b"\0\0\x10\0", b"[[[[[[[[")


def seeds():
    """A byte for the largest payload, one for where the stream is cut, and frames."""
    yield b"\0\xff"
    yield b"\x19\x03" + encode_frame({"n": 1}) + encode_frame({"n": 2, "items": []}, b"x" * 100)
    yield b"\x19\x00" + encode_frame({}, b"\0" * 10)[:-1]
    yield b"\x01\x20" + encode_frame({"n": 1}, b"five!")
    yield b"\xff\x01" + (HEADER_MAX + 1).to_bytes(4, "big") + bytes(4)


def check(data):
    """Read one stream in two ways."""
    if len(data) < 2:
        return
    payload_max, step, stream = data[0] * 4, max(data[1] + 1, len(data) // 64), data[2:]
    frames, end = _read(stream, payload_max, step)
    assert (frames, end) == _read(stream, payload_max, len(stream) or 1), "how the stream is cut changes what is read"
    at = 0
    for _, payload in frames:
        header_size, payload_size = (int.from_bytes(stream[at + start : at + start + 4], "big") for start in (0, 4))
        at += _PREFIX + header_size
        assert header_size <= HEADER_MAX and payload_size <= payload_max
        assert payload == stream[at : at + payload_size], "a payload is not the bytes that were sent as such"
        at += payload_size
    assert at <= len(stream)


def _read(stream, payload_max, step):
    """All frames of a stream, and how it ended."""
    frames = []
    read_end, write_end = os.pipe()
    try:
        reader = FrameReader(read_end)
        for at in range(0, len(stream), step):
            os.write(write_end, stream[at : at + step])
            reader.poll()
            assert len(reader._buffer) <= _PREFIX + HEADER_MAX + payload_max + _READ_SIZE
            while _take(reader, payload_max, frames):
                pass
        os.close(write_end)
        write_end = None
        reader.poll()
        while _take(reader, payload_max, frames):
            pass
    except FrameError as err:
        return frames, str(err)
    except SessionBroken:
        return frames, "closed"
    finally:
        os.close(read_end)
        if write_end is not None:
            os.close(write_end)
    raise AssertionError("a stream that ended goes on")


def _take(reader, payload_max, frames):
    frame = reader.try_frame(payload_max)
    if frame is None:
        return False
    header, payload = frame
    assert isinstance(header, dict) and isinstance(payload, bytes)
    try:
        frames.append((json.dumps(header), payload))
    except RecursionError:
        frames.append(("deep", payload))
    return True
