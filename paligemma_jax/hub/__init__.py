"""The published models, where they are, and their download into the cache of each hub."""
