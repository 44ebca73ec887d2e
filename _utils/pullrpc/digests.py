# SPDX-License-Identifier: GPL-2.0-or-later
"""SHA-256 and HMAC-SHA256 for a program that lives for a moment.

Loading OpenSSL takes a third of the time that Python takes to start. So what is small is hashed by Python's own code,
where it was built with that, and OpenSSL hashes what is large, or everything where it is loaded anyway, as in dom0.
"""

import sys
from _operator import _compare_digest as equal  # noqa: F401  in constant time; what the module hmac gives, without loading it

try:
    from _sha2 import sha256 as _own
except ImportError:
    try:
        # Before Python 3.12.
        from _sha256 import sha256 as _own
    except ImportError:
        _own = None

#: From this many bytes on OpenSSL, which hashes several times faster, is done sooner in spite of loading it.
_LARGE = 1 << 18
_BLOCK = 64
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


def hasher(size):
    """Begin a SHA-256.

    Args:
        size: int, bytes that will be hashed, more or less.

    Returns:
        a hash object, as the module hashlib has them.
    """
    if _own is not None and size < _LARGE and "_hashlib" not in sys.modules:
        return _own()
    import hashlib

    return hashlib.sha256()


def sha256(data):
    """Hash some bytes.

    Args:
        data: bytes.

    Returns:
        bytes, 32.
    """
    digest = hasher(len(data))
    digest.update(data)
    return digest.digest()


def hmac_sha256(key, message):
    """Make an HMAC-SHA256 (RFC 2104).

    Args:
        key, message: bytes.

    Returns:
        bytes, 32.
    """
    if "_hashlib" in sys.modules:
        # In dom0, always.
        import hmac

        return hmac.digest(key, message, "sha256")
    block = (sha256(key) if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
    return sha256(block.translate(_OUTER) + sha256(block.translate(_INNER) + message))
