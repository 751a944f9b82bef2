"""Seeded generators with a known true reward: corpus, demonstrator, golden reward; one file a world."""
