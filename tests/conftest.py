"""Settings that every test shares."""

import hypothesis

# Examples are the same in every run and are not timed; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile(
    "default-run",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
)
hypothesis.settings.register_profile(
    "explore", parent=hypothesis.settings.get_profile("default-run"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile("default-run")
