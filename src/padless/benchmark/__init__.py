"""`padless.bench(model)`: a step unpatched, patched and by what else there is, timed by turns."""
