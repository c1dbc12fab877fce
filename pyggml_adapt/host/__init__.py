"""The foundation, its tasks and their text, over one engine."""
