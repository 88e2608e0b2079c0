# SPDX-License-Identifier: Apache-2.0
"""What the tests of the models share."""

import pytest

from diffusers_dyna.models.transformer_dyna_dit import _PackedWeights


@pytest.fixture(scope="package", autouse=True)
def pack_everything():
    """The trajectories of the tests are too short for any cut to be worth keeping."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_PackedWeights, "MIN_USES", (1, 1))
        yield
