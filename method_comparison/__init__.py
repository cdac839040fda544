"""The comparison grid: arms × tasks × poisoned shares × seeds, cell by cell, and what their results say."""
