"""The trainers' matrix: tiny models made on the spot, one cell a trainer or setup, one table."""
