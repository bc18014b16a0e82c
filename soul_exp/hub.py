"""The hub of models and datasets: where it does not answer, the libraries use their local cache, and try only once."""

import functools
import logging
import os
import ssl
import urllib.error
import urllib.request

import huggingface_hub.constants

from soul_exp import compat

log = logging.getLogger(__name__)

OFFLINE = "HF_HUB_OFFLINE"  # the libraries' own variable: only the local cache is used


def connect() -> None:
    """Ask the hub once per command; if there is no answer, this process and its workers are offline from now on.

    By themselves the libraries repeat each request for half a minute.
    """
    if not is_offline() and not _answers(huggingface_hub.constants.ENDPOINT):
        log.info("%s cannot be reached: only its local cache is used", huggingface_hub.constants.ENDPOINT)
        os.environ[OFFLINE] = "1"
        compat.go_offline()


def is_offline() -> bool:
    """Whether the libraries use their local cache only."""
    return huggingface_hub.constants.is_offline_mode()


@functools.cache
def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=10).close()
    except OSError as error:  # certificates that Python does not know may be known to the libraries
        return isinstance(error, urllib.error.HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
