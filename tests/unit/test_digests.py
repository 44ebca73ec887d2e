# SPDX-License-Identifier: GPL-2.0-or-later
"""Our HMAC is everybody's, whichever code hashes."""

import hashlib
import hmac
import subprocess
import sys
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pullrpc import digests


@given(st.binary(max_size=200), st.binary(max_size=300))
def test_an_hmac_is_that_of_the_standard_library(key, message):
    expected = hmac.new(key, message, "sha256").digest()
    assert digests.hmac_sha256(key, message) == expected
    with mock.patch.dict(sys.modules):
        # As in a client that has not loaded OpenSSL.
        del sys.modules["_hashlib"]
        assert digests.hmac_sha256(key, message) == expected


@pytest.mark.parametrize("size", [0, 1000, 1 << 20])
def test_small_and_large_are_hashed_alike_where_openssl_is_not_loaded(size):
    program = "import sys; sys.path.insert(0, sys.argv[1]); from pullrpc.digests import sha256; print(sha256(bytes(int(sys.argv[2]))).hex())"
    done = subprocess.run([sys.executable, "-IS", "-c", program, digests.__file__.rpartition("/pullrpc/")[0], str(size)], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(bytes(size)).hexdigest()
