"""From "connection closed by peer" to the name of the rank that is gone."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spectral_scale.errors import LostRankError
from spectral_scale.supervision.watchdog import Watchdog

if TYPE_CHECKING:
    from spectral_scale.engine.saver import Saver

logger = logging.getLogger(__name__)

_COMMUNICATION = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out", re.IGNORECASE)


@contextlib.contextmanager
def naming_lost_ranks(watchdog: Watchdog, saver: "Saver") -> Iterator[None]:
    """Around the loop: turn a failed collective into LostRankError if a rank is found dead.

    The original error goes to this rank's log first, since it may say more.
    """
    try:
        yield
    except BaseException as error:
        saver.abandon()
        if not isinstance(error, RuntimeError) or not _COMMUNICATION.search(str(error)):
            raise
        logger.error("a collective failed", exc_info=error)
        culprit = watchdog.blame()
        if culprit is None:
            raise
        raise LostRankError(
            f"{culprit}; this rank cannot go on alone. Start again to resume from the last "
            "checkpoint"
        ) from error
