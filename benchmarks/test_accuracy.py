"""Are results as accurate as the textbook's in the same precision? How do all peers fare away from the data?"""

import dataclasses

import numpy as np
import pytest

from benchmarks.peers import OWN, PEERS
from benchmarks.problems import accuracy

KEYS = 1000


@pytest.mark.parametrize("name", OWN)
def test_budget(benchmark, session, scale, name):
    peer = PEERS[name]
    if peer.why_not():
        pytest.skip(peer.why_not())
    found = benchmark.pedantic(accuracy.findings, (scale.accuracy, [peer]), rounds=1)
    session.records["accuracy"] += [{**dataclasses.asdict(own), "share": own.share} for own in found]
    worst = max(found, key=lambda finding: finding.share)
    benchmark.extra_info["worst"] = {**vars(worst), "share_of_limit": worst.share}
    for own in found:
        if not own.share <= 1:
            session.wrong.append(
                f"{own.peer}, {own.dtype}, {own.case}, {own.quantity}: error {own.error:.3g}"
            )
    assert worst.share <= 1, worst


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.takes(1, 1)])
def test_against_distance(benchmark, session, scale, name):
    peer = PEERS[name]
    reason = peer.why_not()
    if not reason and peer.compiles and not scale.compiled_everywhere:
        reason = "it takes seconds to compile, and is checked in the first question at this scale"
    if reason:
        pytest.skip(reason)
    errors = benchmark.pedantic(accuracy.against_distance, (KEYS, peer), rounds=1)
    session.records["distance"].append(
        {
            "peer": name,
            "precision": peer.precision,
            "bandwidths": list(accuracy.DISTANCES),
            "error": [error if np.isfinite(error) else None for error in errors],
        }
    )
    assert errors[0] <= max(peer.tolerance, 1e-3), "wrong even beside the data"
    if name in OWN:
        assert max(errors) <= 2e-6
