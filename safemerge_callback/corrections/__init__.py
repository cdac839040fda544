"""Floor 6: what is done to a run, and when: changes of its factors, terms of its gradient, and the state they keep."""
