"""One merge at many strengths: what each would do, without writing it."""
