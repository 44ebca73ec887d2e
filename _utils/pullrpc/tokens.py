# SPDX-License-Identifier: GPL-2.0-or-later
"""Tokens and result MACs: how a VM proves a request, and how it knows an answer for dom0's.

A token binds VM, id, timeout, form, command and stdin; nothing of a request can be exchanged after it was made.
The digest of stdin stands in the token line, so that dom0 can check the token before it fetches (and stores) a byte
of stdin. No function here ever puts a key or a MAC into an exception.
"""

from . import PROTOCOL
from .digests import equal, hmac_sha256, sha256
from .errors import KeyringError, Refused

#: How the command's bytes are to be read: a line for the shell, a script, a JSON array of exact arguments,
#: or nothing to run at all (answered by dom0 itself once authenticated).
FORMS = ("shell", "script", "argv", "ping")
#: Longest token line, bytes; a v2 line needs at most 151.
TOKEN_MAX = 256
#: Longest ``.meta``, bytes.
META_MAX = 4096

_HEX = frozenset(b"0123456789abcdefABCDEF")
_EMPTY_DIGEST = b""


def encode(*fields):
    """Join fields so that no two different lists of fields give the same bytes.

    Args:
        fields: str (UTF-8) or bytes.

    Returns:
        bytes: the number of fields, then each one's length and content.
    """
    raw = [field.encode("utf-8") if isinstance(field, str) else field for field in fields]
    return b"".join([len(raw).to_bytes(4, "big")] + [len(field).to_bytes(8, "big") + field for field in raw])


def parse_key(untrusted_text):
    """Read a key file's content.

    Args:
        untrusted_text: bytes, 64 hex digits of either case, at most one newline after them.

    Returns:
        bytes, the 32 of the key.

    Raises:
        KeyringError: it is anything else. The text says what, never the content.
    """
    digits = untrusted_text[:-1] if untrusted_text.endswith(b"\n") else untrusted_text
    if not digits:
        raise KeyringError("the key is empty")
    if len(digits) != 64:
        raise KeyringError(f"the key must be 64 hex digits (256 bits); this is {len(digits)} characters")
    if not _HEX.issuperset(digits):
        raise KeyringError("the key must be 64 hex digits, nothing else")
    key = bytes.fromhex(digits.decode("ascii"))
    if len(set(key)) < 8:
        raise KeyringError("the key is not random (hardly any different bytes); make one with 'qvm-remote key gen'")
    return key


def fingerprint(key):
    """Name a key without giving it away.

    Args:
        key: bytes.

    Returns:
        str, 16 hex digits in groups of four; the same on both sides.
    """
    digest = hmac_sha256(key, encode(f"{PROTOCOL} fingerprint")).hex()
    return ":".join(digest[i : i + 4] for i in range(0, 16, 4))


def _request_mac(key, vm, cid, timeout, form, command, stdin_digest):
    fields = (f"{PROTOCOL} request", vm, cid, str(timeout), form, sha256(command), stdin_digest)
    return hmac_sha256(key, encode(*fields))


def make_token(key, vm, cid, timeout, form, command, stdin_digest=_EMPTY_DIGEST):
    """Make the token line for a request (VM side).

    Args:
        key: bytes, 32.
        vm: str, the VM's own Qubes name.
        cid: str.
        timeout: int, seconds the command may run.
        form: one of :data:`FORMS`.
        command: bytes.
        stdin_digest: bytes, SHA-256 of the command's stdin; empty when it has none.

    Returns:
        bytes, ``v2 <timeout> <form> <sha256 of stdin or -> <hmac>`` and a newline.
    """
    mac = _request_mac(key, vm, cid, timeout, form, command, stdin_digest)
    return f"v2 {timeout} {form} {stdin_digest.hex() or '-'} {mac.hex()}\n".encode("ascii")


class Token:
    """A token line, taken apart but not yet believed.

    Attributes: version (1 or 2), timeout (int seconds, None in v1), form (str), stdin_digest (bytes, may be empty), mac (bytes).
    """

    __slots__ = ("form", "mac", "stdin_digest", "timeout", "version")

    def __init__(self, version, timeout, form, stdin_digest, mac):
        self.version = version
        self.timeout = timeout
        self.form = form
        self.stdin_digest = stdin_digest
        self.mac = mac


def _digest_from_hex(untrusted_word):
    if len(untrusted_word) != 64 or not _HEX.issuperset(untrusted_word):
        raise Refused("token", "the token is malformed")
    return bytes.fromhex(untrusted_word.decode("ascii"))


def parse_token(untrusted_line):
    """Take a token line apart.

    Args:
        untrusted_line: bytes.

    Returns:
        Token

    Raises:
        Refused: it is no token line (code ``token``).
    """
    if len(untrusted_line) > TOKEN_MAX:
        raise Refused("token", "the token is malformed")
    words = (untrusted_line[:-1] if untrusted_line.endswith(b"\n") else untrusted_line).split(b" ")
    if len(words) == 1 and words[0]:
        return Token(1, None, "script", _EMPTY_DIGEST, _digest_from_hex(words[0]))
    if len(words) != 5 or words[0] != b"v2":
        raise Refused("token", "the token is malformed" if words != [b""] else "there is no token")
    _, untrusted_timeout, untrusted_form, untrusted_digest, untrusted_mac = words
    if not 1 <= len(untrusted_timeout) <= 7 or not frozenset(b"0123456789").issuperset(untrusted_timeout) or untrusted_timeout[:1] == b"0":
        raise Refused("token", "the token's timeout is malformed")
    form = untrusted_form.decode("ascii", "replace")
    if form not in FORMS:
        raise Refused("token", "the token names a form of command that dom0 doesn't know")
    digest = _EMPTY_DIGEST if untrusted_digest == b"-" else _digest_from_hex(untrusted_digest)
    return Token(2, int(untrusted_timeout), form, digest, _digest_from_hex(untrusted_mac))


def token_matches(key, vm, cid, token, command):
    """Check a token in constant time (dom0 side).

    Args:
        key: bytes, the key dom0 holds for this VM.
        vm: str, the name of the VM that dom0 fetched the request from.
        cid: str, checked.
        token: Token.
        command: bytes, as fetched.

    Returns:
        bool
    """
    if token.version == 1:
        # qvm-remote 1.x keys its HMAC with the hex digits, and covers the id alone.
        return any(
            [
                equal(hmac_sha256(digits.encode("ascii"), cid.encode("ascii")), token.mac)
                for digits in (key.hex(), key.hex().upper())
            ]
        )
    mac = _request_mac(key, vm, cid, token.timeout, token.form, command, token.stdin_digest)
    return equal(mac, token.mac)


def _result_mac(key, cid, out_digest, err_digest, body):
    return hmac_sha256(key, encode(f"{PROTOCOL} result", cid, out_digest, err_digest, body)).hex()


def make_meta(key, cid, out_digest, err_digest, fields):
    """Make a result's ``.meta`` (dom0 side).

    Args:
        key: bytes, or None when dom0 has no key for the VM: such an answer can only be a refusal.
        cid: str.
        out_digest, err_digest: bytes, SHA-256 of ``.out`` and ``.err``.
        fields: dict of str to str or int; ``exit`` and ``status`` among them. Plain words, no newline.

    Returns:
        bytes: ``mac <hex>`` and a newline, then one ``name value`` line for each field; the MAC covers all of them.
    """
    body = "".join(f"{name} {value}\n" for name, value in sorted(fields.items())).encode("ascii")
    mac = _result_mac(key, cid, out_digest, err_digest, body) if key else "-"
    return b"mac " + mac.encode("ascii") + b"\n" + body


def read_meta(key, cid, out_digest, err_digest, untrusted_meta):
    """Take a ``.meta`` apart and say whether dom0 made it for exactly this result (VM side).

    Args:
        key, cid, out_digest, err_digest: as for :func:`make_meta`.
        untrusted_meta: bytes.

    Returns:
        (dict of str to str, bool): the fields, and whether they are authentic.
    """
    first, _, body = untrusted_meta.partition(b"\n")
    expected = b"mac " + _result_mac(key, cid, out_digest, err_digest, body).encode("ascii")
    fields = dict(line.partition(" ")[::2] for line in body.decode("ascii", "replace").splitlines())
    return fields, equal(first, expected)


def chunk_mac(key, cid, seq, part, data):
    """Prove a piece of a running command's output; dom0 makes it, the VM's client makes it again and compares (:func:`digests.equal`).

    Args:
        key: bytes.
        cid: str.
        seq: int, counted from 0 over both parts together: it proves order and that none is missing.
        part: str, ``out`` or ``err``.
        data: bytes.

    Returns:
        str, 64 hex digits.
    """
    return hmac_sha256(key, encode(f"{PROTOCOL} chunk", cid, str(seq), part, sha256(data))).hex()
