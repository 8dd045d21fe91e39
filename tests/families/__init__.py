"""One table of tiny random models of many families, and the tests that hold headwise to their own eager attention."""
