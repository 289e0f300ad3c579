"""Kernels around attention, each with a plain torch twin; imports no optional package."""
