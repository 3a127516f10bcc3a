"""How well optimizers converge: tasks, methods, a protocol that tunes all alike, and reports."""
