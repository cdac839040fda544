"""The trainers' own tests, run with the callback watching: none may end otherwise than without it."""
