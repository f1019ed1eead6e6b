"""What is generated: one file per task, each ending in ``TASK = Task(...)``."""
