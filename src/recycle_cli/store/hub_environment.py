"""What the environment says of the Hub, checked before the Hub's client reads it.

The client parses it when it is imported, and neither an address nor a token that cannot be one ends
in words there.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from recycle_cli.errors import InputError


def check_hub_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Checks `HF_ENDPOINT` and `HF_TOKEN`, where they are set.

    Raises:
        InputError: the one is no address, or the other cannot be a token.
    """
    endpoint = environ.get("HF_ENDPOINT")
    if endpoint is not None and not _is_address(endpoint):
        raise InputError(
            f"HF_ENDPOINT is {endpoint[:100]!r}, which is no address",
            "write it as https://HOST, or unset it for the Hub itself",
        )
    token = environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise InputError(
            "HF_TOKEN holds characters that no token has", "copy it again, or unset it"
        )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
