"""One adapter a file, each with `NAME`, `version()`, `reject(request)` and `varlen(...)`."""
