"""How many inputs the property tests try: few and always the same in ``make test``, many in ``make fuzz``."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
_PHASES = (
    Phase.explicit,
    Phase.generate,
)  # the first failure is shown as it is: making it small takes minutes
settings.register_profile(
    "ci",
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=_SLOW,
)
settings.register_profile(
    "fuzz",
    settings.get_profile("ci"),
    derandomize=False,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20")),
)
settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "ci")
