"""A method on an unmodified model: planning, hooks, the state of a call, what the cache still holds."""
