"""The four time windows of a run, in an order that cannot leak the future."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from pipelines.contracts.errors import InvalidConfig

__all__ = ["Window", "Windows"]


@dataclass(frozen=True)
class Window:
    """Days from `start` (included) to `end` (excluded), UTC."""

    start: date
    end: date

    @property
    def start_time(self) -> datetime:
        return datetime(self.start.year, self.start.month, self.start.day, tzinfo=UTC)

    @property
    def end_time(self) -> datetime:
        return datetime(self.end.year, self.end.month, self.end.day, tzinfo=UTC)


@dataclass(frozen=True)
class Windows:
    """Pretraining, fine-tuning, validation and test, in that order and without overlap.

    ```
    |--- pretrain ---|--- finetune ---|- validation -|- test -|    time ->
    ```

    Raises:
        InvalidConfig: a window is empty or starts before the one ahead of it has ended.
    """

    pretrain: Window
    finetune: Window
    validation: Window
    test: Window

    ORDER = ("pretrain", "finetune", "validation", "test")

    def __post_init__(self) -> None:
        previous = None
        for name in self.ORDER:
            window = getattr(self, name)
            if window.start >= window.end:
                raise InvalidConfig(
                    f"window '{name}' is empty",
                    expected="a start day before the end day (the end is excluded)",
                    got=f"{window.start} to {window.end}",
                    remedy="Correct the run's windows.",
                )
            if previous is not None and window.start < getattr(self, previous).end:
                raise InvalidConfig(
                    f"window '{name}' leaks the future into '{previous}'",
                    expected=f"a start on or after {getattr(self, previous).end}, where '{previous}' ends",
                    got=str(window.start),
                    remedy=f"Order the windows {' < '.join(self.ORDER)} without overlap.",
                )
            previous = name

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Windows":
        """Parse `{name: [start, end]}` with ISO days; raises `InvalidConfig` on anything else."""
        if not isinstance(raw, dict) or set(raw) != set(cls.ORDER):
            raise InvalidConfig(
                "windows are incomplete",
                expected=f"exactly {', '.join(cls.ORDER)}",
                got=", ".join(map(str, raw)) if isinstance(raw, dict) else repr(raw),
                remedy="Give each as [first day, day after the last].",
            )
        parsed = {}
        for name, bounds in raw.items():
            try:
                start, end = (day if type(day) is date else date.fromisoformat(str(day)) for day in bounds)
            except (TypeError, ValueError) as error:
                raise InvalidConfig(
                    f"window '{name}' cannot be read",
                    expected="[YYYY-MM-DD, YYYY-MM-DD]",
                    got=repr(bounds),
                    remedy="Correct the run's windows.",
                ) from error
            parsed[name] = Window(start, end)
        return cls(**parsed)

    def to_dict(self) -> dict[str, list[str]]:
        return {
            name: [getattr(self, name).start.isoformat(), getattr(self, name).end.isoformat()] for name in self.ORDER
        }
