"""A Hub of one's own, and the client set to speak to it and to no other."""

import pytest
from huggingface_hub import close_session, constants

from tests.hub.local_hub import LocalHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh Hub on loopback and an empty cache; ``me`` is logged in.  The test itself wants ``allow_hosts``."""
    with LocalHub() as served:
        for name, value in {
            "ENDPOINT": served.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("tl_crosscoder.hub.faults.WAITS", (0.0, 0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", served.user("me"))
        close_session()
        yield served
        close_session()
