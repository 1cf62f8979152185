"""A measured number and what it is held against."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Bar:
    """A number with its limit; a ratio where no unit is given, without quartiles where it is not one of rounds."""

    what: str
    limit: float
    measured: float
    first_quartile: float | None = None
    third_quartile: float | None = None
    at_least: bool = True
    unit: str = "times"

    @property
    def passed(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def as_dict(self) -> dict:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {**known, "passed": self.passed}
