"""What the library has to say to its user, besides errors."""

import functools
import logging

SINGLE_RANK = "there is one rank: nothing to exchange, so nothing is compressed"

log = logging.getLogger("hvd_compress")


@functools.cache
def warn_once(message: str) -> None:
    """Log `message` the first time it is given."""
    log.warning(message)
