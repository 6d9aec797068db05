"""A run's own record, drawn and told: one page, pictures, a glance in a terminal. No torch."""
