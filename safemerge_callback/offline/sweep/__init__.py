"""Merges over gates, weights and methods: what each would do, without writing one."""
