"""Put the table of a result file of compare.py into the README, between its two markers.

python benchmarks/report.py benchmarks/results/NAME.json
python benchmarks/report.py benchmarks/results/NAME.json --print    only show it
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
# Two OpenMP threads on two cores wait a whole time slice at each barrier once a third thread runs: the textbook at
# n = 50 then takes 16 ms in place of 30 us. So a little is too much.
MOST_USED_ELSEWHERE = 0.15


def section(content: dict) -> str:
    """The README's section, with all numbers taken from `content`."""
    place, commit = content["machine"], content["commit"]
    versions = place["versions"]
    device = "" if place["device"] == "cpu" else f"{place['device']}, "
    missed = [bar["what"] for bar in content["bars"] if not bar["passed"]]
    setting = (
        f"Medians of alternating runs in one process, float32, N = M = {content['points']} unless said, unsorted "
        "uniform data, w = 1 (no pair can be skipped), each result checked against float64 first. "
        f"{device}{place['processor']}, {place['cores']} cores, {place['instruction_set']}, torch {versions['torch']}, "
        f"numba {versions['numba']}, Python {versions['python']}; commit {commit['commit'][:10]}"
        f"{' with changes' if commit['dirty'] else ''}, {content['date']}. Textbook: the two lines; torch.compile: the "
        "same two lines, compiled."
    )
    lines = [
        "## Speed",
        "",
        *textwrap.wrap(setting, 120),
        "",
        "| time | native | numba | torch.compile | textbook | native, Gpair/s |",
        "| --- | --- | --- | --- | --- | --- |",
        *_times(content["medians"]),
        "",
        "| | measured | quartiles | bar |",
        "| --- | --- | --- | --- |",
        *map(_bar, content["bars"]),
        "",
        *textwrap.wrap(f"Missed: {'; '.join(missed)}." if missed else "All bars are met.", 120),
        "`python benchmarks/compare.py` measures this, `python benchmarks/report.py` writes it here.",
    ]
    return "\n".join(lines)


def _times(medians: list[dict]) -> list[str]:
    """One line a work, in the order measured; what was timed in two groups is shown from the first."""
    works: dict[str, dict[str, dict]] = {}
    for own in medians:
        works.setdefault(own["work"], {}).setdefault(own["competitor"], own)
    lines = []
    for work, found in works.items():
        cells = [
            format_time(found[who]["seconds"]["median"]) if who in found else ""
            for who in ("native", "numba", "torch.compile", "textbook")
        ]
        rate = f"{found['native']['pairs_per_second'] / 1e9:.3g}" if "native" in found else ""
        lines.append(f"| {work} | {' | '.join(cells)} | {rate} |")
    return lines


def _bar(bar: dict) -> str:
    quartiles = ""
    if bar["first_quartile"] != bar["third_quartile"]:
        quartiles = f"{bar['first_quartile']:.3g} to {bar['third_quartile']:.3g}"
    sense = "at least" if bar["at_least"] else "at most"
    missed = "" if bar["passed"] else ", **missed**"
    return (
        f"| {bar['what']} | {bar['measured']:.3g} {bar['unit']} | {quartiles} | "
        f"{sense} {bar['limit']:g}{missed} |"
    )


def format_time(seconds: float) -> str:
    """Three digits and a unit.

    >>> format_time(0.00623)
    '6.23 ms'
    """
    for factor, unit in (1, "s"), (1e3, "ms"):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def busy_questions(cores: dict[str, float | None]) -> list[str]:
    """The questions during which other processes used more of the machine than a comparison bears.

    >>> busy_questions({"forward": 0.02, "gradients": 0.9, "memory": None})
    ['gradients']
    """
    return [name for name, used in cores.items() if used is not None and used > MOST_USED_ELSEWHERE]


def put(text: str, replacement: str) -> str:
    """`text` with what stands between the markers replaced.

    >>> put("a\\n<!-- benchmarks -->\\nold\\n<!-- /benchmarks -->\\nb", "fresh")
    'a\\n<!-- benchmarks -->\\nfresh\\n<!-- /benchmarks -->\\nb'
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one {START} and one {END}")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{replacement}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Put the table of a result file into the README.")
    parser.add_argument("result", type=Path, help="a file of benchmarks/results/")
    parser.add_argument("--print", action="store_true", dest="show", help="only show it")
    options = parser.parse_args()
    content = json.loads(options.result.read_text())
    if options.show:
        print(section(content))
        return 0
    if content["quick"] or content["wrong"]:
        parser.error("not for the README: a quick run, or one with wrong results")
    if busy := busy_questions(content["cores_used_elsewhere"]):
        parser.error(f"not for the README: other processes took processor time during {', '.join(busy)}")
    README.write_text(put(README.read_text(), section(content)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
