"""Protections of the product, each taken away by a name, so that the simulation can be seen to notice: `--without NAME`."""

from collections.abc import Callable
from typing import Any

import gateway.attempt
import kvtransfer.intake
import prefill_svc.engine
from decode_svc.batcher import DecodeBatcher, Stage
from tests.simulation.seams import Seams


def blocks_kept_under_a_step(seams: Seams) -> None:
    """A sequence that is closed in the middle of a step gives its blocks back at once."""

    def close(self: DecodeBatcher, sequence: Any) -> None:
        if sequence in self._sequences:
            del self._sequences[sequence]
            sequence.stage = Stage.CLOSED
            self._release(sequence)

    seams.set(DecodeBatcher, "close", close)


def resume_after_the_last_token(seams: Seams) -> None:
    """A later attempt begins one token too early, and delivers it again."""
    before = gateway.attempt.Attempt.__init__

    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        if self._num_before:
            self._token_ids = self._token_ids[:-1]

    seams.set(gateway.attempt.Attempt, "__init__", begin)


def blocks_freed_after_a_cancel(seams: Seams) -> None:
    """A prompt that is closed before it is complete keeps its blocks."""
    before = prefill_svc.engine.PrefillEngine.close

    def close(self: Any, job: Any) -> None:
        if job.prompt.complete:
            before(self, job)

    seams.set(prefill_svc.engine.PrefillEngine, "close", close)


def checksums(seams: Seams) -> None:
    """Whatever arrives counts as verified."""

    def verify(self: Any, indexes: Any) -> None:
        self.state.verified(indexes)

    seams.set(kvtransfer.intake.Destination, "_verify", verify)


MUTATIONS: dict[str, Callable[[Seams], None]] = {
    each.__name__: each for each in (blocks_kept_under_a_step, resume_after_the_last_token, blocks_freed_after_a_cancel, checksums)
}
