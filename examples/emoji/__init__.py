"""The embedded default model: how its data is made, and how it is trained and judged."""
