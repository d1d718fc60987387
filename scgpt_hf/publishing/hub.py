"""Talk to the Hub: check repository ids, and turn the client's errors into messages that say what to do.

`publish_run.py` publishes models, `publish_cache.py` data sets.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

# HTTPError of httpx or of httpx2, depending on the version of huggingface_hub.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]


class HubError(OSError):
    """The Hub cannot be reached or did not accept an upload; the message says why and what to do."""


def require_repo_id(repo_id: str) -> None:
    """Check that an id has the form OWNER/NAME.

    Raises:
        ValueError: it does not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"expected a repository id like 'my-lab/blood-300k', found {repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"expected a repository id with its owner, like 'my-lab/{repo_id}', found {repo_id!r}")


@contextmanager
def translate_hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Raise errors of the Hub's client as `HubError`, with a message that says what to do.

    Args:
        repo_id: repository that is read or written.
        endpoint: address of the Hub.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub cannot be reached because HF_HUB_OFFLINE is set; unset it") from error
    except json.JSONDecodeError as error:
        raise HubError(
            f"the answer of {endpoint} is not JSON, so it is not the Hub or is failing; check HF_ENDPOINT, or try "
            "again later"
        ) from error
    except (_HttpError, OSError, RuntimeError) as error:
        # The client wraps the error of a failed upload in a RuntimeError.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (_HttpError, ConnectionError, TimeoutError)):
            cause = cause.__cause__
        if cause is None or isinstance(error, HubError):
            raise
        if not isinstance(cause, HfHubHTTPError):
            raise HubError(
                f"the connection to {endpoint} failed ({type(cause).__name__}); check the network and run the same "
                "command again: files that were uploaded are not sent again"
            ) from error
        raise HubError(_format_http_error(cause, repo_id)) from error


def _format_http_error(error: HfHubHTTPError, repo_id: str) -> str:
    status, owner = error.response.status_code, repo_id.split("/")[0]
    if status >= 500:
        return (
            f"the Hub failed with status {status}; run the same command again later: files that were uploaded are not "
            "sent again"
        )
    messages = {
        401: "you are not logged in to the Hub, or it rejects your token (401); run `hf auth login`, or set HF_TOKEN",
        403: f"no write access to {repo_id} (403); use a token with write access to {owner}, or another repository id",
        404: f"the Hub has no {repo_id} that you can read, or no such revision (404); check both, and your token",
        409: f"{repo_id} exists, or is being changed by someone else (409); run the same command again, or choose "
        "another repository id",
        412: f"{repo_id} was changed by someone else in the meantime (412); run the same command again",
        429: "too many requests to the Hub (429); run the same command again in a few minutes",
    }
    reason = error.server_message or str(error).splitlines()[0]
    return messages.get(status, f"the Hub rejected the request for {repo_id} (status {status}): {reason}")
