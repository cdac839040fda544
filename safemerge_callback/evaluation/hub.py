"""One file of a repository of the Hub: out of its cache, or asked for once and briefly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What an answer may take; the client itself would ask a Hub that is out of reach for half a minute.
SECONDS = 5.0


def hub_file(
    repo: str, name: str, *, repo_type: str | None = None, revision: str | None = None, online: bool = True
) -> Path:
    """Return a file of a repository, downloaded where the cache lacks it; `online` False looks into the cache alone.

    ConnectionError (LocalEntryNotFoundError without `online`) at once where the Hub is out of reach, else what the
    client raises.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
    if online and not isinstance(try_to_load_from_cache(repo, name, **where), str):
        try:
            get_hf_file_metadata(hf_hub_url(repo, name, **where), timeout=SECONDS)
        except (OSError, ValueError, EntryNotFoundError):
            raise
        except Exception as error:
            # The HTTP library's own errors, whose module differs between the client's releases.
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
    return Path(hf_hub_download(repo, name, **where, etag_timeout=SECONDS, local_files_only=not online))
