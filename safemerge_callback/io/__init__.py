"""The ground floor: what comes from outside is read in one place each, and what leaves is written whole.

Paths, addresses, documents, names, numbers, patterns and callables are read; files, folders and words are written.
"""
