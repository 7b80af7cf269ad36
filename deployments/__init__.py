"""Ray Serve shells around omnilmm: thin, and the only place that knows both."""
