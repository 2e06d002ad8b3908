"""How hard the property tests look: with HYPOTHESIS_PROFILE=thorough ten times as hard."""

import os

from hypothesis import HealthCheck, settings

# No deadlines: the first example of a kernel test waits for its compilation.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("usual", max_examples=150, **_COMMON)
settings.register_profile("interpreted", max_examples=40, **_COMMON)  # kernels as plain Python: coverage
settings.register_profile("thorough", max_examples=1500, **_COMMON)
_DEFAULT = "interpreted" if os.environ.get("NUMBA_DISABLE_JIT") == "1" else "usual"
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", _DEFAULT))
