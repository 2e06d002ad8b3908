"""How hard the property tests look: with HYPOTHESIS_PROFILE=thorough ten times as hard."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Kernels as plain Python, so that their coverage can be seen (`make test` measures it so).
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT") == "1"

# No deadlines: the first example of a kernel test waits for its compilation.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("usual", max_examples=150, **_COMMON)
settings.register_profile("interpreted", max_examples=40, **_COMMON)
settings.register_profile("thorough", max_examples=1500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpreted" if INTERPRETED else "usual"))


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # a hash that wraps around is silent only when it is compiled
        config.addinivalue_line("filterwarnings", "ignore:overflow encountered:RuntimeWarning")
