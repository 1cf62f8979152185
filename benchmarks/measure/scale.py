"""How large and how long the benchmarks are: in full, quickly (does it work?), or each once and untimed."""

from dataclasses import dataclass, replace

K, MILLION = 1000, 1_000_000


@dataclass(frozen=True)
class Scale:
    """Sizes by question, and the limits that keep all of them within 20 minutes on two cores."""

    name: str
    points: int  # N = M of the dense questions
    scaling: tuple[int, ...]
    narrow: tuple[tuple[int, float], ...]  # N and w of linear time at narrow bandwidths
    several: tuple[int, ...]  # N = M with two and three features, ascending
    several_narrow: dict[int, tuple[float, ...]]  # features: w of the search for the slowest bandwidth
    selection: tuple[int, ...]
    memory: tuple[int, ...]
    memory_peak: int  # N = M of the bar on memory
    accuracy: int
    imports: int  # fresh processes
    share: float  # of the seconds that a group may take in full
    longest: float  # seconds of one call: peers that would take longer are left out, and reported
    memory_limit: float = 6e9  # bytes: the same for the memory they would take
    compiled_everywhere: bool = True  # or, since compiling takes long, only in the first group

    @property
    def chapter(self) -> int:
        return 50


FULL = Scale(
    name="full",
    points=8192,
    scaling=(K, 10 * K, 100 * K, MILLION, 10 * MILLION),
    narrow=((MILLION, 100.0), (MILLION, 10_000.0)),
    several=(10 * K, 65_536, MILLION),
    several_narrow={2: (3, 10, 30, 100, 300, 1000), 3: (3, 10, 30, 100, 300)},
    selection=(500, 2000, 10 * K, 100 * K, MILLION),
    memory=(2048, 8192, 65_536, MILLION),
    memory_peak=200 * K,
    accuracy=1000,
    imports=9,
    share=1.0,
    longest=6.0,
)
QUICK = replace(
    FULL,
    name="quick",
    points=512,
    scaling=(500, 1000, 10 * K),
    narrow=((10 * K, 100.0),),
    several=(1000, 4000),
    several_narrow={2: (3, 100), 3: (3, 100)},
    selection=(500, 1000),
    memory=(512, 2048),
    memory_peak=20 * K,
    accuracy=200,
    imports=2,
    share=0.02,
    longest=1.0,
)
SMOKE = replace(
    QUICK,
    name="smoke",
    points=256,
    scaling=(300,),
    narrow=((300, 10.0),),
    several=(1000,),
    several_narrow={2: (10,), 3: (10,)},
    selection=(500,),
    memory=(300,),
    memory_peak=10 * K,
    imports=1,
    compiled_everywhere=False,
)
SCALES = {scale.name: scale for scale in (FULL, QUICK, SMOKE)}
