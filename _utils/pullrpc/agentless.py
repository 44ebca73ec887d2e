# SPDX-License-Identifier: GPL-2.0-or-later
"""The same conversation without an agent in the VM: one ``qvm-run`` with a POSIX shell script for each turn.

Slower than a session, with the same guarantees; for VMs without our client (or with that of qvm-remote 1.x). One run
looks, takes and fetches; one run writes all results. Only checked ids and base64 ever become part of a script, and
the script travels on stdin, never on a command line.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time

from .aio import Bell
from .errors import AgentUnable, FrameError, KeyringError, SessionBroken, SpoolError
from .layout import PROBLEMS
from .session import CANCELS_MAX, INLINE_MAX, ITEMS_MAX, Found, Item
from .tokens import fingerprint, parse_key
from .transport import run_bounded

_SHELL = "exec /bin/sh -s"
#: Longest listing, bytes: the names and the inlined commands in base64.
_LISTING_MAX = INLINE_MAX * 2 + (ITEMS_MAX + CANCELS_MAX) * 128
#: Each here-document holds this much of a result, bytes: what a shell holds in memory.
_PIECE = 3 << 16
#: A run hands results over at this rate or is given up, bytes a second.
_RATE_MIN = 1 << 19
#: A VM that says it has an agent by now is asked again for one, at the soonest after this long, seconds: it may be lying.
_LIFETIME_MIN = 10
#: A key file: 64 digits and a newline; one byte more shows that it is too long.
_KEY_MAX = 66
#: Names that are none of a command, and are answered in one turn.
_REJECTS_MAX = 50
#: Ended without a queue.
_NO_QUEUE = 3
_UNABLE = "the qube could not take its results (is its disk full?)"

_D8 = "[0-9]" * 8
_D6 = "[0-9]" * 6
_H8 = "[0-9a-f]" * 8

# The same as the agent's ops "key" and "set-key"; the words are those of layout.PROBLEMS. A key that is set stands in
# the script, which comes on stdin; printf is the shell's own, so that it is on no command line.
_INSPECT = f"""\
cd || exit 1
for name in .qvm-remote .qvm-remote/queue .qvm-remote/queue/pending .qvm-remote/queue/running .qvm-remote/queue/results .qvm-remote/history; do
    if [ -L "$name" ]; then echo P folder-symlink
    elif [ ! -e "$name" ]; then echo P folder-missing
    elif [ ! -d "$name" ]; then echo P folder-symlink
    elif [ ! -O "$name" ]; then echo P folder-owner
    elif [ "$(stat -c %a "$name")" != 700 ]; then echo P folder-mode
    fi
done
key=.qvm-remote/auth.key
if [ -L "$key" ]; then echo P key-symlink
elif [ ! -e "$key" ]; then echo P key-missing
elif [ ! -f "$key" ]; then echo P key-symlink
else
    [ -O "$key" ] || echo P key-owner
    case $(stat -c %a "$key") in 600|400) ;; *) echo P key-mode ;; esac
    printf 'K ' && head -c {_KEY_MAX} "$key"
fi
echo
echo END
"""
_SET_KEY = """\
set -euC
umask 077
cd
for name in .qvm-remote .qvm-remote/queue .qvm-remote/queue/pending .qvm-remote/queue/running .qvm-remote/queue/results .qvm-remote/history; do
    [ ! -L "$name" ]
    mkdir -p "$name"
    chmod 0700 "$name"
done
[ ! -d .qvm-remote/auth.key ]
rm -rf .qvm-remote/.auth.key.part
printf '%s\\n' {digits} > .qvm-remote/.auth.key.part || {{ rm -f .qvm-remote/.auth.key.part; exit 1; }}
mv -f .qvm-remote/.auth.key.part .qvm-remote/auth.key
"""

# Nothing that lies there is written into: it may have another name as well, the key's for one. What is written goes to a file that is made
# for it ("new NAME", then into "$half"), with -C, so that none is opened that is there; and that takes the other one's place ("keep NAME").
# A folder there would take it in: it goes first.
_BEGIN = f"""\
set -uC
umask 077
for name in "" /queue /queue/pending /queue/running /queue/results; do
    [ ! -L "$HOME/.qvm-remote$name" ] || exit {_NO_QUEUE}
done
cd "$HOME/.qvm-remote/queue/pending" 2>/dev/null || exit {_NO_QUEUE}
clear() {{
    if [ -d "$1" ]; then rm -rf "$1"; fi
}}
new() {{
    half=${{1%/*}}/.${{1##*/}}.part
    if [ -e "$half" ] || [ -L "$half" ]; then rm -rf "$half"; fi
}}
keep() {{
    clear "$1" && mv -f "$half" "$1"
}}
new ../../dom0-seen
true > "$half" && keep ../../dom0-seen
"""

# What vanishes between a look at it and the next one, as its client takes it back, is as good as never there.
# A name that is no command id is answered here, some of them in a turn: the agent does the same (client/qvm_remote_client/agent.py, _reject).
_LIST = f"""\
reject() {{
    [ "$count" -lt {_REJECTS_MAX} ] || return 0
    [ -d ../rejected ] && [ ! -L ../rejected ] || {{ rm -rf ../rejected; mkdir ../rejected; }}
    count=$((count + 1))
    mv -f -- "$1" "../rejected/$$.$count" 2>/dev/null || return 0
    [ "${{#1}}" -le 200 ] || return 0
    new "../results/$1.err"
    printf 'qvm-remote: refused: this file name is not a command id (YYYYMMDD-HHMMSS-PID-8HEX)\\n' > "$half" && keep "../results/$1.err"
    new "../results/$1.exit"
    printf '125\\n' > "$half" && keep "../results/$1.exit"
}}
is_cid() {{
    case $1 in {_D8}-{_D6}-?*-{_H8}) ;; *) return 1 ;; esac
    pid=${{1#????????-??????-}}
    pid=${{pid%-????????}}
    case $pid in *[!0-9]*|???????????*) return 1 ;; esac
}}
size() {{
    bytes=
    if [ -f "$1" ] && [ ! -L "$1" ] && [ -r "$1" ]; then bytes=$({{ wc -c < "$1"; }} 2>/dev/null | tr -d ' '); fi
    echo "${{bytes:--1}}"
}}
count=0 room=$1 inline=$2 cancels={CANCELS_MAX}
for name in *; do
    [ -e "$name" ] || [ -L "$name" ] || continue
    stem=${{name%%.*}}
    if ! is_cid "$stem"; then reject "$name"; continue; fi
    case $name in
    "$stem.cancel") [ "$cancels" -gt 0 ] && echo "C $stem" && cancels=$((cancels - 1)); continue ;;
    "$stem.auth"|"$stem.in") continue ;;
    "$stem") ;;
    *) reject "$name"; continue ;;
    esac
    [ "$room" -gt 0 ] || continue
    room=$((room - 1))
    command_size=$(size "$stem") token_size=$(size "$stem.auth") stdin_size=$(size "$stem.in")
    [ "$command_size" -ge 0 ] || {{ reject "$name"; rm -rf "$stem.auth" "$stem.in"; continue; }}
    echo "I $stem $command_size $token_size $stdin_size"
    if [ "$token_size" -ge 0 ] && [ $((command_size + token_size)) -le "$inline" ]; then
        inline=$((inline - command_size - token_size))
        echo "D $(head -c "$command_size" "$stem" | base64 | tr -d '\\n') $(head -c "$token_size" "$stem.auth" | base64 | tr -d '\\n')"
    fi
done
! command -v qvm-remote >/dev/null 2>&1 || echo A
echo END
"""

# What was written of a result that does not fit is not to take the others' room. Where the last of its files is there it has arrived before.
_GIVE_UP = """\
give_up() {
    rm -rf "$half"
    [ -e "../results/$1.exit" ] || rm -rf "../results/$1.out" "../results/$1.err" "../results/$1.meta"
}
"""
#: What ends an answer that is whole.
_END = b"END\n"


class Agentless:
    """Turns with a VM that has no agent; used as a :class:`pullrpc.session.Session` is.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.
    """

    kind = "agentless"
    #: Most that one :meth:`fetch` gives, bytes.
    fetch_max = 1 << 22
    #: A command's output reaches the VM when it has ended.
    streams = False

    def __init__(self, config, vm):
        self._config = config
        self._vm = vm
        self._begun = time.monotonic()
        self._next = self._begun
        self._told = []
        self._has_agent = False
        #: One turn at a time; whoever has something to say ends the pause before the next look.
        self._turn = asyncio.Lock()
        self._wanted = Bell()

    async def hello(self):
        """Say what dom0 takes, so that a client there can refuse what is over it.

        Raises:
            SessionBroken, TransportError
        """
        names = ("timeout_max", "command_max", "stdin_max", "max_age")
        lines = "".join(f"{name} {getattr(self._config, name)}\\n" for name in names)
        self._told.append(f"new ../../dom0-limits; printf '{lines}' > \"$half\" && keep ../../dom0-limits\n")

    async def inspect(self):
        """See :meth:`pullrpc.session.Session.inspect`."""
        code, untrusted_output = await self._run([_INSPECT.encode("ascii")], 1024, self._config.answer_wait)
        if code:
            raise SessionBroken("the qube can't be asked (is it running?)")
        return _read_found(untrusted_output)

    async def set_key(self, key):
        """See :meth:`pullrpc.session.Session.set_key`."""
        code, _ = await self._run([_SET_KEY.format(digits=key.hex()).encode("ascii")], 64, self._config.answer_wait)
        if code:
            raise AgentUnable("the qube could not store its key (is its disk full, or ~/.qvm-remote a symbolic link?)")

    async def poll(self, wait, room):
        """See :meth:`pullrpc.session.Session.poll`; here the waiting is done in dom0, at a fixed pace."""
        if self._has_agent and time.monotonic() - self._begun > _LIFETIME_MIN:
            raise SessionBroken("the qube has an agent now")
        if wait and await self._wanted.wait(min(self._next - time.monotonic(), wait)) and time.monotonic() < self._next:
            return [], []
        news = self._news()
        script = _BEGIN + news + f"set -- {room} {INLINE_MAX}\n" + _LIST
        code, untrusted_output = await self._run([script.encode("ascii")], _LISTING_MAX, self._config.answer_wait)
        self._next = time.monotonic() + self._config.agentless_interval
        if code == _NO_QUEUE:
            self._told.insert(0, news)
            return [], []
        if code:
            raise SessionBroken("the qube can't be asked (is it running, is its disk full?)")
        items, cancels, untrusted_claim = _read_listing(untrusted_output, room)
        # The agent of qvm-remote 1.x is none: under it, "agent" is a command for dom0.
        self._has_agent = untrusted_claim and not self._config.accept_v1
        return items, cancels

    async def fetch(self, cid, part, offset, size):
        """See :meth:`pullrpc.session.Session.fetch`."""
        name = cid + {"command": "", "auth": ".auth", "in": ".in"}[part]
        size = min(size, self.fetch_max)
        script = f"{_BEGIN}[ -L {name} ] || [ ! -f {name} ] || tail -c +{offset + 1} {name} | head -c {size}\n"
        code, data = await self._run([script.encode("ascii")], size, self._config.answer_wait + size // _RATE_MIN)
        if code:
            raise SessionBroken("a command could not be fetched")
        return data

    async def take(self, cids):
        """Remember to tell the VM, in the next turn, that dom0 has some commands."""
        self._told += [_take(cid) for cid in cids]

    async def drop(self, cids):
        """Remember to tell the VM that cancelled commands are done with."""
        self._told += [_forget(cid) for cid in cids]

    async def deliver(self, results):
        """See :meth:`pullrpc.session.Session.deliver`; all results go in one run."""
        results = list(results)
        cids = [result.cid for result in results]
        total = sum(size for result in results for size, _ in result.parts.values())
        self._wanted.ring()
        longest = sum(len(cid) + 1 for cid in cids) + len(_END)
        failed = {}
        code, untrusted_output = await self._run(self._delivery(results, failed), longest, self._config.answer_wait + total // _RATE_MIN)
        self._wanted.clear()
        if code or not (b"\n" + untrusted_output).endswith(b"\n" + _END):
            raise SessionBroken("the qube could not be given its results (is it running?)")
        reached = _read_reached(untrusted_output, cids)
        for cid in reached:
            yield cid
        failed = {cid: failed.get(cid, _UNABLE) for cid in cids if cid not in reached}
        if failed:
            raise AgentUnable("; ".join(sorted(set(failed.values()))), failed)

    async def bye(self):
        """Tell the VM what is left to tell."""
        if self._told:
            await self._run([(_BEGIN + self._news()).encode("ascii")], 0, self._config.answer_wait)

    async def close(self):
        """Nothing is open between turns."""
        return 0

    async def _run(self, data, output_max, wait):
        async with self._turn:
            return await run_bounded(self._config, self._vm, _SHELL, data, output_max, wait)

    def _news(self):
        """What is to be told, once: a turn that fails ends this conversation."""
        told, self._told = self._told, []
        return "".join(told)

    def _delivery(self, results, failed):
        yield (_BEGIN + self._news() + _GIVE_UP).encode("ascii")
        for result in results:
            cid, exit_code, parts = result.cid, result.exit_code, result.parts
            yield b"ok=1\n"
            for part in ("out", "err", "meta"):
                # Opened once: nobody puts another file in its place between two pieces. As an argument of "command" it does not end the shell
                # where it fails.
                yield f'[ -z "$ok" ] || {{ new ../results/{cid}.{part}; command exec 3> "$half"; }} || ok=\n'.encode("ascii")
                left = parts[part][0]
                for chunk in _readable(parts[part][1](0), cid, failed):
                    left -= len(chunk)
                    for at in range(0, len(chunk), _PIECE):
                        piece = base64.encodebytes(chunk[at : at + _PIECE])
                        yield b"[ -z \"$ok\" ] || base64 -d >&3 <<'END' || ok=\n" + piece + b"END\n"
                if left:
                    failed.setdefault(cid, "a result is not as long any more as it was")
                if cid in failed:
                    yield b"ok=\n"
                yield f'exec 3>&-; [ -z "$ok" ] || keep ../results/{cid}.{part} || ok=\n'.encode("ascii")
            yield f'[ -z "$ok" ] || {{ new ../results/{cid}.exit; echo {exit_code} > "$half" && keep ../results/{cid}.exit; }} || ok=\n'.encode("ascii")
            yield f'if [ -z "$ok" ]; then give_up {cid}; else echo {cid}; {_forget(cid).rstrip()}; fi\n'.encode("ascii")
        yield b"echo END\n"


def _readable(chunks, cid, failed):
    """As much of a part as dom0 can read; why it can't read on is put into ``failed``."""
    try:
        yield from chunks
    except SpoolError as err:
        failed[cid] = str(err)


def _take(cid):
    """The lines that move a command to those that dom0 has. Its client may have given up in this moment; the marker stays true all the same."""
    marker = f"../running/{cid}"
    return f"""\
clear {marker}
if ! mv -f {cid} {marker} 2>/dev/null && {{ [ -L {marker} ] || [ ! -f {marker} ]; }}; then
    new {marker}
    true > "$half" && keep {marker}
fi
"""


def _forget(cid):
    """The line that removes all of a request."""
    return f"rm -rf {cid} {cid}.auth {cid}.in {cid}.cancel ../running/{cid}\n"


def _read_listing(untrusted_output, room):
    lines = untrusted_output.split(b"\n")
    if lines[-2:] != [b"END", b""]:
        raise FrameError("the qube's list is cut")
    items, cancels = [], []
    has_agent = lines[-3:-2] == [b"A"]
    for line in lines[: -3 if has_agent else -2]:
        kind, _, rest = line.partition(b" ")
        if kind == b"C":
            cancels.append(_word(rest))
        elif kind == b"I":
            items.append(_read_item(rest))
        elif kind == b"D" and items and items[-1].command is None:
            items[-1] = _with_data(items[-1], rest)
        else:
            raise FrameError("the qube's list is malformed")
    if len(items) > min(room, ITEMS_MAX) or len(cancels) > CANCELS_MAX:
        raise FrameError("the qube's list is too long")
    return items, cancels, has_agent


def _read_reached(untrusted_output, cids):
    lines = untrusted_output.split(b"\n")[:-2]
    reached = [cid for cid in cids if cid.encode("ascii") in lines]
    if lines != [cid.encode("ascii") for cid in reached]:
        raise FrameError("the qube named a result that it was not sent, or named one twice")
    return reached


def _read_found(untrusted_output):
    if not untrusted_output.endswith(b"\nEND\n"):
        raise FrameError("the qube's view of its queue is cut")
    # The key comes last, and may hold anything.
    listing, has_key, untrusted_key = untrusted_output[: -len(b"\nEND\n")].partition(b"K ")
    *lines, rest = listing.split(b"\n")
    problems = {_word(line[2:]) for line in lines}
    if rest or not all(line.startswith(b"P ") for line in lines) or not problems.issubset(PROBLEMS):
        raise FrameError("the qube's view of its queue is malformed")
    shown = None
    if has_key:
        try:
            shown = fingerprint(parse_key(untrusted_key))
        except KeyringError:
            problems.add("key-malformed")
    return Found(shown, tuple(sorted(problems)))


def _word(untrusted_word):
    return untrusted_word.decode("ascii", "replace")


def _read_item(untrusted_line):
    words = untrusted_line.split(b" ")
    if len(words) != 4 or any(len(word) > 20 or not word.removeprefix(b"-").isdigit() for word in words[1:]):
        raise FrameError("the qube's list is malformed")
    return Item(_word(words[0]), *(max(-1, int(word)) for word in words[1:]))


def _with_data(item, untrusted_line):
    words = untrusted_line.split(b" ")
    try:
        command, token = (base64.b64decode(word, validate=True) for word in words)
    except (ValueError, binascii.Error):
        raise FrameError("the qube's list is malformed") from None
    if (len(command), len(token)) != (item.command_size, item.token_size):
        # They were changing as they were read: they are fetched, and then refused.
        return item
    return Item(item.untrusted_cid, item.command_size, item.token_size, item.stdin_size, command, token)
