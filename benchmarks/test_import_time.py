"""How much does `import nwfast` add to `import torch`?"""

import statistics

from benchmarks.measure import fresh


def test_import(benchmark, session, scale):
    if benchmark.enabled:
        fresh.import_times()  # files read from disk, bytecode written
    found = []
    benchmark.pedantic(lambda: found.append(fresh.import_times()), rounds=scale.imports)
    session.records["imports"] += found
    milliseconds = {name: 1000 * statistics.median(times[name] for times in found) for name in found[0]}
    benchmark.extra_info["import_ms"] = milliseconds
    assert 0 < milliseconds["nwfast"] < milliseconds["torch"]
