"""A result file as pages: docs/benchmarks.md, its figures, the numbers of docs/performance.md and the README's section.

python benchmarks/pages/report.py                            this machine's file, or the newest
python benchmarks/pages/report.py benchmarks/results/NAME.json
python benchmarks/pages/report.py FILE --to FOLDER           elsewhere, whatever the file: to look at it
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout

from benchmarks.pages import figures, profile_page, tables
from benchmarks.pages.tables import busy

BENCHMARKS = Path(__file__).resolve().parent.parent
ROOT = BENCHMARKS.parent


def put(text: str, replacement: str, name: str) -> str:
    """`text` with what stands between the markers of that name replaced.

    >>> put("a\\n<!-- speed -->\\nold\\n<!-- /speed -->\\nb", "fresh", "speed")
    'a\\n<!-- speed -->\\nfresh\\n<!-- /speed -->\\nb'
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"expected one {start} and, after it, one {end}")
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    return f"{before}{start}\n{replacement}\n{end}{after}"


def about_peers() -> dict[str, dict]:
    """What each peer is and how it is used."""
    from benchmarks.peers import PEERS

    fields = ("about", "package", "precision", "tolerance")
    return {name: {field: getattr(peer, field) for field in fields} for name, peer in PEERS.items()}


def write(content: dict, root: Path) -> list[Path]:
    """Write all pages of a checkout; returns their paths."""
    docs = root / "docs"
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    paths = figures.draw(content, docs / "figures")
    page = docs / "benchmarks.md"
    page.write_text(tables.page(content, about_peers()))
    performance = docs / "performance.md"
    text = performance.read_text()
    for name, part in profile_page.parts(content).items():
        text = put(text, part, name)
    performance.write_text(text)
    readme = root / "README.md"
    readme.write_text(put(readme.read_text(), tables.readme(content), "benchmarks"))
    return [*paths, page, performance, readme]


def default_file() -> Path:
    """This machine's file, or the newest."""
    from benchmarks.measure import machine

    own = BENCHMARKS / "results" / f"{machine.name(machine.fingerprint())}.json"
    if own.exists():
        return own
    dated = [(json.loads(path.read_text()), path) for path in (BENCHMARKS / "results").glob("*.json")]
    full = [
        (content["date"], path) for content, path in dated if content.get("groups") and not content["quick"]
    ]
    if not full:
        raise SystemExit("there is no result file: run make bench first")
    return max(full)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pages of a result file.")
    parser.add_argument("result", type=Path, nargs="?", help="a file of benchmarks/results/")
    parser.add_argument(
        "--to", type=Path, help="write into copies of the pages in this folder, whatever the file"
    )
    options = parser.parse_args()
    content = json.loads((options.result or default_file()).read_text())
    root = options.to or ROOT
    if options.to:
        (root / "docs").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "README.md", root / "README.md")
        shutil.copy(ROOT / "docs" / "performance.md", root / "docs" / "performance.md")
    elif content["quick"] or content["wrong"]:
        parser.error("not for the pages: a quick run, or one with wrong results")
    elif names := busy(content["cores_used_elsewhere"]):
        parser.error(f"not for the pages: other processes took processor time during {'; '.join(names)}")
    for path in write(content, root):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
