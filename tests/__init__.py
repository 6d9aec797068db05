"""`unit`: no ranks or few; `parallel`, `parity`: ranks by `tests.harness`; `journeys`: whole commands."""
