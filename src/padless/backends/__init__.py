"""One adapter a file, each with `NAME`, `reject(request)` and `varlen(...)` of one signature."""
