"""A discrete-event network for the sans-I/O core: seeded, repeatable, fast."""
