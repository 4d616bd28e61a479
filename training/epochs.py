"""The loop both facets train in: steps, a learning curve, a checkpoint after every epoch, and a stop at bad numbers."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.contracts.errors import InvalidTable
from training.facet_io import load_partial, save_partial
from training.tables import ShardedModel

__all__ = ["Fitting", "fingerprint_of"]

log = logging.getLogger(__name__)


def fingerprint_of(settings: Any, *arrays: np.ndarray) -> str:
    """Digest of a configuration and the data: a checkpoint is continued only where both are the same."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@dataclass
class Fitting:
    """A training under way.

    Attributes:
        model: its rows are updated by `backward()`.
        learning_rate: of the dense parameters (Adam).
        partial: the checkpoint's file, removed when the result is written.
        curve: one entry per epoch: step, epoch, loss (mean over the epoch) and what was measured.
    """

    model: ShardedModel
    learning_rate: float
    partial: Path
    fingerprint: str
    curve: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        dense = self.model.dense_parameters()
        self._optimizer = torch.optim.Adam(dense, lr=self.learning_rate) if dense else None
        self._resume()

    def run(
        self, epochs: int, *, batches: Callable[[int], Iterable[Any]], steps: int,
        measure: Callable[[], dict[str, Any]], title: str,
    ) -> None:
        """Train until `epochs` epochs are done, counting those of an earlier, interrupted call.

        Args:
            batches: epoch -> the arguments of the model, step by step.
            steps: per epoch, for the progress bar.
            measure: called on every process after every epoch; its numbers join the curve.

        Raises:
            InvalidTable: the loss is not finite; nothing more is updated.
        """
        first = self.model.processes.is_first
        done = len(self.curve)
        with tqdm(
            total=epochs * steps, initial=done * steps, desc=title, unit="step", disable=None if first else True
        ) as bar:
            for epoch in range(done, epochs):
                losses = []
                for step, batch in enumerate(batches(epoch)):
                    losses.append(self._step(batch, where=f"epoch {epoch + 1}, step {step + 1} of {title}"))
                    bar.update()
                entry = {"epoch": epoch + 1, "step": (epoch + 1) * steps, "loss": math.fsum(losses) / len(losses)}
                self.curve.append(entry | measure())
                self._checkpoint()
                if first:
                    log.info("%s: %s", title, _line(self.curve[-1]))

    def _step(self, batch: Any, *, where: str) -> float:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.model(*batch)
        value = loss.item()
        if not math.isfinite(value):
            raise InvalidTable(
                f"the loss at {where}", expected="a finite number", got=str(value),
                remedy="Nothing was written. Lower table_learning_rate and dense_learning_rate, or raise temperature.",
            )
        loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
        return value

    def _checkpoint(self) -> None:
        state = self.model.gather_state()
        if state is None:
            return
        for number, values in (self._optimizer.state_dict()["state"] if self._optimizer else {}).items():
            state |= {f"adam/{number}/{name}": torch.as_tensor(value).clone() for name, value in values.items()}
        save_partial(self.partial, state, {"fingerprint": self.fingerprint, "curve": self.curve})

    def _resume(self) -> None:
        found = load_partial(self.partial, fingerprint=self.fingerprint)
        # Nobody may go on to write the next checkpoint while another process still reads this one.
        self.model.processes.wait()
        if found is None:
            return
        state, progress = found
        self.model.load_state(state)
        self.curve = progress["curve"]
        if self._optimizer is not None:
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in state.items():
                kind, _, rest = name.partition("/")
                if kind == "adam":
                    number, _, moment = rest.partition("/")
                    moments.setdefault(int(number), {})[moment] = value
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
        if self.model.processes.is_first:
            log.info("continuing after epoch %d from %s", len(self.curve), self.partial)


def _line(entry: dict[str, Any]) -> str:
    flat = ((key, value) for key, value in entry.items() if not isinstance(value, dict))
    return ", ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in flat)
