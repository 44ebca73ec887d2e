# SPDX-License-Identifier: GPL-2.0-or-later
"""Where inputs come from: atheris, which follows the parser's branches, or hypothesis, where there is no atheris. Each runs in a process of
its own; an input that fails is kept as ``crash-<SHA-256>``, and one that takes too long or too much memory fails.
"""

import hashlib
import os
import resource
import signal
import sys
import time

#: Longest input, bytes; what it may take: seconds of a processor, MiB.
INPUT_MAX, INPUT_SECONDS, MEMORY_MAX = 4096, 10, 1024
#: How long it may wait for something: a machine may stand still for a while, which is no defect, seconds.
_WAIT_MAX = 120
#: Inputs of hypothesis from one start of it.
_ROUND = 1000


def with_atheris(target, folder, seconds, runs, seed):
    """Fuzz a target; does not return.

    Args:
        target: module, imported under atheris' instrumentation.
        folder: str, with the corpus, and for what is found.
        seconds, runs: int, when to end; 0 for no bound.
        seed: int; 0 for another one each time.
    """
    import atheris

    def check(data):
        begun = time.process_time()
        try:
            target.check(data)
            if time.process_time() - begun > INPUT_SECONDS:
                _took_too_long()
        except Exception:
            _keep(data, folder, "crash-")
            raise

    seeds, corpus, words = (os.path.join(folder, name) for name in ("seeds", "corpus", "words"))
    os.makedirs(corpus, exist_ok=True)
    os.makedirs(seeds, exist_ok=True)
    for data in target.seeds():
        _keep(data, seeds)
    with open(words, "w", encoding="ascii") as file:
        # libFuzzer takes none that is empty.
        for word in getattr(target, "WORDS", (b"\0",)):
            file.write('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n')
    options = [f"-max_total_time={seconds}", f"-runs={runs or -1}", f"-seed={seed}", f"-max_len={INPUT_MAX}", f"-timeout={_WAIT_MAX}"]
    options += [f"-rss_limit_mb={MEMORY_MAX}", f"-dict={words}", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, corpus, seeds], check)
    atheris.Fuzz()


def with_hypothesis(target, folder, seconds, runs, seed):
    """Fuzz a target.

    Args:
        As for :func:`with_atheris`.
    """
    import hypothesis

    count, failed = 0, None

    def check(data):
        nonlocal count, failed
        count += 1
        signal.setitimer(signal.ITIMER_PROF, INPUT_SECONDS)
        signal.alarm(_WAIT_MAX)
        try:
            target.check(data)
        except Exception:
            # The last one that fails is the smallest that hypothesis has found.
            failed = data
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _took_too_long)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX << 20,) * 2)
    end = time.monotonic() + seconds if seconds else float("inf")
    seeds = list(target.seeds())
    inputs = _changed(seeds, getattr(target, "WORDS", ()))
    try:
        for data in seeds:
            check(data)
        while time.monotonic() < end and (not runs or count < runs):
            limits = {"max_examples": min(_ROUND, runs - count) if runs else _ROUND, "deadline": None, "database": None}
            test = hypothesis.settings(**limits, suppress_health_check=list(hypothesis.HealthCheck))(hypothesis.given(inputs)(check))
            hypothesis.seed(seed + count if seed else os.urandom(8))(test)()
    finally:
        if failed is not None:
            _keep(failed, folder, "crash-")
    print(f"stat::number_of_executed_units: {count}", file=sys.stderr)


def _keep(data, folder, prefix=""):
    with open(os.path.join(folder, prefix + hashlib.sha256(data).hexdigest()[:32]), "wb") as file:
        file.write(data)


def _took_too_long(*_):
    raise TimeoutError(f"an input takes longer than {INPUT_SECONDS} s of a processor, or {_WAIT_MAX} s")


def _changed(seeds, words):
    """A strategy: seeds that were cut, joined and overwritten here and there, and bytes as they come."""
    from hypothesis import strategies as st

    pieces = st.one_of(st.binary(max_size=8), st.sampled_from(words or [b""]), st.sampled_from(seeds))

    @st.composite
    def inputs(draw):
        data = draw(st.one_of(st.sampled_from(seeds), st.binary(max_size=64)))
        for _ in range(draw(st.integers(0, 6))):
            start = draw(st.integers(0, len(data)))
            end = draw(st.one_of(st.just(start), st.integers(start, min(len(data), start + 8)), st.integers(start, len(data))))
            data = (data[:start] + draw(pieces) + data[end:])[:INPUT_MAX]
        return data

    return inputs()
