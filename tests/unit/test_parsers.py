# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM sends, made by the real other side or near to it: it goes in and out unchanged, whatever was changed in it is noticed, and
nothing but what is documented comes out. The same properties over any bytes are those of fuzz/targets.
"""

import asyncio
import hashlib
import json
import os
import re
import string
import subprocess
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pullrpc import agentless, tokens
from pullrpc.aio import run
from pullrpc.duplex import Duplex
from pullrpc.errors import FrameError
from pullrpc.frames import HEADER_MAX, PAYLOAD_MAX, FrameReader, encode_frame
from pullrpc.ids import cid_time, new_cid
from pullrpc.layout import PROBLEMS, Queue
from pullrpc.policy import split_plain
from pullrpc.session import read_poll
from pullrpc.validate import parse_argv
from qvm_remote_client.agent import Agent

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "fuzz"))

from targets import audit, found, stream  # noqa: E402

KEY = bytes(range(32))
CID = "20260131-235959-4711-0badcafe"
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])

_json = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
_headers = st.dictionaries(st.text(max_size=8), _json, max_size=4)
_frames = st.lists(st.tuples(_headers, st.binary(max_size=300)), max_size=5)
_words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@pytest.fixture(scope="module", autouse=True)
def _scratch(tmp_path_factory):
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("targets"))
    yield
    tempfile.tempdir = before


@st.composite
def _changed(draw, whole):
    """Bytes with one place in them that was changed."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 4)))
    changed = whole[:start] + draw(st.binary(max_size=4)) + whole[end:]
    return changed if changed != whole else whole + b"x"


def _pieces(data, cuts):
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in zip(edges, edges[1:])]


# Frames and sessions


@settings(few, max_examples=40)
@given(_frames, st.lists(st.integers(0, 5000), max_size=12), st.binary(max_size=7))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(frames, cuts, rest):
    read_end, write_end = os.pipe()
    reader, out = FrameReader(read_end), []
    for piece in _pieces(b"".join(encode_frame(*frame) for frame in frames) + rest, cuts):
        os.write(write_end, piece)
        reader.poll()
        while (frame := reader.try_frame(300)) is not None:
            out.append(frame)
    assert out == frames
    # Not a byte more was used than the frames have.
    assert bytes(reader._buffer) == rest
    os.close(write_end)
    os.close(read_end)


def test_a_reader_that_nobody_asks_holds_one_frame_at_most():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    reader, sent = FrameReader(read_end), 0
    for _ in range(200):
        try:
            sent += os.write(write_end, bytes(1 << 16))
        except BlockingIOError:
            break
        reader.poll()
    assert len(reader._buffer) <= 8 + HEADER_MAX + PAYLOAD_MAX + (1 << 16)
    assert sent < 1 << 20
    os.close(write_end)
    os.close(read_end)


@few
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.lists(st.integers(0, 5000), max_size=12))
def test_each_request_gets_its_own_answer_however_the_stream_is_cut(payloads, cuts):
    async def play():
        requests_read, requests_write = os.pipe2(os.O_NONBLOCK)
        answers_read, answers_write = os.pipe2(os.O_NONBLOCK)
        duplex = Duplex(requests_write, answers_read, 20)
        asked = [duplex.ask({"op": "x"}, payload_max=300) for _ in payloads]
        for piece in _pieces(b"".join(encode_frame({"n": number}, payload) for number, payload in enumerate(payloads, 1)), cuts):
            os.write(answers_write, piece)
            await asyncio.sleep(0)
        assert [await one for one in asked] == [({"n": number}, payload) for number, payload in enumerate(payloads, 1)]
        duplex.close()
        for fd in (requests_read, requests_write, answers_read, answers_write):
            os.close(fd)

    run(play())


@pytest.mark.parametrize("number", [True, 1.0, "1", [1], None, 2, 0, -1])
def test_an_answer_with_nearly_the_right_number_is_out_of_turn(number):
    async def play():
        requests_read, requests_write = os.pipe2(os.O_NONBLOCK)
        answers_read, answers_write = os.pipe2(os.O_NONBLOCK)
        duplex = Duplex(requests_write, answers_read, 20)
        asked = duplex.ask({"op": "x"})
        os.write(answers_write, encode_frame({"n": number}))
        with pytest.raises(FrameError, match="out of turn"):
            await asked
        for fd in (requests_read, requests_write, answers_read, answers_write):
            os.close(fd)

    run(play())


# What lies in a queue, told by the real agent and by the real script


_COMMANDS = st.dictionaries(
    st.builds("{}-{:06d}-{}-{:08x}".format, st.sampled_from(["20260131", "20991231"]), st.integers(0, 235959), st.integers(0, 9999999999), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.binary(max_size=200), st.none() | st.binary(max_size=160), st.none() | st.binary(max_size=50)),
    max_size=6,
)
_STRANGE = st.lists(st.binary(min_size=1, max_size=40).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b"..")), max_size=3)


def _fill(home, commands, cancels, strange):
    queue = Queue(os.path.join(home, ".qvm-remote"))
    queue.make_folders()
    for name in strange:
        _put(os.fsencode(queue.pending()) + name, b"x")
    for cid, parts in commands.items():
        for suffix, data in zip(("", ".auth", ".in"), parts):
            if data is not None:
                _put(queue.pending(cid + suffix), data)
    for cid in cancels:
        _put(queue.pending(f"{cid}.cancel"), b"")
    return queue


def _put(path, data):
    with open(path, "wb") as file:
        file.write(data)


def _check_listed(items, commands, room):
    assert [item.untrusted_cid for item in items] == sorted(commands)[:room]
    for item in items:
        sizes = [-1 if data is None else len(data) for data in commands[item.untrusted_cid]]
        assert [item.command_size, item.token_size, item.stdin_size] == sizes
        # One that is empty need not come along: it is refused by its size.
        comes = sizes[1] >= 0 and (item.command is not None or sizes[0] + sizes[1] > 0)
        assert (item.command, item.token) == (commands[item.untrusted_cid][:2] if comes else (None, None))


@few
@given(_COMMANDS, st.lists(st.just(CID), max_size=1), _STRANGE, st.integers(0, 8))
def test_what_the_agent_lists_is_what_dom0_reads(commands, cancels, strange, room):
    with tempfile.TemporaryDirectory() as home:
        queue = _fill(home, commands, cancels, strange)
        header, payload = Agent(queue)._poll({"wait": 0, "max": room, "inline": 1 << 16}, b"")
        items, cancelled = read_poll(json.loads(json.dumps(header)), payload, room)
    _check_listed(items, commands, room)
    assert cancelled == cancels


@settings(few, max_examples=8)
@given(_COMMANDS, st.lists(st.just(CID), max_size=1), _STRANGE, st.integers(0, 8))
def test_what_the_script_lists_is_what_dom0_reads(commands, cancels, strange, room):
    with tempfile.TemporaryDirectory() as home:
        _fill(home, commands, cancels, strange)
        script = agentless._BEGIN + f"set -- {room} {1 << 16}\n" + agentless._LIST
        done = subprocess.run(["/bin/sh", "-s"], input=script.encode("ascii"), env={"HOME": home, "PATH": "/usr/bin:/bin"}, capture_output=True, check=True)
    items, cancelled, has_agent = agentless._read_listing(done.stdout, room)
    _check_listed(items, commands, room)
    assert (cancelled, has_agent) == (cancels, False)


@given(st.sets(st.sampled_from(PROBLEMS)), st.none() | st.binary(min_size=32, max_size=32))
def test_what_a_vm_says_of_its_queue_is_what_dom0_reads(problems, key):
    output = b"".join(b"P %s\n" % word.encode() for word in problems) + (b"" if key is None else b"K %s\n" % key.hex().encode()) + b"\nEND\n"
    seen = agentless._read_found(output)
    usable = key is not None and len(set(key)) >= 8
    assert seen.fingerprint == (tokens.fingerprint(key) if usable else None)
    assert set(seen.problems) == problems | ({"key-malformed"} if key is not None and not usable else set())
    found.check_found(seen)


@pytest.mark.parametrize("line", [b"P", b"Q folder-mode", b"P  folder-mode", b"xxfolder-mode", b"P folder-mode ", b"P folder-mode\r\nP key-mode"])
def test_a_line_about_the_queue_that_the_script_does_not_print_is_refused(line):
    with pytest.raises(FrameError):
        agentless._read_found(line + b"\n\nEND\n")


@pytest.mark.parametrize("size", [1 << 63, 10**400, True, 1.5, "1", None], ids=["63-bits", "400-digits", "true", "1.5", "text", "null"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_size_that_no_file_has_is_refused(size, at):
    item = [CID, 1, 1, 1, 0]
    item[at] = size
    with pytest.raises(FrameError):
        read_poll({"items": [item], "cancels": []}, b"", 1)


# Ids, tokens, results


@given(st.integers(0, 253402300799))
def test_a_new_id_says_when_it_was_made(now):
    assert cid_time(new_cid(now)) == now


_request = st.tuples(st.integers(1, 9999999), st.sampled_from(tokens.FORMS), st.binary(max_size=40), st.sampled_from([b"", hashlib.sha256(b"in").digest()]))


@given(_request, st.data())
def test_a_token_line_is_read_as_it_was_made_and_any_other_does_not_fit(request_, data):
    timeout, form, command, digest = request_
    line = tokens.make_token(KEY, "work", CID, timeout, form, command, digest)
    token = tokens.parse_token(line)
    assert (token.version, token.timeout, token.form, token.stdin_digest) == (2, timeout, form, digest)
    assert tokens.token_matches(KEY, "work", CID, token, command)
    changed = data.draw(_changed(line))
    try:
        other = tokens.parse_token(changed)
    except tokens.Refused:
        return
    is_same = changed.removesuffix(b"\n").lower() == line.removesuffix(b"\n")
    assert tokens.token_matches(KEY, "work", CID, other, command) is is_same


_meta_fields = st.dictionaries(
    st.text(string.ascii_lowercase + "-", min_size=1, max_size=8),
    st.integers() | st.text(string.ascii_letters + string.digits + ".:- ", max_size=12),
    max_size=4,
)


@given(_meta_fields, st.data())
def test_a_results_fields_are_read_as_they_were_made_and_any_others_are_not_dom0s(fields, data):
    digests = [hashlib.sha256(part).digest() for part in (b"out", b"err")]
    meta = tokens.make_meta(KEY, CID, *digests, fields)
    made = {name: str(value) for name, value in fields.items()}
    assert tokens.read_meta(KEY, CID, *digests, meta) == (made, True)
    # Without the last newline, say, it is the same.
    read, authentic = tokens.read_meta(KEY, CID, *digests, data.draw(_changed(meta)))
    assert not authentic or read == made


@given(_meta_fields, _meta_fields)
def test_no_two_results_have_the_same_form(one, other):
    made = [tokens.make_meta(KEY, CID, b"", b"", fields) for fields in (one, other)]
    shown = [{name: str(value) for name, value in fields.items()} for fields in (one, other)]
    assert (made[0] == made[1]) == (shown[0] == shown[1])


# Commands


@given(st.lists(_words, min_size=1, max_size=6).filter(lambda words: words[0]), st.booleans())
def test_an_argument_vector_is_read_as_it_was_made(words, ascii_only):
    assert list(parse_argv(json.dumps(words, ensure_ascii=ascii_only))) == words


def _quoted(word, style):
    """A word as a shell takes it, in one of the ways there are."""
    plain = re.fullmatch(r"[a-zA-Z0-9_@%+:,./^-]+", word)
    if style == 0 and plain:
        return word
    if style == 1 and not set(word) & set('$`\\!"'):
        return f'"{word}"'
    return "\"'\"".join(f"'{part}'" for part in word.split("'"))


@few
@given(st.lists(st.lists(st.tuples(_words, st.integers(0, 2)), min_size=1, max_size=5), min_size=1, max_size=20), st.sampled_from([" ", "\t", "  "]))
def test_however_words_are_quoted_they_are_split_as_bash_does(lines, blank):
    lines = [[("run", 0), *words] for words in lines]
    shown = [blank.join(_quoted(*word) for word in words) for words in lines]
    assert [list(split_plain(line)) for line in shown] == [[word for word, _ in words] for words in lines]
    program = "".join(f"printf '%s\\0' {line}\n" for line in shown)
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.stdout.decode().split("\0")[:-1] == [word for words in lines for word, _ in words]


# Streams, and the audit log


@settings(few, max_examples=150)
@given(st.integers(0, 255), st.data())
def test_whatever_is_changed_in_a_stream_what_is_shown_is_a_beginning_of_it(at, data):
    whole = data.draw(st.sampled_from(list(stream.seeds())))[1:]
    stream.check(bytes([at]) + data.draw(_changed(whole) | st.just(whole)))


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**4299, "work", "\x1b[2J\u202e", CID, "0" * 64]) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["file", "keep", "torn", "lost", "ahead", "older", "x"]), inner, max_size=3),
    max_leaves=4,
)
_names = st.sampled_from(["seq", "prev", "time", "what", "vm", "id", "log", "whole", "sha256", "exit", "status", "code", "command"])
_lines = st.dictionaries(_names, _values, max_size=8).map(lambda line: json.dumps({"seq": 1, "prev": "0" * 64, **line}).encode())


@settings(few, max_examples=50)
@given(st.lists(_lines, max_size=4), st.lists(_lines, max_size=4), st.data())
def test_whatever_stands_in_the_audit_log_it_can_be_read_and_written_to(older, current, data):
    head = data.draw(st.sampled_from([seed.partition(b"\xfe")[0] for seed in audit.seeds()]))
    audit.check(b"\xfe".join((head, b"\n".join(older) + b"\n", b"\n".join(current) + b"\n")))


_BAD_LINES = {
    "no-word": b'"whole":false,"vm":[]',
    "no-count": b'"log":{"lost":"\\u001b[2J"}',
    "no-count-of-lines": b'"log":{"ahead":"\\u001b[2J"}',
    "no-file": b'"log":{"file":%s,"keep":1}' % (b"9" * 4299),
    "no-end": b'"what":"ended","time":"2026-11-24","vm":"work","id":"x","exit":%s' % (b"9" * 4299),
    "no-name": b'"whole":false,"vm":"\\u001b","id":"\\u001b","time":"2100"',
}


@pytest.mark.parametrize("rest", _BAD_LINES.values(), ids=_BAD_LINES)
def test_a_line_that_is_none_of_ours_does_not_stop_whoever_reads_the_log(rest):
    audit.check(b'\xfe\xfe{"seq":1,"prev":"%s",%s}\n' % (b"0" * 64, rest))


def test_a_number_that_is_too_long_to_be_counted_on_does_not_stop_whoever_reads_or_writes_the_log():
    audit.check(b'\xfe\xfe{"seq":%s,"prev":"%s"}\n' % (b"9" * 4300, b"0" * 64))


@pytest.mark.parametrize("digest", [b'"' + b"0" * 63, b"x" * 64, b"0" * 63])
def test_a_head_that_is_none_is_not_gone_on_from(digest):
    head = b"boot 1 1 1 " + digest
    audit.check(head.ljust(255) + b'\n\xfe\xfe{"seq":1,"prev":"%s","log":{"file":1,"keep":12}}\n' % (b"0" * 64))


@pytest.mark.parametrize("depth", [200, 600, 8000])
def test_a_line_nested_deeply_does_not_stop_whoever_reads_the_log(depth):
    line = b'{"seq":1,"prev":"%s","time":"2026-11-24","vm":"work","id":"x","x":%s}' % (b"0" * 64, b"[" * depth + b"]" * depth)
    audit.check(b"\xfe\xfe" + line + b"\n")


@given(st.text(max_size=60))
def test_a_command_stands_in_the_audit_log_as_it_was(text):
    path = os.path.join(tempfile.mkdtemp(), "audit.log")
    log = audit.AuditLog(path)
    command = text.encode("utf-8", "replace").decode("utf-8")
    log.write("accepted", "work", CID, **audit.describe_command(command))
    with open(path, "rb") as file:
        raw = file.read()
    assert all(32 <= byte < 127 for byte in raw[:-1]) and raw.endswith(b"\n")
    assert json.loads(raw)["command"] == command
    assert audit.audit_read.verify(path, 12)["problems"] == []
