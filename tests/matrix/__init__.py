"""The version matrix: the golden tests on one transformers per era, over one torch."""
