"""How old pretraining may be when it meets fine-tuning: one gate for publishing and for rolling out."""

import logging
from dataclasses import dataclass

from pipelines.contracts.errors import InvalidConfig, StalePretraining
from pipelines.contracts.windows import Windows

__all__ = ["DEFAULT_LIMITS", "FreshnessLimits", "pretraining_age_days"]

logger = logging.getLogger(__name__)

FINDINGS = (
    "The multi-faceted embedding tables paper (arXiv 2508.05700, Table 3) reports -0.05 % ROC-AUC at a gap of 3 months "
    "and +0.00 %, no gain left, at 6 months"
)
"""The two entries may be against different baselines (fresh pretraining; no pretraining): do not subtract them."""


def pretraining_age_days(windows: Windows) -> int:
    """Days from the end of the pretraining window to the start of the fine-tuning window; 0 when one follows the other.

    ```
    |--- pretrain ---|······ age ······|--- finetune ---|
    ```
    """
    return (windows.finetune.start - windows.pretrain.end).days


@dataclass(frozen=True)
class FreshnessLimits:
    """The gate's two limits, in days of `pretraining_age_days`; an age equal to a limit passes it.

    One setting for every command that asks: the environment variables `WARN_VARIABLE` and `REFUSE_VARIABLE`, which the
    commands' options overrule.

    Attributes:
        forced: only warn past the second limit too.

    >>> FreshnessLimits(warn_days=30, refuse_days=10)    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pipelines.contracts.errors.InvalidConfig: limits of the pretraining's age: expected 0 <= warning <= refusal, ...
    """

    warn_days: int = 90
    refuse_days: int = 180
    forced: bool = False

    WARN_VARIABLE = "FACET_PRETRAINING_WARN_DAYS"
    REFUSE_VARIABLE = "FACET_PRETRAINING_REFUSE_DAYS"

    def __post_init__(self) -> None:
        if not 0 <= self.warn_days <= self.refuse_days:
            raise InvalidConfig(
                "limits of the pretraining's age", expected="0 <= warning <= refusal, in days",
                got=f"{self.warn_days} and {self.refuse_days}",
                remedy="Set --pretraining-warn-days and --pretraining-refuse-days, or their environment variables.",
            )

    def check(self, windows: Windows, what: str) -> None:
        """Warn past the first limit; past the second refuse, or warn when forced.

        Args:
            what: what has these windows, such as `version 7`.

        Raises:
            StalePretraining: the age is past the second limit, and not forced.
        """
        age = pretraining_age_days(windows)
        if age > self.refuse_days and not self.forced:
            raise StalePretraining(
                f"pretraining of {what} ends {windows.pretrain.end}, {age} days before fine-tuning starts",
                expected=f"at most {self.refuse_days} days", got=f"{age}",
                remedy=f"{FINDINGS}. Pretrain on newer data, raise --pretraining-refuse-days, or give --force-stale.",
            )
        if age > self.warn_days:
            logger.warning(
                "pretraining of %s ends %s, %d days before fine-tuning starts (warned of past %d, %s past %d). %s.",
                what, windows.pretrain.end, age, self.warn_days,
                "refused without --force-stale" if age > self.refuse_days else "refused", self.refuse_days, FINDINGS,
            )


DEFAULT_LIMITS = FreshnessLimits()
