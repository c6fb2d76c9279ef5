"""A discrete-event network for the sans-I/O core: seeded, repeatable, as fast as the core itself."""
