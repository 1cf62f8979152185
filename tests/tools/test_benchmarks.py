"""The benchmarks' own machinery: checks, ratios, the regression check and the report."""

import copy
import functools
import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch

import nwfast

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import regression, run  # noqa: E402
from benchmarks.measure import alternate, scale  # noqa: E402
from benchmarks.measure.session import Session, group_as_dict  # noqa: E402
from benchmarks.pages import report, tables  # noqa: E402
from benchmarks.pages.bars import bars  # noqa: E402
from benchmarks.problems import cases, several, workloads  # noqa: E402

OWN = next(name for name in ("native", "numba", "reference") if nwfast.backends.available()[name] is True)
MACHINE = {
    "device": "cpu",
    "processor": "P",
    "cores": 2,
    "instruction_set": "AVX2",
    "versions": {"python": "3", "torch": "2.13.0", "numba": "0"},
}
PACKAGES = {"textbook": "torch", "chunked textbook": "torch", "JAX": "jax"}


def run_of(groups: list[dict], **versions: str) -> dict:
    place = {**MACHINE, "versions": {**MACHINE["versions"], **versions}}
    return {"machine": place, "points": 512, "groups": groups}


def group_of(ratios: dict[str, float], own: str = "native") -> dict:
    found = [{"own": own, "peer": peer, "measured": value} for peer, value in ratios.items()]
    return {"name": "forward", "question": "dense forward", "ratios": found}


def timed() -> dict:
    """Ours beside two peers that need nothing installed, in turn, with everything checked."""
    names = [OWN, "textbook", "chunked textbook"]
    make = functools.partial(workloads.data, 512)
    group = cases.forward("dense forward", make, scale.QUICK, 0.3, names)
    return group_as_dict(group, Session(scale.QUICK).time(group))


@pytest.mark.skipif(OWN == "reference", reason="no kernel of ours can run here")
def test_a_slowed_kernel_fails_the_regression_check(monkeypatch):
    then = run_of([timed()])
    kernel = nwfast.nadaraya_watson

    def slowed(*arguments, **options):
        start = time.perf_counter()
        out = kernel(*arguments, **options)
        taken = time.perf_counter() - start
        time.sleep(4 * taken + 5e-3)  # far above what noise may do
        return out

    monkeypatch.setattr(nwfast, "nadaraya_watson", slowed)
    now = run_of([timed()])

    (change,) = regression.changes(then, now, PACKAGES)
    assert change.own == OWN
    assert set(change.peers) == {"textbook", "chunked textbook"}
    assert change.failed, change


@pytest.mark.parametrize(("factor", "failed"), [(1.0, False), (1.15, False), (1.25, True), (0.5, False)])
def test_more_than_20_percent_slower_fails(factor, failed):
    ratios = {"textbook": 90.0, "chunked textbook": 20.0}
    then = run_of([group_of(ratios)])
    now = run_of([group_of({peer: value / factor for peer, value in ratios.items()})])
    (change,) = regression.changes(then, now, PACKAGES)
    assert change.factor == pytest.approx(factor)
    assert change.failed is failed


def test_a_slower_machine_is_no_regression_and_one_noisy_peer_decides_nothing():
    then = run_of([group_of({"textbook": 90.0, "chunked textbook": 20.0, "JAX": 10.0})], jax="1")
    now = run_of([group_of({"textbook": 30.0, "chunked textbook": 20.0, "JAX": 10.1})], jax="1")
    (change,) = regression.changes(then, now, PACKAGES)
    assert not change.failed


def test_a_peer_of_another_version_is_left_out():
    then = run_of([group_of({"textbook": 90.0, "JAX": 10.0})], jax="1")
    now = run_of([group_of({"textbook": 90.0, "JAX": 1.0})], jax="2")
    (change,) = regression.changes(then, now, PACKAGES)
    assert change.peers == ("textbook",) and change.factor == 1


def test_runs_of_different_machines_are_not_compared():
    then, now = run_of([]), copy.deepcopy(run_of([]))
    assert regression.comparable(then, now) == ""
    now["machine"]["instruction_set"] = "AVX-512"
    assert regression.comparable(then, now) == "instruction_set was AVX2, is AVX-512"


def test_the_check_exits_with_the_verdict(tmp_path, monkeypatch):
    for name, ratio in ("then", 90.0), ("same", 91.0), ("slow", 60.0):
        (tmp_path / f"{name}.json").write_text(json.dumps(run_of([group_of({"textbook": ratio})])))

    def status(name):
        arguments = [str(tmp_path / f"{name}.json"), "--baseline", str(tmp_path / "then.json")]
        monkeypatch.setattr(sys, "argv", ["regression.py", *arguments])
        return regression.main()

    assert status("same") == 0
    assert status("slow") == 1


def test_a_later_run_of_some_files_takes_their_place_in_a_result_of_the_same_commit():
    def result(commit, cores, **seconds):
        groups = [{"name": name, "seconds": value} for name, value in seconds.items()]
        measured = [{"what": name, "measured": value} for name, value in seconds.items()]
        busy = dict.fromkeys(seconds, cores)
        same = {"commit": commit, "machine": {"cores": 2}, "quick": False, "wrong": []}
        return {**same, "groups": groups, "bars": measured, "cores_used_elsewhere": busy}

    renewed = run.renew(result("a", 1.0, first=1.0, second=2.0), result("a", 0.0, second=3.0))
    assert [group["seconds"] for group in renewed["groups"]] == [1.0, 3.0]
    assert [bar["measured"] for bar in renewed["bars"]] == [1.0, 3.0]
    assert renewed["cores_used_elsewhere"] == {"first": 1.0, "second": 0.0}
    with pytest.raises(SystemExit, match="commit"):
        run.renew(renewed, result("b", 0.0, second=3.0))


def test_results_of_files_become_one():
    def result(names, **records):
        groups, bars = [{"name": name} for name in names], [{"what": name} for name in names]
        busy = dict.fromkeys(names, 0.0)
        return {"commit": "a", "groups": groups, "bars": bars, "cores_used_elsewhere": busy, **records}

    one = run.add({}, result(["first", "both"], memory=[1], wrong=["w"], skipping=[4]))
    one = run.add(one, result(["both", "last"], memory=[2], wrong=[], choice=[3]))
    assert [group["name"] for group in one["groups"]] == ["first", "both", "last"]
    assert [bar["what"] for bar in one["bars"]] == ["first", "both", "last"]
    assert (
        one["memory"] == [1, 2] and one["choice"] == [3] and one["wrong"] == ["w"] and one["skipping"] == [4]
    )
    assert list(one["cores_used_elsewhere"]) == ["first", "both", "last"]
    assert one["commit"] == "a"


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(nwfast, "nadaraya_watson", lambda query, *_, **__: torch.zeros_like(query))
    session = Session(scale.QUICK)
    make = functools.partial(workloads.data, 64)
    group = cases.forward("dense forward", make, scale.QUICK, 0.05, [OWN, "textbook"])
    if OWN == "reference":
        pytest.skip("no kernel of ours can run here")
    outcomes = session.time(group)
    assert "off by" in outcomes[OWN].wrong and not outcomes[OWN].seconds
    assert outcomes["textbook"].seconds
    assert len(session.wrong) == 1


def test_what_is_too_large_is_left_out_with_the_reason():
    make = functools.partial(workloads.data, 30_000)
    group = cases.forward("scaling in N", make, scale.QUICK, 0.05, ["textbook", "native"])
    assert "GB" in group.entries["textbook"].why_not()


def test_a_group_of_which_nothing_can_run_is_reported():
    make = functools.partial(workloads.data, 30_000)
    group = cases.forward("scaling in N", make, scale.QUICK, 0.05, ["textbook"])
    session = Session(scale.QUICK)
    assert not session.time(group)["textbook"].seconds
    assert "GB" in session.as_dict()[0]["missing"]["textbook"]


def test_the_search_finds_the_slowest_bandwidth_between_those_asked_for(monkeypatch):
    asked, clock = [], [0.0]

    def build(make, kind):
        w = float(make().w)
        asked.append(w)

        def call():
            clock[0] += 0.1 * w if w < 20 else 6.0 if w < 50 else 0.2

        return call

    monkeypatch.setattr(several, "_build", build)
    monkeypatch.setattr(several.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(several, "_verify", lambda make, kind, found: 0.0)
    found = several.bandwidths(10, 2, False, (1, 10, 100))
    slowest = max(found, key=lambda own: own["seconds"]["median"])
    assert 20 <= slowest["w"] < 50
    assert [own["w"] for own in found] == pytest.approx(sorted(asked))
    assert len(asked) == 7


def test_gradients_of_several_features_are_checked():
    make = functools.partial(several.data, 50, 2, 5.0)
    query, key, value, w = (tensor.double() for tensor in make().inputs)
    query.requires_grad_()
    out = workloads.two_lines(query, key, value, w)
    (gradient,) = torch.autograd.grad(out, query, make().cotangent.double())
    assert several._verify(make, "to w, q", (out.detach(), gradient)) < 1e-12
    for wrong in ((out.detach() + 0.01, gradient), (out.detach(), 1.01 * gradient)):
        with pytest.raises(workloads.WrongResultError, match="to w, q, D = 2: off by"):
            several._verify(make, "to w, q", wrong)
    scores = -(((key[:, None] - key) * w) ** 2).sum(-1) / 2
    alone = torch.softmax(scores.fill_diagonal_(-torch.inf), 1) @ value
    assert several._verify(make, "leave-one-out step in w", (alone,)) < 1e-12
    with pytest.raises(workloads.WrongResultError):
        several._verify(make, "leave-one-out step in w", (out.detach(),))


def test_nan_is_wrong():
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(workloads.WrongResultError, match="off by nan"):
        workloads.check((torch.tensor([1.0, float("nan"), 1.0]),), (exact,), "a peer")


def test_the_report_writes_all_pages_from_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(alternate.gc, "collect", lambda: 0)  # of this whole process, before each sample
    session = Session(scale.QUICK)
    monkeypatch.setattr(session, "absent", lambda: {"JAX": "not imported, which takes seconds"})
    names = [OWN, "textbook", "chunked textbook"]
    session.time(
        cases.forward("dense forward", functools.partial(workloads.data, 256), scale.QUICK, 0.05, names)
    )
    make = functools.partial(workloads.data, 256, w=3.0, ordered=True)
    session.time(cases.forward("scaling in N", make, scale.QUICK, 0.05, names))
    for features in (2, 3):
        make = functools.partial(several.data, 256, features, several.W[features])
        session.time(cases.forward(tables.SEVERAL, make, scale.QUICK, 0.05, names))
    if OWN == "native":
        session.records["bandwidths"] = several.bandwidths(300, 2, True, (3.0, 100.0))
        session.records["dense rate"] = [{"features": 2, "pairs_per_second": several.dense_rate(300, 2)}]
        session.time(several.gradients(tables.SEVERAL, scale.QUICK.several[-1], 2, 0.05))
        session.time(several.growth(tables.SEVERAL, scale.QUICK.several[-1], 2, 0.05))
    session.records["memory of several"] = [{"features": 2, "n": 100, "added_MB": 12.5}]
    session.records["choice"] = [{"features": 2, "cases": 3, "keys": 100, "w": 1.0, "ratio": 1.4}]
    session.records["skipping"] = [
        {"features": 5, "clusters": 5, "n": 100, "w": 2.0, "never": 1.0, "auto": 0.25, "ratio": 4.0}
    ]
    session.records["memory"] = [
        {"peer": "textbook", "n": n, "wanted": "", "added_MB": 1.0 * n, "error": 0.0} for n in (100, 200)
    ]
    session.records["distance"] = [
        {"peer": "textbook", "precision": "float32", "bandwidths": [1.0, 10.0], "error": [1e-7, None]}
    ]
    peak = dict.fromkeys(("fma", "add", "shift", "mixed"), 10000000000.0)
    session.records["ceiling"] = [
        {
            "instruction_set": "AVX2",
            "lanes_float32": 8,
            "cores": 2,
            "clock_GHz": 3.0,
            "clock_GHz_all_cores": 3.0,
            "instructions_per_second": peak,
        }
    ]
    content = json.loads(json.dumps(run.content(session, bars(session), [], MACHINE)))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text((ROOT / "docs" / "performance.md").read_text())
    (tmp_path / "README.md").write_text("a\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nb\n")
    report.write(content, tmp_path)
    assert sorted(path.name for path in (tmp_path / "docs" / "figures").iterdir()) == [
        "error-against-distance.svg",
        "memory-against-n.svg",
        "speed-up.svg",
        "time-against-n.svg",
    ]
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme and readme.startswith("a\n") and readme.endswith("b\n")
    median = content["groups"][0]["entries"][0]["seconds"]["median"]
    assert tables.format_time(median) in readme
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "no number" in page and "## The peers" in page
    assert "takes 12.5 MB beyond its inputs" in page
    missed = {bar["what"] for bar in content["bars"] if not bar["passed"]}
    assert {'D = 2, "auto" over the faster method, worst of 3 cases'} <= missed
    assert "D = 5, 5 clusters, N = M = 100, skipping, over none" in missed
    if OWN == "native":
        assert "All bandwidths" in page and "five clusters" in page
        wanted = {
            f"D = 2, N = M = {scale.QUICK.several[-1]}, {kind}, over the forward" for kind in several.KINDS
        }
        named = {bar["what"] for bar in content["bars"]}
        assert len(wanted & named) == len(several.KINDS) - 1  # all but the forward pass itself
        assert "D = 2, N = M = 300, five clusters, slowest w: forward" in named
    figure = (tmp_path / "docs" / "figures" / "time-against-n.svg").read_text()
    for title in ("one feature", "D = 2", "D = 3"):
        assert f">{title}, " in figure


def test_markers_have_to_be_there():
    with pytest.raises(ValueError, match="expected one <!-- speed -->"):
        report.put("no markers", "text", "speed")


@pytest.mark.parametrize("graphics", [False, True], ids=["host", "device"])
def test_alternating_takes_turns(monkeypatch, graphics):
    """By the host's clock, and by the events of a GPU, here a stub's."""
    made: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, last):
            return 1000 * (last.at - self.at)

    def call(name):
        made.append(name)
        time.sleep(1e-3)

    looks: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    device = torch.device("cuda" if graphics else "cpu")
    clock = alternate.clock_of(device, lambda: looks.append(len(made)))
    calls = {name: functools.partial(call, name) for name in ("a", "b")}
    times = alternate.alternate(calls, 0.0, clock, least_rounds=5)
    assert [len(own) for own in times.values()] == [5, 5]
    assert all(1e-3 <= seconds < 0.5 for own in times.values() for seconds in own)
    # Estimates ab, rounds ab ba ab ba ab: turns that meet are one.
    assert [name for name, _ in itertools.groupby(made)] == list("abababab")
    assert len(looks) == (2 * alternate.LOOKED_AT if graphics else 0)
